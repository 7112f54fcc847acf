//! Our own driver of quinn-proto's state machines: one task for each socket, none for a connection. Whoever touches a
//! connection sends its packets in the same call. Must never hold a lock across an await, nor wake anybody while it
//! holds one.
//!
//! Locks, in the order in which they may be taken: a connection's `state`, then its endpoint's `routing` or `work`, never
//! both of these. Nobody takes a connection's while he holds either, and nobody holds two connections'.

mod connection;
mod endpoint;
#[cfg(test)]
pub(super) mod faults;
mod socket;
mod stream;
mod task;
#[cfg(test)]
mod tests;
mod timers;
mod waiting;

pub(super) use connection::Connection;
pub(super) use endpoint::{Endpoint, Incoming};
pub(super) use socket::Socket;
pub(super) use stream::{ReceiveHalf, SendHalf, Unreadable, Unwritable};
