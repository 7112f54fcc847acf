//! What a network may do to a socket's packets, for tests: refuse, lose and reorder them. Must be the same in every run.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use parking_lot::Mutex;
use quinn_proto::Transmit;

use super::socket::Sent;

/// Which of a socket's packets meet what; 0 is none.
#[derive(Debug, Clone, Copy, Default)]
pub(in crate::quic) struct Plan {
    /// Every so many are refused at first.
    pub(in crate::quic) block_every: u64,
    /// Every so many are lost.
    pub(in crate::quic) lose_every: u64,
    /// Every so many are overtaken by the next.
    pub(in crate::quic) overtake_every: u64,
    /// All are lost after so many.
    pub(in crate::quic) lose_after: u64,
}

/// See the module.
#[derive(Default)]
pub(in crate::quic) struct Faults {
    plan: Plan,
    /// Every packet is refused while it is set.
    shut: Arc<AtomicBool>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    packets: u64,
    overtaken: Option<(Transmit, Vec<u8>)>,
}

impl Faults {
    pub(in crate::quic) fn new(plan: Plan) -> Self {
        Self { plan, ..Self::default() }
    }

    /// And what shuts the socket while it is set.
    pub(in crate::quic) fn shutter() -> (Self, Arc<AtomicBool>) {
        let faults = Self::default();
        let shut = faults.shut.clone();
        (faults, shut)
    }

    pub(super) fn send(&self, transmit: &Transmit, bytes: &[u8], send: impl Fn(&Transmit, &[u8]) -> Sent) -> Sent {
        if self.shut.load(Ordering::Acquire) {
            return Sent::Blocked;
        }
        let mut state = self.state.lock();
        state.packets += 1;
        let (count, plan) = (state.packets, &self.plan);
        let now = |every: u64| every > 0 && count % every == 0;
        if now(plan.block_every) {
            return Sent::Blocked;
        }
        if now(plan.lose_every) || (plan.lose_after > 0 && count > plan.lose_after) {
            return Sent::Gone;
        }
        if now(plan.overtake_every) {
            state.overtaken = Some((copy(transmit), bytes.to_vec()));
            return Sent::Gone;
        }
        let sent = send(transmit, bytes);
        if sent == Sent::Blocked {
            state.packets -= 1;
            return sent;
        }
        if let Some((transmit, bytes)) = state.overtaken.take() {
            send(&transmit, &bytes);
        }
        sent
    }
}

fn copy(transmit: &Transmit) -> Transmit {
    let &Transmit { destination, ecn, size, segment_size, src_ip } = transmit;
    Transmit { destination, ecn, size, segment_size, src_ip }
}
