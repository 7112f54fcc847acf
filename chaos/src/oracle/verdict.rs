//! The judgement: every invariant over a whole history. Must never pass what it has not looked at: a conversation with
//! acknowledgements that nobody read in the end is a violation too.

use serde::Serialize;

use super::{Case, History, Outcome};
use crate::invariants;

/// Violations of one invariant that are told in full; more are only counted.
const TOLD: usize = 20;

/// A promise that was broken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Violation {
    /// `I1` to `I10`.
    pub invariant: &'static str,
    /// Where.
    pub conversation: String,
    /// What was seen, as a sentence.
    pub what: String,
}

/// Collects violations of one invariant.
#[derive(Debug)]
pub struct Violations {
    invariant: &'static str,
    told: Vec<Violation>,
    more: u64,
}

impl Violations {
    /// None yet, of this invariant.
    pub fn of(invariant: &'static str) -> Self {
        Self { invariant, told: Vec::new(), more: 0 }
    }

    /// One more.
    pub fn add(&mut self, conversation: &str, what: impl FnOnce() -> String) {
        if self.told.len() >= TOLD {
            self.more += 1;
            return;
        }
        let conversation = conversation.to_owned();
        self.told.push(Violation { invariant: self.invariant, conversation, what: what() });
    }
}

/// How much was looked at: a verdict over nothing is worth nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Judged {
    /// Operations in all.
    pub operations: u64,
    /// Of them acknowledged.
    pub acknowledged: u64,
    /// Of them refused.
    pub refused: u64,
    /// Of them without an answer.
    pub unknown: u64,
    /// Events that stood in the end.
    pub events: u64,
    /// Streams.
    pub streams: u64,
    /// Items that came by them.
    pub deliveries: u64,
    /// Cursors that servers told.
    pub cursors: u64,
}

/// What came out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// At most 20 of each invariant.
    pub violations: Vec<Violation>,
    /// Those beyond.
    pub more_violations: u64,
    /// What it rests on.
    pub judged: Judged,
}

impl Verdict {
    /// Whether every promise was kept.
    pub fn is_clean(&self) -> bool {
        self.violations.is_empty()
    }

    /// The invariants that were broken, each once.
    pub fn broken(&self) -> Vec<&'static str> {
        let mut broken: Vec<_> = self.violations.iter().map(|v| v.invariant).collect();
        broken.dedup();
        broken
    }
}

/// Holds a history against every invariant.
pub fn judge(history: &History) -> Verdict {
    let case = Case::new(history);
    let (mut violations, mut more_violations) = (Vec::new(), 0);
    for (name, check) in invariants::ALL {
        let mut found = Violations::of(name);
        check(&case, &mut found);
        violations.extend(found.told);
        more_violations += found.more;
    }
    Verdict { violations, more_violations, judged: judged(history) }
}

fn judged(history: &History) -> Judged {
    let count = |of: fn(&Outcome<_>) -> bool| history.operations.iter().filter(|o| of(&o.outcome)).count() as u64;
    Judged {
        operations: history.operations.len() as u64,
        acknowledged: count(|outcome| matches!(outcome, Outcome::Acknowledged(_))),
        refused: count(|outcome| matches!(outcome, Outcome::Refused(_))),
        unknown: count(|outcome| *outcome == Outcome::Unknown),
        events: history.finals.iter().map(|last| last.head).sum(),
        streams: history.streams.len() as u64,
        deliveries: history.streams.iter().map(|stream| stream.items.len() as u64).sum(),
        cursors: history.seen.len() as u64,
    }
}
