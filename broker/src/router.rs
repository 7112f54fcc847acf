//! Carries this broker's own calls to whoever leads the shard, here or elsewhere. Must never propose twice what is not
//! safe to propose twice: when the fate of such a call is unknown, the caller is told so.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use rand::Rng;
use stentor_engine::{effect::Outcome, limits};
use stentor_proto::{
    Bytes,
    ids::{BrokerId, ShardId},
    internal::{
        HeadsDone, LookupDone, NotLeader, Propose, ReadDone, broker_frame::Frame as In, gateway_frame::Frame as Out,
        lookup_done, proposed, read_done,
    },
    reason::Reason,
    v1::Refusal,
};
use tokio::time::Instant;

use crate::{
    batcher::{Answer, NotProposed},
    calls::{Calls, NoAnswer},
    gateway_service::{self, Unfit, checked},
    node::Node,
};

/// The calls to all other brokers.
pub(crate) struct Peers(pub(crate) BTreeMap<BrokerId, Arc<Calls>>);

impl Peers {
    /// Whoever waits for an answer learns that none will come.
    pub(crate) fn close(&self) {
        self.0.values().for_each(|calls| calls.broken());
    }
}

/// Whether a command may be proposed again when nobody knows whether it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Retry {
    /// It has a number or a key, or repeating it changes nothing.
    Always,
    /// Only when it was certainly not proposed.
    OnlyUnsent,
}

/// The shortest and the longest pause between two attempts.
const PAUSE: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(100));

/// One call's search for a leader.
struct Search<'a> {
    node: &'a Node,
    shard: ShardId,
    hint: Option<BrokerId>,
    attempt: usize,
    pause: Duration,
    deadline: Instant,
}

impl<'a> Search<'a> {
    fn new(node: &'a Node, shard: ShardId) -> Self {
        let deadline = Instant::now() + Duration::from_millis(limits::CALL_PATIENCE_MS);
        Self { node, shard, hint: None, attempt: 0, pause: PAUSE.0, deadline }
    }

    /// Whom to ask now.
    fn target(&mut self) -> Option<BrokerId> {
        self.attempt += 1;
        if let Some(hint) = self.hint.take() {
            return Some(hint);
        }
        if let Some(hosted) = self.node.hosted(self.shard) {
            let known = hosted.leadership();
            if known.leads {
                return Some(self.node.broker);
            }
            if let Some(leader) = known.elsewhere() {
                return Some(leader);
            }
        }
        let view = self.node.meta.view()?;
        let replicas = view.slots.replicas(self.shard);
        replicas.get(self.attempt % replicas.len().max(1)).map(|replica| replica.broker)
    }

    /// The target could not; perhaps it said who can. False when patience is at its end.
    async fn next(&mut self, hint: Option<BrokerId>) -> bool {
        // A hint is followed at once the first time; later two brokers may be naming each other.
        self.hint = hint.filter(|_| self.attempt < 3);
        if self.hint.is_none() {
            tokio::time::sleep(self.pause.mul_f64(self.node.host.rng().random_range(0.5..1.0))).await;
            self.pause = (self.pause * 2).min(PAUSE.1);
        }
        Instant::now() < self.deadline && !self.node.stop.is_cancelled()
    }
}

/// Proposes a command to the shard's leader and waits for its outcome. A refusal of `apply` is an outcome here.
pub(crate) async fn propose(node: &Node, shard: ShardId, command: Bytes, retry: Retry) -> Result<Outcome, Refusal> {
    first(propose_run(node, shard, command, retry).await?)
}

fn first(outcomes: Vec<Outcome>) -> Result<Outcome, Refusal> {
    outcomes.into_iter().next().ok_or_else(|| Reason::OutcomeUnknown.refusal())
}

/// The same of a command with several outcomes.
pub(crate) async fn propose_run(
    node: &Node,
    shard: ShardId,
    command: Bytes,
    retry: Retry,
) -> Result<Vec<Outcome>, Refusal> {
    let mut search = Search::new(node, shard);
    let mut fate = Fate::Unsent;
    loop {
        let attempt = attempt(node, search.target(), shard, &command).await;
        let hint = match attempt.map_err(|refusal| fate.tell(refusal))? {
            Ok(outcomes) => return Ok(outcomes),
            Err(NotProposed::Overloaded) => return Err(fate.tell(Reason::Overloaded.refusal())),
            Err(NotProposed::NotLeader { leader, .. }) => leader,
            Err(NotProposed::Unknown { leader }) => {
                fate = Fate::Unknown;
                if retry == Retry::OnlyUnsent {
                    return Err(Reason::OutcomeUnknown.refusal());
                }
                leader
            }
        };
        if !search.next(hint).await {
            return Err(fate.tell(Reason::Unavailable.refusal()));
        }
    }
}

/// What is known of a command's attempts so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// None can have been applied.
    Unsent,
    /// One may have been.
    Unknown,
}

impl Fate {
    /// A refusal of the last attempt says nothing of an earlier one that may have been applied.
    fn tell(self, refusal: Refusal) -> Refusal {
        match self {
            Self::Unsent => refusal,
            Self::Unknown => Reason::OutcomeUnknown.refusal(),
        }
    }
}

/// Proposes a command where the shard's leader is said to be, once and nowhere else: for commands that should not be
/// carried out later than they were asked for.
///
/// # Errors
/// `OUTCOME_UNKNOWN` when the leader was lost with it; with any other reason nothing was proposed.
pub(crate) async fn propose_once(node: &Node, shard: ShardId, command: Bytes) -> Result<Outcome, Refusal> {
    let target = Search::new(node, shard).target();
    first(attempt(node, target, shard, &command).await?.map_err(told_once)?)
}

fn told_once(not: NotProposed) -> Refusal {
    let reason = match not {
        NotProposed::NotLeader { .. } => Reason::Unavailable,
        NotProposed::Overloaded => Reason::Overloaded,
        NotProposed::Unknown { .. } => Reason::OutcomeUnknown,
    };
    reason.refusal()
}

async fn attempt(node: &Node, target: Option<BrokerId>, shard: ShardId, command: &Bytes) -> Result<Answer, Refusal> {
    let nobody = NotProposed::NotLeader { leader: None, retry_here: false };
    let Some(target) = target else { return Ok(Err(nobody)) };
    if target == node.broker {
        return match checked(node, shard, command) {
            Ok((hosted, outcomes)) => Ok(hosted.proposer.call(command.clone(), outcomes).await),
            Err(Unfit::NotHere) => Ok(Err(nobody)),
            Err(Unfit::Refused(reason)) => Err(reason.refusal()),
        };
    }
    let Some(calls) = node.peers.0.get(&target) else { return Ok(Err(nobody)) };
    let placement_version = node.meta.view().map_or(0, |view| view.version());
    let make = |id| Out::Propose(Propose { id, shard: shard.0, placement_version, command: command.clone() });
    match calls.call(make).await {
        Ok(In::Proposed(done)) => match done.result {
            Some(proposed::Result::Outcome(outcome)) => Ok(Ok(vec![Outcome::from_proto(&outcome)])),
            Some(proposed::Result::Outcomes(outcomes)) => {
                Ok(Outcome::from_spans(&outcomes).ok_or(NotProposed::Unknown { leader: None }))
            }
            Some(proposed::Result::NotLeader(not)) if not.unknown => {
                Ok(Err(NotProposed::Unknown { leader: named(&not) }))
            }
            Some(proposed::Result::NotLeader(not)) => {
                Ok(Err(NotProposed::NotLeader { leader: named(&not), retry_here: not.retry_here }))
            }
            Some(proposed::Result::Refusal(refusal)) => Err(refusal),
            // An answer that this version does not know is none.
            None => Ok(Err(NotProposed::Unknown { leader: None })),
        },
        Ok(_) => Ok(Err(NotProposed::Unknown { leader: None })),
        Err(NoAnswer::NotSent) => Ok(Err(nobody)),
        Err(NoAnswer::Unknown) => Ok(Err(NotProposed::Unknown { leader: None })),
    }
}

fn named(not: &NotLeader) -> Option<BrokerId> {
    (not.leader != 0).then_some(BrokerId(not.leader))
}

/// Asks the shard's leader; reads may be asked as often as needed.
async fn ask(node: &Node, shard: ShardId, make: impl Fn(u64) -> Out + Sync) -> Result<In, Refusal> {
    let mut search = Search::new(node, shard);
    loop {
        let answer = match search.target() {
            Some(target) if target == node.broker => Some(gateway_service::call(node, make(0)).await),
            Some(target) => match node.peers.0.get(&target) {
                Some(calls) => calls.call(&make).await.ok(),
                None => None,
            },
            None => None,
        };
        let hint = match answer {
            Some(answer) => match elsewhere(&answer) {
                Some(not) => named(not),
                None => return Ok(answer),
            },
            None => None,
        };
        if !search.next(hint).await {
            return Err(Reason::Unavailable.refusal());
        }
    }
}

fn elsewhere(answer: &In) -> Option<&NotLeader> {
    match answer {
        In::Read(ReadDone { result: Some(read_done::Result::NotLeader(not)), .. }) => Some(not),
        In::Heads(HeadsDone { not_leader: Some(not), .. }) => Some(not),
        In::Lookup(LookupDone { result: Some(lookup_done::Result::NotLeader(not)), .. }) => Some(not),
        _ => None,
    }
}

/// One page.
pub(crate) async fn read(
    node: &Node,
    read: stentor_proto::internal::Read,
) -> Result<stentor_proto::v1::HistoryResponse, Refusal> {
    match ask(node, ShardId(read.shard), |id| Out::Read(stentor_proto::internal::Read { id, ..read.clone() })).await? {
        In::Read(ReadDone { result: Some(read_done::Result::Page(page)), .. }) => Ok(page),
        In::Read(ReadDone { result: Some(read_done::Result::Refusal(refusal)), .. }) => Err(refusal),
        _ => Err(Reason::Internal.refusal()),
    }
}

/// Where streams begin.
pub(crate) async fn heads(
    node: &Node,
    heads: stentor_proto::internal::Heads,
) -> Result<Vec<stentor_proto::v1::ConversationState>, Refusal> {
    let shard = ShardId(heads.shard);
    match ask(node, shard, |id| Out::Heads(stentor_proto::internal::Heads { id, ..heads.clone() })).await? {
        In::Heads(HeadsDone { refusal: Some(refusal), .. }) => Err(refusal),
        In::Heads(done) => Ok(done.states),
        _ => Err(Reason::Internal.refusal()),
    }
}

/// Reads of a user's shard, or one conversation's description.
pub(crate) async fn lookup(
    node: &Node,
    lookup: stentor_proto::internal::Lookup,
) -> Result<lookup_done::Result, Refusal> {
    let shard = ShardId(lookup.shard);
    match ask(node, shard, |id| Out::Lookup(stentor_proto::internal::Lookup { id, ..lookup.clone() })).await? {
        In::Lookup(LookupDone { result: Some(lookup_done::Result::Refusal(refusal)), .. }) => Err(refusal),
        In::Lookup(LookupDone { result: Some(result), .. }) => Ok(result),
        _ => Err(Reason::Internal.refusal()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_that_is_proposed_once_is_never_refused_as_if_nothing_had_happened() {
        let not_leader = NotProposed::NotLeader { leader: None, retry_here: true };
        assert_eq!(told_once(not_leader).reason, "UNAVAILABLE");
        assert_eq!(told_once(NotProposed::Overloaded).reason, "OVERLOADED");
        let unknown = told_once(NotProposed::Unknown { leader: Some(BrokerId(1)) });
        assert_eq!((unknown.reason.as_str(), unknown.retryable), ("OUTCOME_UNKNOWN", true));
    }

    #[test]
    fn once_an_attempt_may_have_been_applied_no_refusal_says_that_nothing_happened() {
        for reason in [Reason::Unavailable, Reason::Overloaded, Reason::Internal] {
            assert_eq!(Fate::Unsent.tell(reason.refusal()), reason.refusal());
            let told = Fate::Unknown.tell(reason.refusal());
            assert_eq!((told.reason.as_str(), told.retryable), ("OUTCOME_UNKNOWN", true));
        }
    }
}
