//! One shard's way in: commands become bundles, bundles become entries, answers go back in order. Must never propose
//! under a stamp or a term that is not this leader's, and never hold more than its bounds.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::{StreamExt, stream::FuturesOrdered};
use openraft::{
    errors::{ClientWriteError, ForwardReason, ForwardToLeader},
    impls::ProgressResponder,
    raft::ClientWriteResult,
};
use stentor_engine::{
    apply::LEVEL,
    batch::{Admit, Batch, BatchRules, Close},
    echo::Echo,
    effect::Outcome,
    limits,
    stamp::StampClock,
};
use stentor_proto::{
    Bytes,
    bundle::Builder,
    ids::{BrokerId, StampMs},
    internal::{NotLeader, Proposed, broker_frame::Frame, proposed},
    reason::Reason,
};
use stentor_raft_store::{
    ShardReader, Store,
    types::{BundleBytes, TypeConfig},
};
use stentor_transport::Host;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::{clocks::Clocks, interest::Attached, metrics::Metrics, parking::Idle, raft::Raft, shard::Leadership};

/// Why a command has no outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NotProposed {
    /// This replica does not lead: nothing was proposed.
    NotLeader {
        /// Who does, if known.
        leader: Option<BrokerId>,
        /// The same broker may lead again shortly.
        retry_here: bool,
    },
    /// Its entry may or may not have been committed.
    Unknown {
        /// Who leads now, if known.
        leader: Option<BrokerId>,
    },
    /// Too much waits: nothing was proposed.
    Overloaded,
}

/// What came of a command: `command::outcomes` of them.
pub(crate) type Answer = Result<Vec<Outcome>, NotProposed>;

/// Who waits for it.
pub(crate) enum Reply {
    /// A call of this broker.
    Once(oneshot::Sender<Answer>),
    /// A proposal that came on a stream.
    Stream {
        /// The stream.
        stream: Arc<Attached>,
        /// The proposal's id there.
        id: u64,
        /// Told to callers whose placement may be older.
        placement_version: u64,
    },
}

impl Reply {
    /// Hands the answer over: the command's outcomes, or why it has none.
    pub(crate) fn answer(self, answer: Result<&[Outcome], NotProposed>) {
        match self {
            Self::Once(sender) => drop(sender.send(answer.map(<[_]>::to_vec))),
            Self::Stream { stream, id, placement_version } => {
                let result = match answer {
                    Ok([outcome]) => proposed::Result::Outcome(outcome.to_proto()),
                    Ok(outcomes) => proposed::Result::Outcomes(Outcome::spans(outcomes)),
                    Err(NotProposed::Overloaded) => proposed::Result::Refusal(Reason::Overloaded.refusal()),
                    Err(NotProposed::NotLeader { leader, retry_here }) => {
                        proposed::Result::NotLeader(not_leader(leader, retry_here, placement_version))
                    }
                    Err(NotProposed::Unknown { leader }) => {
                        let elsewhere = not_leader(leader, false, placement_version);
                        proposed::Result::NotLeader(NotLeader { unknown: true, ..elsewhere })
                    }
                };
                stream.answer(Frame::Proposed(Proposed { id, result: Some(result) }), 32);
            }
        }
    }
}

/// As it travels.
pub(crate) fn not_leader(leader: Option<BrokerId>, retry_here: bool, placement_version: u64) -> NotLeader {
    NotLeader { leader: leader.map_or(0, |l| l.0), retry_here, placement_version, unknown: false }
}

struct Waiting {
    command: Bytes,
    /// How many outcomes it will have.
    outcomes: usize,
    reply: Reply,
}

/// The end of a shard's batcher where commands are put in; cheap to clone.
#[derive(Clone)]
pub(crate) struct Proposer {
    sender: mpsc::Sender<Waiting>,
    waiting_bytes: Arc<AtomicUsize>,
    leadership: watch::Receiver<Leadership>,
    store: Arc<Store>,
    metrics: Arc<Metrics>,
}

impl Proposer {
    /// Queues a command that was checked before and will have so many outcomes. Commands of one caller are proposed in
    /// the order of the calls. The reply is answered in any case.
    pub(crate) fn propose(&self, command: Bytes, outcomes: usize, reply: Reply) {
        let leadership = *self.leadership.borrow();
        if !leadership.ready {
            let leader = leadership.elsewhere();
            return reply.answer(Err(NotProposed::NotLeader { leader, retry_here: leadership.leads }));
        }
        let bytes = command.len();
        let waiting = self.waiting_bytes.fetch_add(bytes, Ordering::Relaxed);
        let full = waiting > 0 && waiting + bytes > limits::BATCHER_BYTES;
        let refused = if full || self.store.overloaded() {
            Some(reply)
        } else {
            match self.sender.try_send(Waiting { command, outcomes, reply }) {
                Ok(()) => None,
                Err(mpsc::error::TrySendError::Full(back) | mpsc::error::TrySendError::Closed(back)) => {
                    Some(back.reply)
                }
            }
        };
        if let Some(reply) = refused {
            self.waiting_bytes.fetch_sub(bytes, Ordering::Relaxed);
            self.metrics.overloads.inc();
            reply.answer(Err(NotProposed::Overloaded));
        }
    }

    /// Proposes and waits for the outcomes.
    pub(crate) async fn call(&self, command: Bytes, outcomes: usize) -> Answer {
        let (sender, receiver) = oneshot::channel();
        self.propose(command, outcomes, Reply::Once(sender));
        receiver.await.unwrap_or(Err(NotProposed::Unknown { leader: None }))
    }
}

/// What a batcher works with.
pub(crate) struct Parts {
    pub(crate) raft: Raft,
    pub(crate) reader: ShardReader,
    pub(crate) store: Arc<Store>,
    pub(crate) clocks: Arc<Clocks>,
    pub(crate) leadership: watch::Receiver<Leadership>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) own: BrokerId,
    pub(crate) host: Host,
    pub(crate) idle: Arc<Idle>,
}

/// A shard's batcher, and the task that it is; it ends with `stop`.
pub(crate) fn start(parts: Parts, stop: CancellationToken) -> (Proposer, impl Future<Output = ()> + Send + 'static) {
    let (sender, receiver) = mpsc::channel(limits::BATCHER_COMMANDS);
    let waiting_bytes = Arc::new(AtomicUsize::new(0));
    let proposer = Proposer {
        sender,
        waiting_bytes: waiting_bytes.clone(),
        leadership: parts.leadership.clone(),
        store: parts.store.clone(),
        metrics: parts.metrics.clone(),
    };
    let batcher = Batcher {
        parts,
        receiver,
        waiting_bytes,
        rules: BatchRules::default(),
        batch: Batch::default(),
        echo: Echo::default(),
        builder: Builder::new(),
        replies: Vec::new(),
        joined: Vec::new(),
        held: None,
        in_flight: FuturesOrdered::new(),
        stamps: None,
        origin: Instant::now(),
    };
    (proposer, batcher.run(stop))
}

/// Who waits, and for how many outcomes.
type Replying = (Reply, usize);

/// A bundle that was proposed at that moment.
type Proposal = (Vec<Replying>, Duration, Option<ClientWriteResult<TypeConfig>>);
type Ending = std::pin::Pin<Box<dyn Future<Output = Proposal> + Send>>;

struct Batcher {
    parts: Parts,
    receiver: mpsc::Receiver<Waiting>,
    waiting_bytes: Arc<AtomicUsize>,
    rules: BatchRules,
    batch: Batch,
    echo: Echo,
    builder: Builder,
    replies: Vec<Replying>,
    /// What has joined since rows were last asked for: once for all, since `apply` holds their lock for a whole entry.
    joined: Vec<Bytes>,
    /// Did not fit into the open bundle; begins the next one.
    held: Option<Waiting>,
    in_flight: FuturesOrdered<Ending>,
    /// The stamps of the term in which they began.
    stamps: Option<(u64, StampClock)>,
    origin: Instant,
}

impl Batcher {
    async fn run(mut self, stop: CancellationToken) {
        loop {
            self.fill();
            if !self.joined.is_empty() {
                self.parts.reader.prefetch(&self.joined);
                self.joined.clear();
            }
            let room = self.in_flight.len() < limits::BUNDLES_IN_FLIGHT;
            let mut deadline = None;
            if room {
                let (now, idle) = (self.origin.elapsed(), self.in_flight.is_empty());
                let decision = match self.held {
                    Some(_) => Close::Now,
                    None => self.batch.close(&self.rules, now, idle, self.echo.waits(now)),
                };
                match decision {
                    Close::Now => {
                        self.propose().await;
                        continue;
                    }
                    Close::At(at) => deadline = Some(self.origin + at),
                    Close::Empty => {}
                }
            }
            tokio::select! {
                biased;
                Some((replies, since, result)) = self.in_flight.next(), if !self.in_flight.is_empty() => {
                    let now = self.origin.elapsed();
                    match &result {
                        Some(Ok(_)) => self.echo.answered(now, count(&replies), now.saturating_sub(since)),
                        // How long it took says nothing, and nobody comes back for sure.
                        _ => self.echo = Echo::default(),
                    }
                    answer(replies, result);
                }
                waiting = self.receiver.recv(), if self.held.is_none() => match waiting {
                    Some(waiting) => self.admit(waiting),
                    None => return,
                },
                () = tokio::time::sleep_until(deadline.unwrap_or(self.origin)), if deadline.is_some() => {}
                () = stop.cancelled() => return,
            }
        }
    }

    /// Takes what waits already, as far as it fits.
    fn fill(&mut self) {
        if let Some(held) = self.held.take() {
            self.admit(held);
        }
        while self.held.is_none() {
            let Ok(waiting) = self.receiver.try_recv() else { return };
            self.admit(waiting);
        }
    }

    fn admit(&mut self, waiting: Waiting) {
        let bytes = waiting.command.len();
        match self.batch.admit(&self.rules, bytes) {
            Admit::Join => {
                self.waiting_bytes.fetch_sub(bytes, Ordering::Relaxed);
                let now = self.origin.elapsed();
                self.batch.joined(now, bytes);
                self.echo.joined(now, waiting.outcomes);
                self.builder.push(&waiting.command);
                self.joined.push(waiting.command);
                self.replies.push((waiting.reply, waiting.outcomes));
            }
            Admit::CloseFirst => self.held = Some(waiting),
            Admit::TooLarge => {
                self.waiting_bytes.fetch_sub(bytes, Ordering::Relaxed);
                let refused = vec![Outcome::refused(Reason::BodyTooLarge); waiting.outcomes];
                waiting.reply.answer(Ok(&refused));
            }
        }
    }

    async fn propose(&mut self) {
        let builder = std::mem::take(&mut self.builder);
        let replies = std::mem::take(&mut self.replies);
        // Nothing is in it; what it grew to in one bundle is not kept by every shard for ever.
        self.joined = Vec::new();
        self.batch.closed();
        self.echo.closed();
        let leadership = *self.parts.leadership.borrow();
        let not_leader = NotProposed::NotLeader { leader: leadership.elsewhere(), retry_here: leadership.leads };
        if !leadership.ready {
            return refuse(replies, not_leader);
        }
        self.parts.idle.in_use().await;
        let stamp = self.stamp(leadership.term);
        let metrics = &self.parts.metrics;
        metrics.bundles.inc();
        let sends = count(&replies);
        metrics.proposals.inc_by(sends as u64);
        metrics.commands_per_bundle.observe(sends as f64);
        let (responder, result) = ProgressResponder::complete_only();
        let bundle = BundleBytes::new(builder.finish(LEVEL, stamp));
        let write = self.parts.raft.write(bundle).responder(responder).with_leader(leadership.term);
        if write.await.is_err() {
            return refuse(replies, NotProposed::Unknown { leader: None });
        }
        let since = self.origin.elapsed();
        self.in_flight.push_back(Box::pin(async move { (replies, since, result.await.ok()) }));
    }

    /// The stamp of the next entry.
    fn stamp(&mut self, term: u64) -> StampMs {
        let now = self.origin.elapsed();
        let wall = self.parts.host.wall_ms();
        match &mut self.stamps {
            Some((of, clock)) if *of == term => clock.stamp(now, wall),
            _ => {
                // The first entry of the term is applied, so everything before it is, and this is the log's last.
                let last = self.parts.reader.last_stamp();
                let peers = self.parts.raft.voter_ids().map(|id| id.broker).filter(|&b| b != self.parts.own);
                let mut clocks = self.parts.clocks.of(peers, Instant::now());
                clocks.push(wall);
                let mut clock = StampClock::begin(last, &clocks, now);
                let stamp = clock.stamp(now, wall);
                self.stamps = Some((term, clock));
                stamp
            }
        }
    }
}

fn count(replies: &[Replying]) -> usize {
    replies.iter().map(|(_, outcomes)| outcomes).sum()
}

fn refuse(replies: Vec<Replying>, why: NotProposed) {
    replies.into_iter().for_each(|(reply, _)| reply.answer(Err(why)));
}

fn answer(replies: Vec<Replying>, result: Option<ClientWriteResult<TypeConfig>>) {
    let unknown = |leader| NotProposed::Unknown { leader };
    match result {
        Some(Ok(written)) => {
            let mut outcomes = &written.data.0[..];
            for (reply, count) in replies {
                let own;
                reply.answer(match outcomes.split_at_checked(count) {
                    Some(split) => {
                        (own, outcomes) = split;
                        Ok(own)
                    }
                    None => {
                        // What is left belongs to nobody that could be told apart.
                        outcomes = &[];
                        Err(unknown(None))
                    }
                });
            }
        }
        Some(Err(ClientWriteError::ForwardToLeader(forward))) => refuse(replies, forwarded(&forward)),
        Some(Err(ClientWriteError::LogEntryDiscarded(forward))) => {
            refuse(replies, unknown(forward.leader_id.map(|l| l.broker)));
        }
        Some(Err(_)) | None => refuse(replies, unknown(None)),
    }
}

/// openraft says where to go; an expired lease names nobody and is no reason to go anywhere.
pub(crate) fn forwarded(forward: &ForwardToLeader<TypeConfig>) -> NotProposed {
    NotProposed::NotLeader {
        leader: forward.leader_id.map(|l| l.broker),
        retry_here: forward.reason == ForwardReason::LeaseExpired,
    }
}
