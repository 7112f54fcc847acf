//! Idle shards park: their replicas stop ticking, their leaders stop their heartbeats, and one message per pair of brokers
//! stands in for all of them (`stentor_engine::parking`; docs/architecture.md, "Parking"). Must wake a replica before
//! anything else is done with it, and never let one help to another leadership while its leader counts on it.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering},
    },
    time::Duration,
};

use futures_util::{FutureExt, StreamExt, stream};
use hashbrown::HashMap;
use openraft::{Instant as _, ReadPolicy, ServerState, async_runtime::WatchReceiver, metrics::RaftMetrics};
use parking_lot::Mutex;
use stentor_engine::parking::{Confirmed, Follows, Leads, Park, Rules, Told};
use stentor_proto::{
    ids::{BrokerId, Incarnation, META_SHARD, ReplicaId, ShardId},
    internal::{self, peer_frame::Message},
};
use stentor_raft_store::types::{TypeConfig, Vote};
use tokio::time::Instant;

use crate::{
    membership,
    meta::MetaView,
    network::link::{Lane, LinkError, Route},
    node::Node,
    raft::{HEARTBEAT, LEASE, Raft},
    shard::HostedShard,
};

/// Four heartbeats, and less than a follower's shortest election time-out.
const SILENCE: Duration = Duration::from_millis(590);
/// Two heartbeats.
const ANSWER: Duration = Duration::from_millis(300);
/// Clocks may differ in speed by so much: a leader counts on less than what its followers keep.
const DRIFT: u32 = 10;
/// A shard in which nothing was done since its leader leads parks after so long at the latest: thousands that begin or
/// change their leader at once would keep each other from it by their ticks.
const UNTOUCHED: Duration = Duration::from_secs(1);
/// A shard that could not be parked is tried again so much later: a peer may be of an older version.
const AGAIN: Duration = Duration::from_secs(10);
/// All parked replicas are looked at every so many pulses, about ten seconds.
const AUDIT_ROUNDS: u32 = 66;
/// Replicas that are looked at at a time.
const CHECKS_AT_ONCE: usize = 64;

const AWAKE: u8 = 0;
/// It ticks, and no quorum has answered its leader yet.
const WAKING: u8 = 1;
const PARKED: u8 = 2;

/// What has woken since the tables were last brought up to date.
type Woken = Arc<Mutex<Vec<ShardId>>>;
/// The shards of all replicas that tick: whoever looks at all of them regularly looks at these.
type Ticking = Arc<Mutex<BTreeSet<ShardId>>>;

/// Whether one replica is parked.
pub(crate) struct Idle {
    shard: ShardId,
    raft: Raft,
    state: AtomicU8,
    /// Held while the state and the ticks change together.
    change: Mutex<()>,
    used: AtomicBool,
    woken: Woken,
    ticking: Ticking,
}

impl Idle {
    pub(crate) fn is_parked(&self) -> bool {
        self.state.load(Ordering::Acquire) == PARKED
    }

    /// It ticks again, and its leader says at once that it is there.
    pub(crate) fn wake(&self) {
        if !self.is_parked() {
            return;
        }
        let changing = self.change.lock();
        if self.is_parked() {
            self.used.store(true, Ordering::Relaxed);
            self.state.store(WAKING, Ordering::Release);
            // Polled once: a full queue or a stopped replica sends none, and the next pulse does. A follower sends none.
            let _ = tokio::task::unconstrained(self.raft.trigger().heartbeat()).now_or_never();
            self.raft.runtime_config().tick(true);
            self.ticking.lock().insert(self.shard);
            self.woken.lock().push(self.shard);
        }
        drop(changing);
    }

    /// The leader is going to do something: returns when a quorum has answered it since it woke, or one lease later.
    pub(crate) async fn in_use(&self) {
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
        if self.state.load(Ordering::Acquire) == AWAKE {
            return;
        }
        self.wake();
        // What came of it whoever called finds out: by then the lease is there, or another leader is.
        let _ = tokio::time::timeout(LEASE, self.raft.get_read_linearizer(ReadPolicy::ReadIndex)).await;
        let _ = self.state.compare_exchange(WAKING, AWAKE, Ordering::AcqRel, Ordering::Acquire);
    }

    fn park(&self) {
        let changing = self.change.lock();
        self.state.store(PARKED, Ordering::Release);
        self.raft.runtime_config().tick(false);
        self.ticking.lock().remove(&self.shard);
        drop(changing);
    }
}

/// What one broker knows of parked shards, of those that it leads and of those that it follows.
pub(crate) struct Parking {
    origin: Instant,
    /// `None`: nothing parks.
    after: Option<Duration>,
    tables: Mutex<Tables>,
    woken: Woken,
    ticking: Ticking,
    /// What must wake with the next pulse.
    must_wake: Mutex<Vec<ShardId>>,
    rounds: AtomicU32,
}

struct Tables {
    leads: Leads,
    follows: Follows,
    quiet: HashMap<ShardId, Quiet>,
}

/// Since when nothing has happened in a shard that is led here.
#[derive(Clone, Copy, PartialEq)]
struct Quiet {
    term: u64,
    last_index: u64,
    since: Duration,
    /// Somebody used it in this term.
    touched: bool,
}

impl Parking {
    /// `first_list`: differs from that of every earlier process.
    pub(crate) fn new(after: Option<Duration>, first_list: u64) -> Self {
        let follows = Rules { lease: LEASE, answer: ANSWER, silence: SILENCE };
        let leads = Rules { lease: LEASE - LEASE / DRIFT, ..follows };
        let tables =
            Tables { leads: Leads::new(leads, first_list), follows: Follows::new(follows), quiet: HashMap::new() };
        Self {
            origin: Instant::now(),
            after,
            tables: Mutex::new(tables),
            woken: Woken::default(),
            ticking: Ticking::default(),
            must_wake: Mutex::default(),
            rounds: AtomicU32::new(0),
        }
    }

    pub(crate) fn idle(&self, shard: ShardId, raft: Raft) -> Arc<Idle> {
        let (state, used) = (AtomicU8::new(AWAKE), AtomicBool::new(false));
        let (woken, ticking) = (self.woken.clone(), self.ticking.clone());
        ticking.lock().insert(shard);
        Arc::new(Idle { shard, raft, state, change: Mutex::default(), used, woken, ticking })
    }

    fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    /// For how long this broker leads a parked shard yet, without that Raft knows it.
    pub(crate) fn lease_left(&self, shard: ShardId) -> Duration {
        self.tables.lock().leads.lease_left(self.now(), shard)
    }

    /// Whether votes for the shard must neither be given nor be asked for: its leader counts on it. Either way the replica
    /// wakes soon.
    pub(crate) fn refuses(&self, shard: ShardId) -> bool {
        let (now, mut tables) = (self.now(), self.tables.lock());
        let leads = !tables.leads.lease_left(now, shard).is_zero();
        let asked = tables.follows.refuses(now, shard);
        drop(tables);
        if leads || asked.woke {
            self.must_wake.lock().push(shard);
        }
        asked.refused || leads
    }

    /// The replicas that tick, ascending.
    pub(crate) fn ticking(&self, node: &Node) -> Vec<Arc<HostedShard>> {
        let shards: Vec<ShardId> = self.ticking.lock().iter().copied().collect();
        shards.into_iter().filter_map(|shard| node.hosted(shard)).collect()
    }

    /// The parked replicas that lead, ascending.
    pub(crate) fn led(&self, node: &Node) -> Vec<Arc<HostedShard>> {
        let shards: Vec<ShardId> = self.tables.lock().leads.shards().collect();
        shards.into_iter().filter_map(|shard| node.hosted(shard)).collect()
    }

    /// How many of the parked replicas lead.
    pub(crate) fn leaders(&self) -> usize {
        self.tables.lock().leads.len()
    }

    /// How many replicas are parked here.
    pub(crate) fn parked(&self) -> usize {
        let tables = self.tables.lock();
        tables.leads.len() + tables.follows.parked()
    }

    /// A stream to a peer is new: what was on the way to it may be lost.
    pub(crate) fn connected(&self, peer: BrokerId) {
        self.tables.lock().leads.forget(peer);
    }
}

fn wake(node: &Node, shards: impl IntoIterator<Item = ShardId>) {
    for hosted in shards.into_iter().filter_map(|shard| node.hosted(shard)) {
        hosted.idle.wake();
    }
}

/// With each pulse: wakes what must wake, parks what may park. Before the heartbeats of those that are awake.
pub(crate) fn round(node: &Node) {
    let parking = &node.links.parking;
    let now = parking.now();
    let must = {
        let mut tables = parking.tables.lock();
        bring_up_to_date(parking, &mut tables);
        let mut must = tables.leads.lapsed(now);
        for &shard in &must {
            tables.quiet.insert(shard, Quiet { term: 0, last_index: 0, since: now + AGAIN, touched: true });
        }
        must.extend(tables.follows.silent(now));
        must.append(&mut parking.must_wake.lock());
        must
    };
    wake(node, must);
    if parking.rounds.fetch_add(1, Ordering::Relaxed).is_multiple_of(AUDIT_ROUNDS) {
        audit(node);
    }
    let Some(after) = parking.after else { return };
    for hosted in parking.ticking(node).iter().filter(|hosted| hosted.shard != META_SHARD) {
        // Read for each: a placement that changes after this is seen by whoever looks for shards that are not settled.
        let Some(view) = node.meta.view() else { return };
        park_if_quiet(parking, &view, hosted, (now, after));
    }
}

/// A replica that does not tick although nobody keeps it parked would never stand for election again. None should be found.
fn audit(node: &Node) {
    let parking = &node.links.parking;
    let all = node.all_hosted();
    let lost: Vec<_> = {
        let tables = parking.tables.lock();
        let kept = |shard| tables.leads.keeps(shard) || tables.follows.keeps(shard);
        all.iter().filter(|hosted| hosted.idle.is_parked() && !kept(hosted.shard)).collect()
    };
    lost.into_iter().for_each(|hosted| hosted.idle.wake());
}

/// What woke by itself is awake in the tables too.
fn bring_up_to_date(parking: &Parking, tables: &mut Tables) {
    for shard in std::mem::take(&mut *parking.woken.lock()) {
        tables.leads.wake(shard);
        tables.follows.woken(shard);
    }
}

fn park_if_quiet(parking: &Parking, view: &MetaView, hosted: &HostedShard, (now, after): (Duration, Duration)) {
    let leadership = hosted.leadership();
    if !leadership.ready {
        return;
    }
    let used = hosted.idle.used.swap(false, Ordering::Relaxed);
    let metrics = hosted.raft.metrics();
    let metrics = metrics.borrow_watched();
    let here =
        Quiet { term: leadership.term, last_index: metrics.last_log_index.unwrap_or(0), since: now, touched: used };
    let mut tables = parking.tables.lock();
    let known = tables.quiet.entry(hosted.shard).or_insert(here);
    let same = known.term == here.term && known.last_index == here.last_index;
    if used || !same {
        let touched = used || known.touched && known.term == here.term;
        *known = Quiet { since: known.since.max(now), touched, ..here };
        return;
    }
    let after = if known.touched { after } else { after.min(UNTOUCHED) };
    if now.saturating_sub(known.since) < after || known.since > now {
        return;
    }
    let Some((park, others, voters)) = fit(hosted, &metrics, here) else { return };
    drop(metrics);
    if membership::is_settled(view, hosted) {
        known.since = now;
        hosted.idle.park();
        tables.leads.park(now, park, others, voters);
    }
}

/// Whether every replica has everything that was ever written, and has been heard of lately.
fn fit(hosted: &HostedShard, metrics: &RaftMetrics<TypeConfig>, here: Quiet) -> Option<(Park, Vec<BrokerId>, usize)> {
    let last = metrics.last_log_index?;
    let leads = metrics.state.is_leader() && metrics.vote.leader_id.term == here.term;
    let applied = metrics.last_applied.is_some_and(|id| id.index == last);
    let committed = metrics.local_committed.is_some_and(|id| id.index == last);
    let membership = metrics.membership_config.membership();
    let one_config = membership.get_joint_config().len() == 1 && membership.learner_ids().next().is_none();
    if !(leads && applied && committed && one_config) {
        return None;
    }
    let voters: Vec<ReplicaId> = membership.voter_ids().collect();
    let (matched, heard) = (metrics.replication.as_ref()?, metrics.heartbeat.as_ref()?);
    let has_all = |id: &ReplicaId| {
        matched.get(id).copied().flatten().is_some_and(|id| id.index == last)
            && heard.get(id).cloned().flatten().is_some_and(|at| at.elapsed() < LEASE)
    };
    let others: Vec<ReplicaId> = voters.iter().filter(|id| **id != hosted.own).copied().collect();
    if others.len() + 1 != voters.len() || !others.iter().all(has_all) {
        return None;
    }
    let park = Park { shard: hosted.shard, term: here.term, last_index: last };
    Some((park, others.into_iter().map(|id| id.broker).collect(), voters.len()))
}

/// Tells every peer which shards it is to keep parked, if there are any. After [`round`].
pub(crate) fn tell(node: &Arc<Node>) {
    let parking = &node.links.parking;
    for peer in node.links.peers() {
        let told = parking.tables.lock().leads.tell(parking.now(), peer);
        let Some(told) = told else { continue };
        let asked = node.clone();
        let mut asking = Box::pin(async move { ask(&asked, peer, told).await });
        // Polled here once, so that messages are queued in the order of their rounds.
        if (&mut asking).now_or_never().is_none() {
            node.spawn(asking);
        }
    }
}

async fn ask(node: &Node, peer: BrokerId, told: Told) {
    let Some(link) = node.links.link(peer, Lane::Control) else { return };
    let replica = |broker| ReplicaId { broker, incarnation: Incarnation(0) };
    let route = Route { shard: META_SHARD, from: replica(node.broker), to: replica(peer) };
    let number = |shard: ShardId| shard.0;
    let lead = |park: Park| {
        let leader = node.hosted(park.shard).map_or(0, |hosted| hosted.own.to_u64());
        internal::Park { shard: park.shard.0, term: park.term, last_index: park.last_index, leader }
    };
    let message = Message::Parked(internal::Parked {
        list: told.list,
        round: told.round,
        parks: told.parks.into_iter().map(lead).collect(),
        wakes: told.wakes.into_iter().map(number).collect(),
        digest: told.digest,
    });
    let answer = tokio::time::timeout(LEASE, link.ask(route, message)).await;
    match answer {
        Ok(Ok(Message::ParkedAnswer(answer))) => {
            let internal::ParkedAnswer { list, round, agreed, withdrawn } = answer;
            let withdrawn = withdrawn.into_iter().map(ShardId).collect();
            let answer = Confirmed { list, round, agreed, withdrawn };
            node.links.parking.tables.lock().leads.answered(peer, &answer);
        }
        // The stream is gone, and the next one begins with a new list; or the peer knows nothing of parking.
        Ok(Err(LinkError::NotConnected(_) | LinkError::Broken(_) | LinkError::Refused(..)) | Ok(_)) | Err(_) => {}
    }
}

/// Work that a peer's message asks for; what it says has been taken note of already, in the order of messages.
pub(crate) fn told(
    node: &Arc<Node>,
    leader: BrokerId,
    message: internal::Parked,
) -> impl Future<Output = Message> + use<> {
    let node = node.clone();
    let internal::Parked { list, round, parks, wakes, digest } = message;
    let leaders: HashMap<ShardId, u64> = parks.iter().map(|park| (ShardId(park.shard), park.leader)).collect();
    let parks = parks.iter();
    let parks = parks.map(|p| Park { shard: ShardId(p.shard), term: p.term, last_index: p.last_index }).collect();
    let told = Told { list, round, parks, wakes: wakes.into_iter().map(ShardId).collect(), digest };
    let todo = {
        let parking = &node.links.parking;
        let (now, mut tables) = (parking.now(), parking.tables.lock());
        bring_up_to_date(parking, &mut tables);
        tables.follows.told(now, leader, &told)
    };
    node.links.parking.must_wake.lock().extend(todo.wake);
    async move {
        let parking = &node.links.parking;
        let checks = stream::iter(todo.park).map(|park| {
            let leader = leaders.get(&park.shard).map(|&id| ReplicaId::from_u64(id));
            let node = &node;
            async move { (park.shard, follow(node, park, leader).await) }
        });
        let mut checks = checks.buffer_unordered(CHECKS_AT_ONCE);
        while let Some((shard, parked)) = checks.next().await {
            let kept = parking.tables.lock().follows.checked(leader, (list, round), shard, parked);
            if !kept {
                wake(&node, [shard]);
            }
        }
        let Confirmed { list, round, agreed, withdrawn } = parking.tables.lock().follows.confirm(leader, list, round);
        let withdrawn = withdrawn.into_iter().map(|shard| shard.0).collect();
        Message::ParkedAnswer(internal::ParkedAnswer { list, round, agreed, withdrawn })
    }
}

/// Parks a replica that follows, if it has what its leader says. Votes are refused already: what came before is in the
/// state that is looked at.
async fn follow(node: &Node, park: Park, leader: Option<ReplicaId>) -> bool {
    let (Some(hosted), Some(leader)) = (node.hosted(park.shard), leader) else { return false };
    hosted.idle.park();
    let follows = hosted.raft.with_raft_state(move |state| {
        let index =
            |id: Option<&stentor_raft_store::types::RaftLogId>| id.is_some_and(|id| id.index == park.last_index);
        let Vote { leader_id, committed } = state.vote_ref();
        let of_leader = *committed && leader_id.term == park.term && leader_id.voted_for == leader;
        let follower = state.server_state == ServerState::Follower;
        of_leader && follower && index(state.log_ids.last()) && index(state.local_committed())
    });
    follows.await.unwrap_or(false)
}

/// For whoever takes the leadership away on purpose: returns when the others have heard that the shards are awake, and none
/// of them parks in the next moments. One that has woken by itself a moment ago is not known to be awake either.
pub(crate) async fn settle(node: &Node, hosted: impl IntoIterator<Item = &HostedShard>) {
    for hosted in hosted {
        hosted.idle.wake();
        hosted.idle.used.store(true, Ordering::Relaxed);
    }
    if node.links.parking.after.is_some() {
        tokio::time::sleep(2 * HEARTBEAT).await;
    }
}
