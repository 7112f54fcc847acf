//! What the engine costs per send: applied one by one and as a run, and put into bundles. Must never assert a time.

#![allow(clippy::unwrap_used, missing_docs)]

use std::{hint::black_box, time::Duration};

use bytes::{Bytes, BytesMut};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use stentor_engine::{
    apply::{self, Context},
    batch::{Admit, Batch, BatchRules, Close},
    command,
    effect::Applied,
    rows::MemoryRows,
};
use stentor_proto::{
    bundle::Builder,
    ids::{AppId, ConversationId, DeviceId, StampMs, UserId},
    internal::{Actor, Create, Send, SendRun},
    v1::{ConversationKind, SendItem},
};

/// As many as a device often has ready.
const SENDS: u64 = 64;
const BODY: &[u8] = &[b'x'; 256];

fn app() -> AppId {
    AppId::new("app").unwrap()
}

fn id() -> ConversationId {
    ConversationId::new("general").unwrap()
}

fn actor() -> Actor {
    command::actor(&UserId::new("ann").unwrap(), Some(&DeviceId::new("phone").unwrap()), false)
}

fn apply_all(rows: &mut MemoryRows, commands: &[Bytes]) -> Applied {
    let (mut out, mut records) = (Applied::default(), BytesMut::new());
    let ctx = Context { stamp: StampMs(1_000), level: apply::LEVEL };
    for command in commands {
        apply::apply_command(rows, &ctx, command, &mut records, &mut out).unwrap();
    }
    out
}

fn shard() -> MemoryRows {
    let mut rows = MemoryRows::default();
    let create = Create { actor: Some(actor()), kind: ConversationKind::Group as i32, ..Create::default() };
    apply_all(&mut rows, &[command::encode(&command::create(&app(), &id(), create))]);
    rows
}

fn alone() -> Vec<Bytes> {
    let send = |send_no| Send { actor: Some(actor()), send_no, body: Bytes::from_static(BODY), ..Send::default() };
    (1..=SENDS).map(|send_no| command::encode(&command::send(&app(), &id(), send(send_no)))).collect()
}

fn together() -> Vec<Bytes> {
    let item = || command::run_item(SendItem { body: Bytes::from_static(BODY), ..SendItem::default() }, 1 << 20);
    let items = (0..SENDS).map(|_| item()).collect();
    let run = SendRun { actor: Some(actor()), send_no: 1, done_no: 0, session_no: 0, items };
    vec![command::encode(&command::send_run(&app(), &id(), run))]
}

fn applying(c: &mut Criterion) {
    let mut group = c.benchmark_group("apply");
    group.throughput(Throughput::Elements(SENDS));
    let rows = shard();
    for (name, commands) in [("64 sends", alone()), ("a run of 64", together())] {
        group.bench_function(name, |b| {
            let apply = |mut rows: MemoryRows| (apply_all(&mut rows, &commands), rows);
            b.iter_batched(|| rows.clone(), apply, BatchSize::SmallInput);
        });
    }
    group.finish();
}

/// What the batcher decides and copies for each command.
fn bundling(c: &mut Criterion) {
    let mut group = c.benchmark_group("batcher");
    group.throughput(Throughput::Elements(SENDS));
    let (commands, rules) = (alone(), BatchRules::default());
    group.bench_function("64 commands", |b| {
        b.iter(|| {
            let (mut batch, mut builder, mut bundles) = (Batch::default(), Builder::new(), Vec::new());
            for command in &commands {
                if batch.admit(&rules, command.len()) == Admit::CloseFirst {
                    bundles.push(std::mem::take(&mut builder).finish(apply::LEVEL, StampMs(1)));
                    batch.closed();
                }
                builder.push(command);
                batch.joined(Duration::ZERO, command.len());
                black_box(batch.close(&rules, Duration::ZERO, false, None) == Close::Now);
            }
            bundles.push(builder.finish(apply::LEVEL, StampMs(1)));
            bundles
        });
    });
    group.finish();
}

criterion_group!(benches, applying, bundling);
criterion_main!(benches);
