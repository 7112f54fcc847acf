//! Which operation comes next, and how often each comes. Must never make one so rare that a run of a few hundred
//! operations goes without it.

use super::{
    Connect, Dice, actor::Actor, history::History, participants::Participants, read_mark::ReadMark,
    reconnect::Reconnect, retry::Retry, send::Send, tail::Tail,
};

/// An operation with what was left to chance decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mix {
    Send(Send),
    Retry(Retry),
    History(History),
    Tail(Tail),
    ReadMark(ReadMark),
    Participants(Participants),
    Reconnect(Reconnect),
}

impl Mix {
    pub(super) fn draw(dice: &mut Dice, sends_only: bool) -> Self {
        match dice.below(100) {
            _ if sends_only => Self::Send(Send::sample(dice)),
            0..45 => Self::Send(Send::sample(dice)),
            45..55 => Self::Retry(Retry::sample(dice)),
            55..73 => Self::History(History::sample(dice)),
            73..83 => Self::Tail(Tail),
            83..88 => Self::ReadMark(ReadMark),
            88..96 => Self::Participants(Participants::sample(dice)),
            _ => Self::Reconnect(Reconnect::sample(dice)),
        }
    }

    pub(super) async fn execute<C: Connect>(self, actor: &mut Actor<C>) {
        match self {
            Self::Send(send) => send.execute(actor).await,
            Self::Retry(retry) => retry.execute(actor).await,
            Self::History(history) => history.execute(actor).await,
            Self::Tail(tail) => tail.execute(actor).await,
            Self::ReadMark(mark) => mark.execute(actor),
            Self::Participants(change) => change.execute(actor).await,
            Self::Reconnect(reconnect) => reconnect.execute(actor).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, mem::discriminant};

    use super::*;

    #[test]
    fn a_few_hundred_draws_have_all_and_a_seed_repeats() {
        let draws = |seed| {
            let mut dice = Dice::new(seed);
            (0..300).map(|_| Mix::draw(&mut dice, false)).collect::<Vec<_>>()
        };
        let mut counts = BTreeMap::new();
        for operation in draws(7) {
            *counts.entry(format!("{:?}", discriminant(&operation))).or_insert(0) += 1;
        }
        assert!(counts.len() == 7 && counts.values().all(|n| *n >= 3), "{counts:?}");
        assert_eq!(draws(8), draws(8));
        assert_ne!(draws(8), draws(9));
    }
}
