//! What breaks the cluster: SIGKILL of one node at a time, again and again, or of all brokers in one blow. Must always put
//! back what it took.

use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until};

use super::{ClusterError, lines::Progress, processes::Processes, report::Fault};
use crate::workload::Dice;

/// From one kill to the next.
const EVERY: Duration = Duration::from_secs(3);
/// So long the node stays dead.
const DEAD_FOR: Duration = Duration::from_secs(1);
/// So many sends without an answer make a blow worth dealing.
pub(super) const IN_FLIGHT: u64 = 100;

/// Kills a random one of these nodes every 3 s and starts it after 1 s, from the first answer until all is over.
pub(super) async fn one_at_a_time(
    processes: &Processes,
    nodes: &[String],
    dice: &mut Dice,
    progress: &Progress,
) -> Result<Vec<Fault>, ClusterError> {
    let mut faults = Vec::new();
    progress.until(|progress| progress.answered() > 0).await;
    let mut next = Instant::now();
    while !progress.is_finished() {
        let Some(node) = dice.pick(nodes) else { break };
        let before = progress.answered();
        processes.kill(node).await?;
        sleep(DEAD_FOR).await;
        processes.start(node).await?;
        // One after the last answer breaks nothing.
        if !progress.is_finished() && progress.answered() > 0 {
            faults.push(Fault { nodes: vec![node.clone()], unanswered: progress.unanswered(), answered: before });
        }
        next = (next + EVERY).max(Instant::now());
        tokio::select! {
            () = sleep_until(next) => {}
            () = progress.until(Progress::is_finished) => {}
        }
    }
    Ok(faults)
}

/// Kills all of these nodes at once and starts them again, so many times, each time with many sends in flight and after
/// some were answered since the last time.
pub(super) async fn all_at_once(
    processes: &Processes,
    nodes: &[String],
    times: u64,
    progress: &Progress,
) -> Result<Vec<Fault>, ClusterError> {
    let mut faults = Vec::new();
    for _ in 0..times {
        let before = progress.answered();
        let ready =
            |progress: &Progress| progress.answered() > before + IN_FLIGHT && progress.unanswered() >= IN_FLIGHT;
        progress.until(ready).await;
        if progress.is_finished() {
            break;
        }
        processes.kill_at_once(nodes)?;
        // So that the folder knows that they did not fail by themselves; waits until the last thread is gone.
        for node in nodes {
            processes.kill(node).await?;
        }
        // Nothing can be answered any more, so what is open now was open when it happened.
        faults.push(Fault { nodes: nodes.to_vec(), unanswered: progress.unanswered(), answered: progress.answered() });
        processes.start_all(nodes).await?;
    }
    Ok(faults)
}
