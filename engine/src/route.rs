//! The gateway's way to a shard: whom to ask, and the ordered pipe of proposals that have no answer yet. Must never
//! send a later proposal of the pipe where an earlier one was not sent, and never drop one without an answer.
//!
//! Exactly-once is not made here but in `apply` (send numbers and client ids): the pipe may send a proposal as often
//! as it likes, as long as the order within the pipe stays.

use std::collections::VecDeque;

use stentor_proto::{Bytes, ids::BrokerId};

/// The pipe has no room: the caller answers `OVERLOADED`, which is retryable; nothing changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("too many unanswered proposals for one shard")]
pub struct Full;

/// Bounds of one pipe.
#[derive(Debug, Clone, Copy)]
pub struct PipeLimits {
    /// Unanswered proposals.
    pub entries: usize,
    /// Bytes of their commands.
    pub bytes: usize,
}

/// What is known of a proposal that got no answer in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expired {
    /// It never went out: nothing happened.
    Unsent,
    /// It may have been applied, or still be.
    Unknown,
}

#[derive(Debug)]
struct Entry<T> {
    /// Of the last attempt; ascending along the sent part of the pipe.
    id: u64,
    pushed_ms: u64,
    /// It went out on the present route.
    was_sent: bool,
    /// It went out on an earlier route, and nobody said that it was not proposed there.
    doubt: bool,
    command: Bytes,
    /// `None`: answered, only holding its place until what stands before it is answered too.
    tag: Option<T>,
}

/// Whom an answer is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answered<T> {
    /// As pushed.
    pub tag: T,
    /// An earlier attempt may have been applied: a refusal of this one does not say that nothing happened.
    pub doubt: bool,
}

/// The unanswered proposals for one shard, oldest first. `T` says whom an answer is for.
#[derive(Debug)]
pub struct Pipe<T> {
    entries: VecDeque<Entry<T>>,
    /// How many of the front were sent on the present route.
    sent: usize,
    open: usize,
    bytes: usize,
    next_id: u64,
    limits: PipeLimits,
}

impl<T> Pipe<T> {
    /// An empty pipe. Ids count from `first_id`.
    pub fn new(first_id: u64, limits: PipeLimits) -> Self {
        Self { entries: VecDeque::new(), sent: 0, open: 0, bytes: 0, next_id: first_id, limits }
    }

    /// Whether a command of this length may be pushed. One is always let in, whatever its size.
    pub fn has_room(&self, command_bytes: usize) -> bool {
        let fits = self.bytes + command_bytes <= self.limits.bytes && self.open < self.limits.entries;
        fits || self.open == 0
    }

    /// Appends a proposal; it goes out with the next [`Self::send`].
    pub fn push(&mut self, command: Bytes, tag: T, now_ms: u64) -> Result<(), Full> {
        if !self.has_room(command.len()) {
            return Err(Full);
        }
        self.bytes += command.len();
        self.open += 1;
        self.entries.push_back(Entry {
            id: 0,
            pushed_ms: now_ms,
            was_sent: false,
            doubt: false,
            command,
            tag: Some(tag),
        });
        Ok(())
    }

    /// Sends what was not sent on this route, in order. Every attempt has an id of its own, so that an answer to an
    /// abandoned attempt meets nobody.
    pub fn send(&mut self, mut out: impl FnMut(u64, &Bytes)) {
        for entry in self.entries.range_mut(self.sent..) {
            (entry.id, entry.was_sent) = (self.next_id, true);
            self.next_id += 1;
            out(entry.id, &entry.command);
        }
        self.sent = self.entries.len();
    }

    /// The answer to an attempt: whom it is for. `None` for an abandoned attempt, or one that was answered.
    pub fn answered(&mut self, id: u64) -> Option<Answered<T>> {
        let at = self.find(id)?;
        let entry = self.entries.get_mut(at)?;
        let answered = Answered { tag: entry.tag.take()?, doubt: entry.doubt };
        self.bytes -= std::mem::take(&mut entry.command).len();
        self.open -= 1;
        self.drop_answered_front();
        Some(answered)
    }

    /// Whether this id is an unanswered attempt on the present route.
    pub fn awaits(&self, id: u64) -> bool {
        self.find(id).and_then(|at| self.entries.get(at)).is_some_and(|entry| entry.tag.is_some())
    }

    /// The answer to an attempt: it was not proposed, and goes out again after the [`Self::reset`] that follows.
    pub fn not_proposed(&mut self, id: u64) {
        if let Some(entry) = self.find(id).and_then(|at| self.entries.get_mut(at)) {
            entry.was_sent = false;
        }
    }

    /// The route changed: everything that has no answer will be sent again, in order.
    pub fn reset(&mut self) {
        self.entries.retain(|entry| entry.tag.is_some());
        // An id of an abandoned attempt must not be found, nor disturb the order of ids among the sent ones.
        for entry in &mut self.entries {
            entry.id = 0;
            entry.doubt |= std::mem::take(&mut entry.was_sent);
        }
        self.sent = 0;
    }

    /// Gives up on proposals that were pushed at or before `before_ms`, oldest first, and says what is known of each:
    /// what was sent may have been applied or still be. Their senders are told to try again, which exactly-once makes
    /// harmless.
    pub fn expire(&mut self, before_ms: u64, mut gone: impl FnMut(T, Expired)) {
        while self.entries.front().is_some_and(|entry| entry.pushed_ms <= before_ms) {
            let Some(entry) = self.entries.pop_front() else { return };
            self.sent = self.sent.saturating_sub(1);
            self.bytes -= entry.command.len();
            if let Some(tag) = entry.tag {
                self.open -= 1;
                gone(tag, if entry.was_sent || entry.doubt { Expired::Unknown } else { Expired::Unsent });
            }
        }
    }

    /// When the oldest unanswered proposal was pushed.
    pub fn oldest_ms(&self) -> Option<u64> {
        self.entries.front().map(|entry| entry.pushed_ms)
    }

    /// How many have no answer.
    pub fn len(&self) -> usize {
        self.open
    }

    /// Whether everything is answered.
    pub fn is_empty(&self) -> bool {
        self.open == 0
    }

    fn find(&self, id: u64) -> Option<usize> {
        let at = self.entries.partition_point(|entry| entry.id != 0 && entry.id < id);
        (at < self.sent && self.entries.get(at)?.id == id).then_some(at)
    }

    fn drop_answered_front(&mut self) {
        while self.entries.front().is_some_and(|entry| entry.tag.is_none()) {
            self.entries.pop_front();
            self.sent -= 1;
        }
    }
}

/// The shortest and the longest pause before another replica is asked, in ms.
const PAUSE_MS: (u64, u64) = (10, 500);

/// So often in a row a broker that says that it leads, and cannot answer yet, is asked again: a new leader is ready after
/// one fsync of a quorum, one that is cut off from its followers never is.
const PATIENCE: u32 = 5;

/// Whom to ask for a shard: the leader as far as anybody said, else one replica after the other.
#[derive(Debug, Clone, Default)]
pub struct Route {
    replicas: Vec<BrokerId>,
    target: Option<BrokerId>,
    failures: u32,
    /// How often in a row the target has said that it leads and cannot answer yet.
    claims: u32,
}

impl Route {
    /// The placement says who holds the shard and, perhaps, who leads it. True when the target changed.
    pub fn placed(&mut self, replicas: Vec<BrokerId>, leader: Option<BrokerId>) -> bool {
        let before = self.target;
        self.replicas = replicas;
        let stays = self.failures == 0 && before.is_some_and(|target| self.replicas.contains(&target));
        if !stays {
            self.claims = 0;
            self.target = leader.filter(|leader| self.replicas.contains(leader)).or(self.replicas.first().copied());
        }
        self.target != before
    }

    /// Whom to ask now.
    pub fn target(&self) -> Option<BrokerId> {
        self.target
    }

    /// The target answered: it leads.
    pub fn confirmed(&mut self) {
        (self.failures, self.claims) = (0, 0);
    }

    /// `from` cannot answer; perhaps it said who leads, and that may be itself: it is asked again then, unless it has
    /// said so [`PATIENCE`] times. Gives the pause before the next attempt, in ms; `None` when `from` is not the target
    /// any more, so that late answers move nothing.
    pub fn not_leader(&mut self, from: BrokerId, leader: Option<BrokerId>) -> Option<u64> {
        if self.target != Some(from) {
            return None;
        }
        let leader = leader.filter(|leader| self.replicas.contains(leader));
        if leader == Some(from) && self.claims < PATIENCE {
            self.claims += 1;
            return Some(PAUSE_MS.0 << (self.claims - 1));
        }
        let leader = leader.filter(|leader| *leader != from);
        (self.target, self.claims) = (leader.or_else(|| self.after(from)), 0);
        Some(self.pause(leader.is_some()))
    }

    /// The target can't be reached or went silent. Gives the pause before the next attempt, in ms.
    pub fn lost(&mut self, from: BrokerId) -> Option<u64> {
        if self.target != Some(from) {
            return None;
        }
        (self.target, self.claims) = (self.after(from), 0);
        Some(self.pause(false))
    }

    fn after(&self, broker: BrokerId) -> Option<BrokerId> {
        let at = self.replicas.iter().position(|&b| b == broker).map_or(0, |at| at + 1);
        self.replicas.get(at % self.replicas.len().max(1)).copied()
    }

    /// The first redirect is followed at once; afterwards the pauses grow, so that two brokers that name each other
    /// during an election are not asked in a circle at full speed.
    fn pause(&mut self, redirected: bool) -> u64 {
        let failures = self.failures;
        self.failures = self.failures.saturating_add(1);
        if redirected && failures == 0 {
            return 0;
        }
        (PAUSE_MS.0 << failures.min(10)).min(PAUSE_MS.1)
    }
}

#[cfg(test)]
#[path = "route_tests.rs"]
mod tests;
