//! The coordinator's way to workers that are processes of their own: dials all, gives each its share, carries words and
//! orders. Must never talk to who has no certificate of the cluster's authority, nor wait for a worker that gives no sign
//! of life.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use futures_util::{StreamExt, future::try_join_all, stream};
use stentor_proto::internal::{BenchOrder, BenchWord, bench_worker_client::BenchWorkerClient};
use stentor_transport::{grpc, tls::ClientTls};
use tokio::{sync::mpsc, task::JoinSet, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use super::{
    conduct::{Crew, Member},
    link::{AHEAD, MAX_WORKERS, Order, Said, Word},
    share::Share,
    wire::{self, Heard, Hello, reason},
};
use crate::{BenchError, Observer, Target, report::Worker, scenario::Work};

/// From dialling to the worker's consent.
const DIAL_WITHIN: Duration = Duration::from_secs(10);
/// A worker gives a sign of life each second; one that gives none for so long does not live.
const SILENT_FOR: Duration = Duration::from_secs(30);

/// What several workers are to do.
#[derive(Debug)]
pub struct Run<'a> {
    /// Where they listen, `host:port` each.
    pub workers: &'a [String],
    /// With a certificate of the cluster's authority.
    pub tls: &'a ClientTls,
    /// The whole work.
    pub work: &'a Work,
    /// Who watches.
    pub observer: &'a Observer,
}

/// Finds all workers, and has each prepare its share; afterwards the crew can run.
pub async fn gather<'a>(target: &'a Target, run: Run<'_>) -> Result<(Crew<'a>, Vec<Worker>), BenchError> {
    let count = run.workers.len();
    if count == 0 || count > MAX_WORKERS || run.workers.iter().collect::<BTreeSet<_>>().len() < count {
        return Err(BenchError::Settings(format!("1 to {MAX_WORKERS} workers are needed, each named once")));
    }
    let shares = Share::all(run.work, count)?;
    let watched = run.observer.is_there();
    let opened = run.workers.iter().zip(shares).enumerate().map(|(place, (address, share))| async move {
        let work = serde_json::to_vec(&share).map_err(BenchError::cluster)?;
        let named = format!("{}-{place}", target.run());
        let hello = Hello { cluster_id: target.cluster_id().to_owned(), run: named, place, watched, work };
        open(address, run.tls, hello).await
    });
    let opened = try_join_all(opened).await?;
    let (words, said) = mpsc::channel(count);
    let (mut members, mut carriers) = (Vec::new(), JoinSet::new());
    for (place, (address, (orders, stream))) in run.workers.iter().zip(opened).enumerate() {
        members.push(Member { process: format!("bench-{}", place + 1), address: Some(address.clone()), orders });
        carriers.spawn(carry(place, stream, words.clone()));
    }
    let mut crew = Crew::new(target, members, said, carriers, (run.work.rhythm(), run.observer.clone()));
    let machines = crew.prepared().await?;
    let worker = |(place, (address, machine)): (usize, (&String, Vec<u8>))| {
        let unreadable =
            |error: serde_json::Error| worker_failed(address, format!("its machine is unreadable: {error}"));
        let machine = serde_json::from_slice(&machine).map_err(unreadable)?;
        Ok(Worker { process: format!("bench-{}", place + 1), address: address.clone(), machine })
    };
    let workers = run.workers.iter().zip(machines).enumerate().map(worker).collect::<Result<_, BenchError>>()?;
    Ok((crew, workers))
}

type Opened = (mpsc::Sender<Order>, Streaming<BenchWord>);

async fn open(address: &str, tls: &ClientTls, hello: Hello) -> Result<Opened, BenchError> {
    let channel = grpc::channel(resolve(address).await?, tls).map_err(BenchError::cluster)?;
    let (orders, outbound) = mpsc::channel(AHEAD);
    let first: BenchOrder = wire::hello(hello);
    let outbound = stream::iter([first]).chain(ReceiverStream::new(outbound).map(wire::order));
    let mut client = BenchWorkerClient::new(channel).max_decoding_message_size(wire::MAX_WORD_BYTES);
    match timeout(DIAL_WITHIN, client.run(outbound)).await {
        Ok(Ok(answer)) => Ok((orders, answer.into_inner())),
        Ok(Err(status)) if status.code() == Code::ResourceExhausted && status.message() == reason::BUSY => {
            Err(BenchError::Busy { worker: address.into() })
        }
        Ok(Err(status)) => Err(worker_failed(address, format!("it cannot be reached: {}", told(&status)))),
        Err(_) => Err(worker_failed(address, "it does not answer".into())),
    }
}

async fn resolve(address: &str) -> Result<SocketAddr, BenchError> {
    let wrong = |why: String| BenchError::Settings(format!("{address} is no address of a worker (host:port): {why}"));
    let found = timeout(DIAL_WITHIN, tokio::net::lookup_host(address)).await;
    let mut found = found.map_err(|_| wrong("no answer".into()))?.map_err(|error| wrong(error.to_string()))?;
    found.next().ok_or_else(|| wrong("it has none".into()))
}

/// Carries what a worker says, until its last word.
async fn carry(place: usize, mut stream: Streaming<BenchWord>, words: mpsc::Sender<Said>) {
    loop {
        let heard = match timeout(SILENT_FOR, stream.message()).await {
            Ok(Ok(Some(word))) => wire::read_word(word),
            Ok(Ok(None)) => Err(BenchError::Protocol("it ended in the middle of the run".into())),
            Ok(Err(status)) => Err(BenchError::Protocol(format!("the connection broke: {}", told(&status)))),
            Err(_) => Err(BenchError::Late("a sign of life".into())),
        };
        let said = match heard {
            Ok(Heard::Alive) => continue,
            Ok(Heard::Word(word)) => Ok(word),
            Ok(Heard::Failed { reason, message }) if reason == reason::FAILED => Err(BenchError::Protocol(message)),
            Ok(Heard::Failed { reason, message }) => Err(BenchError::Protocol(format!("{message} ({reason})"))),
            Err(error) => Err(error),
        };
        let last = matches!(said, Err(_) | Ok(Word::Closed));
        if words.send((place, said)).await.is_err() || last {
            return;
        }
    }
}

fn worker_failed(worker: &str, what: String) -> BenchError {
    BenchError::Worker { worker: worker.into(), what }
}

/// What a status says, down to its first cause.
fn told(status: &Status) -> String {
    let mut text = status.message().to_owned();
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        let cause = error.to_string();
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
        source = error.source();
    }
    text
}
