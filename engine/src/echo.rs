//! Whether those who are answered come back together, as a pure decision: devices that send their next message when they
//! have the answer to the last one come as a crowd, and a bundle that waits a moment for all of them saves a round. Must
//! never let a command wait where that has not been seen.

use std::time::Duration;

use crate::limits;

/// Of those who were expected, in 1/256, so many must have come lately with the first of them: an open loop brings a
/// quarter in a quarter of a round. With 224 four devices whose last one is late now and then were a fifth slower.
const CROWD: u32 = 192;
/// After so many rounds without an answer nobody is expected any more.
const FORGOTTEN_ROUNDS: u32 = 2;
/// One in so many may be late.
const LATE: u64 = 8;

/// What a shard's batcher has seen lately. Moments are monotonic, since any origin that the caller keeps to; counts are of
/// outcomes, since a run of sends is one command.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Echo {
    /// Of those who were expected, how many came soon after the first of them, smoothed, in 1/256.
    together: u32,
    /// How long a bundle takes from its proposal until it is applied, smoothed.
    round: Duration,
    /// Those in the open bundle.
    waiting: u64,
    /// Those who were answered and have not come back.
    owed: u64,
    /// The fewest that it has been since the first of a crowd came: so many stay away.
    least: u64,
    /// When somebody was answered last.
    answered: Duration,
    /// Nobody has come back since.
    silent: bool,
    /// How long it takes from an answer until the first comes back, smoothed.
    turn: Duration,
    crowd: Option<Crowd>,
}

/// The first who came back, and who came with him.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Crowd {
    since: Duration,
    expected: u64,
    came: u64,
}

impl Echo {
    /// For how long those who have not come are waited for once the first of them is here.
    fn patience(&self) -> Duration {
        (self.round / 4).min(limits::BUNDLE_WAIT)
    }

    /// A command with so many outcomes has joined the open bundle.
    pub fn joined(&mut self, now: Duration, count: usize) {
        let count = count as u64;
        if now.saturating_sub(self.answered) > self.round * FORGOTTEN_ROUNDS {
            self.owed = 0;
        }
        self.waiting += count;
        self.owed = self.owed.saturating_sub(count);
        if std::mem::take(&mut self.silent) {
            self.judge();
            self.owed -= self.least.min(self.owed);
            self.least = self.owed;
            self.turn = smooth(self.turn, now.saturating_sub(self.answered).min(self.round));
            self.crowd = (self.owed > 0).then_some(Crowd { since: now, expected: self.owed, came: 0 });
        } else if let Some(crowd) = &self.crowd
            && now.saturating_sub(crowd.since) <= self.patience()
        {
            self.crowd = Some(Crowd { came: crowd.came + count, ..*crowd });
        }
        self.least = self.least.min(self.owed);
    }

    fn judge(&mut self) {
        if let Some(Crowd { expected, came, .. }) = self.crowd.take() {
            let share = (came * 256 / expected.max(1)).min(256) as u32;
            self.together = (3 * self.together + share) / 4;
        }
    }

    /// The open bundle was proposed.
    pub fn closed(&mut self) {
        self.waiting = 0;
    }

    /// A bundle with so many outcomes was applied, so long after its proposal.
    pub fn answered(&mut self, now: Duration, count: usize, took: Duration) {
        if self.silent && now.saturating_sub(self.answered) > self.round * 3 / 2 {
            self.crowd = Some(Crowd { since: now, expected: self.owed, came: 0 });
            self.judge();
        }
        self.round = smooth(self.round, took);
        self.owed += count as u64;
        (self.answered, self.silent) = (now, true);
    }

    /// Until when the open bundle of an idle shard should wait, if at all.
    pub fn waits(&self, now: Duration) -> Option<Duration> {
        let until = match self.crowd {
            // Those who wait and those who were answered would take turns for ever, each with a round of their own.
            _ if self.silent && self.turn + self.patience() <= self.round => {
                self.answered + self.turn + self.patience()
            }
            Some(crowd) if !self.silent => crowd.since + self.patience(),
            _ => return None,
        };
        let missing = self.owed * LATE > self.owed + self.waiting;
        (self.together >= CROWD && now < until && missing).then_some(until)
    }
}

fn smooth(before: Duration, now: Duration) -> Duration {
    if before.is_zero() { now } else { (before * 7 + now) / 8 }
}

#[cfg(test)]
mod tests {
    use std::{cmp::Reverse, collections::BinaryHeap};

    use proptest::prelude::*;

    use super::*;
    use crate::batch::{Batch, BatchRules, Close};

    const MS: Duration = Duration::from_millis(1);

    /// A shard that takes `round` for a bundle, and what came of it: the sizes of its bundles, and how long commands waited
    /// although the shard was idle.
    struct Shard {
        echo: Echo,
        batch: Batch,
        waiting: Vec<Duration>,
        under_way: Option<(Duration, Duration, usize)>,
        sizes: Vec<usize>,
        idle_wait: Duration,
    }

    impl Shard {
        fn new() -> Self {
            let (echo, batch) = (Echo::default(), Batch::default());
            Self { echo, batch, waiting: Vec::new(), under_way: None, sizes: Vec::new(), idle_wait: Duration::ZERO }
        }

        /// Lets everything happen up to `now`; the moments at which commands are answered.
        fn until(&mut self, now: Duration, round: Duration) -> Vec<(Duration, usize)> {
            let mut answers = Vec::new();
            let mut at = Duration::ZERO;
            loop {
                match self.under_way {
                    Some((since, end, count)) if end <= now => {
                        at = end;
                        self.echo.answered(end, count, end - since);
                        self.under_way = None;
                        answers.push((end, count));
                    }
                    Some(_) => return answers,
                    None => {
                        let rules = BatchRules::default();
                        let opened = self.waiting.last().copied().unwrap_or_default().max(at);
                        let go = match self.batch.close(&rules, opened, true, self.echo.waits(opened)) {
                            Close::Now => opened,
                            Close::At(go) if go <= now => go,
                            Close::At(_) | Close::Empty => return answers,
                        };
                        self.idle_wait += self.waiting.iter().map(|&came| go - came.max(at)).sum::<Duration>();
                        self.sizes.push(self.waiting.len());
                        self.under_way = Some((go, go + round, self.waiting.len()));
                        self.waiting.clear();
                        self.batch.closed();
                        self.echo.closed();
                    }
                }
            }
        }

        fn command(&mut self, now: Duration) {
            self.batch.joined(now, 100);
            self.echo.joined(now, 1);
            self.waiting.push(now);
        }
    }

    /// `clients`, each of which sends again `turn` after its answer, spread over `spread`.
    fn closed_loop(clients: usize, round: Duration, turn: Duration, spread: Duration) -> Shard {
        let mut shard = Shard::new();
        let mut due: BinaryHeap<_> = (0..clients).map(|n| Reverse(round * n as u32 / clients as u32)).collect();
        for _ in 0..clients * 60 {
            // Answers bring the next commands of as many clients.
            let horizon = due.peek().map_or(Duration::MAX / 4, |Reverse(at)| *at);
            let end = shard.under_way.map_or(Duration::MAX / 4, |(_, end, _)| end);
            for (at, count) in shard.until(horizon.min(end), round) {
                due.extend((0..count).map(|n| Reverse(at + turn + spread * n as u32 / count as u32)));
            }
            if horizon <= end
                && let Some(Reverse(at)) = due.pop()
            {
                shard.command(at);
                for (at, count) in shard.until(at, round) {
                    due.extend((0..count).map(|n| Reverse(at + turn + spread * n as u32 / count as u32)));
                }
            }
        }
        shard
    }

    #[test]
    fn a_crowd_travels_in_one_bundle() {
        let shard = closed_loop(64, MS, MS / 5, MS / 10);
        let late = &shard.sizes[shard.sizes.len() - 10..];
        assert!(late.iter().all(|&size| size >= 56), "{late:?} of {} bundles", shard.sizes.len());
    }

    #[test]
    fn who_stays_away_is_waited_for_once() {
        let mut echo = Echo { together: 256, round: MS, ..Echo::default() };
        echo.answered(MS * 9, 64, MS);
        let mut waited = 0;
        for round in 5..25 {
            let came = MS * 2 * round;
            echo.joined(came, 20);
            echo.joined(came, 34);
            waited += usize::from(echo.waits(came).is_some());
            echo.closed();
            echo.answered(came + MS, 54, MS);
        }
        assert!(waited <= 1, "{waited} of 20");
    }

    #[test]
    fn a_device_alone_never_waits() {
        let shard = closed_loop(1, MS, MS / 5, MS / 10);
        assert_eq!(shard.idle_wait, Duration::ZERO);
        assert!(shard.sizes.iter().all(|&size| size == 1));
    }

    #[test]
    fn those_who_come_back_one_by_one_are_not_waited_for() {
        let shard = closed_loop(64, MS, MS, MS);
        assert!(shard.idle_wait < MS * shard.sizes.len() as u32 / 20, "{:?}", shard.idle_wait);
    }

    #[test]
    fn nobody_is_waited_for_for_long() {
        let mut echo = Echo { together: 256, round: MS, ..Echo::default() };
        echo.answered(MS * 9, 8, MS);
        assert_eq!(echo.waits(MS * 10), None, "nobody is here");
        echo.joined(MS * 10, 4);
        assert_eq!(echo.waits(MS * 10), Some(MS * 10 + MS / 4));
        assert_eq!(echo.waits(MS * 10 + MS / 4), None);
        echo.joined(MS * 10, 4);
        assert_eq!(echo.waits(MS * 10), None, "all are here");
        echo.closed();
        echo.answered(MS * 11, 8, MS);
        echo.joined(MS * 14, 1);
        assert_eq!(echo.waits(MS * 14), None, "they may come whenever they like");
    }

    proptest! {
        /// Commands that come at their own times wait a twentieth of a round on average at most.
        #[test]
        fn an_open_loop_hardly_waits(
            gaps in prop::collection::vec(0.0f64..1.0, 600),
            per_round in prop_oneof![0.05f64..1.0, 1.0f64..40.0],
        ) {
            let mut shard = Shard::new();
            let mut at = 0.0;
            for gap in &gaps {
                at += -(1.0 - gap).ln() / per_round;
                let now = MS.mul_f64(at);
                // One by one, as they end: a command must not join what had gone before it came.
                while shard.under_way.is_some_and(|(_, end, _)| end <= now) {
                    let end = shard.under_way.map_or(now, |(_, end, _)| end);
                    shard.until(end, MS);
                }
                shard.until(now, MS);
                shard.command(now);
                shard.until(now, MS);
            }
            prop_assert!(shard.idle_wait < MS * gaps.len() as u32 / 20, "{:?}", shard.idle_wait);
        }
    }
}
