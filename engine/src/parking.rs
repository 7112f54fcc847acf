//! Parking: what a leader and its followers remember of shards whose replicas have stopped ticking because nothing happens
//! there. Must never let a leader count on a follower that may have voted for another within the last lease.
//!
//! A leader tells each peer, with the one heartbeat of their pair, which shards it keeps parked there: changes, and a
//! digest of the whole list. The peer confirms, naming the shards that it has woken. What a confirmation is worth: from when
//! the confirmed message was *sent*, for one lease, that peer helps nobody to another leadership of a parked shard, since it
//! refuses votes and asks for none (`Follows::refuses`) from when it parks until one lease after it has withdrawn. So a
//! leader with confirmations of a quorum leads, though no replica of the shard has said a word.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use stentor_proto::ids::{BrokerId, ShardId};
use twox_hash::XxHash3_64;

/// How long things may take. Times are elapsed times of one process, from any beginning.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// How long a confirmation is worth something.
    pub lease: Duration,
    /// How long a peer may take to park a shard.
    pub answer: Duration,
    /// After this long without a word, either side wakes what it shares with the other. Below `lease`.
    pub silence: Duration,
}

/// A shard that is to be parked under a leader whose log ends there, committed and applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Park {
    /// The shard.
    pub shard: ShardId,
    /// The leader's term.
    pub term: u64,
    /// The last entry of its log.
    pub last_index: u64,
}

/// What a leader tells a peer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Told {
    /// Which list: another number, in whatever direction, is another list, which begins empty.
    pub list: u64,
    /// Counts the messages of a list, from 1.
    pub round: u64,
    /// Added to it.
    pub parks: Vec<Park>,
    /// Taken out of it.
    pub wakes: Vec<ShardId>,
    /// Of the list after that ([`digest_of`] of each, all XORed).
    pub digest: u64,
}

/// What a peer answers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Confirmed {
    /// As it was told.
    pub list: u64,
    /// As it was told.
    pub round: u64,
    /// It has the same list. Otherwise it has none any more.
    pub agreed: bool,
    /// Those of the list that are not parked here, or no more.
    pub withdrawn: Vec<ShardId>,
}

/// Shards that one message may add; more are added by the next ones.
pub const PARKS_AT_ONCE: usize = 1_024;
/// Shards that one leader may keep parked in one process: more than a cluster can have.
const PARKED_MOST: usize = 65_536;
/// Shards that wake at once because somebody is silent or new: thousands that tick and ask for votes at the same moment
/// would keep whoever was slow from coming back. A shard that stays parked longer than it is led loses nothing but time.
const WAKES_AT_ONCE: usize = 256;
/// Messages to one peer that may be without an answer and still be counted.
const ROUNDS_REMEMBERED: usize = 16;

/// A shard's part in the digest of a list.
pub fn digest_of(shard: ShardId, term: u64) -> u64 {
    let mut bytes = [0; 12];
    bytes[..4].copy_from_slice(&shard.0.to_le_bytes());
    bytes[4..].copy_from_slice(&term.to_le_bytes());
    XxHash3_64::oneshot(&bytes)
}

/// The leader's half: every shard that this process leads and keeps parked.
#[derive(Debug)]
pub struct Leads {
    rules: Rules,
    next_list: u64,
    shards: BTreeMap<ShardId, Kept>,
    /// Not confirmed by all yet.
    pending: BTreeSet<ShardId>,
    /// Those whose peer may have missed something: they wake soon.
    doubtful: BTreeSet<ShardId>,
    peers: BTreeMap<BrokerId, List>,
}

#[derive(Debug)]
struct Kept {
    since: Duration,
    others: Vec<BrokerId>,
    /// How many of the others make a quorum with this one.
    needed: usize,
}

/// What one peer was told.
#[derive(Debug, Default)]
struct List {
    number: u64,
    round: u64,
    /// With its term, and the round that told it; 0: still to be told.
    shards: BTreeMap<ShardId, (Park, u64)>,
    untold: VecDeque<ShardId>,
    wakes: Vec<ShardId>,
    digest: u64,
    sent: VecDeque<(u64, Duration)>,
    /// The newest round that was confirmed, and when it was sent.
    confirmed: Option<(u64, Duration)>,
}

impl List {
    fn take_out(&mut self, shard: ShardId) {
        match self.shards.remove(&shard) {
            Some((park, told)) if told > 0 => {
                self.digest ^= digest_of(shard, park.term);
                self.wakes.push(shard);
            }
            _ => {}
        }
    }

    /// When the newest message was sent after which the peer said that the shard is parked there.
    fn confirmed_at(&self, shard: ShardId) -> Option<Duration> {
        let (round, at) = self.confirmed?;
        self.shards.get(&shard).filter(|(_, told)| (1..=round).contains(told)).map(|_| at)
    }

    fn tell(&mut self, now: Duration) -> Option<Told> {
        if self.shards.is_empty() && self.wakes.is_empty() {
            return None;
        }
        self.round += 1;
        let mut parks = Vec::new();
        while parks.len() < PARKS_AT_ONCE {
            let Some(shard) = self.untold.pop_front() else { break };
            if let Some((park, told)) = self.shards.get_mut(&shard).filter(|(_, told)| *told == 0) {
                *told = self.round;
                self.digest ^= digest_of(shard, park.term);
                parks.push(*park);
            }
        }
        self.sent.push_back((self.round, now));
        if self.sent.len() > ROUNDS_REMEMBERED {
            self.sent.pop_front();
        }
        let (list, round, digest) = (self.number, self.round, self.digest);
        Some(Told { list, round, parks, wakes: std::mem::take(&mut self.wakes), digest })
    }
}

impl Leads {
    /// Nothing is parked yet. `first_list` must differ from what an earlier process of this broker used.
    pub fn new(rules: Rules, first_list: u64) -> Self {
        let (shards, peers) = (BTreeMap::new(), BTreeMap::new());
        let (pending, doubtful) = (BTreeSet::new(), BTreeSet::new());
        Self { rules, next_list: first_list, shards, pending, doubtful, peers }
    }

    fn list(&mut self, peer: BrokerId) -> &mut List {
        let next = &mut self.next_list;
        self.peers.entry(peer).or_insert_with(|| {
            *next = next.wrapping_add(1);
            List { number: *next, ..List::default() }
        })
    }

    /// How many shards are kept parked.
    pub fn len(&self) -> usize {
        self.shards.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.shards.is_empty()
    }

    /// All that are kept parked, ascending.
    pub fn shards(&self) -> impl Iterator<Item = ShardId> {
        self.shards.keys().copied()
    }

    /// Whether the shard is kept parked.
    pub fn keeps(&self, shard: ShardId) -> bool {
        self.shards.contains_key(&shard)
    }

    /// The shard stops ticking here; the brokers with its other replicas are to follow. `voters`: how many it has in all.
    pub fn park(&mut self, now: Duration, park: Park, others: Vec<BrokerId>, voters: usize) {
        self.wake(park.shard);
        for peer in &others {
            let list = self.list(*peer);
            // A wake that was not told yet comes first within a message.
            list.shards.insert(park.shard, (park, 0));
            list.untold.push_back(park.shard);
        }
        if !others.is_empty() {
            self.pending.insert(park.shard);
        }
        self.shards.insert(park.shard, Kept { since: now, others, needed: voters / 2 });
    }

    /// The shard ticks again, here and soon there.
    pub fn wake(&mut self, shard: ShardId) {
        self.pending.remove(&shard);
        self.doubtful.remove(&shard);
        let Some(kept) = self.shards.remove(&shard) else { return };
        for peer in kept.others {
            if let Some(list) = self.peers.get_mut(&peer) {
                list.take_out(shard);
            }
        }
    }

    /// What to tell a peer now, if anything. Must be sent in this order, or [`Self::forget`] be called.
    pub fn tell(&mut self, now: Duration, peer: BrokerId) -> Option<Told> {
        self.peers.get_mut(&peer)?.tell(now)
    }

    /// A peer answered. What it has woken wakes here soon.
    pub fn answered(&mut self, peer: BrokerId, answer: &Confirmed) {
        let Some(list) = self.peers.get_mut(&peer).filter(|list| list.number == answer.list) else { return };
        if !answer.agreed {
            return self.forget(peer);
        }
        let Some(&(round, at)) = list.sent.iter().find(|(round, _)| *round == answer.round) else { return };
        list.sent.retain(|(sent, _)| *sent > round);
        if list.confirmed.is_none_or(|(newest, _)| newest < round) {
            list.confirmed = Some((round, at));
        }
        let told = |shard: &&ShardId| list.shards.get(shard).is_some_and(|(_, told)| (1..=round).contains(told));
        let withdrawn: Vec<ShardId> = answer.withdrawn.iter().filter(told).copied().collect();
        withdrawn.iter().for_each(|shard| _ = list.shards.get_mut(shard).map(|(_, told)| *told = u64::MAX));
        self.doubtful.extend(withdrawn);
        let Self { pending, shards, peers, .. } = self;
        pending.retain(|shard| {
            let confirmed = |peer| peers.get(peer).is_some_and(|list: &List| list.confirmed_at(*shard).is_some());
            shards.get(shard).is_some_and(|kept| !kept.others.iter().all(confirmed))
        });
    }

    /// A peer may have missed something: it is told a new list, which begins empty, and what it shares wakes soon.
    pub fn forget(&mut self, peer: BrokerId) {
        self.peers.remove(&peer);
        let with_peer = |(shard, kept): (&ShardId, &Kept)| kept.others.contains(&peer).then_some(*shard);
        self.doubtful.extend(self.shards.iter().filter_map(with_peer));
    }

    /// For how long this process leads the shard yet, as far as confirmations say.
    pub fn lease_left(&self, now: Duration, shard: ShardId) -> Duration {
        let Some(kept) = self.shards.get(&shard) else { return Duration::ZERO };
        if kept.needed == 0 {
            return self.rules.lease;
        }
        let confirmed = |peer| self.peers.get(peer).and_then(|list| list.confirmed_at(shard));
        let mut times: Vec<Duration> = kept.others.iter().filter_map(confirmed).collect();
        times.sort_unstable_by(|a, b| b.cmp(a));
        let since = times.get(kept.needed - 1).map(|at| now.saturating_sub(*at));
        since.map_or(Duration::ZERO, |since| self.rules.lease.saturating_sub(since))
    }

    /// The next shards that must wake, since a peer did not park them in time or is new, or a quorum has been silent. They
    /// wake here.
    #[must_use]
    pub fn lapsed(&mut self, now: Duration) -> Vec<ShardId> {
        let late = |shard: &&ShardId| {
            self.shards.get(shard).is_none_or(|kept| now.saturating_sub(kept.since) > self.rules.answer)
        };
        let mut woken: Vec<ShardId> = self.doubtful.iter().take(WAKES_AT_ONCE).copied().collect();
        woken.extend(self.pending.iter().filter(late).take(WAKES_AT_ONCE));
        let silent = |list: &List| {
            let heard = |(_, at): (u64, Duration)| now.saturating_sub(at) <= self.rules.silence;
            !list.shards.is_empty() && !list.confirmed.is_some_and(heard)
        };
        if self.peers.values().any(silent) {
            let least = self.rules.lease.saturating_sub(self.rules.silence);
            let lapsed = |shard: &&ShardId| !self.pending.contains(shard) && self.lease_left(now, **shard) < least;
            woken.extend(self.shards.keys().filter(lapsed).take(WAKES_AT_ONCE));
        }
        woken.iter().for_each(|&shard| self.wake(shard));
        woken
    }
}

/// The follower's half: every shard that others keep parked in this process.
#[derive(Debug)]
pub struct Follows {
    rules: Rules,
    lists: BTreeMap<BrokerId, Followed>,
    /// Until when no vote is given or asked for, by whom that was promised.
    gates: BTreeMap<(ShardId, BrokerId), Duration>,
    /// Parked under a list that is gone.
    orphans: BTreeSet<ShardId>,
}

#[derive(Debug, Default)]
struct Followed {
    number: u64,
    /// Of the last message.
    round: u64,
    digest: u64,
    heard: Duration,
    shards: BTreeMap<ShardId, (u64, State)>,
    /// All of them were parked when they were last looked at, and none has changed since.
    all_parked: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// It is being looked whether it can be parked, since this round. No votes from here on.
    Asked(u64),
    Parked,
    /// It ticks.
    Withdrawn,
}

/// What to do after a leader's message.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Todo {
    /// Look whether this replica has these logs, under this leader, and park them. Then say so to [`Follows::checked`].
    pub park: Vec<Park>,
    /// Let these tick soon: their leader's own message, which is on its way, had better come first.
    pub wake: Vec<ShardId>,
}

/// What becomes of a request for votes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    /// It must not be granted, nor be sent.
    pub refused: bool,
    /// The replica was parked and must tick again: it may have to grant one later.
    pub woke: bool,
}

impl Follows {
    /// Nothing is parked yet.
    pub fn new(rules: Rules) -> Self {
        Self { rules, lists: BTreeMap::new(), gates: BTreeMap::new(), orphans: BTreeSet::new() }
    }

    /// How many shards are parked.
    pub fn parked(&self) -> usize {
        let parked = |list: &Followed| list.shards.values().filter(|(_, state)| *state == State::Parked).count();
        self.lists.values().map(parked).sum()
    }

    /// Whether a replica may be parked: whoever finds another one parked must let it tick.
    pub fn keeps(&self, shard: ShardId) -> bool {
        let kept = |list: &Followed| list.shards.get(&shard).is_some_and(|(_, state)| *state != State::Withdrawn);
        self.orphans.contains(&shard) || self.lists.values().any(kept)
    }

    /// A leader's message came.
    #[must_use]
    pub fn told(&mut self, now: Duration, leader: BrokerId, told: &Told) -> Todo {
        let mut todo = Todo::default();
        if self.lists.get(&leader).is_some_and(|list| list.number != told.list) {
            self.drop_list(leader);
        }
        let list = self.lists.entry(leader).or_default();
        if told.round != list.round + 1 {
            // Something was lost, or comes late: what it takes out may have been added again since.
            self.drop_list(leader);
            return todo;
        }
        (list.number, list.round, list.heard) = (told.list, told.round, now);
        list.all_parked &= told.parks.is_empty();
        for shard in &told.wakes {
            if let Some((term, state)) = list.shards.remove(shard) {
                // Its leader has given it up itself and now counts on what Raft says. A message of an older list says
                // nothing of that.
                self.gates.remove(&(*shard, leader));
                list.digest ^= digest_of(*shard, term);
                todo.wake.extend((state != State::Withdrawn).then_some(*shard));
            }
        }
        for park in &told.parks {
            self.orphans.remove(&park.shard);
            if let Some((term, _)) = list.shards.insert(park.shard, (park.term, State::Asked(told.round))) {
                list.digest ^= digest_of(park.shard, term);
            }
            list.digest ^= digest_of(park.shard, park.term);
            todo.park.push(*park);
        }
        if list.digest != told.digest || list.shards.len() > PARKED_MOST {
            todo.park.clear();
            self.drop_list(leader);
        }
        todo
    }

    /// Whether a shard that a message wanted parked is. False: it must tick.
    #[must_use]
    pub fn checked(&mut self, leader: BrokerId, (list, round): (u64, u64), shard: ShardId, parked: bool) -> bool {
        let list = self.lists.get_mut(&leader).filter(|known| known.number == list);
        // What was asked since then has a check of its own.
        if let Some((_, state)) = list.and_then(|list| list.shards.get_mut(&shard))
            && *state == State::Asked(round)
        {
            // One that could not be parked was never confirmed: nobody counts on it.
            *state = if parked { State::Parked } else { State::Withdrawn };
        }
        parked && self.keeps(shard)
    }

    /// The answer to a message. It speaks for the last one of which everything was checked.
    pub fn confirm(&mut self, leader: BrokerId, list: u64, round: u64) -> Confirmed {
        let known = self.lists.get_mut(&leader).filter(|known| known.number == list);
        let Some(known) = known else { return Confirmed { list, round, ..Confirmed::default() } };
        if known.all_parked {
            return Confirmed { list, round: round.min(known.round), agreed: true, withdrawn: Vec::new() };
        }
        let unchecked = known.shards.values().filter_map(|(_, state)| match state {
            State::Asked(round) => Some(round.saturating_sub(1)),
            State::Parked | State::Withdrawn => None,
        });
        // A message that was not taken may be asked about after an older one was.
        let round = unchecked.min().unwrap_or(round).min(round).min(known.round);
        let awake = known.shards.iter().filter(|(_, (_, state))| *state == State::Withdrawn);
        let withdrawn: Vec<ShardId> = awake.map(|(shard, _)| *shard).collect();
        known.all_parked = known.shards.values().all(|(_, state)| *state == State::Parked);
        Confirmed { list, round, agreed: true, withdrawn }
    }

    /// The replica ticks again, for whatever reason.
    pub fn woken(&mut self, shard: ShardId) {
        self.orphans.remove(&shard);
        let Self { rules, lists, gates, .. } = self;
        for (leader, list) in lists {
            let until = list.kept_until(rules);
            if let Some((_, state)) = list.shards.get_mut(&shard).filter(|(_, state)| *state != State::Withdrawn) {
                *state = State::Withdrawn;
                list.all_parked = false;
                gates.insert((shard, *leader), until);
            }
        }
    }

    /// Whether votes for another leader of the shard must neither be given nor be asked for.
    #[must_use]
    pub fn refuses(&mut self, now: Duration, shard: ShardId) -> Asked {
        let woke = self.keeps(shard);
        self.woken(shard);
        let mut gates = self.gates.range((shard, BrokerId(0))..=(shard, BrokerId(u32::MAX)));
        Asked { refused: gates.any(|(_, until)| now < *until), woke }
    }

    /// The next shards that must tick again because their leader has been silent, or has begun anew; and forgets what is
    /// over.
    #[must_use]
    pub fn silent(&mut self, now: Duration) -> Vec<ShardId> {
        let Self { rules, lists, gates, orphans } = self;
        let mut woken: Vec<ShardId> = std::iter::from_fn(|| orphans.pop_first()).take(WAKES_AT_ONCE).collect();
        for (leader, list) in lists.iter_mut().filter(|(_, list)| now.saturating_sub(list.heard) > rules.silence) {
            let until = list.kept_until(rules);
            list.all_parked = false;
            let parked = list.shards.iter_mut().filter(|(_, (_, state))| *state != State::Withdrawn);
            for (shard, (_, state)) in parked.take(WAKES_AT_ONCE) {
                *state = State::Withdrawn;
                gates.insert((*shard, *leader), until);
                woken.push(*shard);
            }
        }
        gates.retain(|_, until| now < *until);
        woken
    }

    /// Forgets a leader's list. What was parked ticks again soon.
    fn drop_list(&mut self, leader: BrokerId) {
        let Some(list) = self.lists.remove(&leader) else { return };
        let until = list.kept_until(&self.rules);
        for (shard, _) in list.shards.into_iter().filter(|(_, (_, state))| *state != State::Withdrawn) {
            self.gates.insert((shard, leader), until);
            self.orphans.insert(shard);
        }
    }
}

impl Followed {
    /// Nothing is confirmed after a message but that message.
    fn kept_until(&self, rules: &Rules) -> Duration {
        self.heard + rules.lease
    }
}

#[cfg(test)]
#[path = "parking_tests.rs"]
mod tests;
