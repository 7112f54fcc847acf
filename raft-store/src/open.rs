//! Opening a data directory: lock, identity, both instances, the check against the side file, unfinished installs.
//! Must never start a thread, or let anybody read, before all of that is right.

use std::{
    io,
    sync::{Arc, atomic::AtomicUsize},
    time::Duration,
};

use parking_lot::Mutex;
use stentor_engine::limits;
use stentor_proto::ids::Incarnation;
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};

use crate::{
    apply::{self, ApplyStats},
    checkpoint::Checkpoints,
    db::{Db, DbError, Instance},
    disk::{Disk, Lock},
    identity::{self, Found},
    install,
    loader::Loader,
    logkey,
    memory::MemoryDisk,
    quarantine::{self, Quarantine},
    store::{ApplyHook, Identity, OpenError, Opened, Parts, Store, StoreConfig},
    synced::SyncedFile,
    wal::Wal,
};

/// Opens a data directory, recovers and starts the threads. Blocks on the disk.
///
/// # Errors
/// See [`OpenError`]; nothing in the directory was changed, but for an interrupted snapshot that was finished.
pub fn open(config: StoreConfig, on_applied: Arc<dyn ApplyHook>) -> Result<Arc<Store>, OpenError> {
    open_on(Disk::Real, config, on_applied)
}

/// The same on a twin in memory, for simulation. To be called in a tokio runtime, whose tasks the workers become: with
/// one thread, paused time and a seed it repeats bit for bit. `config.dir` only names the directory on the disk.
///
/// # Errors
/// See [`OpenError`].
pub fn open_in_memory(
    config: StoreConfig,
    disk: &MemoryDisk,
    on_applied: Arc<dyn ApplyHook>,
) -> Result<Arc<Store>, OpenError> {
    open_on(Disk::Memory(disk.life()), config, on_applied)
}

fn open_on(disk: Disk, config: StoreConfig, on_applied: Arc<dyn ApplyHook>) -> Result<Arc<Store>, OpenError> {
    let dir = config.dir.clone();
    let io_error = |source| OpenError::Io { dir: dir.clone(), source };
    let corrupt = |what: String| OpenError::Corrupt { dir: dir.clone(), what };
    disk.create_dir_all(&dir).map_err(io_error)?;
    let lock = disk.lock(&dir)?;
    if let Some(what) = quarantine::noted(&disk, &dir).map_err(io_error)? {
        return Err(corrupt(what));
    }
    let (identity, new) = match identity::read(&disk, &dir).map_err(io_error)? {
        Found::New => (None, true),
        Found::Known(identity) => (identity, false),
        Found::Newer(found) => return Err(OpenError::NewerFormat { dir, found, known: identity::FORMAT }),
        Found::Damaged(what) => return Err(corrupt(what.into())),
    };
    // A known directory without its databases has lost them: opening must not make empty ones in their place.
    let log_db = Arc::new(disk.open_db(&dir, Instance::Log, new)?);
    let state_db = Arc::new(disk.open_db(&dir, Instance::State, new)?);
    let side = SyncedFile::open(&disk, &dir.join("synced")).map_err(io_error)?;
    let disk_error = |error| match error {
        DbError::Corrupt(what) => corrupt(what),
        DbError::Io(what) => io_error(io::Error::other(what)),
    };
    let position = position(&log_db).map_err(disk_error)?;
    let synced = side.read().map_err(io_error)?.map_err(corrupt)?;
    if position < synced {
        return Err(corrupt(format!("the log recovers to batch {position}, but batch {synced} was fsynced")));
    }
    if new {
        if position > 0 {
            return Err(corrupt("the log has entries, but the identity file is missing".into()));
        }
        identity::write(&disk, &dir, None).map_err(io_error)?;
    }
    let install_dir = dir.join("install");
    let incarnation = identity.as_ref().map_or(Incarnation(0), |identity: &Identity| identity.incarnation);
    install::resume(&state_db, &disk, &install_dir, incarnation).map_err(disk_error)?;
    start(disk, config, on_applied, lock, log_db, state_db, side, position, identity).map_err(io_error)
}

/// The batch that the log recovered to; 0 for a new one.
fn position(db: &Db) -> Result<u64, DbError> {
    let Some(value) = db.get(logkey::POSITION)? else { return Ok(0) };
    let bytes = logkey::unseal(&logkey::POSITION, &value).map_err(DbError::Corrupt)?;
    let long = |_| DbError::Corrupt("the log's position has a wrong length".into());
    bytes.try_into().map(u64::from_be_bytes).map_err(long)
}

#[allow(clippy::too_many_arguments)]
fn start(
    disk: Disk,
    config: StoreConfig,
    hook: Arc<dyn ApplyHook>,
    lock: Lock,
    log_db: Arc<Db>,
    state_db: Arc<Db>,
    side: SyncedFile,
    position: u64,
    identity: Option<Identity>,
) -> io::Result<Arc<Store>> {
    let failed = watch::Sender::new(None);
    let epoch = Instant::now();
    let exec = disk.exec();
    let quarantine = Arc::new(Quarantine::new(&disk, &config.dir, &failed));
    let (wal, wal_worker) = Wal::start(exec, log_db.clone(), side, position, (failed.clone(), quarantine.clone()))?;
    // Many shards' checkpoints share a flush; a tenth of the interval keeps them durable in time.
    let delay = (config.checkpoint_interval / 10).min(Duration::from_secs(1));
    let (checkpoints, [checkpoint_worker, flush_worker]) =
        Checkpoints::start(exec, &state_db, (&failed, &quarantine), delay)?;
    let (apply, apply_rx) = mpsc::channel(limits::APPLY_QUEUE_JOBS);
    let (loader, load_worker) = Loader::start(exec, state_db.clone(), apply.downgrade())?;
    let apply_stats = Arc::new(ApplyStats::default());
    let apply_worker = apply::start(exec, apply_rx, loader.clone(), hook, apply_stats.clone(), epoch)?;
    let parts = Parts {
        disk,
        state_db,
        apply,
        loader,
        checkpoints,
        failed,
        quarantine,
        install_dir: config.dir.join("install"),
        clean_budget: Arc::new(AtomicUsize::new(config.cache_bytes - config.dirty_bytes())),
        epoch,
        identity: Arc::new(Mutex::new(identity)),
    };
    let workers = vec![apply_worker, load_worker, checkpoint_worker, flush_worker, wal_worker];
    Ok(Arc::new(Store::new(Opened { config, parts, log_db, wal, apply_stats, workers, lock })))
}
