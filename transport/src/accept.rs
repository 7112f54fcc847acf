//! The accept loop that every TCP server here shares: bounded connections, an orderly end, then a firm one. Must never
//! end because one connection failed.

use std::{
    future::Future,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::Semaphore,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{Listener, host::Inner, memory};

/// How long connections may take to end their calls after a shutdown began; then they are cut.
pub(crate) const GRACE: Duration = Duration::from_secs(2);

/// Out of file descriptors or the like: others must end first, and a tight loop would not help them.
const AFTER_A_FAILURE: Duration = Duration::from_millis(50);

/// A byte stream, of whichever network.
#[derive(Debug)]
pub(crate) enum ByteStream {
    Tcp(TcpStream),
    Memory(memory::Stream),
}

impl AsyncRead for ByteStream {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(context, out),
            Self::Memory(stream) => Pin::new(stream).poll_read(context, out),
        }
    }
}

impl AsyncWrite for ByteStream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(context, bytes),
            Self::Memory(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_flush(context),
            Self::Memory(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Memory(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write_vectored(context, bytes),
            Self::Memory(stream) => Pin::new(stream).poll_write_vectored(context, bytes),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Tcp(stream) => stream.is_write_vectored(),
            Self::Memory(stream) => stream.is_write_vectored(),
        }
    }
}

enum Accepting {
    Tcp(tokio::net::TcpListener),
    Memory(memory::StreamListener),
}

impl Accepting {
    fn of(listener: Listener) -> io::Result<Self> {
        Ok(match listener.0 {
            Inner::Real(listener) => {
                listener.set_nonblocking(true)?;
                Self::Tcp(tokio::net::TcpListener::from_std(listener)?)
            }
            Inner::Memory(listener) => Self::Memory(listener),
        })
    }

    async fn accept(&self) -> io::Result<ByteStream> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                // Every write here is a whole answer; waiting for more would only delay it.
                let _ = stream.set_nodelay(true);
                Ok(ByteStream::Tcp(stream))
            }
            Self::Memory(listener) => listener.accept().await.map(ByteStream::Memory),
        }
    }
}

/// Accepts until `shutdown`, at most `max_connections` at a time (further ones wait in the kernel). `serve` runs once
/// for each; it should end soon after its token is cancelled and is dropped [`GRACE`] later. Dropping the returned
/// future cuts everything at once.
pub(crate) async fn run<S, F>(
    listener: Listener,
    max_connections: usize,
    shutdown: impl Future<Output = ()>,
    serve: S,
) -> io::Result<()>
where
    S: Fn(ByteStream, CancellationToken) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    let listener = Accepting::of(listener)?;
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
            Ok(stream) => {
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
