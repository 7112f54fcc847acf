//! Measures a load on a peer as `measure` does on our own cluster: warm-up, one phase, what all processes used in it.
//! Must never count what happened before or after the phase.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use tokio::time::sleep;

use super::{PeerError, server::Server};
use crate::{
    BenchError, Outcome, Spent, Timing, Usage,
    fsyncs::Fsyncs,
    measure::Cost,
    meter::Meters,
    workers::{Part, joined},
};

/// The processes of a peer, by name; one name may be several.
#[derive(Debug)]
pub(crate) struct Gauge {
    processes: Vec<(String, u32)>,
    fsyncs: Option<Fsyncs>,
}

struct Moment {
    at: Instant,
    own: Usage,
    servers: Vec<Usage>,
    fsyncs: Option<u64>,
}

impl Gauge {
    /// Of these servers; begins to count fsyncs, where that is allowed.
    pub(crate) fn of(servers: &[Server]) -> Self {
        let processes: Vec<_> = servers.iter().map(|server| (server.name().to_owned(), server.pid())).collect();
        Self::of_processes(processes)
    }

    /// Of processes by their numbers.
    pub(crate) fn of_processes(processes: Vec<(String, u32)>) -> Self {
        let pids: Vec<u32> = processes.iter().map(|(_, pid)| *pid).collect();
        Self { processes, fsyncs: Fsyncs::count(&pids) }
    }

    /// Lets the load run through warm-up and one phase.
    pub(crate) async fn measure(&self, timing: Timing, meters: &Meters) -> Result<Outcome, PeerError> {
        sleep(Duration::from_secs_f64(timing.warm_up_s)).await;
        let before = self.now()?;
        meters.take();
        sleep(Duration::from_secs_f64(timing.seconds)).await;
        let now = self.now()?;
        let part = Part::taken(meters, now.at - before.at, now.own.since(&before.own));
        Ok(joined(vec![("bench".into(), part)], self.cost(&before, &now)))
    }

    fn now(&self) -> Result<Moment, PeerError> {
        let own = Usage::own().map_err(BenchError::io("read /proc/self"))?;
        let servers = self.processes.iter().map(|(name, pid)| {
            Usage::of(*pid).map_err(|error| PeerError::failed(format!("read what {name} uses"), error))
        });
        let servers = servers.collect::<Result<Vec<_>, _>>()?;
        Ok(Moment { at: Instant::now(), own, servers, fsyncs: self.fsyncs.as_ref().map(Fsyncs::so_far) })
    }

    fn cost(&self, before: &Moment, now: &Moment) -> Cost {
        let mut servers: BTreeMap<String, Spent> = BTreeMap::new();
        for ((name, _), (before, now)) in self.processes.iter().zip(before.servers.iter().zip(&now.servers)) {
            let spent = now.since(before);
            servers.entry(name.clone()).and_modify(|sum| *sum = sum.plus(&spent)).or_insert(spent);
        }
        Cost {
            elapsed: now.at - before.at,
            threads: BTreeMap::new(),
            servers,
            fsyncs: now.fsyncs.zip(before.fsyncs).map(|(now, before)| now - before),
        }
    }
}
