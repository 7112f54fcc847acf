//! One simulated run: a cluster, a workload, a nemesis, healing, and the judgement. Must never call a run clean that was
//! not looked at whole: progress after healing, every conversation read in the end, and all replicas compared.

use std::{fmt, sync::Arc, time::Duration};

use stentor_broker::StoreTuning;
use stentor_client::{Client, ConversationId, Create, MemoryCursors, Message};
use stentor_raft_store::DiskFaults;
use stentor_transport::memory::Trace;
use tokio::{
    runtime::{Builder, RngSeed},
    time::{Instant, timeout},
};

use super::{Cluster, Schedule};
use crate::{
    oracle::{Device, Judged, Recorder, Verdict, judge},
    workload::{self, Connect, Workload},
};

/// Progress is due so soon after the healing (faults.md, L).
const PROGRESS: Duration = Duration::from_secs(10);
/// How long whatever is not there yet may take in the end.
const SETTLE: Duration = Duration::from_secs(60);
/// Conversations that are only there to show progress; by chance they lie in several shards.
const PROBES: usize = 4;

/// Characters of a violation that are told; bodies are long.
const TOLD: usize = 400;

/// What is run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Brokers, 1 to 5.
    pub brokers: usize,
    /// Gateways.
    pub gateways: usize,
    /// Shards beside the meta shard.
    pub shards: u32,
    /// After how long without news a shard parks; zero: never.
    pub park_after: Duration,
    /// Bounds of the brokers' stores: with small ones they refuse work now and then, as brokers under too much load do.
    pub store: StoreTuning,
    /// How long faults begin.
    pub chaos: Duration,
    /// The faults; drawn from the seed when there are none here.
    pub schedule: Option<Schedule>,
    /// Faults that every broker's disk has from the beginning until all is healed.
    pub disks: DiskFaults,
    /// What clients do; its seed is replaced by the run's.
    pub workload: workload::Plan,
    /// Keep every note of the trace, to see where two runs part.
    pub lines: bool,
}

impl Default for Plan {
    fn default() -> Self {
        let pause = Duration::from_millis(900);
        let workload = workload::Plan { operations: 40, pause, ..workload::Plan::small(0) };
        let chaos = Duration::from_secs(20);
        Self {
            brokers: 3,
            gateways: 2,
            shards: 3,
            // Between two operations, so that most of a run is parking and waking.
            park_after: Duration::from_millis(500),
            store: StoreTuning::default(),
            chaos,
            schedule: None,
            disks: DiskFaults::default(),
            workload,
            lines: false,
        }
    }
}

/// What came out of a run, as plain values.
#[derive(Debug, Clone)]
pub struct Report {
    /// The seed, by which it can be had again.
    pub seed: u64,
    /// Over everything that happened; the same for every run of the same seed and plan.
    pub hash: u64,
    /// What happened to the cluster.
    pub schedule: Schedule,
    /// Simulated time.
    pub simulated: Duration,
    /// Notes of the trace: packets, draws, applied entries.
    pub notes: u64,
    /// Entries that were applied.
    pub entries: usize,
    /// What the judgement rests on.
    pub judged: Judged,
    /// What was broken, each as a sentence that begins with the invariant.
    pub violations: Vec<String>,
    /// Every note, if they were to be kept.
    pub lines: Vec<String>,
}

impl Report {
    /// The invariants that were broken, each once.
    pub fn broken(&self) -> Vec<&str> {
        let mut broken: Vec<_> = self.violations.iter().filter_map(|v| v.split(':').next()).collect();
        broken.dedup();
        broken
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Judged { acknowledged, refused, unknown, events, deliveries, .. } = self.judged;
        writeln!(
            f,
            "seed {}: hash {:016x}, {:.1} simulated s, {acknowledged} acknowledged, {refused} refused, {unknown} unknown, \
             {events} events, {deliveries} deliveries, {} entries, {} notes",
            self.seed,
            self.hash,
            self.simulated.as_secs_f64(),
            self.entries,
            self.notes
        )?;
        write!(f, "{}", self.schedule)?;
        self.violations
            .iter()
            .try_for_each(|violation| writeln!(f, "  {}", violation.chars().take(TOLD).collect::<String>()))
    }
}

/// Runs a seed on this thread, which must not be inside a runtime.
pub fn run(seed: u64, plan: &Plan) -> Report {
    stentor_raft_store::runtime::seed_thread(seed);
    let runtime = Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .rng_seed(RngSeed::from_bytes(&seed.to_le_bytes()))
        .build()
        .unwrap_or_else(|error| unreachable!("a runtime without IO: {error}"));
    let report = runtime.block_on(scenario(seed, plan));
    // Tasks of the last lives end here; nothing of them outlives the run.
    drop(runtime);
    report
}

async fn scenario(seed: u64, plan: &Plan) -> Report {
    let (began, trace) = (Instant::now(), Trace::new(plan.lines));
    let schedule = plan.schedule.clone();
    let schedule = schedule.unwrap_or_else(|| Schedule::draw(seed, plan.brokers, plan.gateways, plan.chaos));
    let recorder = Recorder::new();
    let mut violations = Vec::new();
    let mut entries = 0;
    match Cluster::start(seed, plan, trace.clone()).await {
        Err(error) => violations.push(format!("L: {error}")),
        Ok(cluster) => {
            if let Err(error) = chaos(seed, plan, &schedule, &cluster, &recorder, &mut violations).await {
                violations.push(format!("L: {error}"));
            }
            violations.extend(cluster.problems());
            entries = cluster.entries();
        }
    }
    let history = recorder.history();
    trace.note("history", &[], format!("{history:?}").as_bytes());
    let Verdict { violations: broken, judged, .. } = judge(&history);
    violations.extend(broken.into_iter().map(|v| format!("{}: {}: {}", v.invariant, v.conversation, v.what)));
    Report {
        seed,
        hash: trace.hash(),
        schedule,
        simulated: began.elapsed(),
        notes: trace.notes(),
        entries,
        judged,
        violations,
        lines: trace.take_lines(),
    }
}

/// Before, during and after the faults.
async fn chaos(
    seed: u64,
    plan: &Plan,
    schedule: &Schedule,
    cluster: &Cluster,
    recorder: &Recorder,
    violations: &mut Vec<String>,
) -> Result<(), String> {
    let probes = probes(cluster).await?;
    let workload = workload::Plan { seed, ..plan.workload.clone() };
    let begun = Workload::begin(workload, cluster.clone(), recorder.clone()).await;
    let mut workload = begun.map_err(|error| format!("the workload cannot begin: {error}"))?;
    let nemesis = async {
        schedule.carry_out(cluster).await;
        Schedule::heal(cluster).await;
        progress(cluster, &probes).await
    };
    let ((), progressed) = tokio::join!(workload.run(), nemesis);
    violations.extend(progressed.err().map(|error| format!("L: no progress {PROGRESS:?} after healing: {error}")));
    let settled = workload.settle(SETTLE).await;
    violations.extend(settled.missing.into_iter().map(|missing| format!("L: {missing}")));
    if let Err(error) = cluster.ready(PROGRESS).await {
        violations.push(format!("L: {error}"));
    }
    Ok(())
}

fn prober(n: usize) -> Device {
    Device { user: "prober".into(), name: format!("device-{n}").into() }
}

async fn prober_client(cluster: &Cluster, n: usize) -> Result<Client, String> {
    cluster.connect(&prober(n), Arc::new(MemoryCursors::new()), n).await.map_err(|error| error.to_string())
}

/// Conversations to show progress in.
async fn probes(cluster: &Cluster) -> Result<Vec<ConversationId>, String> {
    let client = prober_client(cluster, 0).await?;
    let mut probes = Vec::new();
    for n in 0..PROBES {
        let id = ConversationId::new(format!("probe-{n}")).map_err(|error| error.to_string())?;
        let created = client.create_conversation(Create::group([]).id(id.clone())).await;
        created.map_err(|error| format!("a probe cannot be created: {error}"))?;
        probes.push(id);
    }
    client.close().await;
    Ok(probes)
}

/// A fresh device must get an acknowledgement in every probe.
async fn progress(cluster: &Cluster, probes: &[ConversationId]) -> Result<(), String> {
    let until = Instant::now() + PROGRESS;
    let mut attempt = 1;
    loop {
        match prober_client(cluster, attempt).await {
            Ok(client) => {
                for probe in probes {
                    let left = until.saturating_duration_since(Instant::now());
                    match timeout(left, client.send(probe, Message::text("progress"))).await {
                        Ok(Ok(_)) => {}
                        Ok(Err(error)) => return Err(format!("{probe}: {error}")),
                        Err(_) => return Err(format!("{probe} does not answer")),
                    }
                }
                client.close().await;
                return Ok(());
            }
            Err(error) if Instant::now() >= until => return Err(error),
            Err(_) => attempt += 1,
        }
    }
}
