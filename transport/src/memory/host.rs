//! A simulated host as its node sees it: one life of it. Must never do anything for a node whose host was killed: its
//! tasks may still run a little, and whatever they say is lost.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use parking_lot::Mutex;
use rand::{RngCore, rngs::StdRng};

use super::{
    Network, QuicListener, StreamListener,
    wire::{Backlog, Kind},
};
use crate::{bind::BindError, quic::QuicLimits};

#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) network: Network,
    pub(crate) ip: IpAddr,
    pub(crate) life: u64,
    pub(crate) random: Mutex<StdRng>,
}

impl Host {
    pub(crate) fn wall_ms(&self) -> u64 {
        let shared = &self.network.0;
        let skew_ms = shared.state.lock().machines.get(&self.ip).map_or(0, |machine| machine.skew_ms);
        let true_ms = shared.wall_ms + shared.started.elapsed().as_millis() as u64;
        true_ms.saturating_add_signed(skew_ms)
    }

    pub(crate) fn draw(&self) -> u64 {
        let drawn = self.random.lock().next_u64();
        self.network.0.trace.note("draw", &[super::ip_number(self.ip), drawn], &[]);
        drawn
    }

    pub(crate) fn listen(&self, addr: SocketAddr) -> Result<StreamListener, BindError> {
        let backlog = self.bind(addr, Kind::Stream)?;
        Ok(StreamListener::new(self.network.clone(), addr, backlog))
    }

    pub(crate) fn listen_quic(&self, addr: SocketAddr, limits: &QuicLimits) -> Result<QuicListener, BindError> {
        let backlog = self.bind(addr, Kind::Quic)?;
        Ok(QuicListener::new(self.network.clone(), addr, backlog, limits.max_connections))
    }

    fn bind(&self, addr: SocketAddr, kind: Kind) -> Result<Arc<Backlog>, BindError> {
        if addr.ip() != self.ip || !self.network.0.lives(self.ip, self.life) {
            return Err(BindError::NotAvailable { addr });
        }
        let backlog = Arc::new(Backlog::default());
        let mut state = self.network.0.state.lock();
        if state.listeners.contains_key(&(addr, kind)) {
            return Err(BindError::PortInUse { addr });
        }
        state.listeners.insert((addr, kind), backlog.clone());
        Ok(backlog)
    }
}

impl Network {
    /// Nobody listens there any more, unless somebody else does by now.
    pub(crate) fn unbind(&self, addr: SocketAddr, kind: Kind, backlog: &Arc<Backlog>) {
        let mut state = self.0.state.lock();
        if state.listeners.get(&(addr, kind)).is_some_and(|known| Arc::ptr_eq(known, backlog)) {
            state.listeners.remove(&(addr, kind));
        }
    }
}
