//! The two halves of a session: what a device and a gateway say next and what they may not say. Pure: time is an
//! argument, sending is somebody else's.

pub mod client;
pub mod listing;
pub mod server;
