//! The coordinator: tells all workers of a run when parts begin and end, looks at the servers at the same moments, and
//! joins what comes back. Must never go on without one of them: a worker that fails, ends or falls silent fails the run.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{sleep_until, timeout_at},
};

use super::{
    link::{AHEAD, Ear, Order, Said, Turns, Word},
    merge::{self, Part},
    stage::{Load, Stage},
};
use crate::{
    BenchError, Histogram, Live, Observer, Outcome, Pace, Target, Timing,
    measure::{Cost, Snapshot},
    meter::Tally,
    scenario::{idle, resume},
};

/// Between two looks for somebody who watches.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// A worker that does not hand over what it noted by then does not work any more.
const CUT_WITHIN: Duration = Duration::from_secs(30);
/// What the process of a single generator is called.
const ALONE: &str = "bench";

/// How a run's repeats are made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rhythm {
    /// A load that runs through warm-up and all repeats, and is cut.
    Steady,
    /// Each repeat adds devices, which then rest.
    Adding,
    /// In each repeat all go away, miss so many messages each, and come back.
    Returning {
        /// Messages that each device misses.
        missed: usize,
    },
}

/// One worker.
#[derive(Debug)]
pub(super) struct Member {
    /// Its process, in reports.
    pub(super) process: String,
    /// Where it listens; `None` in this process.
    pub(super) address: Option<String>,
    pub(super) orders: mpsc::Sender<Order>,
}

/// All workers of a run, as the coordinator has them.
#[derive(Debug)]
pub struct Crew<'a> {
    target: &'a Target,
    members: Vec<Member>,
    words: mpsc::Receiver<Said>,
    rhythm: Rhythm,
    observer: Observer,
    /// The repeat that runs, and since when.
    now: (u32, Instant),
    /// What each said last of the part that runs.
    live: Vec<Tally>,
    /// What each told of its machine, until they are taken.
    machines: Vec<Vec<u8>>,
    /// What carries words from elsewhere; ended with the crew.
    _carriers: JoinSet<()>,
}

/// Puts one load under a coordinator, both in this process, for one run.
pub async fn alone(
    target: &Target,
    load: &mut impl Load,
    (rhythm, pace, timing): (Rhythm, Pace, Timing),
    observer: &Observer,
) -> Result<Vec<Outcome>, BenchError> {
    with(target, load, rhythm, observer, async |crew| crew.run(pace, timing).await).await
}

/// The same for several runs, one after the other.
pub async fn with<T>(
    target: &Target,
    load: &mut impl Load,
    rhythm: Rhythm,
    observer: &Observer,
    lead: impl AsyncFnOnce(&mut Crew<'_>) -> Result<T, BenchError>,
) -> Result<T, BenchError> {
    let (orders, heard) = mpsc::channel(AHEAD);
    let (words, said) = mpsc::channel(AHEAD);
    let mut stage = Stage::new(Ear { orders: heard, words, place: 0 }, observer.is_there());
    let member = Member { process: ALONE.into(), address: None, orders };
    let mut crew = Crew::new(target, vec![member], said, JoinSet::new(), (rhythm, observer.clone()));
    let lead = async {
        let led = lead(&mut crew).await?;
        crew.order(0, Order::End).await?;
        Ok(led)
    };
    let (mut lead, mut attend) = (Box::pin(lead), Box::pin(stage.attend(load)));
    tokio::select! {
        biased;
        // Its own error says more than that it is gone.
        ended = &mut attend => match ended {
            Ok(()) => lead.await,
            Err(error) => Err(error),
        },
        led = &mut lead => match led {
            Ok(led) => attend.await.map(|()| led),
            Err(error) => Err(error),
        },
    }
}

impl<'a> Crew<'a> {
    pub(super) fn new(
        target: &'a Target,
        members: Vec<Member>,
        words: mpsc::Receiver<Said>,
        carriers: JoinSet<()>,
        (rhythm, observer): (Rhythm, Observer),
    ) -> Self {
        let (live, machines) = (vec![Tally::default(); members.len()], vec![Vec::new(); members.len()]);
        Self { target, members, words, rhythm, observer, now: (0, Instant::now()), live, machines, _carriers: carriers }
    }

    /// One run: the outcome of each repeat. What was counted afterwards was right.
    pub async fn run(&mut self, pace: Pace, timing: Timing) -> Result<Vec<Outcome>, BenchError> {
        match self.rhythm {
            Rhythm::Steady => Box::pin(self.steady(pace, timing)).await,
            Rhythm::Adding => Box::pin(idle::lead(self, timing)).await,
            Rhythm::Returning { missed } => Box::pin(resume::lead(self, missed, timing)).await,
        }
    }

    async fn steady(&mut self, pace: Pace, timing: Timing) -> Result<Vec<Outcome>, BenchError> {
        self.begin(pace).await?;
        self.wait(timing.warm_up_s, 0).await?;
        let mut before = Snapshot::take(self.target).await;
        self.cut().await?;
        let mut outcomes = Vec::new();
        for repeat in 1..=timing.repeats {
            let (outcome, now) = self.repeat(repeat, timing.seconds, &before).await?;
            outcomes.push(outcome);
            before = now;
        }
        self.stop().await?;
        Ok(outcomes)
    }

    /// Lets the load run for a while after `before`, and cuts.
    pub(crate) async fn repeat(
        &mut self,
        repeat: u32,
        seconds: f64,
        before: &Snapshot,
    ) -> Result<(Outcome, Snapshot), BenchError> {
        self.wait(seconds, repeat).await?;
        let now = Snapshot::take(self.target).await;
        let parts = self.cut().await?;
        Ok((merge::joined(parts, now.since(before)), now))
    }

    /// The cluster under load.
    pub(crate) fn target(&self) -> &'a Target {
        self.target
    }

    /// Everybody gets ready, and then all begin.
    pub(crate) async fn begin(&mut self, pace: Pace) -> Result<(), BenchError> {
        self.ready(pace).await?.go(self).await
    }

    /// Everybody gets ready; nobody has begun.
    pub(crate) async fn ready(&mut self, pace: Pace) -> Result<Readiness, BenchError> {
        self.order_all(&Order::Begin(pace)).await?;
        let tasks = self.answers("get ready", None, |word| match word {
            Word::Ready(tasks) => Ok(tasks),
            other => Err(other),
        });
        Ok(Readiness(tasks.await?))
    }

    /// Takes what all have noted since the last cut.
    pub(crate) async fn cut(&mut self) -> Result<Vec<(String, Part)>, BenchError> {
        self.order_all(&Order::Cut).await?;
        self.parts(Some(CUT_WITHIN)).await
    }

    /// All begin a step of a repeat that each ends when it has done its share: what came out, and how long the slowest
    /// worker took.
    pub(crate) async fn step(
        &mut self,
        ready: Readiness,
        repeat: u32,
        before: &Snapshot,
    ) -> Result<(Outcome, Duration), BenchError> {
        ready.go(self).await?;
        self.now.0 = repeat;
        let parts = self.parts(None).await?;
        let cost: Cost = Snapshot::take(self.target).await.since(before);
        let slowest = parts.iter().map(|(_, part)| part.elapsed).max().unwrap_or_default();
        Ok((merge::done(parts, cost), slowest))
    }

    async fn parts(&mut self, within: Option<Duration>) -> Result<Vec<(String, Part)>, BenchError> {
        let parts = self.answers("hand over what was noted", within, |word| match word {
            Word::Part(part) => Ok(*part),
            other => Err(other),
        });
        let parts = parts.await?;
        self.live.iter_mut().for_each(|live| *live = Tally::default());
        Ok(self.members.iter().map(|member| member.process.clone()).zip(parts).collect())
    }

    /// Ends the load; everybody counts.
    pub(crate) async fn stop(&mut self) -> Result<(), BenchError> {
        self.order_all(&Order::Stop).await?;
        let counted = self.answers("count", None, |word| match word {
            Word::Counted => Ok(()),
            other => Err(other),
        });
        counted.await.map(|_| ())
    }

    /// Everybody closes his sessions. Afterwards there is nobody any more.
    pub async fn dismiss(mut self) -> Result<(), BenchError> {
        self.order_all(&Order::End).await?;
        let closed = self.answers("close", None, |word| match word {
            Word::Closed => Ok(()),
            other => Err(other),
        });
        closed.await.map(|_| ())
    }

    /// What all have prepared, by worker: their machines, as they told them.
    pub(super) async fn prepared(&mut self) -> Result<Vec<Vec<u8>>, BenchError> {
        let prepared = self.answers("prepare", None, |word| match word {
            Word::Prepared => Ok(()),
            other => Err(other),
        });
        prepared.await?;
        Ok(std::mem::take(&mut self.machines))
    }

    /// Waits while the load runs.
    pub(crate) async fn wait(&mut self, seconds: f64, repeat: u32) -> Result<(), BenchError> {
        let began = Instant::now();
        let end = began + Duration::from_secs_f64(seconds);
        self.now = (repeat, began);
        let mut look = began + LOOK_EVERY;
        while Instant::now() < end {
            tokio::select! {
                biased;
                () = sleep_until(look.min(end).into()) => {
                    look += LOOK_EVERY;
                    self.look();
                }
                said = self.words.recv() => self.aside(said)?,
            }
        }
        Ok(())
    }

    fn look(&self) {
        if !self.observer.is_there() {
            return;
        }
        let ((repeat, began), mut latencies) = (self.now, Histogram::new());
        self.live.iter().for_each(|live| latencies.add(&live.latencies));
        let (count, errors) = self.live.iter().fold((0, 0), |(c, e), live| (c + live.count, e + live.errors));
        let elapsed = began.elapsed();
        self.observer.look(&Live {
            repeat,
            elapsed,
            rate_per_s: count as f64 / elapsed.as_secs_f64().max(1e-3),
            p50_ms: latencies.percentile_ms(50.0),
            p99_ms: latencies.percentile_ms(99.0),
            errors,
        });
    }

    async fn order(&mut self, place: usize, order: Order) -> Result<(), BenchError> {
        let Some(member) = self.members.get(place) else { return Ok(()) };
        if member.orders.send(order).await.is_ok() {
            return Ok(());
        }
        // It has gone, and why comes behind whatever it said before.
        loop {
            let said = self.words.recv().await;
            self.aside(said)?;
        }
    }

    async fn order_all(&mut self, order: &Order) -> Result<(), BenchError> {
        for place in 0..self.members.len() {
            self.order(place, order.clone()).await?;
        }
        Ok(())
    }

    /// The word of each that answers an order, in the order of the workers.
    async fn answers<T>(
        &mut self,
        what: &str,
        within: Option<Duration>,
        take: impl Fn(Word) -> Result<T, Word>,
    ) -> Result<Vec<T>, BenchError> {
        let deadline = within.map(|within| Instant::now() + within);
        let mut all: BTreeMap<usize, T> = BTreeMap::new();
        while all.len() < self.members.len() {
            let said = match deadline {
                None => self.words.recv().await,
                Some(deadline) => match timeout_at(deadline.into(), self.words.recv()).await {
                    Ok(said) => said,
                    Err(_) => {
                        let silent = (0..self.members.len()).find(|place| !all.contains_key(place)).unwrap_or(0);
                        return Err(self.failed(silent, BenchError::Late(format!("its answer to `{what}`"))));
                    }
                },
            };
            let place = match &said {
                Some((place, Ok(_))) => *place,
                _ => return self.aside(said).and(Err(lost())),
            };
            let Some((_, Ok(word))) = said else { continue };
            match take(word) {
                Ok(answer) if !all.contains_key(&place) => drop(all.insert(place, answer)),
                Ok(_) => return Err(self.failed(place, BenchError::Protocol("it answered twice".into()))),
                Err(other) => self.aside(Some((place, Ok(other))))?,
            }
            self.look();
        }
        Ok(all.into_values().collect())
    }

    /// A word that is no answer: what goes on, or the end of the run.
    fn aside(&mut self, said: Option<Said>) -> Result<(), BenchError> {
        match said {
            Some((place, Ok(Word::Live(tally)))) => {
                if let Some(live) = self.live.get_mut(place) {
                    *live = *tally;
                }
                Ok(())
            }
            // One that has little to prepare has done so before another one was dialled.
            Some((place, Ok(Word::Welcome(machine)))) if self.machines.get(place).is_some_and(Vec::is_empty) => {
                self.machines[place] = machine;
                Ok(())
            }
            Some((place, Ok(_))) => Err(self.failed(place, BenchError::Protocol("it spoke out of turn".into()))),
            Some((place, Err(error))) => Err(self.failed(place, error)),
            None => Err(lost()),
        }
    }

    /// A failure with the name of who failed, if it is another process.
    fn failed(&self, place: usize, error: BenchError) -> BenchError {
        match self.members.get(place).and_then(|member| member.address.clone()) {
            Some(worker) => BenchError::Worker { worker, what: error.to_string() },
            None => error,
        }
    }
}

fn lost() -> BenchError {
    BenchError::Protocol("all workers are gone".into())
}

/// Everybody is ready: how many tasks each has.
#[derive(Debug)]
#[must_use]
pub(crate) struct Readiness(Vec<u32>);

impl Readiness {
    /// All begin.
    pub(crate) async fn go(self, crew: &mut Crew<'_>) -> Result<(), BenchError> {
        crew.now = (0, Instant::now());
        for place in 0..self.0.len() {
            if let Some(turns) = Turns::new(self.0.clone(), place) {
                crew.order(place, Order::Go(turns)).await?;
            }
        }
        Ok(())
    }
}
