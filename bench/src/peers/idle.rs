//! What connections cost a server that say nothing: its memory before and after so many. Must never count memory that
//! has not settled.

use std::time::{Duration, Instant};

use futures_util::{StreamExt, TryStreamExt, stream};
use tokio::time::sleep;

use super::{PeerError, server::Server};
use crate::{BenchError, Histogram, Outcome, Timing, Usage};

/// Connections that are made at the same time.
const CONNECTING: usize = 16;
/// Memory that has not changed for so long has settled.
const STILL_FOR: Duration = Duration::from_millis(500);
/// It is not waited for longer.
const SETTLED_WITHIN: Duration = Duration::from_secs(10);

/// Bytes of a server's own memory for each connection: the name of the figure.
pub(crate) const BYTES: &str = "bytes_per_connection";

/// Makes connections, waits for memory to settle, and gives them up.
pub(crate) async fn hold<C, F>(
    servers: &[Server],
    connections: usize,
    timing: Timing,
    connect: impl Fn(usize) -> F,
) -> Result<Outcome, PeerError>
where
    F: Future<Output = Result<C, PeerError>>,
{
    // The first ones make a server allocate what all share.
    let first: Vec<C> = stream::iter(0..CONNECTING).map(&connect).buffer_unordered(CONNECTING).try_collect().await?;
    sleep(Duration::from_secs_f64(timing.warm_up_s)).await;
    let before = settled(servers).await?;
    let (began, mut took) = (Instant::now(), Histogram::new());
    let timed = |n| {
        let connecting = connect(n);
        async move {
            let began = Instant::now();
            connecting.await.map(|connection| (connection, began.elapsed()))
        }
    };
    let numbers = stream::iter(CONNECTING..CONNECTING + connections);
    let held: Vec<(C, Duration)> = numbers.map(timed).buffer_unordered(CONNECTING).try_collect().await?;
    let seconds = began.elapsed().as_secs_f64();
    held.iter().for_each(|(_, time)| took.record(*time));
    let after = settled(servers).await?;
    let mut outcome = Outcome::counted(seconds, held.len() as u64, 0, &took);
    let bytes = (after as f64 - before as f64) * 1024.0 / held.len().max(1) as f64;
    outcome.figures.insert(BYTES.into(), bytes);
    drop((first, held));
    Ok(outcome)
}

async fn settled(servers: &[Server]) -> Result<u64, PeerError> {
    let deadline = Instant::now() + SETTLED_WITHIN;
    let mut memory = anonymous_kib(servers)?;
    loop {
        sleep(STILL_FOR).await;
        let now = anonymous_kib(servers)?;
        if now == memory || Instant::now() > deadline {
            return Ok(now);
        }
        memory = now;
    }
}

fn anonymous_kib(servers: &[Server]) -> Result<u64, PeerError> {
    let of = |server: &Server| {
        let usage = Usage::of(server.pid()).map_err(BenchError::io("read a server's memory"))?;
        Ok(usage.anonymous_kib)
    };
    servers.iter().map(of).sum()
}
