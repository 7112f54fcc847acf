//! gRPC over our own TCP and TLS: the server's side for given routes, and channels that dial again by themselves. Must
//! never retry a call: only callers know whether a second try is harmless.

use std::{future::Future, io, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use hyper::{Request, body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls_pki_types::ServerName;
use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, TlsConnector, client};
use tokio_util::sync::CancellationToken;
use tonic::transport::{
    Endpoint, Uri,
    server::{Connected, TcpConnectInfo, TlsConnectInfo},
};
pub use tonic::{service::Routes, transport::Channel};
use tower::Service;

use crate::{
    Listener,
    accept::{self, ByteStream},
    memory,
    tls::{ClientTls, SERVER_NAME, ServerTls, TlsError},
};

/// Per connection; the default of 64 KiB costs a round trip per 64 KiB.
const CONNECTION_WINDOW_BYTES: u32 = 4 * 1024 * 1024;
/// Per stream. A stream between nodes carries everything of a pair.
const STREAM_WINDOW_BYTES: u32 = 1024 * 1024;
/// A bundle of 32 KiB and its neighbours fit in one frame.
const MAX_FRAME_BYTES: u32 = 128 * 1024;
/// What a server holds for one stream whose reader is slow, before writing waits.
const MAX_SEND_BYTES: usize = 512 * 1024;
/// Calls at a time on one connection; the next waits at the caller.
const MAX_STREAMS: u32 = 1_024;
/// File descriptors are the bound of a process (20,000); this leaves room for files.
const MAX_CONNECTIONS: usize = 8_192;

/// From the first byte to the end of TLS, on the server.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// From dialling to the end of TLS, on the client: a call to a dead node must fail soon, so that the caller can ask
/// another one.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// A client asks its server for a sign of life this often…
const CLIENT_PING_EVERY: Duration = Duration::from_secs(2);
/// …and gives the connection up after this long without one. Longer than a bad fsync, shorter than a patience.
const CLIENT_PING_TIMEOUT: Duration = Duration::from_secs(3);
/// A server looks after clients that vanished without a word.
const SERVER_PING_EVERY: Duration = Duration::from_secs(20);
const SERVER_PING_TIMEOUT: Duration = Duration::from_secs(10);

/// A server could not run. Single connections that fail are no reason.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The listener cannot be used.
    #[error("cannot serve: {0}")]
    Listener(#[from] io::Error),
}

/// Serves `routes` until `shutdown` is ready: then no new calls are taken, and calls that run have two seconds to end
/// before their connections are cut. Handlers find the caller by `Request::remote_addr` and `Request::peer_certs`.
/// Dropping the future cuts everything at once.
pub fn serve<L, F>(
    listener: L,
    tls: &ServerTls,
    routes: Routes,
    shutdown: F,
) -> impl Future<Output = Result<(), ServeError>> + Send + use<L, F>
where
    L: Into<Listener>,
    F: Future<Output = ()> + Send + 'static,
{
    let acceptor = TlsAcceptor::from(tls.config.clone());
    let (routes, listener) = (routes.prepare(), listener.into());
    async move {
        let serve = |stream, stop| serve_connection(stream, acceptor.clone(), routes.clone(), stop);
        Ok(accept::run(listener, MAX_CONNECTIONS, shutdown, serve).await?)
    }
}

async fn serve_connection(stream: ByteStream, acceptor: TlsAcceptor, routes: Routes, stop: CancellationToken) {
    let stream = match stream {
        ByteStream::Tcp(stream) => stream,
        ByteStream::Memory(stream) => {
            let (local, remote) = (stream.local_addr(), stream.remote_addr());
            let caller = TcpConnectInfo { local_addr: Some(local), remote_addr: Some(remote) };
            return serve_http2(stream, (caller, None), routes, stop).await;
        }
    };
    let handshake = timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream));
    let stream = tokio::select! {
        () = stop.cancelled() => return,
        stream = handshake => stream,
    };
    match stream {
        Ok(Ok(stream)) => {
            let caller = stream.connect_info();
            serve_http2(stream, (caller.get_ref().clone(), Some(caller)), routes, stop).await
        }
        Ok(Err(error)) => tracing::debug!(%error, "TLS handshake failed"),
        Err(_) => tracing::debug!("TLS handshake took too long"),
    }
}

/// Who calls: his address, and his certificates where there is TLS.
type Caller = (TcpConnectInfo, Option<TlsConnectInfo<TcpConnectInfo>>);

async fn serve_http2<S>(stream: S, (caller, certified): Caller, routes: Routes, stop: CancellationToken)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(caller.clone());
        if let Some(certified) = &certified {
            request.extensions_mut().insert(certified.clone());
        }
        routes.clone().call(request)
    });
    let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .max_frame_size(MAX_FRAME_BYTES)
        .max_send_buf_size(MAX_SEND_BYTES)
        .max_concurrent_streams(MAX_STREAMS)
        .keep_alive_interval(SERVER_PING_EVERY)
        .keep_alive_timeout(SERVER_PING_TIMEOUT)
        // Nobody reads it, and it would bring the real clock into a simulation.
        .auto_date_header(false)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    let result = tokio::select! {
        result = &mut connection => result,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "connection ended");
    }
}

/// A channel to the node at `addr`, without dialling yet. Each call on a broken channel dials anew, waits at most one
/// second for it, and fails with `UNAVAILABLE` if that fails: a restarted node is found by the first call after it
/// listens. A call that is under way when its connection breaks fails with `UNAVAILABLE`, `UNKNOWN` or `CANCELLED`,
/// and may have been carried out. Must be called within a tokio runtime.
pub fn channel(addr: SocketAddr, tls: &ClientTls) -> Result<Channel, TlsError> {
    let connector = TlsConnector::from(tls.grpc.clone());
    let dial = tower::service_fn(move |_: Uri| {
        let connector = connector.clone();
        async move { dial(addr, connector).await.map(TokioIo::new) }
    });
    Ok(endpoint(addr)?.connect_with_connector_lazy(dial))
}

/// The same over a simulated network, which has no TLS.
pub(crate) fn memory_channel(addr: SocketAddr, host: Arc<memory::Host>) -> Result<Channel, TlsError> {
    let dial = tower::service_fn(move |_: Uri| {
        let host = host.clone();
        async move {
            match timeout(CONNECT_TIMEOUT, memory::connect_stream(&host, addr)).await {
                Ok(stream) => stream.map(TokioIo::new),
                Err(_) => Err(silent(addr)),
            }
        }
    });
    Ok(endpoint(addr)?.connect_with_connector_lazy(dial))
}

fn endpoint(addr: SocketAddr) -> Result<Endpoint, TlsError> {
    let uri = |scheme| format!("{scheme}://{SERVER_NAME}:{}", addr.port());
    let origin = Uri::try_from(uri("https")).map_err(|_| TlsError::Address(addr))?;
    // Tonic must not do the TLS that `dial` does already; only the calls shall say that they are safe.
    let endpoint = Endpoint::from_shared(uri("http"))
        .map_err(|_| TlsError::Address(addr))?
        .origin(origin)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .max_frame_size(MAX_FRAME_BYTES)
        .http2_keep_alive_interval(CLIENT_PING_EVERY)
        .keep_alive_timeout(CLIENT_PING_TIMEOUT)
        .keep_alive_while_idle(true);
    Ok(endpoint)
}

fn silent(addr: SocketAddr) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, format!("{addr} does not answer"))
}

async fn dial(addr: SocketAddr, connector: TlsConnector) -> io::Result<client::TlsStream<TcpStream>> {
    let name = ServerName::try_from(SERVER_NAME).map_err(io::Error::other)?;
    let connect = async {
        let stream = TcpStream::connect(addr).await?;
        stream.set_nodelay(true)?;
        connector.connect(name, stream).await
    };
    match timeout(CONNECT_TIMEOUT, connect).await {
        Ok(stream) => stream,
        Err(_) => Err(silent(addr)),
    }
}

#[cfg(test)]
mod tests {
    use std::{net::Ipv4Addr, path::Path};

    use tokio::sync::oneshot;
    use tonic::{Code, Request, Status, service::interceptor::InterceptedService};
    use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

    use super::*;
    use crate::{bind, pki::Pki, tls::TlsFiles};

    const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

    async fn soon<F: Future>(future: F) -> F::Output {
        timeout(Duration::from_secs(20), future).await.expect("in time")
    }

    fn node(dir: &Path) -> TlsFiles {
        Pki::create(dir).unwrap().issue("broker-1", dir).unwrap()
    }

    struct Server {
        addr: SocketAddr,
        stop: oneshot::Sender<()>,
        task: tokio::task::JoinHandle<Result<(), ServeError>>,
    }

    fn start(addr: SocketAddr, tls: &ServerTls, certificates: bool) -> Server {
        let listener = bind::tcp(addr).unwrap();
        let addr = listener.local_addr().unwrap();
        let (_, health) = tonic_health::server::health_reporter();
        let check = move |request: Request<()>| {
            let known = request.remote_addr().is_some() && request.peer_certs().is_some() == certificates;
            if known { Ok(request) } else { Err(Status::internal("the caller is not as expected")) }
        };
        let (stop, stopped) = oneshot::channel::<()>();
        let shutdown = async { drop(stopped.await) };
        let routes = Routes::new(InterceptedService::new(health, check));
        Server { addr, stop, task: tokio::spawn(serve(listener, tls, routes, shutdown)) }
    }

    async fn check(client: &mut HealthClient<Channel>) -> Result<i32, Status> {
        soon(client.check(HealthCheckRequest::default())).await.map(|answer| answer.into_inner().status)
    }

    const SERVING: Result<i32, Code> = Ok(ServingStatus::Serving as i32);

    #[tokio::test]
    async fn nodes_talk_over_mtls_and_others_do_not() {
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let files = node(dir.path());
        let server = start(ANY, &ServerTls::peer(&files).unwrap(), true);
        let call = async |tls: &ClientTls| {
            check(&mut HealthClient::new(channel(server.addr, tls).unwrap())).await.map_err(|status| status.code())
        };
        assert_eq!(call(&ClientTls::peer(&files).unwrap()).await, SERVING);
        // With TLS 1.3 a server's refusal comes after the client's handshake, within the call: its code varies. It is
        // INTERNAL if the handler was reached.
        let refused = async |tls: &ClientTls| matches!(call(tls).await, Err(code) if code != Code::Internal);
        assert!(refused(&ClientTls::public(&files.ca).unwrap()).await, "no certificate");
        let foreign = node(other.path());
        let stranger = TlsFiles { ca: files.ca.clone(), ..foreign.clone() };
        assert!(refused(&ClientTls::peer(&stranger).unwrap()).await, "of another CA");
        assert_eq!(call(&ClientTls::peer(&foreign).unwrap()).await, Err(Code::Unavailable), "trusts another CA");
        assert_eq!(call(&ClientTls::peer(&files).unwrap()).await, SERVING);
    }

    #[tokio::test]
    async fn callers_of_the_api_need_no_certificate() {
        let dir = tempfile::tempdir().unwrap();
        let files = node(dir.path());
        let server = start(ANY, &ServerTls::api(&files).unwrap(), false);
        let channel = channel(server.addr, &ClientTls::public(&files.ca).unwrap()).unwrap();
        assert_eq!(check(&mut HealthClient::new(channel)).await.map_err(|s| s.code()), SERVING);
    }

    #[tokio::test]
    async fn a_restarted_node_is_found_by_the_first_call() {
        let dir = tempfile::tempdir().unwrap();
        let files = node(dir.path());
        let tls = ServerTls::peer(&files).unwrap();
        let server = start(ANY, &tls, true);
        let mut client = HealthClient::new(channel(server.addr, &ClientTls::peer(&files).unwrap()).unwrap());
        for _ in 0..3 {
            let server = start_again(server.addr, &tls, &server.task).await;
            assert!(check(&mut client).await.is_ok());
            server.task.abort();
            let _ = server.task.await;
            assert!(check(&mut client).await.is_err());
        }
    }

    async fn start_again(
        addr: SocketAddr,
        tls: &ServerTls,
        old: &tokio::task::JoinHandle<Result<(), ServeError>>,
    ) -> Server {
        old.abort();
        soon(async {
            while !old.is_finished() {
                tokio::task::yield_now().await;
            }
        })
        .await;
        start(addr, tls, true)
    }

    #[tokio::test]
    async fn shutdown_cuts_calls_that_do_not_end() {
        let dir = tempfile::tempdir().unwrap();
        let files = node(dir.path());
        let server = start(ANY, &ServerTls::peer(&files).unwrap(), true);
        let mut client = HealthClient::new(channel(server.addr, &ClientTls::peer(&files).unwrap()).unwrap());
        let mut watch = soon(client.watch(HealthCheckRequest::default())).await.unwrap().into_inner();
        assert!(soon(watch.message()).await.unwrap().is_some());
        server.stop.send(()).unwrap();
        soon(server.task).await.unwrap().unwrap();
        assert!(soon(watch.message()).await.is_err());
        assert_eq!(check(&mut client).await.unwrap_err().code(), Code::Unavailable);
    }

    #[tokio::test]
    async fn a_node_that_accepts_and_says_nothing_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let silent = bind::tcp(ANY).unwrap();
        let tls = ClientTls::peer(&node(dir.path())).unwrap();
        let mut client = HealthClient::new(channel(silent.local_addr().unwrap(), &tls).unwrap());
        assert_eq!(check(&mut client).await.unwrap_err().code(), Code::Unavailable);
    }
}
