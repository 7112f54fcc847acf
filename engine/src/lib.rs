//! Every decision of Stentor as plain values: what a command does to a conversation or a user, what a session says
//! next, who may see what. No IO, no clocks, no randomness of its own: those are arguments.

#![forbid(unsafe_code)]

pub mod effect;
pub mod key;
pub mod rows;
