//! Messages from one sender to many devices of a peer, with the moment of sending inside, and room for so many that not
//! all devices have yet. Must never send on while devices are too far behind: what waits in a client is no delivery.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::{sync::Semaphore, time::timeout};

use super::{MESSAGE_BYTES, PeerError};
use crate::{meter::Meters, pace::Schedule};

/// What was sent must be everywhere within this time after the end.
const ARRIVED_WITHIN: Duration = Duration::from_secs(30);
/// Messages under way at most in an open loop: only a server that cannot hold the rate meets it.
const OPEN_WINDOW: usize = 4_096;

/// Deliveries of one run.
#[derive(Debug, Clone)]
pub(crate) struct Spread {
    pub(crate) meters: Arc<Meters>,
    room: Arc<Semaphore>,
    window: usize,
    devices: usize,
}

impl Spread {
    /// With a window of messages; `None` for an open loop.
    pub(crate) fn new(devices: usize, window: Option<usize>) -> Self {
        let window = window.unwrap_or(OPEN_WINDOW).min(Semaphore::MAX_PERMITS.min(u32::MAX as usize) / devices.max(1));
        Self { meters: Arc::default(), room: Arc::new(Semaphore::new(window * devices)), window, devices }
    }

    /// The body of a message that is due now or was a while ago; waits for room first.
    pub(crate) async fn next(&self, schedule: Option<&mut Schedule>) -> Bytes {
        let due = match schedule {
            None => None,
            Some(schedule) => {
                let due = schedule.due();
                tokio::time::sleep_until(due.into()).await;
                schedule.take(Instant::now());
                Some(due)
            }
        };
        if let Ok(room) = self.room.acquire_many(self.devices as u32).await {
            room.forget();
        }
        self.body(due.unwrap_or_else(Instant::now))
    }

    fn body(&self, due: Instant) -> Bytes {
        let mut body = [0x2a; MESSAGE_BYTES];
        body[..8].copy_from_slice(&self.meters.units.stamp(due).to_le_bytes());
        Bytes::copy_from_slice(&body)
    }

    /// Notes what one device has got; others of our messages have at least eight bytes, so nothing is lost.
    pub(crate) fn came<'a>(&self, device: usize, bodies: impl Iterator<Item = &'a [u8]>, noted: &mut Vec<Duration>) {
        let now = Instant::now();
        for body in bodies {
            if let Some(stamp) = body.first_chunk::<8>() {
                noted.push(self.meters.units.since(u64::from_le_bytes(*stamp), now));
            }
        }
        self.room.add_permits(noted.len());
        self.meters.units.note(device, noted);
    }

    /// A message that could not be sent.
    pub(crate) fn failed(&self, error: &dyn std::fmt::Display) {
        self.meters.units.fail(0, error);
        self.room.add_permits(self.devices);
    }

    /// Waits until every device has everything that was sent.
    pub(crate) async fn arrived(&self) -> Result<(), PeerError> {
        let all = (self.window * self.devices) as u32;
        match timeout(ARRIVED_WITHIN, self.room.acquire_many(all)).await {
            Ok(Ok(_)) => Ok(()),
            _ => {
                let lacking = all as usize - self.room.available_permits();
                Err(PeerError::failed("deliver everything", format!("{lacking} deliveries did not come")))
            }
        }
    }
}
