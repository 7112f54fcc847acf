//! One event to 10,000 sessions of a gateway: encoded once, put into each inbox, taken out again. Must never assert a
//! time.

#![allow(clippy::unwrap_used, missing_docs)]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use stentor_gateway::figures::FanoutFigure;
use stentor_proto::{
    record,
    v1::{EventHeader, EventKind},
};

const SESSIONS: usize = 10_000;

fn fanout(c: &mut Criterion) {
    let mut figure = FanoutFigure::new(SESSIONS).unwrap();
    let mut seq = 0;
    let mut group = c.benchmark_group("fan-out");
    group.throughput(Throughput::Elements(SESSIONS as u64));
    group.bench_function("one event to 10,000 sessions", |b| {
        b.iter(|| {
            seq += 1;
            let header = EventHeader { seq, kind: EventKind::Message.into(), ..Default::default() };
            let mut event = Vec::new();
            record::encode(&header, &[b'x'; 256], 0, 0, &mut event);
            assert!(figure.live(vec![event.into()]));
            assert_eq!(figure.take(), SESSIONS);
        });
    });
    group.finish();
}

criterion_group!(benches, fanout);
criterion_main!(benches);
