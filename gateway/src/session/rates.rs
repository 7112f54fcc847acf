//! How fast a device may go here: its buckets, and what was refused for now and holds back what comes behind. Must never
//! refuse a numbered send for good: only the device's place in its own queue is at stake.

use stentor_engine::{
    limits,
    rate::{Bucket, Rate},
    session::server::HeldBack,
};
use stentor_proto::{ids::ShardId, reason::Reason, v1};

use super::Session;
use crate::{
    config::GatewayLimits,
    core::{Core, Who},
};

/// What a session has left to spend.
pub(super) struct Rates {
    sends: Bucket,
    bytes: Bucket,
    calls: Bucket,
    held_back: HeldBack,
}

/// The rates of the configuration.
struct Allowed {
    sends: Rate,
    bytes: Rate,
    calls: Rate,
}

fn allowed(limits: &GatewayLimits) -> Allowed {
    Allowed { sends: limits.sends.rate(), bytes: limits.send_bytes.rate(), calls: limits.calls.rate() }
}

impl Rates {
    /// Those of a device that may have been here a moment ago.
    pub(super) fn of(core: &Core, who: &Who) -> Self {
        let now_ms = core.now_ms();
        let (sends, bytes) = core.lend_rates(who);
        let calls = Bucket::new(allowed(&core.config.limits).calls, now_ms);
        Self { sends, bytes, calls, held_back: HeldBack::default() }
    }
}

impl Session {
    /// Whether a send goes on now. It is refused for now together with everything behind it.
    pub(super) fn admit(&mut self, shard: ShardId, send: &v1::Send, frame_bytes: usize) -> Result<(), Reason> {
        self.admit_some(shard, (&send.conversation, send.send_no), [frame_bytes]).1
    }

    /// The same of sends in a row, with the bytes of each: so many go on, and why the others do not.
    pub(super) fn admit_some(
        &mut self,
        shard: ShardId,
        (conversation, send_no): (&str, u64),
        sizes: impl IntoIterator<Item = usize>,
    ) -> (usize, Result<(), Reason>) {
        let now_ms = self.core.now_ms();
        let Rates { sends, bytes, held_back, .. } = &mut self.rates;
        if let Some(reason) = held_back.is_behind(conversation, send_no) {
            return (0, Err(reason));
        }
        let allowed = allowed(&self.core.config.limits);
        let (mut count, mut refused) = (0, self.server.is_stuck(shard, now_ms).then_some(Reason::Unavailable));
        for size in sizes {
            if refused.is_some() {
                break;
            }
            if sends.take(allowed.sends, 1, now_ms) && bytes.take(allowed.bytes, size as u64, now_ms) {
                count += 1;
            } else {
                self.core.metrics.rate_limited.inc();
                refused = Some(Reason::RateLimited);
            }
        }
        if count > 0 {
            held_back.admitted(conversation);
        }
        let Some(reason) = refused else { return (count, Ok(())) };
        held_back.refused(conversation, send_no + count as u64, reason);
        (count, Err(reason))
    }

    /// A send was refused because its sender has no access: it has left a row.
    pub(super) fn charge_stranger(&mut self) {
        let allowed = allowed(&self.core.config.limits);
        self.rates.sends.charge(allowed.sends, limits::STRANGERS_SEND_COST, self.core.now_ms());
    }

    /// Whether one more call, subscription or frame of cursor moves may be carried out now.
    pub(super) fn may_call(&mut self) -> Result<(), Reason> {
        let allowed = allowed(&self.core.config.limits);
        if self.rates.calls.take(allowed.calls, 1, self.core.now_ms()) {
            return Ok(());
        }
        self.core.metrics.rate_limited.inc();
        Err(Reason::RateLimited)
    }

    /// What the device has spent goes with it to its next session here.
    pub(super) fn return_rates(&self) {
        self.core.return_rates(&self.who, self.rates.sends, self.rates.bytes);
    }
}
