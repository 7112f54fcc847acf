//! One task that sends through the SDK: in a closed loop, or at its share of a rate. Must never spawn a task per message,
//! nor wait for one answer while a later one could be noted too late.

use std::{
    collections::VecDeque,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::FutureExt;
use stentor_client::{Client, ClientError, Message, SendHandle, Sent};
use tokio::{
    sync::Notify,
    time::{sleep_until, timeout},
};

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
    /// Where answers are noted; units unless there is such a meter.
    pub(crate) answers: &'static str,
    /// What a closed loop waits for besides answers.
    pub(crate) gate: Option<Arc<Gate>>,
}

/// Lets a closed loop of messages go on only when those before have been delivered.
#[derive(Debug)]
pub(crate) struct Gate {
    /// Devices that get each message.
    devices: u64,
    /// Messages that not all devices have, at most.
    window: u64,
    sent: AtomicU64,
    delivered: AtomicU64,
    room: Notify,
}

impl Gate {
    pub(crate) fn new(devices: usize, window: usize) -> Self {
        let (sent, delivered) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { devices: devices as u64, window: window as u64, sent, delivered, room: Notify::new() }
    }

    /// Devices have got so many more.
    pub(crate) fn deliver(&self, count: u64) {
        self.delivered.fetch_add(count, Ordering::AcqRel);
        if self.has_room() {
            self.room.notify_one();
        }
    }

    fn has_room(&self) -> bool {
        let (sent, delivered) = (self.sent.load(Ordering::Acquire), self.delivered.load(Ordering::Acquire));
        (sent * self.devices).saturating_sub(delivered) < self.window * self.devices
    }

    fn send(&self) {
        self.sent.fetch_add(1, Ordering::AcqRel);
    }
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
            while self.waiting.len() < self.lane.window && self.may_go() {
                if !self.send(Instant::now()).await {
                    break;
                }
            }
            match &self.lane.gate {
                Some(gate) if self.waiting.is_empty() => {
                    // Bounded: somebody may have told the lane to stop.
                    let _ = timeout(AFTER_FAILURE, gate.room.notified()).await;
                }
                _ => self.oldest().await,
            }
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

    fn may_go(&self) -> bool {
        self.lane.gate.as_ref().is_none_or(|gate| gate.has_room())
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
                if let Some(gate) = &lane.gate {
                    gate.send();
                }
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
        self.noted.hand_on(self.meters.other(self.lane.answers), self.lane.number);
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

/// Answers to sends, where the units are something else.
pub(crate) const SENT: &str = "sent";
/// How much later than due the generator itself handed a message on.
pub(crate) const LATE: &str = "late";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gate_waits_for_all_devices() {
        let gate = Gate::new(10, 2);
        gate.send();
        assert!(gate.has_room());
        gate.send();
        assert!(!gate.has_room());
        gate.deliver(1);
        assert!(gate.has_room(), "one delivery of the first message makes room, as ten of different ones do");
        gate.send();
        gate.deliver(10);
        assert!(gate.has_room());
    }
}
