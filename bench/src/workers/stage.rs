//! A worker's side of a run: what a load does when its coordinator says so. Must never begin, cut or end anything by a
//! clock of its own.

use std::{
    future::Future,
    time::{Duration, Instant},
};

use tokio::time::{MissedTickBehavior, interval};

use super::{
    link::{Ear, Order, Turns, Word},
    merge::Part,
};
use crate::{BenchError, Pace, Usage, meter::Meters};

/// How often somebody who watches is told.
const TELL_EVERY: Duration = Duration::from_millis(250);

/// Users and conversations that are ready, and what they do.
pub trait Load {
    /// Gets ready, gathers on the stage, makes load until the stage is told to stop, and counts. May be called again.
    fn run(&mut self, pace: Pace, stage: &mut Stage) -> impl Future<Output = Result<(), BenchError>>;
}

/// Where a load hears its coordinator.
#[derive(Debug)]
pub struct Stage {
    ear: Ear,
    watched: bool,
    /// What this process had used at the last cut, and when that was.
    cut: Option<(Instant, Usage)>,
}

impl Stage {
    pub(super) fn new(ear: Ear, watched: bool) -> Self {
        Self { ear, watched, cut: None }
    }

    pub(super) async fn say(&self, word: Word) -> Result<(), BenchError> {
        self.ear.say(word).await
    }

    /// Makes load whenever the coordinator wants it, until he wants nothing more.
    pub(super) async fn attend(&mut self, load: &mut impl Load) -> Result<(), BenchError> {
        loop {
            match self.ear.hear().await? {
                Order::Begin(pace) => Box::pin(load.run(pace, self)).await?,
                Order::End => return Ok(()),
                order => return Err(unexpected(&order)),
            }
            self.ear.say(Word::Counted).await?;
        }
    }

    /// Waits until all workers are ready. `tasks` take turns in an open loop.
    pub(crate) async fn gather(&mut self, tasks: usize) -> Result<Turns, BenchError> {
        self.ear.say(Word::Ready(u32::try_from(tasks).unwrap_or(u32::MAX))).await?;
        match self.ear.hear().await? {
            Order::Go(turns) => {
                self.cut = Some((Instant::now(), own()?));
                Ok(turns)
            }
            order => Err(unexpected(&order)),
        }
    }

    /// Hands over what was noted since the last cut.
    pub(crate) async fn hand_over(&mut self, meters: &Meters) -> Result<(), BenchError> {
        let (now, used) = (Instant::now(), own()?);
        let (then, before) = self.cut.replace((now, used)).unwrap_or((now, used));
        let part = Part::taken(meters, now - then, used.since(&before));
        self.ear.say(Word::Part(Box::new(part))).await
    }

    /// Lets a load run, and hands over at each cut, until it must stop.
    pub(crate) async fn measure(&mut self, meters: &Meters) -> Result<(), BenchError> {
        let mut tell = interval(TELL_EVERY);
        tell.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                order = self.ear.hear() => match order? {
                    Order::Cut => self.hand_over(meters).await?,
                    Order::Stop => return Ok(()),
                    order => return Err(unexpected(&order)),
                },
                _ = tell.tick(), if self.watched => {
                    self.ear.say(Word::Live(Box::new(meters.units.peek()))).await?;
                }
            }
        }
    }

    /// Tells somebody who watches what was noted so far, if the line is free.
    pub(crate) fn tell(&self, meters: &Meters) {
        if self.watched {
            let word = Word::Live(Box::new(meters.units.peek()));
            let _ = self.ear.words.try_send((self.ear.place, Ok(word)));
        }
    }
}

fn own() -> Result<Usage, BenchError> {
    Usage::own().map_err(BenchError::io("read /proc/self"))
}

fn unexpected(order: &Order) -> BenchError {
    let name = match order {
        Order::Begin(_) => "begin",
        Order::Go(_) => "go",
        Order::Cut => "cut",
        Order::Stop => "stop",
        Order::End => "end",
    };
    BenchError::Protocol(format!("the coordinator said `{name}` out of turn"))
}
