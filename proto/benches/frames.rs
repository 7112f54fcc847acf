//! What client frames cost: sends one by one against a run of them, both ways. Must never assert a time.

#![allow(clippy::unwrap_used, missing_docs)]

use std::hint::black_box;

use bytes::{Bytes, BytesMut};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use stentor_proto::{
    frame::{self, ClientFrame},
    v1,
};

/// As many as a device often has ready.
const SENDS: u64 = 64;
const BODY: &[u8] = &[b'x'; 256];

fn alone() -> Vec<ClientFrame> {
    let send = |send_no| v1::Send {
        conversation: "general".into(),
        send_no,
        body: Bytes::from_static(BODY),
        ..Default::default()
    };
    (1..=SENDS).map(|send_no| send(send_no).into()).collect()
}

fn together() -> Vec<ClientFrame> {
    let item = v1::SendItem { body: Bytes::from_static(BODY), ..Default::default() };
    let items = vec![item; SENDS as usize];
    vec![v1::SendRun { conversation: "general".into(), send_no: 1, done_no: 0, items }.into()]
}

fn encoded(frames: &[ClientFrame]) -> BytesMut {
    let mut out = BytesMut::new();
    frames.iter().for_each(|frame| frame.encode(&mut out));
    out
}

fn frames(c: &mut Criterion) {
    let mut group = c.benchmark_group("frames");
    group.throughput(Throughput::Elements(SENDS));
    for (name, frames) in [("64 sends", alone()), ("a run of 64", together())] {
        group.bench_function(format!("encode {name}"), |b| b.iter(|| encoded(black_box(&frames))));
        let wire = encoded(&frames);
        group.bench_function(format!("decode {name}"), |b| {
            let decode = |mut buffer: BytesMut| {
                while let Some((kind, message)) = frame::split(&mut buffer, frame::DEFAULT_MAX_BYTES).unwrap() {
                    black_box(ClientFrame::decode(kind, message).unwrap());
                }
            };
            b.iter_batched(|| wire.clone(), decode, BatchSize::SmallInput);
        });
    }
    group.finish();
}

criterion_group!(benches, frames);
criterion_main!(benches);
