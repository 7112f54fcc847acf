//! The accept loop that every TCP server here shares: bounded connections, an orderly end, then a firm one. Must never
//! end because one connection failed.

use std::{future::Future, io, net::TcpListener, sync::Arc, time::Duration};

use tokio::{
    net::TcpStream,
    sync::Semaphore,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

/// How long connections may take to end their calls after a shutdown began; then they are cut.
pub(crate) const GRACE: Duration = Duration::from_secs(2);

/// Out of file descriptors or the like: others must end first, and a tight loop would not help them.
const AFTER_A_FAILURE: Duration = Duration::from_millis(50);

/// Accepts until `shutdown`, at most `max_connections` at a time (further ones wait in the kernel). `serve` runs once
/// for each; it should end soon after its token is cancelled and is dropped [`GRACE`] later. Dropping the returned
/// future cuts everything at once.
pub(crate) async fn run<S, F>(
    listener: TcpListener,
    max_connections: usize,
    shutdown: impl Future<Output = ()>,
    serve: S,
) -> io::Result<()>
where
    S: Fn(TcpStream, CancellationToken) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let permits = Arc::new(Semaphore::new(max_connections));
    let stop = CancellationToken::new();
    let mut connections = JoinSet::new();
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        let accepted = async {
            let permit = permits.clone().acquire_owned().await;
            (listener.accept().await, permit)
        };
        let (accepted, permit) = tokio::select! {
            () = &mut shutdown => break,
            accepted = accepted => accepted,
            Some(_) = connections.join_next() => continue,
        };
        match accepted {
            Ok((stream, _)) => {
                // Every write here is a whole answer; waiting for more would only delay it.
                let _ = stream.set_nodelay(true);
                let connection = serve(stream, stop.clone());
                connections.spawn(async move {
                    connection.await;
                    drop(permit);
                });
            }
            // The caller gave up in the kernel's queue.
            Err(e) if is_callers_fault(&e) => {}
            Err(error) => {
                tracing::warn!(%error, "cannot accept connections");
                sleep(AFTER_A_FAILURE).await;
            }
        }
    }
    drop(listener);
    stop.cancel();
    let ended = timeout(GRACE, async { while connections.join_next().await.is_some() {} }).await;
    if ended.is_err() {
        tracing::debug!(connections = connections.len(), "cutting connections that did not end in time");
    }
    connections.shutdown().await;
    Ok(())
}

fn is_callers_fault(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted)
}
