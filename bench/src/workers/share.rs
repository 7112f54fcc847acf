//! The one place where a scenario is split among workers. Must never lose or invent load: the shares of all workers add
//! up to the whole, whatever remains of a division. A conversation with everybody in it belongs to one worker, since its
//! messages are counted there, and since a latency has its beginning and end on one clock.

use crate::{BenchError, scenario::Work};

/// Which part of how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// The worker's place, from 0.
    pub index: usize,
    /// How many workers there are.
    pub of: usize,
}

impl Share {
    /// How many of `total` this worker has: the n-th belongs to the worker n modulo the number of workers.
    pub fn part(self, total: usize) -> usize {
        total / self.of + usize::from(self.index < total % self.of)
    }

    /// The same of things of which each worker must have one.
    fn at_least_one(self, total: usize, what: &str) -> Result<usize, BenchError> {
        match self.part(total) {
            0 => Err(BenchError::Settings(format!("{total} {what} cannot be split among {} workers", self.of))),
            part => Ok(part),
        }
    }

    /// Conversations, which are never split themselves.
    fn conversations(self, total: usize) -> Result<usize, BenchError> {
        let why = |_| {
            BenchError::Settings(format!(
                "{} workers need at least as many --conversations, not {total}: each is sent into, read and counted \
                 by one worker",
                self.of
            ))
        };
        self.at_least_one(total, "conversations").map_err(why)
    }

    /// A window that is spread evenly over conversations.
    fn window(self, window: usize, conversations: usize) -> Result<usize, BenchError> {
        let each = window.checked_div(conversations).unwrap_or(0);
        let more = window.checked_rem(conversations).unwrap_or(0);
        match each * self.part(conversations) + self.part(more) {
            0 => Err(BenchError::Settings(format!("a window of {window} cannot be split among {} workers", self.of))),
            window => Ok(window),
        }
    }

    /// Devices that come in groups; the last group may be smaller.
    fn grouped(self, total: usize, group: usize) -> Result<usize, BenchError> {
        let groups = total.div_ceil(group);
        let own = self.at_least_one(groups, &format!("groups of {group} devices"))?;
        let has_last = groups.checked_sub(1).is_some_and(|last| last % self.of == self.index);
        Ok(own * group - if has_last { groups * group - total } else { 0 })
    }

    /// This worker's share of a work. The rate of an open loop stays whole: workers take turns in it.
    pub fn of_work(self, work: &Work) -> Result<Work, BenchError> {
        if self.of <= 1 {
            return Ok(*work);
        }
        let mut share = *work;
        match &mut share {
            Work::Send { load, .. } => {
                let conversations = self.conversations(load.conversations)?;
                load.window = self.window(load.window, load.conversations)?;
                load.conversations = conversations;
                load.sessions = self.part(load.sessions).max(1);
            }
            Work::Fanout { load, .. } => {
                load.conversations = self.conversations(load.conversations)?;
                // Those are in the first conversation, which the first worker has.
                load.stuck = if self.index == 0 { load.stuck } else { 0 };
            }
            Work::Connect { load, .. } => {
                load.concurrency = self.at_least_one(load.concurrency, "devices at a time")?
            }
            Work::Idle(load) => load.devices = self.at_least_one(load.devices, "devices")?,
            Work::Resume(load) => load.devices = self.grouped(load.devices, crate::scenario::resume::TOGETHER)?,
            Work::History { load, .. } => {
                load.conversations = self.conversations(load.conversations)?;
                load.sessions = self.at_least_one(load.sessions, "sessions")?;
            }
            Work::Mixed(_) => {
                return Err(BenchError::Settings(
                    "`mixed` cannot be split among workers: one day is drawn over all users, readers of a conversation \
                     would be on another machine than its writer, and a delivery would be timed by two clocks"
                        .into(),
                ));
            }
        }
        Ok(share)
    }

    /// Whether a work can be split, and all shares of it.
    pub fn all(work: &Work, of: usize) -> Result<Vec<Work>, BenchError> {
        (0..of).map(|index| Self { index, of }.of_work(work)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Pace,
        scenario::{
            connect::ConnectSettings, fanout::FanoutSettings, history::HistorySettings, idle::IdleSettings,
            mixed::MixedSettings, resume::ResumeSettings, send::SendSettings,
        },
    };

    fn send(conversations: usize, window: usize, sessions: usize) -> Work {
        let load = SendSettings { conversations, window, sessions, ..SendSettings::default() };
        Work::Send { load, pace: Pace::Closed, find_p99_ms: None, via_api: false }
    }

    fn sum(shares: &[Work], of: impl Fn(&Work) -> usize) -> usize {
        shares.iter().map(of).sum()
    }

    proptest::proptest! {
        #[test]
        fn shares_add_up_to_the_whole(
            of in 1_usize..40, conversations in 1_usize..5_000, window in 1_usize..5_000, devices in 1_usize..5_000,
        ) {
            let settings = |work: &Work| match *work {
                Work::Send { load, .. } => (load.conversations, load.window),
                Work::Fanout { load, .. } => (load.conversations, load.stuck),
                Work::Connect { load, .. } => (load.concurrency, 0),
                Work::Idle(load) => (load.devices, 0),
                Work::Resume(load) => (load.devices, 0),
                Work::History { load, .. } => (load.conversations, load.sessions),
                Work::Mixed(load) => (load.conversations, load.users),
            };
            let fanout = FanoutSettings { conversations, stuck: 7, ..FanoutSettings::default() };
            let history = HistorySettings { conversations, sessions: window.min(conversations), ..HistorySettings::default() };
            for work in [
                send(conversations, window, 1),
                Work::Fanout { load: fanout, pace: Pace::Closed },
                Work::Connect { load: ConnectSettings { concurrency: devices, resumed: false }, pace: Pace::Closed },
                Work::Idle(IdleSettings { devices, conversations: 2 }),
                Work::Resume(ResumeSettings { devices, ..ResumeSettings::default() }),
                Work::History { load: history, pace: Pace::Closed },
            ] {
                // What is too small for so many workers is refused as a whole.
                let Ok(shares) = Share::all(&work, of) else { continue };
                let whole = settings(&work);
                proptest::prop_assert_eq!(sum(&shares, |share| settings(share).0), whole.0);
                proptest::prop_assert_eq!(sum(&shares, |share| settings(share).1), whole.1);
                proptest::prop_assert!(shares.iter().all(|share| settings(share).0 > 0));
            }
        }
    }

    #[test]
    fn each_conversation_has_the_same_window_wherever_it_is() {
        let shares = Share::all(&send(3, 10, 5), 2).unwrap();
        // 4, 3 and 3 messages: the first and the third conversation are the first worker's.
        assert_eq!(shares, [send(2, 7, 3), send(1, 3, 2)]);
        assert_eq!(Share::all(&send(3, 10, 5), 1).unwrap(), [send(3, 10, 5)]);
    }

    #[test]
    fn what_cannot_be_split_is_refused_with_the_reason() {
        let refused = |work: &Work, of| match Share::all(work, of) {
            Err(BenchError::Settings(why)) => why,
            other => panic!("{other:?}"),
        };
        assert!(refused(&send(1, 64, 1), 2).contains("--conversations, not 1"));
        assert!(refused(&send(8, 1, 1), 2).contains("window of 1"));
        assert!(refused(&Work::Idle(IdleSettings { devices: 2, conversations: 0 }), 3).contains("2 devices"));
        assert!(refused(&Work::Resume(ResumeSettings { devices: 10, ..Default::default() }), 2).contains("groups"));
        assert!(refused(&Work::Mixed(MixedSettings::default()), 2).contains("two clocks"));
    }
}
