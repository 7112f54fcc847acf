//! The apply thread of a broker: takes jobs of all shards, carries each command to the engine, answers. A shard whose
//! rows are not in memory is parked while the loader fetches them. Must never read a disk itself.

use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use bytes::{Bytes, BytesMut};
use openraft::{EntryPayload, storage::ApplyResponder};
use stentor_engine::{
    apply::{self, ApplyError, Context},
    effect::Applied,
    key::RowKey,
    limits,
};
use stentor_proto::{bundle::Bundle, ids::ShardId};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use crate::{
    cache::Map,
    exec::{Exec, Worker},
    loader::{LoadRequest, Loader},
    shard::{ShardCore, ShardState},
    store::ApplyHook,
    types::{Answers, RaftLogEntry, RaftLogId, StoredMembership, TypeConfig},
};

/// An entry and who waits for its answers.
pub(crate) type Item = (RaftLogEntry, Option<ApplyResponder<TypeConfig>>);

/// Committed entries of one shard, in order.
pub(crate) struct ApplyJob {
    pub(crate) core: Arc<ShardCore>,
    pub(crate) entries: VecDeque<Item>,
    pub(crate) done: oneshot::Sender<io::Result<()>>,
}

/// Runs between two entries of its shard.
pub(crate) type Call = Box<dyn FnOnce(&mut ShardState) + Send>;

/// What the apply thread is asked to do.
pub(crate) enum Job {
    Apply(ApplyJob),
    Call(Arc<ShardCore>, Call),
    /// The loader is through for a parked shard.
    Loaded(ShardId),
    Close(oneshot::Sender<()>),
}

/// Figures of the thread.
#[derive(Default)]
pub(crate) struct ApplyStats {
    pub(crate) entries: AtomicU64,
    pub(crate) commands: AtomicU64,
    pub(crate) loads: AtomicU64,
}

/// Half of an entry: what its commands have given so far.
struct EntryRun {
    log_id: RaftLogId,
    bundle: Bytes,
    context: Context,
    commands: Vec<Bytes>,
    next: usize,
    out: Applied,
    responder: Option<ApplyResponder<TypeConfig>>,
}

struct Parked {
    job: ApplyJob,
    run: Box<EntryRun>,
    calls: Vec<Call>,
}

enum Step {
    Done,
    /// The entry waits for this row.
    Park(Box<EntryRun>, RowKey),
    Stop(String),
}

/// Starts the thread.
pub(crate) fn start(
    exec: Exec,
    rx: mpsc::Receiver<Job>,
    loader: Loader,
    hook: Arc<dyn ApplyHook>,
    stats: Arc<ApplyStats>,
    epoch: Instant,
) -> io::Result<Worker> {
    let thread = ApplyThread { rx, loader, hook, stats, epoch, parked: Map::default(), records: BytesMut::new() };
    exec.spawn("apply", thread.run())
}

struct ApplyThread {
    rx: mpsc::Receiver<Job>,
    loader: Loader,
    hook: Arc<dyn ApplyHook>,
    stats: Arc<ApplyStats>,
    epoch: Instant,
    parked: Map<ShardId, Parked>,
    /// The arena that the engine writes records into.
    records: BytesMut,
}

impl ApplyThread {
    async fn run(mut self) {
        while let Some(job) = self.rx.recv().await {
            match job {
                Job::Apply(job) => self.entries(job, None),
                Job::Call(core, call) => self.call(&core, call),
                Job::Loaded(shard) => self.resume(shard),
                Job::Close(done) => {
                    self.rx.close();
                    // Whoever asked may have given up waiting.
                    let _ = done.send(());
                }
            }
        }
    }

    fn call(&mut self, core: &ShardCore, call: Call) {
        // Between two entries, never inside one: a parked shard is inside.
        match self.parked.get_mut(&core.shard) {
            Some(parked) if parked.calls.len() < limits::APPLY_PARKED_CALLS => parked.calls.push(call),
            Some(_) => tracing::warn!(shard = %core.shard, "too many reads wait for a parked shard; one is refused"),
            None => call(&mut core.state.lock()),
        }
    }

    fn resume(&mut self, shard: ShardId) {
        let Some(parked) = self.parked.remove(&shard) else { return };
        let core = parked.job.core.clone();
        self.entries(parked.job, Some(*parked.run));
        match self.parked.get_mut(&shard) {
            Some(again) => again.calls = parked.calls,
            None => {
                let mut state = core.state.lock();
                parked.calls.into_iter().for_each(|call| call(&mut state));
            }
        }
    }

    fn entries(&mut self, mut job: ApplyJob, mut half: Option<EntryRun>) {
        let core = job.core.clone();
        loop {
            let step = match half.take() {
                Some(run) => self.commands(&core, run),
                None => match job.entries.pop_front() {
                    Some(item) => self.entry(&core, item),
                    None => break,
                },
            };
            match step {
                Step::Done => {}
                Step::Park(run, key) => {
                    self.stats.loads.fetch_add(1, Relaxed);
                    core.state.lock().cache.wait(true);
                    let request =
                        LoadRequest { core: core.clone(), keys: wanted(&core, key, &run, &job), resume: true };
                    self.parked.insert(core.shard, Parked { job, run, calls: Vec::new() });
                    self.loader.load(request);
                    return;
                }
                Step::Stop(what) => {
                    tracing::error!(shard = %core.shard, what, "a replica must stop");
                    core.state.lock().stopped.get_or_insert(what.clone());
                    // Whoever asked may be gone already.
                    let _ = job.done.send(Err(io::Error::new(io::ErrorKind::InvalidData, what)));
                    return;
                }
            }
        }
        {
            let mut state = core.state.lock();
            state.cache.wait(false);
            state.cache.trim();
            core.count_rows(&state);
        }
        // Whoever asked may be gone already.
        let _ = job.done.send(Ok(()));
    }

    fn entry(&mut self, core: &Arc<ShardCore>, (entry, responder): Item) -> Step {
        let log_id = entry.log_id;
        let mut state = core.state.lock();
        if let Some(what) = &state.stopped {
            return Step::Stop(what.clone());
        }
        if state.progress.applied >= Some(log_id) {
            return Step::Stop(format!("entry {log_id} is applied twice: {:?} was the last", state.progress.applied));
        }
        let bytes = match entry.payload {
            EntryPayload::Normal(bundle) => {
                let run = match begin(&mut state, log_id, bundle.bundle, responder) {
                    Ok(run) => run,
                    Err(what) => return Step::Stop(what),
                };
                drop(state);
                return self.commands(core, run);
            }
            EntryPayload::Membership(membership) => {
                state.progress.membership = StoredMembership::new(Some(log_id), membership);
                ENTRY_BYTES
            }
            EntryPayload::Blank => ENTRY_BYTES,
        };
        state.progress.applied = Some(log_id);
        drop(state);
        self.finish(core, log_id, bytes, Applied::default(), responder);
        Step::Done
    }

    fn commands(&mut self, core: &Arc<ShardCore>, mut run: EntryRun) -> Step {
        let mut state = core.state.lock();
        // A load that failed has stopped the replica.
        if let Some(what) = &state.stopped {
            return Step::Stop(what.clone());
        }
        while let Some(command) = run.commands.get(run.next) {
            let applied =
                apply::apply_command(&mut state.cache, &run.context, command, &mut self.records, &mut run.out);
            match applied {
                Ok(()) => run.next += 1,
                Err(ApplyError::NotLoaded(missing)) => return Step::Park(Box::new(run), missing.0),
                Err(error) => return Step::Stop(format!("entry {}: {error}", run.log_id)),
            }
        }
        if let Some(what) = state.cache.broken() {
            return Step::Stop(format!("entry {}: {what}", run.log_id));
        }
        let appended = state.cache.take_appended();
        let progress = &mut state.progress;
        progress.applied = Some(run.log_id);
        progress.chain = apply::chain(progress.chain, &run.bundle);
        progress.events += appended;
        drop(state);
        self.finish(core, run.log_id, ENTRY_BYTES + run.bundle.len() as u64, run.out, run.responder);
        Step::Done
    }

    fn finish(
        &self,
        core: &ShardCore,
        log_id: RaftLogId,
        bytes: u64,
        mut applied: Applied,
        responder: Option<ApplyResponder<TypeConfig>>,
    ) {
        core.log_applied(bytes);
        if core.dirty_since_ms.load(Relaxed) == 0 {
            core.dirty_since_ms.store(self.epoch.elapsed().as_millis() as u64 + 1, Relaxed);
        }
        core.log.applied_to(log_id.index);
        core.applied.send_replace(Some(log_id));
        self.stats.entries.fetch_add(1, Relaxed);
        self.stats.commands.fetch_add(applied.outcomes.len() as u64, Relaxed);
        self.hook.applied(core.shard, log_id, &mut applied);
        if let Some(responder) = responder {
            responder.send(Answers(applied.outcomes));
        }
    }
}

/// What an entry without a bundle counts for.
const ENTRY_BYTES: u64 = 64;

fn begin(
    state: &mut ShardState,
    log_id: RaftLogId,
    bundle: Bytes,
    responder: Option<ApplyResponder<TypeConfig>>,
) -> Result<EntryRun, String> {
    let parsed = Bundle::parse(bundle.clone()).map_err(|e| format!("entry {log_id}: {e}"))?;
    let context = apply::begin_entry(&mut state.progress.stamp, &parsed).map_err(|e| format!("entry {log_id}: {e}"))?;
    let commands: Vec<Bytes> = parsed.commands().collect();
    let out = Applied { outcomes: Vec::with_capacity(commands.len()), effects: Vec::with_capacity(commands.len()) };
    Ok(EntryRun { log_id, bundle, context, commands, next: 0, out, responder })
}

/// Everything that the entry, and those behind it, will ask for and that memory does not have.
fn wanted(core: &ShardCore, first: RowKey, run: &EntryRun, job: &ApplyJob) -> Vec<RowKey> {
    let mut keys = vec![first];
    let state = core.state.lock();
    let mut visit = |key: RowKey| {
        if keys.len() < limits::LOAD_KEYS && state.cache.peek(&key).is_none() {
            keys.push(key);
        }
    };
    run.commands[run.next..].iter().for_each(|command| apply::prefetch(command, &mut visit));
    for (entry, _) in &job.entries {
        if let EntryPayload::Normal(bundle) = &entry.payload
            && let Ok(bundle) = Bundle::parse(bundle.bundle.clone())
        {
            bundle.commands().for_each(|command| apply::prefetch(&command, &mut visit));
        }
    }
    drop(state);
    keys.sort_unstable();
    keys.dedup();
    keys
}
