//! The files of the twin: contents and names, each with what would survive a power cut.
//! Must never make a write or a name durable that nobody synced, but for old writes, as operating systems do.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    path::{Path, PathBuf},
};

use stentor_engine::apply::chain;

use super::{Honesty, Life, Platter, Step};

/// A sector is written whole or not at all.
const SECTOR_BYTES: usize = 512;
/// A torn write leaves at most this many of its sectors.
const TORN_SECTORS: usize = 64;
/// Writes to one file that wait for an fsync; older ones the operating system has written back by then. Keeps files
/// that are never fsynced, such as the synced position, from growing a history without end.
const WRITEBACK_WRITES: usize = 16;

#[derive(Debug, Clone)]
enum Write {
    Truncate,
    At(usize, Vec<u8>),
}

impl Write {
    fn apply(&self, content: &mut Vec<u8>) {
        match self {
            Self::Truncate => content.clear(),
            Self::At(at, bytes) => {
                let end = at + bytes.len();
                if content.len() < end {
                    content.resize(end, 0);
                }
                content[*at..end].copy_from_slice(bytes);
            }
        }
    }

    /// The same, torn at a sector's end after the `sectors`th.
    fn torn(&self, sectors: usize) -> Self {
        match self {
            Self::Truncate => Self::Truncate,
            Self::At(at, bytes) => {
                let end = (at / SECTOR_BYTES + sectors) * SECTOR_BYTES;
                Self::At(*at, bytes[..end.saturating_sub(*at).min(bytes.len())].to_vec())
            }
        }
    }
}

#[derive(Default)]
struct Inode {
    now: Vec<u8>,
    durable: Vec<u8>,
    unsynced: VecDeque<Write>,
}

impl Inode {
    fn write(&mut self, write: Write) {
        write.apply(&mut self.now);
        self.unsynced.push_back(write);
        if self.unsynced.len() > WRITEBACK_WRITES
            && let Some(oldest) = self.unsynced.pop_front()
        {
            oldest.apply(&mut self.durable);
        }
    }

    fn sync(&mut self) {
        self.unsynced.clear();
        self.durable.clone_from(&self.now);
    }

    fn cut(&mut self, platter: &mut Platter) {
        let kept = platter.kept(self.unsynced.len());
        for write in self.unsynced.iter().take(kept) {
            write.apply(&mut self.durable);
        }
        if let Some(write) = self.unsynced.get(kept) {
            let sectors = platter.kept(TORN_SECTORS);
            if sectors > 0 {
                write.torn(sectors).apply(&mut self.durable);
            }
        }
        self.unsynced.clear();
        self.now.clone_from(&self.durable);
    }
}

#[derive(Debug)]
enum NameChange {
    Link(PathBuf, u64),
    Unlink(PathBuf),
}

impl NameChange {
    fn apply(&self, names: &mut BTreeMap<PathBuf, u64>) {
        match self {
            Self::Link(path, inode) => drop(names.insert(path.clone(), *inode)),
            Self::Unlink(path) => drop(names.remove(path)),
        }
    }

    fn is_in(&self, dir: &Path) -> bool {
        let (Self::Link(path, _) | Self::Unlink(path)) = self;
        path.parent() == Some(dir)
    }
}

/// All files of a disk.
#[derive(Default)]
pub(crate) struct Files {
    inodes: BTreeMap<u64, Inode>,
    names: BTreeMap<PathBuf, u64>,
    durable_names: BTreeMap<PathBuf, u64>,
    /// Changes of names whose directory was not synced since; a rename is two that come together.
    unsynced_names: Vec<Vec<NameChange>>,
    next_inode: u64,
    locked: bool,
}

fn not_found() -> io::Error {
    io::Error::from(io::ErrorKind::NotFound)
}

impl Files {
    pub(crate) fn cut(&mut self, platter: &mut Platter) {
        let kept = platter.kept(self.unsynced_names.len());
        for change in self.unsynced_names.drain(..).take(kept).flatten() {
            change.apply(&mut self.durable_names);
        }
        self.names = self.durable_names.clone();
        self.inodes.retain(|inode, _| self.names.values().any(|named| named == inode));
        self.inodes.values_mut().for_each(|inode| inode.cut(platter));
        self.locked = false;
    }

    pub(crate) fn unlock(&mut self) {
        self.locked = false;
    }

    pub(crate) fn durable_names(&self) -> Vec<PathBuf> {
        self.durable_names.keys().cloned().collect()
    }

    pub(crate) fn fingerprint(&self, hash: u64) -> u64 {
        self.durable_names.iter().fold(hash, |hash, (path, inode)| {
            let content = self.inodes.get(inode).map_or(&[][..], |inode| &inode.durable);
            chain(chain(hash, path.as_os_str().as_encoded_bytes()), content)
        })
    }

    fn rename_changes(&mut self, changes: Vec<NameChange>) {
        changes.iter().for_each(|change| change.apply(&mut self.names));
        self.unsynced_names.push(changes);
    }

    fn inode(&mut self, inode: u64) -> io::Result<&mut Inode> {
        self.inodes.get_mut(&inode).ok_or_else(not_found)
    }

    fn make(&mut self, path: &Path) -> u64 {
        self.next_inode += 1;
        self.inodes.insert(self.next_inode, Inode::default());
        self.rename_changes(vec![NameChange::Link(path.to_path_buf(), self.next_inode)]);
        self.next_inode
    }
}

/// An open file of the twin.
pub(crate) struct MemoryFile {
    life: Life,
    inode: u64,
    at: usize,
}

impl MemoryFile {
    /// The bytes at `at`, as many as there are.
    pub(crate) fn read_at(&self, out: &mut [u8], at: u64) -> io::Result<usize> {
        self.life.with(|platter, _| {
            let content = &platter.files.inode(self.inode)?.now;
            let rest = content.get(usize::try_from(at).unwrap_or(usize::MAX)..).unwrap_or(&[]);
            let count = rest.len().min(out.len());
            out[..count].copy_from_slice(&rest[..count]);
            platter.read_file(&mut out[..count])?;
            Ok(count)
        })
    }

    pub(crate) fn read_exact(&mut self, out: &mut [u8]) -> io::Result<()> {
        let count = self.read_at(out, self.at as u64)?;
        self.at += count;
        if count == out.len() { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    pub(crate) fn write_all_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.life.with(|platter, life| {
            platter.operation(life, Step::Write)?;
            let at = usize::try_from(at).map_err(io::Error::other)?;
            platter.files.inode(self.inode)?.write(Write::At(at, bytes.to_vec()));
            Ok(())
        })
    }

    pub(crate) fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_all_at(bytes, self.at as u64)?;
        self.at += bytes.len();
        Ok(())
    }

    pub(crate) fn sync_all(&self) -> io::Result<()> {
        self.life.with(|platter, life| {
            platter.operation(life, Step::Sync)?;
            if platter.honesty() == Honesty::Honest {
                platter.files.inode(self.inode)?.sync();
            }
            Ok(())
        })
    }
}

/// Held for as long as a process uses a directory of the twin.
pub(crate) struct MemoryLock(Life);

impl Drop for MemoryLock {
    fn drop(&mut self) {
        // A dead process' lock went with it.
        let _ = self.0.with(|platter, _| {
            platter.files.unlock();
            Ok(())
        });
    }
}

impl Life {
    fn change<R>(&self, f: impl FnOnce(&mut Files) -> io::Result<R>) -> io::Result<R> {
        self.with(|platter, life| {
            platter.operation(life, Step::Write)?;
            f(&mut platter.files)
        })
    }

    fn file(&self, inode: u64) -> MemoryFile {
        MemoryFile { life: self.clone(), inode, at: 0 }
    }

    /// `None` when another process holds it.
    pub(crate) fn lock(&self) -> io::Result<Option<MemoryLock>> {
        self.with(|platter, _| {
            let free = !std::mem::replace(&mut platter.files.locked, true);
            Ok(free.then(|| MemoryLock(self.clone())))
        })
    }

    pub(crate) fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.with(|platter, _| {
            let inode = *platter.files.names.get(path).ok_or_else(not_found)?;
            let mut content = platter.files.inode(inode)?.now.clone();
            platter.read_file(&mut content)?;
            Ok(content)
        })
    }

    pub(crate) fn open_file(&self, path: &Path) -> io::Result<MemoryFile> {
        let inode = self.with(|platter, _| platter.files.names.get(path).copied().ok_or_else(not_found))?;
        Ok(self.file(inode))
    }

    /// Made when it is not there.
    pub(crate) fn open_or_create(&self, path: &Path) -> io::Result<MemoryFile> {
        match self.open_file(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Ok(self.file(self.change(|files| Ok(files.make(path)))?))
            }
            found => found,
        }
    }

    /// Empty, whatever was there.
    pub(crate) fn create(&self, path: &Path) -> io::Result<MemoryFile> {
        let inode = self.change(|files| match files.names.get(path).copied() {
            Some(inode) => {
                files.inode(inode)?.write(Write::Truncate);
                Ok(inode)
            }
            None => Ok(files.make(path)),
        })?;
        Ok(self.file(inode))
    }

    pub(crate) fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.change(|files| {
            let inode = *files.names.get(from).ok_or_else(not_found)?;
            let gone = NameChange::Unlink(from.to_path_buf());
            files.rename_changes(vec![gone, NameChange::Link(to.to_path_buf(), inode)]);
            Ok(())
        })
    }

    pub(crate) fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.change(|files| {
            files.names.get(path).ok_or_else(not_found)?;
            files.rename_changes(vec![NameChange::Unlink(path.to_path_buf())]);
            Ok(())
        })
    }

    pub(crate) fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.with(|platter, life| {
            platter.operation(life, Step::Sync)?;
            if platter.honesty() == Honesty::Lies {
                return Ok(());
            }
            let files = &mut platter.files;
            for changes in std::mem::take(&mut files.unsynced_names) {
                if changes.iter().all(|change| change.is_in(dir)) {
                    changes.iter().for_each(|change| change.apply(&mut files.durable_names));
                } else {
                    files.unsynced_names.push(changes);
                }
            }
            Ok(())
        })
    }

    /// The files of a directory, by name.
    pub(crate) fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        self.with(|platter, _| {
            Ok(platter.files.names.keys().filter(|path| path.parent() == Some(dir)).cloned().collect())
        })
    }
}
