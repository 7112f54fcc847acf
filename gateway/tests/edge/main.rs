//! The gateway from outside: scripted brokers behind it, raw QUIC devices before it.

#![allow(clippy::unwrap_used, clippy::panic)]

mod calls;
mod cursors;
mod hello;
mod membership;
mod rates;
mod sends;
mod streams;
mod support;
