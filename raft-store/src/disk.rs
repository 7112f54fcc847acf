//! The files beside the databases, and the opening of these: on a real disk or on its twin in memory.
//! Must never decide when something is synced: that is said above.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use rocksdb::DB;

use crate::{
    db::{Db, Instance, Rocks},
    exec::Exec,
    framing,
    memory::{
        Life,
        files::{MemoryFile, MemoryLock},
    },
    options,
    store::OpenError,
};

/// Where a data directory lies.
#[derive(Clone)]
pub(crate) enum Disk {
    Real,
    Memory(Life),
}

/// An open file.
pub(crate) enum DiskFile {
    Real(File),
    Memory(MemoryFile),
}

/// Held for as long as a directory is in use.
pub(crate) enum Lock {
    Real { _file: File },
    Memory { _lock: MemoryLock },
}

impl Disk {
    /// How workers run beside it.
    pub(crate) fn exec(&self) -> Exec {
        match self {
            Self::Real => Exec::Threads,
            Self::Memory(_) => Exec::Tasks,
        }
    }

    pub(crate) fn create_dir_all(&self, dir: &Path) -> io::Result<()> {
        match self {
            Self::Real => fs::create_dir_all(dir),
            // Its paths are names; nothing has to be there before them.
            Self::Memory(_) => Ok(()),
        }
    }

    /// Takes a directory for this process.
    pub(crate) fn lock(&self, dir: &Path) -> Result<Lock, OpenError> {
        let path = dir.join("LOCK");
        let io_error = |source| OpenError::Io { dir: path.clone(), source };
        match self {
            Self::Real => {
                let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(io_error)?;
                match file.try_lock() {
                    Ok(()) => Ok(Lock::Real { _file: file }),
                    Err(TryLockError::WouldBlock) => Err(OpenError::InUse(dir.to_path_buf())),
                    Err(TryLockError::Error(error)) => Err(io_error(error)),
                }
            }
            Self::Memory(life) => {
                let lock = life.lock().map_err(io_error)?;
                lock.map(|lock| Lock::Memory { _lock: lock }).ok_or_else(|| OpenError::InUse(dir.to_path_buf()))
            }
        }
    }

    pub(crate) fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        match self {
            Self::Real => fs::read(path),
            Self::Memory(life) => life.read(path),
        }
    }

    /// For reading.
    pub(crate) fn open_file(&self, path: &Path) -> io::Result<DiskFile> {
        match self {
            Self::Real => File::open(path).map(DiskFile::Real),
            Self::Memory(life) => life.open_file(path).map(DiskFile::Memory),
        }
    }

    /// For reading and writing; made when it is not there.
    pub(crate) fn open_or_create(&self, path: &Path) -> io::Result<DiskFile> {
        match self {
            Self::Real => {
                let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
                file.map(DiskFile::Real)
            }
            Self::Memory(life) => life.open_or_create(path).map(DiskFile::Memory),
        }
    }

    /// For writing; empty, whatever was there.
    pub(crate) fn create(&self, path: &Path) -> io::Result<DiskFile> {
        match self {
            Self::Real => File::create(path).map(DiskFile::Real),
            Self::Memory(life) => life.create(path).map(DiskFile::Memory),
        }
    }

    pub(crate) fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        match self {
            Self::Real => fs::rename(from, to),
            Self::Memory(life) => life.rename(from, to),
        }
    }

    pub(crate) fn remove_file(&self, path: &Path) -> io::Result<()> {
        match self {
            Self::Real => fs::remove_file(path),
            Self::Memory(life) => life.remove_file(path),
        }
    }

    /// Makes the names in a directory durable.
    pub(crate) fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        match self {
            Self::Real => File::open(dir)?.sync_all(),
            Self::Memory(life) => life.sync_dir(dir),
        }
    }

    /// The files of a directory, by name.
    pub(crate) fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        match self {
            Self::Real => {
                let mut paths =
                    fs::read_dir(dir)?.map(|file| file.map(|f| f.path())).collect::<io::Result<Vec<_>>>()?;
                paths.sort_unstable();
                Ok(paths)
            }
            Self::Memory(life) => life.list(dir),
        }
    }

    /// Opens an instance; made only when `create` says so.
    pub(crate) fn open_db(&self, dir: &Path, instance: Instance, create: bool) -> Result<Db, OpenError> {
        let (path, mut options) = match instance {
            Instance::Log => (dir.join("log"), options::log(create)),
            Instance::State => (dir.join("state"), options::state(create)),
        };
        match self {
            Self::Real => {
                // The instance may be a mount of its own.
                let place = if path.is_dir() { &path } else { dir };
                options::past_the_page_cache(&mut options, place);
                open_rocks(path, &options).map_err(|error| match error {
                    // The whole directory is to be given up, not this part of it.
                    OpenError::Corrupt { dir: part, what } => {
                        OpenError::Corrupt { dir: dir.to_path_buf(), what: format!("{}: {what}", part.display()) }
                    }
                    other => other,
                })
            }
            Self::Memory(life) => match life.open_table(&path, instance, create) {
                Ok(db) => Ok(Db::Memory(db)),
                Err(error) => Err(OpenError::Io { dir: path, source: io::Error::other(error) }),
            },
        }
    }
}

/// How RocksDB words ENOENT.
const NO_SUCH_FILE: &str = "IO error: No such file or directory";

fn open_rocks(path: PathBuf, options: &rocksdb::Options) -> Result<Db, OpenError> {
    match framing::check(&path) {
        Ok(Ok(())) => {}
        Ok(Err(what)) => return Err(OpenError::Corrupt { dir: path, what }),
        Err(source) => return Err(OpenError::Io { dir: path, source }),
    }
    match DB::open(options, &path) {
        Ok(db) => Ok(Db::Rocks(Rocks::new(db))),
        Err(error) => Err(match error.kind() {
            // A file that another one names is lost.
            rocksdb::ErrorKind::IOError if error.to_string().starts_with(NO_SUCH_FILE) => {
                OpenError::Corrupt { dir: path, what: error.to_string() }
            }
            rocksdb::ErrorKind::IOError => OpenError::Io { dir: path, source: io::Error::other(error) },
            rocksdb::ErrorKind::Busy | rocksdb::ErrorKind::TryAgain => OpenError::InUse(path),
            _ => OpenError::Corrupt { dir: path, what: error.to_string() },
        }),
    }
}

impl DiskFile {
    /// The bytes at `at`, as many as are there now.
    pub(crate) fn read_at(&self, out: &mut [u8], at: u64) -> io::Result<usize> {
        match self {
            Self::Real(file) => file.read_at(out, at),
            Self::Memory(file) => file.read_at(out, at),
        }
    }

    pub(crate) fn read_exact(&mut self, out: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Real(file) => file.read_exact(out),
            Self::Memory(file) => file.read_exact(out),
        }
    }

    pub(crate) fn write_all_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        match self {
            Self::Real(file) => file.write_all_at(bytes, at),
            Self::Memory(file) => file.write_all_at(bytes, at),
        }
    }

    pub(crate) fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Real(file) => file.write_all(bytes),
            Self::Memory(file) => file.write_all(bytes),
        }
    }

    pub(crate) fn sync_all(&self) -> io::Result<()> {
        match self {
            Self::Real(file) => file.sync_all(),
            Self::Memory(file) => file.sync_all(),
        }
    }
}
