//! One task that sends through the SDK: in a closed loop, or at its share of a rate. Must never spawn a task per message,
//! nor wait for one answer while a later one could be noted too late.

use std::{
    collections::VecDeque,
    pin::pin,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use futures_util::FutureExt;
use stentor_client::{Client, ClientError, Message, SendHandle, Sent};
use tokio::time::sleep_until;

use super::{Stop, talk::Talk};
use crate::{
    body::Bodies,
    meter::{Batch, Meters},
    pace::{Pace, Schedule},
};

/// A shard that refuses is not asked again at once.
const AFTER_FAILURE: Duration = Duration::from_millis(20);
/// Messages handed to the SDK before answers are looked at again.
const BURST: usize = 64;

/// What a lane needs; lanes of one load share most of it.
#[derive(Debug, Clone)]
pub(crate) struct Lane {
    /// Its number, and how many there are.
    pub(crate) number: usize,
    pub(crate) lanes: usize,
    pub(crate) client: Client,
    pub(crate) talks: Vec<Arc<Talk>>,
    pub(crate) window: usize,
    pub(crate) bodies: Arc<Bodies>,
    /// Bodies carry the moment when they were due.
    pub(crate) stamped: bool,
}

/// A send without an answer.
struct Waiting {
    due: Instant,
    talk: usize,
    handle: SendHandle,
}

/// A lane that runs.
struct Running<'a> {
    lane: &'a Lane,
    meters: &'a Meters,
    waiting: VecDeque<Waiting>,
    noted: Batch,
    late: Batch,
    sent: usize,
    failed: bool,
}

impl Lane {
    /// Sends until it is told to stop, and until every answer is there.
    pub(crate) async fn run(self, pace: Pace, began: Instant, meters: Arc<Meters>, stop: Stop) {
        let mut running = Running {
            lane: &self,
            meters: &meters,
            waiting: VecDeque::with_capacity(self.window),
            noted: Batch::default(),
            late: Batch::default(),
            // Lanes begin at different bodies.
            sent: self.number * 31,
            failed: false,
        };
        match pace {
            Pace::Closed => running.closed(&stop).await,
            Pace::Open { rate_per_s } => {
                running.open(Schedule::new(began, rate_per_s, self.number, self.lanes), &stop).await;
            }
        }
        while let Some(waiting) = running.waiting.pop_front() {
            running.answered(waiting.due, waiting.talk, waiting.handle.await);
            running.hand_on();
        }
    }
}

impl Running<'_> {
    async fn closed(&mut self, stop: &Stop) {
        while !stop.is_set() {
            while self.waiting.len() < self.lane.window {
                if !self.send(Instant::now()).await {
                    break;
                }
            }
            self.oldest().await;
            self.ready();
            self.hand_on();
            self.pause().await;
        }
    }

    async fn open(&mut self, mut schedule: Schedule, stop: &Stop) {
        let mut timer = pin!(sleep_until(schedule.due().into()));
        while !stop.is_set() {
            for _ in 0..BURST.min(self.lane.window - self.waiting.len()) {
                let now = Instant::now();
                let Some(due) = schedule.take(now) else { break };
                self.late.push(now - due);
                self.send(due).await;
            }
            let full = self.waiting.len() >= self.lane.window;
            timer.as_mut().reset(schedule.due().into());
            tokio::select! {
                biased;
                () = self.oldest(), if !self.waiting.is_empty() => {}
                () = &mut timer, if !full => {}
            }
            self.ready();
            self.hand_on();
        }
    }

    /// Hands one to the SDK; false when it does not take it.
    async fn send(&mut self, due: Instant) -> bool {
        let (n, lane) = (self.sent, self.lane);
        self.sent += 1;
        let body = match lane.stamped {
            true => lane.bodies.stamped(n, &self.meters.units, due),
            false => lane.bodies.get(n),
        };
        let talk = n % lane.talks.len();
        match lane.client.send_pipelined(&lane.talks[talk].id, Message::bytes(String::new(), body)).await {
            Ok(handle) => {
                self.waiting.push_back(Waiting { due, talk, handle });
                true
            }
            Err(error) => {
                self.error(talk, &error);
                false
            }
        }
    }

    /// Waits for the oldest answer. Cancel-safe.
    async fn oldest(&mut self) {
        let Some(oldest) = self.waiting.front_mut() else { return };
        let answer = (&mut oldest.handle).await;
        let (due, talk) = (oldest.due, oldest.talk);
        self.waiting.pop_front();
        self.answered(due, talk, answer);
    }

    /// Notes what has come besides.
    fn ready(&mut self) {
        while let Some(oldest) = self.waiting.front_mut() {
            let Some(answer) = (&mut oldest.handle).now_or_never() else { return };
            let (due, talk) = (oldest.due, oldest.talk);
            self.waiting.pop_front();
            self.answered(due, talk, answer);
        }
    }

    fn answered(&mut self, due: Instant, talk: usize, answer: Result<Sent, ClientError>) {
        match answer {
            Ok(_) => {
                self.noted.push(due.elapsed());
                self.lane.talks[talk].acknowledged.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => self.error(talk, &error),
        }
    }

    fn error(&mut self, talk: usize, error: &ClientError) {
        if matches!(error, ClientError::Unknown(_)) {
            self.lane.talks[talk].unknown.fetch_add(1, Ordering::Relaxed);
        }
        self.failed = true;
        self.meters.units.fail(self.lane.number, error);
    }

    fn hand_on(&mut self) {
        self.noted.hand_on(&self.meters.units, self.lane.number);
        if let Some((_, late)) = self.meters.others.iter().find(|(name, _)| *name == LATE) {
            self.late.hand_on(late, self.lane.number);
        }
    }

    async fn pause(&mut self) {
        if std::mem::take(&mut self.failed) {
            tokio::time::sleep(AFTER_FAILURE).await;
        }
    }
}

/// How much later than due the generator itself handed a message on.
pub(crate) const LATE: &str = "late";
