//! What a session knows of its user's list of conversations: the whole of it once, then only what changed, as far as
//! the head of the user's own stream says that something did. Must never think that it knows a change that it did not
//! read: whatever is lost on the way, the next head makes it look again.

use crate::limits;

/// A question for the list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ask {
    /// Only what changed after this seq of the user's own stream; 0: everything.
    pub changed_after: u64,
    /// Only conversations behind this one, in the order of the list.
    pub after: String,
}

/// What a page brought about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listed {
    /// There is more of it, or something changed meanwhile.
    Ask(Ask),
    /// The list is known up to the head that is known.
    Done,
    /// It is behind a head that it heard of, and the list says nothing new: wait until [`Listing::due_ms`].
    Rest,
}

#[derive(Debug, Default)]
enum State {
    /// Nobody wants the list.
    #[default]
    Off,
    /// Known up to the head.
    Idle,
    /// A page was asked for. `upto` is the head that the round's first page was read at.
    Asked { ask: Ask, upto: Option<u64> },
    /// Asked again from the start of the round at this time.
    Resting { at_ms: u64 },
}

/// See the module.
#[derive(Debug, Default)]
pub struct Listing {
    /// Every change up to here was read.
    known: u64,
    /// There are changes up to here at least.
    head: u64,
    state: State,
    /// The whole list was read once.
    is_whole: bool,
}

impl Listing {
    /// Reads the whole list and follows it from then on.
    pub fn begin(&mut self) -> Ask {
        self.ask(String::new(), None)
    }

    /// Whether the whole list was read once.
    pub fn is_whole(&self) -> bool {
        self.is_whole
    }

    /// The head of the user's own stream is at least this.
    pub fn head(&mut self, head: u64) -> Option<Ask> {
        self.head = self.head.max(head);
        (matches!(self.state, State::Idle) && self.head > self.known).then(|| self.ask(String::new(), None))
    }

    /// The page that was asked for: the head before it was read, and where the next page begins (empty: nowhere).
    pub fn page(&mut self, head: u64, next: &str, now_ms: u64) -> Listed {
        let State::Asked { ask, upto } = std::mem::take(&mut self.state) else { return Listed::Done };
        let upto = upto.unwrap_or(head);
        // A place that does not lie further on would be asked for again for ever.
        if next > ask.after.as_str() {
            return Listed::Ask(self.ask(next.to_owned(), Some(upto)));
        }
        self.is_whole = true;
        let is_news = upto > self.known;
        self.known = self.known.max(upto);
        if self.known >= self.head {
            self.state = State::Idle;
            return Listed::Done;
        }
        if is_news {
            return Listed::Ask(self.ask(String::new(), None));
        }
        self.rest(now_ms);
        Listed::Rest
    }

    /// The page could not be had right now: the round begins again after a pause.
    pub fn failed(&mut self, now_ms: u64) {
        if matches!(self.state, State::Asked { .. }) {
            self.rest(now_ms);
        }
    }

    /// The list cannot be had, for good.
    pub fn end(&mut self) {
        (self.state, self.is_whole) = (State::Off, true);
    }

    /// When [`Self::retry`] wants to be called.
    pub fn due_ms(&self) -> Option<u64> {
        match self.state {
            State::Resting { at_ms } => Some(at_ms),
            _ => None,
        }
    }

    /// The pause may be over.
    pub fn retry(&mut self, now_ms: u64) -> Option<Ask> {
        self.due_ms().filter(|&at_ms| at_ms <= now_ms).map(|_| self.ask(String::new(), None))
    }

    fn rest(&mut self, now_ms: u64) {
        self.state = State::Resting { at_ms: now_ms + limits::RETRY_MS };
    }

    fn ask(&mut self, after: String, upto: Option<u64>) -> Ask {
        let ask = Ask { changed_after: if self.is_whole { self.known } else { 0 }, after };
        self.state = State::Asked { ask: ask.clone(), upto };
        ask
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// A user's list at his shard: conversation to the seq of its last change.
    #[derive(Default)]
    struct World {
        list: BTreeMap<String, u64>,
        head: u64,
        asked: Option<Ask>,
        seen: BTreeMap<String, u64>,
        listing: Listing,
    }

    #[derive(Debug, Clone)]
    enum Op {
        Change(u8, bool),
        Answer(usize),
        Fail,
        Later,
        Registered,
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        let op = prop_oneof![
            3 => (0..12u8, any::<bool>()).prop_map(|(c, told)| Op::Change(c, told)),
            4 => (1..4usize).prop_map(Op::Answer),
            1 => Just(Op::Fail),
            1 => Just(Op::Later),
            1 => Just(Op::Registered),
        ];
        proptest::collection::vec(op, 0..80)
    }

    impl World {
        fn take(&mut self, ask: Option<Ask>) {
            if let Some(ask) = ask {
                assert!(self.asked.replace(ask).is_none(), "two questions at once");
            }
        }

        fn step(&mut self, op: Op, now_ms: u64) {
            match op {
                Op::Change(c, told) => {
                    self.head += 1;
                    self.list.insert(format!("c{c:02}"), self.head);
                    if told {
                        self.step(Op::Registered, now_ms);
                    }
                }
                Op::Registered => {
                    let ask = self.listing.head(self.head);
                    self.take(ask);
                }
                Op::Answer(limit) => {
                    let Some(ask) = self.asked.take() else { return };
                    let behind: Vec<_> = self.list.iter().filter(|(name, _)| **name > ask.after).take(limit).collect();
                    let next = if behind.len() == limit { behind[limit - 1].0.clone() } else { String::new() };
                    let changed = behind.into_iter().filter(|(_, seq)| **seq > ask.changed_after);
                    self.seen.extend(changed.map(|(name, seq)| (name.clone(), *seq)));
                    if let Listed::Ask(ask) = self.listing.page(self.head, &next, now_ms) {
                        self.take(Some(ask));
                    }
                }
                Op::Fail => {
                    if self.asked.take().is_some() {
                        self.listing.failed(now_ms);
                    }
                }
                Op::Later => {
                    let ask = self.listing.retry(now_ms);
                    self.take(ask);
                }
            }
        }
    }

    proptest! {
        #[test]
        fn every_change_is_read_in_the_end(before in 0..12u8, ops in ops()) {
            let mut world = World::default();
            (0..before).for_each(|c| world.step(Op::Change(c, false), 0));
            let ask = world.listing.begin();
            world.take(Some(ask));
            for (now_ms, op) in ops.into_iter().enumerate() {
                world.step(op, now_ms as u64);
            }
            // The head is told by the next registration at the latest; nothing fails any more.
            world.step(Op::Registered, 1_000);
            for turn in 0..200 {
                world.step(Op::Answer(3), 1_000 + turn);
                world.step(Op::Later, 10_000 + turn);
            }
            prop_assert!(world.asked.is_none() && world.listing.due_ms().is_none() && world.listing.is_whole());
            prop_assert_eq!(world.seen, world.list);
        }
    }

    #[test]
    fn a_list_that_nothing_changed_in_is_not_read_again() {
        let mut listing = Listing::default();
        assert_eq!(listing.head(4), None, "nobody wants it yet");
        assert_eq!(listing.begin(), Ask { changed_after: 0, after: String::new() });
        assert_eq!(listing.page(4, "m", 0), Listed::Ask(Ask { changed_after: 0, after: "m".into() }));
        assert_eq!(listing.page(6, "", 0), Listed::Done);
        assert_eq!(listing.head(4), None);
        let again = Some(Ask { changed_after: 4, after: String::new() });
        assert_eq!(listing.head(6), again, "what came between the pages may lie before the second one");
    }
}
