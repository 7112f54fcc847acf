//! Plain HTTP for orchestrators and Prometheus: `/livez`, `/readyz`, `/startupz`, `/metrics`. Inside the cluster's own
//! network only: it has no TLS, takes no input, and must never tell anything about users.

use std::{
    fmt,
    future::Future,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio_util::sync::CancellationToken;
use tower::Service;

pub use crate::grpc::ServeError;
use crate::{
    Listener,
    accept::{self, ByteStream},
};

/// An orchestrator, a scraper, a person with curl; nobody needs more.
const MAX_CONNECTIONS: usize = 64;
/// A connection that sends nothing, or its request in drops, must not keep its place.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// A GET without a body.
const MAX_BUFFER_BYTES: usize = 16 * 1024;

/// What a node says about itself; clones share their state. Begins as alive, neither started nor ready.
#[derive(Clone)]
pub struct Probes(Arc<Inner>);

struct Inner {
    live: AtomicBool,
    started: AtomicBool,
    ready: AtomicBool,
    metrics: Box<dyn Fn() -> String + Send + Sync>,
}

impl fmt::Debug for Probes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Probes")
            .field("live", &self.0.live)
            .field("started", &self.0.started)
            .field("ready", &self.0.ready)
            .finish_non_exhaustive()
    }
}

impl Probes {
    /// `metrics` answers each scrape, in Prometheus' text format; it should not block.
    pub fn new(metrics: impl Fn() -> String + Send + Sync + 'static) -> Self {
        Self(Arc::new(Inner {
            live: AtomicBool::new(true),
            started: AtomicBool::new(false),
            ready: AtomicBool::new(false),
            metrics: Box::new(metrics),
        }))
    }

    /// Whether the start is over.
    pub fn set_started(&self, started: bool) {
        self.0.started.store(started, Ordering::Relaxed);
    }

    /// Whether callers should be sent here.
    pub fn set_ready(&self, ready: bool) {
        self.0.ready.store(ready, Ordering::Relaxed);
    }

    /// Whether the process is worth keeping; `false` asks for a restart.
    pub fn set_live(&self, live: bool) {
        self.0.live.store(live, Ordering::Relaxed);
    }
}

/// Serves the probes until `shutdown` is ready.
pub async fn serve_probes(
    listener: impl Into<Listener>,
    probes: Probes,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), ServeError> {
    let router = router(probes);
    let serve = |stream, stop| serve_connection(stream, router.clone(), stop);
    Ok(accept::run(listener.into(), MAX_CONNECTIONS, shutdown, serve).await?)
}

fn router(probes: Probes) -> Router {
    Router::new()
        .route("/livez", get(|State(Probes(p)): State<Probes>| async move { answer(&p.live) }))
        .route("/startupz", get(|State(Probes(p)): State<Probes>| async move { answer(&p.started) }))
        .route("/readyz", get(|State(Probes(p)): State<Probes>| async move { answer(&p.ready) }))
        .route("/metrics", get(metrics))
        .with_state(probes)
}

fn answer(flag: &AtomicBool) -> (StatusCode, &'static str) {
    if flag.load(Ordering::Relaxed) { (StatusCode::OK, "ok\n") } else { (StatusCode::SERVICE_UNAVAILABLE, "no\n") }
}

async fn metrics(State(Probes(probes)): State<Probes>) -> impl IntoResponse {
    const FORMAT: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, FORMAT)], (probes.metrics)())
}

async fn serve_connection(stream: ByteStream, router: Router, stop: CancellationToken) {
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(MAX_BUFFER_BYTES)
        .serve_connection(TokioIo::new(stream), service_fn(move |request| router.clone().call(request)));
    let mut connection = pin!(connection);
    let result = tokio::select! {
        result = &mut connection => result,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "probe's connection ended");
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr};

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
        sync::oneshot,
        time::timeout,
    };

    use super::*;
    use crate::{bind, probe};

    async fn get(addr: SocketAddr, path: &str) -> (u16, String) {
        let exchange = async {
            let mut stream = TcpStream::connect(addr).await.unwrap();
            let request = format!("GET {path} HTTP/1.1\r\nhost: node\r\nconnection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            answer
        };
        let answer = timeout(Duration::from_secs(20), exchange).await.expect("in time");
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head[9..12].parse().unwrap(), body.to_owned())
    }

    #[tokio::test]
    async fn probes_say_what_they_were_told() {
        let listener = bind::tcp(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0)).unwrap();
        let addr = listener.local_addr().unwrap();
        let probes = Probes::new(|| "stentor_test_count 7\n# EOF\n".to_owned());
        let (stop, stopped) = oneshot::channel::<()>();
        let server = tokio::spawn(serve_probes(listener, probes.clone(), async { drop(stopped.await) }));
        let all = async || [get(addr, "/livez").await.0, get(addr, "/startupz").await.0, get(addr, "/readyz").await.0];
        assert_eq!(all().await, [200, 503, 503]);
        assert_eq!(probe::status(addr, "/readyz", Duration::from_secs(20)).await.unwrap(), 503);
        probes.set_started(true);
        assert_eq!(all().await, [200, 200, 503]);
        probes.set_ready(true);
        assert_eq!(all().await, [200, 200, 200]);
        probes.set_live(false);
        assert_eq!(all().await, [503, 200, 200]);
        assert_eq!(get(addr, "/metrics").await, (200, "stentor_test_count 7\n# EOF\n".to_owned()));
        assert_eq!(get(addr, "/secrets").await.0, 404);
        let page = |path| probe::get(addr, path, Duration::from_secs(20));
        assert_eq!(page("/metrics").await.unwrap(), "stentor_test_count 7\n# EOF\n");
        assert!(page("/secrets").await.is_err());
        // A caller who connects and says nothing does not hold the shutdown up.
        let _silent = TcpStream::connect(addr).await.unwrap();
        stop.send(()).unwrap();
        timeout(Duration::from_secs(20), server).await.expect("in time").unwrap().unwrap();
    }
}
