//! What a coordinator and its workers say to each other, and how it travels within a process. Must never be unbounded:
//! who does not listen makes the other one wait.

use tokio::sync::mpsc;

use super::merge::Part;
use crate::{BenchError, Pace, meter::Tally};

/// More workers than a run can need.
pub const MAX_WORKERS: usize = 256;
/// Words or orders on their way.
pub(super) const AHEAD: usize = 8;

/// The coordinator to a worker. It waits for the word that answers each before the next.
#[derive(Debug, Clone)]
pub(super) enum Order {
    /// Get ready for a load; answered by [`Word::Ready`].
    Begin(Pace),
    /// All are ready: begin.
    Go(Turns),
    /// Hand over what was noted since the last one; answered by [`Word::Part`].
    Cut,
    /// End the load and count; answered by [`Word::Counted`].
    Stop,
    /// Close all sessions.
    End,
}

/// A worker to its coordinator.
#[derive(Debug)]
pub(super) enum Word {
    /// It has taken the work; what its machine is, as JSON.
    Welcome(Vec<u8>),
    /// Its users and conversations are there.
    Prepared,
    /// It can begin, with so many tasks that take turns.
    Ready(u32),
    /// What was noted since the last cut.
    Part(Box<Part>),
    /// What was noted so far, for who watches.
    Live(Box<Tally>),
    /// The load has ended, and its counts are right.
    Counted,
    /// All sessions are closed.
    Closed,
}

/// A word with its worker's place; an error is the worker's last.
pub(super) type Said = (usize, Result<Word, BenchError>);

/// Whose turn it is in an open loop, over all workers: everybody's first tasks, then the second ones…, so that tasks of
/// different workers follow each other as those of one would.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turns {
    tasks: Vec<u32>,
    place: usize,
}

impl Turns {
    /// Of the worker at `place`; each worker has so many tasks.
    pub(super) fn new(tasks: Vec<u32>, place: usize) -> Option<Self> {
        (place < tasks.len()).then_some(Self { tasks, place })
    }

    pub(super) fn tasks(&self) -> &[u32] {
        &self.tasks
    }

    pub(super) fn place(&self) -> usize {
        self.place
    }

    /// The number of this worker's `task`-th task among all tasks, from 0.
    pub fn number(&self, task: usize) -> usize {
        let before = |(place, tasks): (usize, &u32)| {
            let tasks = *tasks as usize;
            tasks.min(task) + usize::from(place < self.place && tasks > task)
        };
        self.tasks.iter().enumerate().map(before).sum()
    }

    /// How many tasks there are in all.
    pub fn of(&self) -> usize {
        self.tasks.iter().map(|tasks| *tasks as usize).sum()
    }

    /// This worker's place among the workers, from 0 to below 1.
    pub fn fraction(&self) -> f64 {
        self.place as f64 / self.tasks.len().max(1) as f64
    }
}

/// A worker's end of a line.
#[derive(Debug)]
pub(super) struct Ear {
    pub(super) orders: mpsc::Receiver<Order>,
    pub(super) words: mpsc::Sender<Said>,
    pub(super) place: usize,
}

impl Ear {
    pub(super) async fn say(&self, word: Word) -> Result<(), BenchError> {
        self.words.send((self.place, Ok(word))).await.map_err(|_| gone())
    }

    pub(super) async fn hear(&mut self) -> Result<Order, BenchError> {
        self.orders.recv().await.ok_or_else(gone)
    }
}

fn gone() -> BenchError {
    BenchError::Protocol("the coordinator is gone".into())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    proptest::proptest! {
        #[test]
        fn every_task_has_a_number_of_its_own(tasks in proptest::collection::vec(1_u32..40, 1..12)) {
            let turns = |place| Turns::new(tasks.clone(), place).unwrap();
            let numbers = (0..tasks.len())
                .flat_map(|place| (0..tasks[place] as usize).map(move |task| (place, task)))
                .map(|(place, task)| turns(place).number(task));
            let numbers: BTreeSet<usize> = numbers.collect();
            proptest::prop_assert!(numbers.into_iter().eq(0..turns(0).of()));
        }
    }

    #[test]
    fn workers_take_turns_and_one_alone_keeps_its_numbers() {
        let of = |place| Turns::new(vec![2, 3], place).unwrap();
        assert_eq!([0, 1].map(|task| of(0).number(task)), [0, 2]);
        assert_eq!([0, 1, 2].map(|task| of(1).number(task)), [1, 3, 4]);
        assert!((0..9).all(|task| Turns::new(vec![9], 0).unwrap().number(task) == task));
        assert_eq!(Turns::new(vec![1], 1), None);
    }
}
