//! The runs: what is sent, what is broken meanwhile, and what is asked for in the end. Must never end without the verdict
//! of the oracle and of `admin verify`.

use std::{path::PathBuf, process::Stdio, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncBufReadExt, BufReader},
    time::{Instant, timeout},
};

use super::{
    ClusterError, Fault, Report,
    devices::Gateways,
    json,
    lines::{self, Pace, Progress},
    nemesis,
    processes::Processes,
};
use crate::{
    oracle::{Answer, Call, Device, Name, Outcome, Recorder, Start, judge},
    workload::{Dice, Plan, Workload},
};

/// After the last fault, everything has come within this time; generous, since machines may be busy.
const SETTLE_WITHIN: Duration = Duration::from_secs(120);
/// Lines per second while single nodes are killed.
const RATE: u32 = 200;
/// Lines unanswered at most while all brokers are killed.
const WINDOW: usize = 1_024;

/// Events of the creation: itself, and the follower.
const CREATED: u64 = 2;

/// What is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A random broker every 3 s.
    Brokers,
    /// A random gateway every 3 s.
    Gateways,
    /// All brokers at once.
    All,
    /// A random node of either kind every 3 s, under the mixed workload of many devices.
    Mixed,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 4] = [Self::Brokers, Self::Gateways, Self::All, Self::Mixed];

    /// As it is called on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Brokers => "brokers",
            Self::Gateways => "gateways",
            Self::All => "all",
            Self::Mixed => "mixed",
        }
    }
}

/// One run to be made.
#[derive(Debug, Clone)]
pub struct Scenario {
    /// What is broken.
    pub kind: Kind,
    /// The binary under test.
    pub binary: PathBuf,
    /// Decides what is left to chance, as far as processes let it.
    pub seed: u64,
    /// Lines to send, of [`Kind::All`] at least; operations of each device of the mixed workload.
    pub size: u64,
    /// At least so many faults must have met it; of [`Kind::All`] exactly so many are made.
    pub faults: u64,
}

impl Scenario {
    /// As the project's goals ask for it.
    pub fn full(kind: Kind, binary: PathBuf, seed: u64) -> Self {
        let (size, faults) = match kind {
            Kind::Brokers | Kind::Gateways => (20_000, 20),
            Kind::All => (15_000, 10),
            Kind::Mixed => (600, 15),
        };
        Self { kind, binary, seed, size, faults }
    }

    /// A few seconds of the same.
    pub fn short(kind: Kind, binary: PathBuf, seed: u64) -> Self {
        let (size, faults) = match kind {
            Kind::Brokers | Kind::Gateways => (1_500, 2),
            Kind::All => (2_000, 2),
            Kind::Mixed => (60, 2),
        };
        Self { kind, binary, seed, size, faults }
    }

    /// Makes it, on a cluster of its own.
    ///
    /// # Errors
    /// Why it could not be made or judged. What was judged and is bad is in the report.
    pub async fn run(&self) -> Result<Report, ClusterError> {
        let began = Instant::now();
        let mut processes = Processes::up(self.binary.clone()).await?;
        let recorder = Recorder::new();
        let ran = match self.kind {
            Kind::Mixed => self.mixed(&processes, &recorder).await,
            _ => self.lines(&processes, &recorder).await,
        };
        let Ran { faults, longest_stall, mut missing } = ran.inspect_err(|_| drop(processes.keep()))?;
        let (_, printed) = processes.ask(&["admin", "verify", "--json"]).await?;
        let verify: serde_json::Value =
            printed.lines().last().and_then(|line| serde_json::from_str(line).ok()).unwrap_or_default();
        if (faults.len() as u64) < self.faults {
            missing.push(format!("{} faults met it, of at least {}", faults.len(), self.faults));
        }
        let verdict = judge(&recorder.history());
        let ok = verdict.is_clean() && missing.is_empty() && verify["ok"] == true && verdict.judged.acknowledged > 0;
        Ok(Report {
            scenario: self.kind.name(),
            ok,
            seed: self.seed,
            wall_s: began.elapsed().as_secs_f64(),
            faults,
            longest_stall_ms: longest_stall.map(|stall| stall.as_millis() as u64),
            verdict,
            missing,
            verify,
            kept: (!ok).then(|| processes.keep().display().to_string()),
        })
    }

    /// One sender of lines and one who follows, while nodes die.
    async fn lines(&self, processes: &Processes, recorder: &Recorder) -> Result<Ran, ClusterError> {
        let (sender, follower) = (Device::new("ann", "sender"), Device::new("bob", "follower"));
        let conversation = create(processes, recorder, &sender, &follower).await?;
        let progress = Arc::new(Progress::default());
        let (rate, window) = if self.kind == Kind::All { (None, WINDOW) } else { (Some(RATE), WINDOW) };
        let pace = Pace { lines: self.size, rate, window };
        let sending = lines::send(processes, recorder, &conversation, (&sender, self.seed, pace), &progress);
        let following = follow(processes, recorder, &conversation, &follower, &progress);
        let breaking = self.breaking(processes, &progress);
        let ((), faults, followed) = tokio::try_join!(sending, breaking, following)?;
        let mut missing = Vec::new();
        let events = progress.in_all().map_or(u64::MAX, |lines| lines + CREATED);
        missing.extend((followed < events).then(|| format!("{follower} got {followed} of {events} events")));
        read_all(processes, recorder, &conversation, &sender).await?;
        let unanswered = recorder.unanswered();
        missing.extend((unanswered > 0).then(|| format!("{unanswered} lines have no answer")));
        if self.kind == Kind::All {
            let few = faults.iter().filter(|fault| fault.unanswered < nemesis::IN_FLIGHT).count();
            missing.extend((few > 0).then(|| format!("{few} blows met fewer than {} sends", nemesis::IN_FLIGHT)));
        }
        Ok(Ran { faults, longest_stall: Some(progress.longest_stall()), missing })
    }

    async fn breaking(&self, processes: &Processes, progress: &Progress) -> Result<Vec<Fault>, ClusterError> {
        let nodes = match self.kind {
            Kind::Brokers | Kind::All => processes.nodes("broker")?,
            Kind::Gateways => processes.nodes("gateway")?,
            Kind::Mixed => [processes.nodes("broker")?, processes.nodes("gateway")?].concat(),
        };
        if self.kind == Kind::All {
            let faults = nemesis::all_at_once(processes, &nodes, self.faults, progress).await;
            progress.leave_unbroken();
            return faults;
        }
        // Goes on for as long as the sender does.
        progress.leave_unbroken();
        nemesis::one_at_a_time(processes, &nodes, &mut Dice::new(self.seed).fork("nemesis"), progress).await
    }

    /// Many devices through the SDK, while nodes of both kinds die.
    async fn mixed(&self, processes: &Processes, recorder: &Recorder) -> Result<Ran, ClusterError> {
        let plan = Plan { operations: self.size, users: 4, conversations: 6, ..Plan::small(self.seed) };
        let mut workload = Workload::begin(plan, Gateways::of(processes)?, recorder.clone()).await?;
        let progress = Arc::new(Progress::begun());
        let working = async {
            workload.run().await;
            progress.finish();
            Ok(())
        };
        let ((), faults) = tokio::try_join!(working, self.breaking(processes, &progress))?;
        let missing = workload.settle(SETTLE_WITHIN).await.missing;
        Ok(Ran { faults, longest_stall: None, missing })
    }
}

/// How a run went, before it is judged.
struct Ran {
    faults: Vec<Fault>,
    longest_stall: Option<Duration>,
    missing: Vec<String>,
}

/// A group of the sender's, with the follower in it.
async fn create(
    processes: &Processes,
    recorder: &Recorder,
    owner: &Device,
    other: &Device,
) -> Result<Name, ClusterError> {
    let id: Name = "lines".into();
    let operation = recorder.invoke(owner, &id, Call::Create { history_full: false });
    let arguments =
        ["conversation", "create", "--id", &id, "--participant", &other.user, "--user", &owner.user, "--json"];
    processes.run(&arguments).await?;
    recorder.answer(operation, Outcome::Acknowledged(Answer::Event { seq: 1, repeat: false }));
    Ok(id)
}

/// Follows the conversation from its beginning until all lines have come, or none comes any more. Returns how far it got.
async fn follow(
    processes: &Processes,
    recorder: &Recorder,
    conversation: &Name,
    by: &Device,
    progress: &Progress,
) -> Result<u64, ClusterError> {
    let stream = recorder.subscribe(by, conversation, Start::After(0));
    let arguments = ["tail", conversation, "--after-seq", "0", "--json", "--user", &by.user, "--device", &by.name];
    let mut child = processes.spawn(&arguments, Stdio::null())?;
    let Some(stdout) = child.stdout.take() else { return Ok(0) };
    let mut lines = BufReader::new(stdout).lines();
    let mut last = 0;
    while progress.in_all().is_none_or(|lines| last < lines + CREATED) {
        let Ok(line) = timeout(SETTLE_WITHIN, lines.next_line()).await else { break };
        let Some(line) = line.map_err(ClusterError::io("read what came"))? else { break };
        let item = json::item(&line)?;
        last = item.span().1;
        recorder.deliver(stream, item);
    }
    Ok(last)
}

/// The whole conversation, read linearizably when all is over.
async fn read_all(
    processes: &Processes,
    recorder: &Recorder,
    conversation: &Name,
    by: &Device,
) -> Result<(), ClusterError> {
    let arguments = ["history", conversation, "--linearizable", "--json", "--user", &by.user];
    let printed = processes.run(&arguments).await?;
    let items = printed.lines().map(json::item).collect::<Result<Vec<_>, _>>()?;
    let head = items.last().map_or(0, |item| item.span().1);
    recorder.read_all(conversation, items, head);
    Ok(())
}
