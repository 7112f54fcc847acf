//! Ports for a development cluster: the well-known ones, those it had last time, or free ones. Must never hand out a
//! port that another process, or another node of this cluster, has.

use std::{
    collections::HashSet,
    fs::File,
    net::{Ipv4Addr, SocketAddr},
};

use rand::Rng;
use stentor_transport::bind::{self, BindError};

use crate::failure::Failure;

/// Where free ports are looked for: below the range from which systems take ports for outgoing connections.
const FREE: std::ops::Range<u16> = 18_000..32_000;
/// Tries before giving up; a machine with so few free ports has other worries.
const TRIES: u32 = 200;

/// Which kind of socket will be bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Wire {
    /// A listening stream socket.
    Tcp,
    /// A datagram socket.
    Udp,
}

/// Chooses ports, one caller at a time on this machine: what was free a moment ago must still be free when the nodes
/// bind it, so this is kept until they have.
#[derive(Debug)]
pub(crate) struct Ports {
    given: HashSet<(Wire, u16)>,
    _lock: Option<File>,
}

impl Ports {
    /// Waits until no other development cluster is choosing. Without a place for the lock it goes on without.
    pub(crate) fn lock() -> Self {
        let path = std::env::temp_dir().join("stentor-ports.lock");
        let file = File::options().write(true).create(true).truncate(false).open(path).ok();
        Self { given: HashSet::new(), _lock: file.filter(|file| file.lock().is_ok()) }
    }

    /// The preferred port on loopback if it is free, else any free one.
    pub(crate) fn choose(&mut self, wire: Wire, preferred: u16) -> Result<SocketAddr, Failure> {
        let mut port = preferred;
        for _ in 0..TRIES {
            if !self.given.contains(&(wire, port)) && is_free(wire, port)? {
                self.given.insert((wire, port));
                return Ok(on_loopback(port));
            }
            port = rand::rng().random_range(FREE);
        }
        Err(Failure::failed("no free port was found on loopback"))
    }
}

fn on_loopback(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

fn is_free(wire: Wire, port: u16) -> Result<bool, Failure> {
    let bound = match wire {
        Wire::Tcp => bind::tcp(on_loopback(port)).map(drop),
        Wire::Udp => bind::udp(on_loopback(port)).map(drop),
    };
    match bound {
        Ok(()) => Ok(true),
        Err(BindError::PortInUse { .. }) => Ok(false),
        Err(error) => Err(Failure::failed(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_port_is_replaced_and_none_is_given_twice() {
        let taken = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        let mut ports = Ports::lock();
        let first = ports.choose(Wire::Tcp, port).unwrap();
        assert_ne!(first.port(), port);
        assert_ne!(ports.choose(Wire::Tcp, first.port()).unwrap(), first);
        assert_eq!(ports.choose(Wire::Udp, first.port()).unwrap().port(), first.port());
    }
}
