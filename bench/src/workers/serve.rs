//! A worker as a process of its own: waits for a coordinator, takes his work, and is free again when the run is over,
//! however it ended. Must never make load for a coordinator who is gone, nor serve two at a time.

use std::{future::Future, net::TcpListener, path::PathBuf, sync::Arc, time::Duration};

use stentor_proto::internal::{
    BenchHello, BenchOrder, BenchWord,
    bench_order::Order as WireOrder,
    bench_worker_server::{BenchWorker, BenchWorkerServer},
};
use stentor_transport::{
    grpc::{self, Routes},
    tls::ServerTls,
};
use tokio::{
    runtime::Handle,
    sync::{Semaphore, mpsc},
    task::JoinSet,
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{
    link::{AHEAD, Ear, Said, Word},
    stage::Stage,
    wire::{self, reason},
};
use crate::{
    BenchError, Target,
    body::{Bodies, BodySize},
    report::Machine,
    scenario::Work,
};

/// A coordinator says who he is at once.
const HELLO_WITHIN: Duration = Duration::from_secs(10);
/// A sign of life, whatever the load does.
const ALIVE_EVERY: Duration = Duration::from_secs(1);
/// Of what users and conversations of a run are named by.
const MAX_RUN_BYTES: usize = 32;

type News = dyn Fn(&str) + Send + Sync;

/// What a worker needs for any run.
#[derive(Clone)]
pub struct Service {
    dir: PathBuf,
    bodies: fn(BodySize) -> Bodies,
    news: Arc<News>,
    seat: Arc<Semaphore>,
}

impl std::fmt::Debug for Service {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Service").field("dir", &self.dir).finish_non_exhaustive()
    }
}

/// Why a run ended: a stable code, and words.
type Failed = (&'static str, String);

impl Service {
    /// For the cluster of a folder. `bodies` makes what is sent; `news` hears when a run begins and ends.
    pub fn new(dir: PathBuf, bodies: fn(BodySize) -> Bodies, news: impl Fn(&str) + Send + Sync + 'static) -> Self {
        Self { dir, bodies, news: Arc::new(news), seat: Arc::new(Semaphore::new(1)) }
    }

    /// One run, to its end.
    async fn session(self, mut orders: Streaming<BenchOrder>, words: mpsc::Sender<Result<BenchWord, Status>>) {
        let hello = match timeout(HELLO_WITHIN, orders.message()).await {
            Ok(Ok(Some(BenchOrder { order: Some(WireOrder::Hello(hello)) }))) => hello,
            _ => return,
        };
        (self.news)(&format!("run {} begins", hello.run.escape_default()));
        let mut lives = JoinSet::new();
        lives.spawn(live(words.clone()));
        let (pass, heard) = mpsc::channel(AHEAD);
        let (said, mut saying) = mpsc::channel(AHEAD);
        let mut job = Box::pin(self.job(hello, Ear { orders: heard, words: said, place: 0 }));
        let read = async {
            while let Ok(Some(order)) = orders.message().await {
                let order = wire::read_order(order).map_err(|error| (reason::FAILED, error.to_string()))?;
                if pass.send(order).await.is_err() {
                    // The job has ended, and says so itself.
                    std::future::pending::<()>().await;
                }
            }
            Ok::<(), Failed>(())
        };
        let ended = tokio::select! {
            biased;
            ended = &mut job => ended.map(|()| "done"),
            // Dropping the job ends its load.
            gone = read => gone.map(|()| "given up, the coordinator is gone"),
            () = speak(&mut saying, &words) => Ok("given up, the coordinator is gone"),
        };
        drop(job);
        while let Ok((_, Ok(word))) = saying.try_recv() {
            let _ = words.send(Ok(wire::word(word))).await;
        }
        match ended {
            Ok(how) => (self.news)(&format!("run {how}")),
            Err((reason, message)) => {
                (self.news)(&format!("run failed: {message}"));
                let _ = words.send(Ok(wire::failed(reason, message))).await;
            }
        }
    }

    async fn job(&self, hello: BenchHello, ear: Ear) -> Result<(), Failed> {
        let failed = |error: BenchError| (reason::FAILED, error.to_string());
        let target = self.welcome(&hello)?;
        let work: Work = serde_json::from_slice(&hello.work)
            .map_err(|error| (reason::FAILED, format!("the work cannot be understood: {error}")))?;
        let machine = serde_json::to_vec(&Machine::this(&std::env::temp_dir())).unwrap_or_default();
        let mut stage = Stage::new(ear, hello.watched);
        stage.say(Word::Welcome(machine)).await.map_err(failed)?;
        let mut load = Box::pin(work.prepare(&target, self.bodies)).await.map_err(failed)?;
        stage.say(Word::Prepared).await.map_err(failed)?;
        stage.attend(&mut load).await.map_err(failed)?;
        Box::pin(load.close()).await;
        stage.say(Word::Closed).await.map_err(failed)
    }

    /// Whether this coordinator can be served: the cluster for his run.
    fn welcome(&self, hello: &BenchHello) -> Result<Target, Failed> {
        let version = env!("CARGO_PKG_VERSION");
        if hello.version != version || hello.format != wire::FORMAT {
            let (theirs, format) = (hello.version.escape_default(), hello.format);
            return Err((
                reason::VERSION,
                format!(
                    "it has version {version}, messages {}; its coordinator {theirs}, messages {format}",
                    wire::FORMAT
                ),
            ));
        }
        let target = Target::read(&self.dir).map_err(|error| (reason::FAILED, error.to_string()))?;
        if target.cluster_id() != hello.cluster_id {
            return Err((reason::CLUSTER, format!("{} is the folder of another cluster", self.dir.display())));
        }
        let named = !hello.run.is_empty() && hello.run.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        if !named || hello.run.len() > MAX_RUN_BYTES {
            return Err((reason::FAILED, "the run has no name that can be used".into()));
        }
        Ok(target.for_run(&hello.run, hello.place as usize))
    }
}

/// Passes words on, until nobody hears them any more.
async fn speak(saying: &mut mpsc::Receiver<Said>, words: &mpsc::Sender<Result<BenchWord, Status>>) {
    while let Some((_, Ok(word))) = saying.recv().await {
        if words.send(Ok(wire::word(word))).await.is_err() {
            return;
        }
    }
    // The job has ended, which its own end tells.
    std::future::pending().await
}

/// Gives signs of life. A task of its own: what a load prepares may keep its thread for long.
async fn live(words: mpsc::Sender<Result<BenchWord, Status>>) {
    let mut alive = interval(ALIVE_EVERY);
    alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        alive.tick().await;
        if words.send(Ok(wire::alive())).await.is_err() {
            return;
        }
    }
}

#[tonic::async_trait]
impl BenchWorker for Service {
    type RunStream = ReceiverStream<Result<BenchWord, Status>>;

    async fn run(&self, request: Request<Streaming<BenchOrder>>) -> Result<Response<Self::RunStream>, Status> {
        let Ok(seat) = Arc::clone(&self.seat).try_acquire_owned() else {
            return Err(Status::resource_exhausted(reason::BUSY));
        };
        let (words, said) = mpsc::channel(AHEAD);
        let (service, orders, runtime) = (self.clone(), request.into_inner(), Handle::current());
        // On a thread of its own, as a single generator has the main one: what leads a load need not move between
        // threads. It ends with the connection.
        tokio::task::spawn_blocking(move || {
            runtime.block_on(service.session(orders, words));
            drop(seat);
        });
        Ok(Response::new(ReceiverStream::new(said)))
    }
}

/// Serves coordinators of the cluster, one after the other, until `shutdown` is ready.
pub async fn serve(
    listener: TcpListener,
    tls: &ServerTls,
    service: Service,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), BenchError> {
    let routes = BenchWorkerServer::new(service).max_decoding_message_size(wire::MAX_ORDER_BYTES);
    grpc::serve(listener, tls, Routes::new(routes), shutdown).await.map_err(BenchError::cluster)
}
