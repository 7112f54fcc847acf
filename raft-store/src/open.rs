//! Opening a data directory: lock, identity, both instances, the check against the side file, unfinished installs.
//! Must never start a thread, or let anybody read, before all of that is right.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io,
    path::Path,
    sync::{Arc, atomic::AtomicUsize},
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use rocksdb::{DB, Options};
use stentor_engine::limits;
use stentor_proto::ids::Incarnation;
use tokio::sync::{mpsc, watch};

use crate::{
    apply::{self, ApplyStats},
    checkpoint::Checkpoints,
    framing,
    identity::{self, Found},
    install,
    loader::Loader,
    logkey, options,
    store::{ApplyHook, Identity, OpenError, Opened, Parts, Store, StoreConfig},
    synced::SyncedFile,
    wal::Wal,
};

/// Opens a data directory, recovers and starts the threads. Blocks on the disk.
///
/// # Errors
/// See [`OpenError`]; nothing in the directory was changed, but for an interrupted snapshot that was finished.
pub fn open(config: StoreConfig, on_applied: Arc<dyn ApplyHook>) -> Result<Arc<Store>, OpenError> {
    let dir = config.dir.clone();
    let io_error = |source| OpenError::Io { dir: dir.clone(), source };
    let corrupt = |what: String| OpenError::Corrupt { dir: dir.clone(), what };
    fs::create_dir_all(&dir).map_err(io_error)?;
    let lock = lock(&dir)?;
    let (identity, new) = match identity::read(&dir).map_err(io_error)? {
        Found::New => (None, true),
        Found::Known(identity) => (identity, false),
        Found::Newer(found) => return Err(OpenError::NewerFormat { dir, found, known: identity::FORMAT }),
        Found::Damaged(what) => return Err(corrupt(what.into())),
    };
    // A known directory without its databases has lost them: opening must not make empty ones in their place.
    let log_db = open_db(&dir, "log", &options::log(new))?;
    let state_db = open_db(&dir, "state", &options::state(new))?;
    let side = SyncedFile::open(&dir.join("synced")).map_err(io_error)?;
    let position = position(&log_db).map_err(corrupt)?;
    let synced = side.read().map_err(io_error)?.map_err(corrupt)?;
    if position < synced {
        return Err(corrupt(format!("the log recovers to batch {position}, but batch {synced} was fsynced")));
    }
    if new {
        if position > 0 {
            return Err(corrupt("the log has entries, but the identity file is missing".into()));
        }
        identity::write(&dir, None).map_err(io_error)?;
    }
    let install_dir = dir.join("install");
    let incarnation = identity.as_ref().map_or(Incarnation(0), |identity: &Identity| identity.incarnation);
    install::resume(&state_db, &install_dir, incarnation).map_err(corrupt)?;
    start(config, on_applied, lock, log_db, state_db, side, position, identity).map_err(io_error)
}

fn lock(dir: &Path) -> Result<File, OpenError> {
    let path = dir.join("LOCK");
    let io_error = |source| OpenError::Io { dir: path.clone(), source };
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(io_error)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(OpenError::InUse(dir.to_path_buf())),
        Err(TryLockError::Error(error)) => Err(io_error(error)),
    }
}

fn open_db(dir: &Path, name: &str, options: &Options) -> Result<Arc<DB>, OpenError> {
    let path = dir.join(name);
    match framing::check(&path) {
        Ok(Ok(())) => {}
        Ok(Err(what)) => return Err(OpenError::Corrupt { dir: path, what }),
        Err(source) => return Err(OpenError::Io { dir: path, source }),
    }
    DB::open(options, &path).map(Arc::new).map_err(|error| match error.kind() {
        rocksdb::ErrorKind::IOError => OpenError::Io { dir: path, source: io::Error::other(error) },
        rocksdb::ErrorKind::Busy | rocksdb::ErrorKind::TryAgain => OpenError::InUse(path),
        _ => OpenError::Corrupt { dir: path, what: error.to_string() },
    })
}

/// The batch that the log recovered to; 0 for a new one.
fn position(db: &DB) -> Result<u64, String> {
    let Some(value) = db.get(logkey::POSITION).map_err(|e| e.to_string())? else { return Ok(0) };
    let bytes = logkey::unseal(&logkey::POSITION, &value)?;
    bytes.try_into().map(u64::from_be_bytes).map_err(|_| "the log's position has a wrong length".into())
}

#[allow(clippy::too_many_arguments)]
fn start(
    config: StoreConfig,
    hook: Arc<dyn ApplyHook>,
    lock: File,
    log_db: Arc<DB>,
    state_db: Arc<DB>,
    side: SyncedFile,
    position: u64,
    identity: Option<Identity>,
) -> io::Result<Arc<Store>> {
    let failed = watch::Sender::new(None);
    let epoch = Instant::now();
    let (wal, wal_thread) = Wal::start(log_db.clone(), side, position, failed.clone())?;
    // Many shards' checkpoints share a flush; a tenth of the interval keeps them durable in time.
    let delay = (config.checkpoint_interval / 10).min(Duration::from_secs(1));
    let (checkpoints, [checkpoint_thread, flush_thread]) = Checkpoints::start(&state_db, &failed, delay)?;
    let (apply, apply_rx) = mpsc::channel(limits::APPLY_QUEUE_JOBS);
    let (loader, load_thread) = Loader::start(state_db.clone(), apply.downgrade())?;
    let apply_stats = Arc::new(ApplyStats::default());
    let apply_thread = apply::start(apply_rx, loader.clone(), hook, apply_stats.clone(), epoch)?;
    let parts = Parts {
        state_db,
        apply,
        loader,
        checkpoints,
        failed,
        install_dir: config.dir.join("install"),
        clean_budget: Arc::new(AtomicUsize::new(config.cache_bytes / 2)),
        epoch,
        identity: Arc::new(Mutex::new(identity)),
    };
    let threads = vec![apply_thread, load_thread, checkpoint_thread, flush_thread, wal_thread];
    Ok(Arc::new(Store::new(Opened { config, parts, log_db, wal, apply_stats, threads, lock })))
}
