//! Every decision of Stentor as plain values: what a command does to a conversation or a user, what a session says
//! next, who may see what. No IO, no clocks, no randomness of its own: those are arguments.

#![forbid(unsafe_code)]

pub mod access;
pub mod apply;
pub mod batch;
pub mod command;
pub mod conversation;
pub mod dedup;
pub mod delivery;
pub mod echo;
pub mod effect;
pub mod join;
pub mod key;
pub mod limits;
pub mod membership;
pub mod meta;
pub mod parking;
pub mod placement;
#[cfg(feature = "planted")]
pub mod planted;
pub mod rate;
pub mod route;
pub mod rows;
pub mod session;
pub mod stamp;
mod state;
pub mod user;
