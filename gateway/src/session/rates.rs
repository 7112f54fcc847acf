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
        let now_ms = self.core.now_ms();
        let Rates { sends, bytes, held_back, .. } = &mut self.rates;
        if let Some(reason) = held_back.is_behind(&send.conversation, send.send_no) {
            return Err(reason);
        }
        let allowed = allowed(&self.core.config.limits);
        let reason = if self.server.is_stuck(shard, now_ms) {
            Reason::Unavailable
        } else if !(sends.take(allowed.sends, 1, now_ms) && bytes.take(allowed.bytes, frame_bytes as u64, now_ms)) {
            self.core.metrics.rate_limited.inc();
            Reason::RateLimited
        } else {
            held_back.admitted(&send.conversation);
            return Ok(());
        };
        held_back.refused(&send.conversation, send.send_no, reason);
        Err(reason)
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
