//! Coordinator and workers over real sockets with real keys, where one side breaks what it promised. Must never wait
//! without a deadline.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

use std::{
    future::Future,
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

use stentor_proto::internal::{
    BenchBegin, BenchHello, BenchOrder, BenchPart, BenchTally, BenchWord, bench_order::Order as WireOrder,
    bench_word::Word as WireWord, bench_worker_client::BenchWorkerClient, bench_worker_server::BenchWorker,
    bench_worker_server::BenchWorkerServer,
};
use stentor_transport::{
    bind,
    grpc::{self, Routes},
    pki::Pki,
    tls::ClientTls,
};
use tempfile::TempDir;
use tokio::{sync::mpsc, task::JoinHandle, time::timeout};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};

use super::{
    link::{Turns, Word},
    merge::Part,
    wire, *,
};
use crate::{
    BenchError, Observer, Outcome, Pace, Target, Timing,
    body::Bodies,
    meter::{Meters, Tally},
    report::Machine,
    scenario::{Work, idle::IdleSettings, send::SendSettings},
};

const SHORT: Timing = Timing { warm_up_s: 0.05, seconds: 0.1, repeats: 2 };

async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(60), future).await.expect("in time")
}

/// What the bench reads of a cluster's folder; nothing of it runs.
pub(crate) fn cluster_folder(id: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let pki = Pki::create(&dir.path().join("pki")).unwrap();
    write_cluster(dir.path(), id, pki.ca_path());
    dir
}

fn write_cluster(dir: &Path, id: &str, ca: &Path) {
    let key = dir.join("signing.key");
    std::fs::write(&key, "key").unwrap();
    let file = serde_json::json!({
        "cluster_id": id, "nodes": [], "ca": ca, "app": "demo", "signing_key": { "kid": "dev", "private_key": key },
    });
    std::fs::write(dir.join("cluster.json"), file.to_string()).unwrap();
}

/// A worker that listens; ended when dropped.
struct Listening {
    address: String,
    task: JoinHandle<()>,
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn listen<W: BenchWorker>(dir: &Path, worker: W) -> Listening {
    let keys = Keys::issued(&Target::read(dir).unwrap(), "bench-worker").unwrap();
    let listener = bind::tcp(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let tls = keys.server().unwrap();
    let task = tokio::spawn(async move {
        let _keys = keys;
        let routes = Routes::new(BenchWorkerServer::new(worker));
        grpc::serve(listener, &tls, routes, std::future::pending()).await.unwrap();
    });
    Listening { address, task }
}

fn real(dir: &Path) -> Listening {
    listen(dir, Service::new(dir.to_owned(), |_| Bodies::of_bytes(1), |_| {}))
}

/// Says this to an order, and ends the stream if it is to.
type Script = fn(&WireOrder) -> (Vec<BenchWord>, bool);

/// A worker that does what a script says.
struct Fake(Script);

fn word(word: Word) -> BenchWord {
    wire::word(word)
}

/// 10 units, each of 3 ms, in a second.
fn part() -> Part {
    let mut units = Tally { count: 10, ..Tally::default() };
    (0..10).for_each(|_| units.latencies.record(Duration::from_millis(3)));
    Part { elapsed: Duration::from_secs(1), units, ..Part::default() }
}

fn honest(order: &WireOrder) -> (Vec<BenchWord>, bool) {
    let machine = || serde_json::to_vec(&Machine::this(Path::new("/"))).unwrap();
    let words = match order {
        WireOrder::Hello(_) => vec![word(Word::Welcome(machine())), word(Word::Prepared)],
        WireOrder::Begin(_) => vec![word(Word::Ready(3))],
        WireOrder::Go(_) => vec![word(Word::Live(Box::new(part().units))), wire::alive()],
        WireOrder::Cut(_) => vec![word(Word::Part(Box::new(part())))],
        WireOrder::Stop(_) => vec![word(Word::Counted)],
        WireOrder::End(_) => vec![word(Word::Closed)],
    };
    (words, false)
}

#[tonic::async_trait]
impl BenchWorker for Fake {
    type RunStream = ReceiverStream<Result<BenchWord, Status>>;

    async fn run(&self, request: Request<Streaming<BenchOrder>>) -> Result<Response<Self::RunStream>, Status> {
        let (script, mut orders) = (self.0, request.into_inner());
        let (words, said) = mpsc::channel(32);
        tokio::spawn(async move {
            while let Ok(Some(order)) = orders.message().await {
                let (all, ends) = script(&order.order.unwrap());
                for word in all {
                    let _ = words.send(Ok(word)).await;
                }
                if ends {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(said)))
    }
}

fn work() -> Work {
    Work::Send { load: SendSettings::default(), pace: Pace::Closed, find_p99_ms: None, via_api: false }
}

/// A whole run with these workers.
async fn lead(dir: &Path, workers: &[String], work: &Work) -> Result<Vec<Outcome>, BenchError> {
    let target = Target::read(dir).unwrap();
    let keys = Keys::issued(&target, "bench-coordinator").unwrap();
    let (tls, observer) = (keys.client().unwrap(), Observer::new(|_| {}));
    let (mut crew, found) = soon(gather(&target, Run { workers, tls: &tls, work, observer: &observer })).await?;
    assert_eq!(found.iter().map(|worker| &worker.address).collect::<Vec<_>>(), workers.iter().collect::<Vec<_>>());
    let outcomes = soon(crew.run(work.pace(), SHORT)).await?;
    soon(crew.dismiss()).await?;
    Ok(outcomes)
}

#[tokio::test]
async fn what_all_workers_noted_is_joined() {
    let dir = cluster_folder("c");
    let (one, other) = (listen(dir.path(), Fake(honest)), listen(dir.path(), Fake(honest)));
    let outcomes = lead(dir.path(), &[one.address.clone(), other.address.clone()], &work()).await.unwrap();
    assert_eq!(outcomes.len(), 2);
    for outcome in outcomes {
        assert_eq!((outcome.count, outcome.rate_per_s, outcome.latency.count), (20, 20.0, 20));
        assert_eq!(outcome.processes.keys().collect::<Vec<_>>(), ["bench-1", "bench-2"]);
    }
}

/// Fails a run with an honest worker and this one; what the failure says of it.
async fn fails(script: Script) -> String {
    let dir = cluster_folder("c");
    let (one, other) = (listen(dir.path(), Fake(honest)), listen(dir.path(), Fake(script)));
    match lead(dir.path(), &[one.address.clone(), other.address.clone()], &work()).await {
        Err(BenchError::Worker { worker, what }) if worker == other.address => what,
        ended => panic!("{ended:?}"),
    }
}

#[tokio::test]
async fn a_worker_that_ends_in_a_run_fails_it() {
    let what = fails(|order| match order {
        WireOrder::Cut(_) => (vec![], true),
        order => honest(order),
    });
    assert!(what.await.contains("in the middle"));
    let what = fails(|order| match order {
        WireOrder::Go(_) => (vec![], true),
        order => honest(order),
    });
    assert!(what.await.contains("in the middle"));
}

#[tokio::test]
async fn a_worker_whose_counts_are_wrong_fails_the_run() {
    let what = fails(|order| match order {
        WireOrder::Stop(_) => (vec![wire::failed(wire::reason::FAILED, "the counts are wrong: a lost message")], true),
        order => honest(order),
    });
    assert_eq!(what.await, "the counts are wrong: a lost message");
}

#[tokio::test]
async fn a_worker_that_talks_nonsense_fails_the_run_and_nothing_else() {
    let what = fails(|order| match order {
        WireOrder::Cut(_) => {
            let units = BenchTally { value_steps_ns: vec![5_000], counts: vec![u64::MAX], ..BenchTally::default() };
            let part = BenchPart { elapsed_ns: 1, units: Some(units), ..BenchPart::default() };
            (vec![BenchWord { word: Some(WireWord::Part(part)) }], false)
        }
        order => honest(order),
    });
    assert!(what.await.contains("cannot be understood"));
    let what = fails(|order| match order {
        WireOrder::Begin(_) => (vec![word(Word::Counted)], false),
        order => honest(order),
    });
    assert!(what.await.contains("out of turn"));
    let what = fails(|order| match order {
        WireOrder::Cut(_) => {
            let units = BenchTally { counts: vec![1; wire::MAX_WORD_BYTES], ..BenchTally::default() };
            let part = BenchPart { elapsed_ns: 1, units: Some(units), ..BenchPart::default() };
            (vec![BenchWord { word: Some(WireWord::Part(part)) }], false)
        }
        order => honest(order),
    });
    assert!(what.await.contains("too large"));
}

fn idle() -> Work {
    Work::Idle(IdleSettings { devices: 1, conversations: 0 })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_serves_one_coordinator_and_then_the_next() {
    let dir = cluster_folder("c");
    let worker = real(dir.path());
    let (target, workers) = (Target::read(dir.path()).unwrap(), [worker.address.clone()]);
    let keys = Keys::issued(&target, "bench-coordinator").unwrap();
    let (tls, observer, work) = (keys.client().unwrap(), Observer::none(), idle());
    let run = || Run { workers: &workers, tls: &tls, work: &work, observer: &observer };
    let first = soon(gather(&target, run())).await.unwrap();
    assert!(matches!(gather(&target, run()).await, Err(BenchError::Busy { worker }) if worker == workers[0]));
    // The coordinator dies.
    drop(first);
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut again = loop {
        match gather(&target, run()).await {
            Ok((crew, _)) => break crew,
            Err(BenchError::Busy { .. }) if Instant::now() < deadline => tokio::task::yield_now().await,
            Err(error) => panic!("{error}"),
        }
    };
    // What goes wrong at a worker is told with its name.
    let ended = soon(again.run(Pace::Closed, SHORT)).await;
    let Err(BenchError::Worker { worker: named, what }) = ended else { panic!("{ended:?}") };
    assert_eq!((named, what.as_str()), (worker.address.clone(), "the cluster has no gateway"));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_no_key_of_the_cluster_is_refused() {
    let (dir, other) = (cluster_folder("c"), cluster_folder("c"));
    let worker = real(dir.path());
    let (target, workers) = (Target::read(dir.path()).unwrap(), [worker.address.clone()]);
    let (observer, work) = (Observer::none(), idle());
    let foreign = Keys::issued(&Target::read(other.path()).unwrap(), "bench-coordinator").unwrap();
    for tls in [ClientTls::public(target.ca()).unwrap(), foreign.client().unwrap()] {
        let run = Run { workers: &workers, tls: &tls, work: &work, observer: &observer };
        let Err(BenchError::Worker { worker, .. }) = soon(gather(&target, run)).await else { panic!("let in") };
        assert_eq!(worker, workers[0]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn other_versions_and_other_clusters_are_refused_with_their_codes() {
    let dir = cluster_folder("c");
    let (worker, target) = (real(dir.path()), Target::read(dir.path()).unwrap());
    let keys = Keys::issued(&target, "bench-coordinator").unwrap();
    let hello = BenchHello {
        format: wire::FORMAT,
        version: env!("CARGO_PKG_VERSION").into(),
        cluster_id: "c".into(),
        run: "r-0".into(),
        place: 0,
        watched: false,
        work: serde_json::to_vec(&idle()).unwrap().into(),
    };
    let channel = grpc::channel(worker.address.parse().unwrap(), &keys.client().unwrap()).unwrap();
    let first = async |order: WireOrder| loop {
        let mut client = BenchWorkerClient::new(channel.clone());
        let order = BenchOrder { order: Some(order.clone()) };
        let orders = tokio_stream::iter([order]).chain(tokio_stream::pending());
        // The session before may still be ending.
        let Ok(answer) = client.run(orders).await else { continue };
        let mut words = answer.into_inner();
        loop {
            match words.message().await.unwrap().and_then(|word| word.word) {
                Some(WireWord::Failed(failed)) => return failed.reason,
                Some(WireWord::Alive(_)) => {}
                other => return format!("{other:?}").chars().take(12).collect(),
            }
        }
    };
    let of = |change: fn(&mut BenchHello)| {
        let mut hello = hello.clone();
        change(&mut hello);
        WireOrder::Hello(hello)
    };
    assert_eq!(soon(first(of(|hello| hello.version = "9.9.9".into()))).await, "VERSION_DIFFERS");
    assert_eq!(soon(first(of(|hello| hello.format = 7))).await, "VERSION_DIFFERS");
    assert_eq!(soon(first(of(|hello| hello.cluster_id = "d".into()))).await, "WRONG_CLUSTER");
    assert_eq!(soon(first(of(|hello| hello.work = "{}".into()))).await, "FAILED");
    assert_eq!(soon(first(of(|hello| hello.run = "../r".into()))).await, "FAILED");
    assert_eq!(soon(first(WireOrder::Begin(BenchBegin::default()))).await, "None");
    assert_eq!(soon(first(of(|_| {}))).await, "Some(Welcome");
}

#[tokio::test]
async fn workers_are_named_once_and_reachable() {
    let dir = cluster_folder("c");
    let one = listen(dir.path(), Fake(honest));
    let twice = [one.address.clone(), one.address.clone()];
    assert!(matches!(lead(dir.path(), &twice, &work()).await, Err(BenchError::Settings(_))));
    assert!(matches!(lead(dir.path(), &["nonsense".into()], &work()).await, Err(BenchError::Settings(_))));
    let gone = one.address.clone();
    one.task.abort();
    let ended = lead(dir.path(), std::slice::from_ref(&gone), &work()).await;
    assert!(matches!(ended, Err(BenchError::Worker { worker, .. }) if worker == gone));
}

/// A load in this process that notes a unit at each step of the clock, and may fail.
struct Ticking {
    fails: bool,
    numbers: Vec<Turns>,
}

impl Load for Ticking {
    async fn run(&mut self, _: Pace, stage: &mut Stage) -> Result<(), BenchError> {
        let meters = Meters::new().with("late");
        self.numbers.push(stage.gather(5).await?);
        let ticks = async {
            loop {
                tokio::time::sleep(Duration::from_millis(5)).await;
                meters.units.note(0, &mut vec![Duration::from_millis(2)]);
                meters.other("late").note(0, &mut vec![Duration::from_millis(1)]);
            }
        };
        tokio::select! {
            () = ticks => {}
            measured = stage.measure(&meters) => measured?,
        }
        if self.fails { Err(BenchError::Wrong("a message is lost".into())) } else { Ok(()) }
    }
}

#[tokio::test]
async fn one_generator_is_a_worker_of_the_same_process() {
    let dir = cluster_folder("c");
    let target = Target::read(dir.path()).unwrap();
    let mut load = Ticking { fails: false, numbers: Vec::new() };
    let twice = async |crew: &mut Crew<'_>| {
        crew.run(Pace::Closed, SHORT).await?;
        crew.run(Pace::Closed, SHORT).await
    };
    let outcomes = soon(with(&target, &mut load, Rhythm::Steady, &Observer::none(), twice)).await.unwrap();
    assert_eq!(outcomes.len(), 2);
    for outcome in outcomes {
        assert!(outcome.count > 0 && outcome.latency.count == outcome.count, "{outcome:?}");
        assert_eq!(outcome.processes.keys().collect::<Vec<_>>(), ["bench"]);
        assert!(outcome.figures["late_count"] > 0.0);
    }
    assert!(load.numbers.iter().all(|turns| turns.of() == 5 && turns.number(4) == 4) && load.numbers.len() == 2);
    load.fails = true;
    let how = (Rhythm::Steady, Pace::Closed, SHORT);
    let ended = soon(alone(&target, &mut load, how, &Observer::none())).await;
    assert!(matches!(ended, Err(BenchError::Wrong(why)) if why == "a message is lost"));
}
