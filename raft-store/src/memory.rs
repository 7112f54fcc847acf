//! The twin of a broker's disk, for simulation: RocksDB's instances and the files beside them in memory, which forget
//! what was not synced when their power is cut, and fail when told to. Must never draw randomness but from its seed.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use stentor_engine::apply::chain;
use tokio::sync::watch;

use crate::{
    db::{DbError, Instance},
    runtime::split_mix,
};

pub(crate) mod files;
pub(crate) mod table;

use files::Files;
use table::Table;

/// The operating system's words when a disk refuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DiskError {
    /// EIO: the device failed.
    #[default]
    Io,
    /// ENOSPC: no space is left.
    NoSpace,
}

impl From<DiskError> for io::Error {
    fn from(error: DiskError) -> Self {
        // Linux' numbers, so that the words are the real ones.
        Self::from_raw_os_error(match error {
            DiskError::Io => 5,
            DiskError::NoSpace => 28,
        })
    }
}

/// What becomes of a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadFault {
    /// The operating system refuses.
    Refused(DiskError),
    /// A database's own checksum does not match. Files have none: a bit of them is flipped.
    Damaged,
    /// A bit is flipped, and nothing below this crate sees it.
    Flipped,
}

/// Faults by chance, each a probability from 0 to 1, drawn from the disk's seed.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct DiskFaults {
    /// A write fails; part of it may have reached the disk.
    pub write_fails: f64,
    /// An fsync or flush fails; what it was to make durable may be lost even without a power cut.
    pub sync_fails: f64,
    /// A read of a database or file fails.
    pub read_fails: f64,
    /// How they fail.
    pub error: DiskError,
    /// An fsync or flush is acknowledged and does nothing: what it covers is lost at the cut, unless a later one is
    /// honest.
    pub sync_lies: f64,
    /// Votes are acknowledged as synced and are lost at the cut: a planted bug for checkers to find.
    pub votes_forgotten: bool,
}

/// A disk. Cheap to clone; outlives the stores that are opened on it with [`crate::open_in_memory`], one at a time.
#[derive(Clone)]
pub struct MemoryDisk {
    shared: Arc<Shared>,
}

struct Shared {
    platter: Mutex<Platter>,
    votes: watch::Sender<u64>,
}

/// What is on the disk, and what happens to it.
pub(crate) struct Platter {
    /// Counts cuts and kills: whoever came before the last one is dead.
    life: u64,
    random: u64,
    torn: bool,
    sync_delay: Duration,
    faults: DiskFaults,
    operations: u64,
    end_at: Option<(u64, End)>,
    fail_at: Option<(u64, DiskError)>,
    reads: u64,
    read_fault_at: Option<(u64, ReadFault)>,
    pub(crate) tables: BTreeMap<(PathBuf, Instance), Table>,
    pub(crate) files: Files,
}

/// How a process ends that is not asked.
#[derive(Debug, Clone, Copy)]
enum End {
    Cut,
    Kill,
}

/// What an operation does, for faults.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    Write,
    Sync,
}

/// What becomes of a sync that did not fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Honesty {
    Honest,
    Lies,
}

fn off() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the power is off")
}

impl Platter {
    fn draw(&mut self) -> u64 {
        let (state, drawn) = split_mix(self.random);
        self.random = state;
        drawn
    }

    /// A number below `end`, which is not 0.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.draw() % (end as u64).max(1)) as usize
    }

    pub(crate) fn chance(&mut self, probability: f64) -> bool {
        // No draw without need: turning a fault off must not change what else is drawn.
        probability > 0.0 && ((self.draw() >> 11) as f64 / (1u64 << 53) as f64) < probability
    }

    /// Whether the caller's process still lives.
    pub(crate) fn alive(&self, life: u64) -> io::Result<()> {
        if self.life == life { Ok(()) } else { Err(off()) }
    }

    /// Counts an operation that changes the disk, and says whether it may happen.
    pub(crate) fn operation(&mut self, life: u64, step: Step) -> io::Result<()> {
        self.alive(life)?;
        self.operations += 1;
        if let Some((_, end)) = self.end_at.take_if(|(at, _)| *at == self.operations) {
            match end {
                End::Cut => self.cut(),
                End::Kill => self.kill(),
            }
            return Err(off());
        }
        if let Some((_, error)) = self.fail_at.take_if(|(at, _)| *at == self.operations) {
            return Err(error.into());
        }
        let probability = match step {
            Step::Write => self.faults.write_fails,
            Step::Sync => self.faults.sync_fails,
        };
        if self.chance(probability) { Err(self.faults.error.into()) } else { Ok(()) }
    }

    /// Counts a read, and says what becomes of it.
    fn read(&mut self) -> Option<ReadFault> {
        self.reads += 1;
        let told = self.read_fault_at.take_if(|(at, _)| *at == self.reads).map(|(_, fault)| fault);
        told.or_else(|| {
            let fails = self.chance(self.faults.read_fails);
            fails.then_some(ReadFault::Refused(self.faults.error))
        })
    }

    /// Reads from a database: what its own checksums say.
    fn read_row(&mut self, row: Option<Bytes>) -> Result<Option<Bytes>, DbError> {
        match self.read() {
            None => Ok(row),
            Some(ReadFault::Refused(error)) => Err(io::Error::from(error).into()),
            Some(ReadFault::Damaged) => Err(DbError::Corrupt("block checksum mismatch".into())),
            Some(ReadFault::Flipped) => Ok(row.map(|row| {
                let mut row = row.to_vec();
                self.flip(&mut row);
                row.into()
            })),
        }
    }

    /// Reads bytes of a file.
    pub(crate) fn read_file(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        match self.read() {
            None => Ok(()),
            Some(ReadFault::Refused(error)) => Err(error.into()),
            Some(ReadFault::Damaged | ReadFault::Flipped) => {
                self.flip(bytes);
                Ok(())
            }
        }
    }

    fn flip(&mut self, bytes: &mut [u8]) {
        let at = self.below(bytes.len());
        let bit = self.below(8);
        if let Some(byte) = bytes.get_mut(at) {
            *byte ^= 1 << bit;
        }
    }

    pub(crate) fn table(&mut self, key: &(PathBuf, Instance)) -> io::Result<&mut Table> {
        let missing = || io::Error::new(io::ErrorKind::NotFound, "the database is not there");
        self.tables.get_mut(key).ok_or_else(missing)
    }

    pub(crate) fn honesty(&mut self) -> Honesty {
        if self.chance(self.faults.sync_lies) { Honesty::Lies } else { Honesty::Honest }
    }

    pub(crate) fn forgets_votes(&self) -> bool {
        self.faults.votes_forgotten
    }

    /// How many of `pending` changes in order a cut leaves.
    pub(crate) fn kept(&mut self, pending: usize) -> usize {
        if self.torn && pending > 0 { self.below(pending + 1) } else { 0 }
    }

    fn cut(&mut self) {
        self.life += 1;
        self.end_at = None;
        let mut tables = std::mem::take(&mut self.tables);
        tables.values_mut().for_each(|table| table.cut(self));
        self.tables = tables;
        let mut files = std::mem::take(&mut self.files);
        files.cut(self);
        self.files = files;
    }

    fn kill(&mut self) {
        self.life += 1;
        self.end_at = None;
        let mut tables = std::mem::take(&mut self.tables);
        for ((_, instance), table) in &mut tables {
            match instance {
                // Written is written: the operating system lives on.
                Instance::Log => table.reread(),
                // Rows since the last flush were in the process' memory.
                Instance::State => table.cut(self),
            }
        }
        self.tables = tables;
        self.files.unlock();
    }
}

impl MemoryDisk {
    /// An empty disk. All that happens to it by chance follows from `seed`.
    pub fn new(seed: u64) -> Self {
        let platter = Platter {
            life: 0,
            random: seed,
            torn: true,
            sync_delay: Duration::ZERO,
            faults: DiskFaults::default(),
            operations: 0,
            end_at: None,
            fail_at: None,
            reads: 0,
            read_fault_at: None,
            tables: BTreeMap::new(),
            files: Files::default(),
        };
        Self { shared: Arc::new(Shared { platter: Mutex::new(platter), votes: watch::Sender::new(0) }) }
    }

    /// The power goes: what was not synced is lost, and the store that is open is dead. All that it still tries fails
    /// without effect; a new one can be opened at once.
    pub fn cut_power(&self) {
        self.shared.platter.lock().cut();
    }

    /// SIGKILL: as a power cut, but what was written to files and to the log's WAL is there, synced or not.
    pub fn kill_process(&self) {
        self.shared.platter.lock().kill();
    }

    /// Whether a cut leaves a random prefix of what was not synced, down to a torn 512-byte sector of a file (as disks
    /// do; the default), or nothing of it.
    pub fn set_torn(&self, torn: bool) {
        self.shared.platter.lock().torn = torn;
    }

    /// From now on an fsync of the log and a flush of the state take this much simulated time.
    pub fn set_sync_delay(&self, delay: Duration) {
        self.shared.platter.lock().sync_delay = delay;
    }

    /// From now on these faults happen.
    pub fn set_faults(&self, faults: DiskFaults) {
        self.shared.platter.lock().faults = faults;
    }

    /// No fault, and no end, is ahead any more.
    pub fn heal(&self) {
        let mut platter = self.shared.platter.lock();
        platter.faults = DiskFaults::default();
        platter.fail_at = None;
        platter.read_fault_at = None;
        platter.end_at = None;
    }

    /// Operations that changed the disk so far: writes, fsyncs, flushes, creations, renames, removals.
    pub fn operations(&self) -> u64 {
        self.shared.platter.lock().operations
    }

    /// The power goes in place of the `n`th operation from now, counted from 1.
    pub fn cut_power_at(&self, n: u64) {
        let mut platter = self.shared.platter.lock();
        platter.end_at = Some((platter.operations + n, End::Cut));
    }

    /// The process is killed in place of the `n`th operation from now, counted from 1.
    pub fn kill_process_at(&self, n: u64) {
        let mut platter = self.shared.platter.lock();
        platter.end_at = Some((platter.operations + n, End::Kill));
    }

    /// The `n`th operation from now, counted from 1, fails.
    pub fn fail_at(&self, n: u64, error: DiskError) {
        let mut platter = self.shared.platter.lock();
        platter.fail_at = Some((platter.operations + n, error));
    }

    /// Reads of databases and files so far: each value, and each step of a cursor.
    pub fn reads(&self) -> u64 {
        self.shared.platter.lock().reads
    }

    /// The `n`th read from now, counted from 1, goes wrong.
    pub fn fail_read_at(&self, n: u64, fault: ReadFault) {
        let mut platter = self.shared.platter.lock();
        platter.read_fault_at = Some((platter.reads + n, fault));
    }

    /// How many votes were synced, as it grows: whoever watches can cut the power right after one was granted.
    pub fn votes_synced(&self) -> watch::Receiver<u64> {
        self.shared.votes.subscribe()
    }

    /// A hash over all bytes that would survive a power cut with nothing torn.
    pub fn fingerprint(&self) -> u64 {
        let platter = self.shared.platter.lock();
        let tables = platter.tables.iter().fold(0, |hash, ((path, instance), table)| {
            let hash = chain(hash, path.as_os_str().as_encoded_bytes());
            table.fingerprint(chain(hash, &[*instance as u8]))
        });
        platter.files.fingerprint(tables)
    }

    /// The files that would survive a power cut with nothing torn, by path.
    pub fn durable_files(&self) -> Vec<PathBuf> {
        self.shared.platter.lock().files.durable_names()
    }

    pub(crate) fn life(&self) -> Life {
        Life { life: self.shared.platter.lock().life, disk: self.clone() }
    }
}

/// A process' hold on a disk; dead after a cut or a kill.
#[derive(Clone)]
pub(crate) struct Life {
    disk: MemoryDisk,
    life: u64,
}

impl Life {
    /// The disk, while this process lives.
    pub(crate) fn with<R>(&self, f: impl FnOnce(&mut Platter, u64) -> io::Result<R>) -> io::Result<R> {
        let mut platter = self.disk.shared.platter.lock();
        platter.alive(self.life)?;
        f(&mut platter, self.life)
    }

    /// Waits as long as a sync takes.
    pub(crate) async fn sync_time(&self) {
        let delay = self.disk.shared.platter.lock().sync_delay;
        if delay > Duration::ZERO {
            tokio::time::sleep(delay).await;
        }
    }

    /// Reads one value of a database that this process had a picture of.
    pub(crate) fn read_row(&self, row: Option<Bytes>) -> Result<Option<Bytes>, DbError> {
        self.disk.shared.platter.lock().read_row(row)
    }

    pub(crate) fn votes_synced(&self, count: u64) {
        if count > 0 {
            self.disk.shared.votes.send_modify(|votes| *votes += count);
        }
    }

    /// Opens an instance.
    pub(crate) fn open_table(&self, dir: &Path, instance: Instance, create: bool) -> Result<table::MemoryDb, DbError> {
        let key = (dir.to_path_buf(), instance);
        self.with(|platter, _| {
            if create {
                platter.tables.entry(key.clone()).or_default();
            }
            platter.table(&key).map(drop)
        })?;
        Ok(table::MemoryDb::new(self.clone(), key))
    }
}
