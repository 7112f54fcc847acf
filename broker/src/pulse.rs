//! One heartbeat for all shards that this broker leads, at the same moment, so that a peer gets them in one batch and each
//! replica's own clock may tick slowly. Must never wait for one shard while others are due.

use std::sync::Arc;

use futures_util::FutureExt;

use crate::{node::Node, parking, raft::HEARTBEAT};

/// Runs until the broker stops.
pub(crate) async fn run(node: Arc<Node>) {
    let mut every = tokio::time::interval(HEARTBEAT);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = every.tick() => {}
            () = node.stop.cancelled() => return,
        }
        parking::round(&node);
        let ticking = node.links.parking.ticking(&node);
        for hosted in ticking.iter().filter(|hosted| hosted.leadership().leads) {
            // Polled once, whatever this task has used of its turn: a full queue or a stopped replica gets none, and
            // openraft's own slower heartbeat stands in.
            let trigger = hosted.raft.trigger();
            let _ = tokio::task::unconstrained(trigger.heartbeat()).now_or_never();
        }
        parking::tell(&node);
    }
}
