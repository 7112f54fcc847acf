//! Cursors in a directory: an append-only log with a checksum per record, rewritten when most of it is history. Must
//! never wait for the disk but in `sync`, and never believe a record that is torn or changed.
//!
//! ```text
//! "STNC" │ u8 format = 1 │ record…        record: u32 LE length │ u32 LE CRC32(payload) │ payload
//! payload: 1 │ app/user/device                                           before every other
//!          2 │ u64 LE delivered │ conversation (the rest)
//!          3 │ u64 LE last │ u64 LE done │ conversation (the rest)
//! ```
//!
//! **What a crash can lose.** Whatever was saved since the last `sync` (1 s): delivered cursors are then too low, so
//! the device gets again what it had, and the application drops it by `seq`, as it must anyway; send counts are then
//! too low, which harms nothing, since a client asks the server for its count (`GetSendState`, `ConversationState`)
//! before its first send. A torn or changed record ends the log there, with the same effect.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::{Buf, BufMut};
use parking_lot::Mutex;
use stentor_proto::ids::{ConversationId, SendNo, Seq};

use super::{Change, CursorStore, Identity, Kept, StoreError, Table};

const MAGIC: &[u8; 4] = b"STNC";
const FORMAT: u8 = 1;
const HEADER_BYTES: usize = MAGIC.len() + 1;
const RECORD_PREFIX_BYTES: usize = 8;
/// No record is longer: the longest ids three times over.
const MAX_RECORD_BYTES: usize = 1_024;
/// No file of ours is longer; a longer one is not read.
const MAX_FILE_BYTES: u64 = 256 * 1024 * 1024;
/// The log is rewritten when it is longer than this and most of it is history.
const REWRITE_ABOVE_BYTES: u64 = 64 * 1024;
/// What one conversation takes at most, both records with the longest id.
const CONTENT_BYTES: u64 = 640;
const SYNC_INTERVAL: Duration = Duration::from_secs(1);

const IDENTITY: u8 = 1;
const DELIVERED: u8 = 2;
const SENDS: u8 = 3;

/// Cursors in a directory of their own, locked for one process.
#[derive(Debug)]
pub struct FileCursors {
    dir: PathBuf,
    /// One sync at a time; never held while a saver waits.
    syncing: Mutex<()>,
    log: Mutex<Log>,
    /// Held until this is dropped.
    _lock: File,
}

#[derive(Debug)]
struct Log {
    file: File,
    bytes: u64,
    /// As app/user/device; `None` in a new directory.
    identity: Option<String>,
    table: Table,
    dirty: bool,
    /// While the log is rewritten: what was appended since its content was taken.
    since: Option<Vec<u8>>,
    /// The file cannot be trusted any more (a failed write or sync) and must be replaced from memory.
    broken: bool,
}

impl FileCursors {
    /// Opens a directory, made if it is not there, and locks it.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, StoreError> {
        let dir = dir.as_ref().to_owned();
        fs::create_dir_all(&dir).map_err(|e| failed(&dir, e))?;
        let lock_path = dir.join("lock");
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(&lock_path);
        let lock = lock.map_err(|e| failed(&lock_path, e))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Err(StoreError::InUse { path: dir.display().to_string() }),
            Err(fs::TryLockError::Error(e)) => return Err(failed(&lock_path, e)),
        }
        let log = Log::open(&dir)?;
        Ok(Self { dir, syncing: Mutex::new(()), log: Mutex::new(log), _lock: lock })
    }

    fn path(&self) -> PathBuf {
        self.dir.join("cursors.log")
    }

    /// Writes the content anew beside the log, without holding up savers, and swaps the two.
    fn rewrite(&self) -> io::Result<()> {
        let content = {
            let mut log = self.log.lock();
            log.since = Some(Vec::new());
            log.content()
        };
        let result = self.replace(&content);
        if result.is_err() {
            self.log.lock().since = None;
        }
        result
    }

    fn replace(&self, content: &[u8]) -> io::Result<()> {
        let temp = self.dir.join("cursors.new");
        if let Err(error) = fs::remove_file(&temp)
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(error);
        }
        let mut file = OpenOptions::new().create_new(true).append(true).open(&temp)?;
        file.write_all(content)?;
        file.sync_all()?;
        let mut log = self.log.lock();
        let since = log.since.take().unwrap_or_default();
        file.write_all(&since)?;
        fs::rename(&temp, self.path())?;
        (log.file, log.bytes) = (file, (content.len() + since.len()) as u64);
        (log.broken, log.dirty) = (false, !since.is_empty());
        drop(log);
        File::open(&self.dir)?.sync_all()
    }
}

impl CursorStore for FileCursors {
    fn bind(&self, identity: &Identity) -> Result<(), StoreError> {
        let wanted = format!("{}/{}/{}", identity.app, identity.user, identity.device);
        let mut log = self.log.lock();
        match &log.identity {
            Some(found) if *found == wanted => Ok(()),
            Some(found) => {
                Err(StoreError::OtherDevice { path: self.dir.display().to_string(), found: found.clone(), wanted })
            }
            None => {
                log.identity = Some(wanted.clone());
                log.append(&identity_record(&wanted)).map_err(|e| failed(&self.path(), e))
            }
        }
    }

    fn delivered(&self, conversation: &ConversationId) -> Option<Seq> {
        self.log.lock().table.get(conversation).delivered
    }

    fn sends(&self, conversation: &ConversationId) -> Option<(SendNo, SendNo)> {
        self.log.lock().table.get(conversation).sends
    }

    fn save(&self, changes: &[Change]) -> Result<(), StoreError> {
        let mut log = self.log.lock();
        let mut records = Vec::with_capacity(changes.len() * 48);
        for change in changes {
            log.table.apply(change);
            change_record(change, &mut records);
        }
        log.append(&records).map_err(|e| failed(&self.path(), e))
    }

    fn sync_interval(&self) -> Option<Duration> {
        Some(SYNC_INTERVAL)
    }

    fn sync(&self) -> Result<(), StoreError> {
        let _one = self.syncing.lock();
        let (file, rewrite) = {
            let mut log = self.log.lock();
            if !std::mem::take(&mut log.dirty) && !log.broken {
                return Ok(());
            }
            (log.file.try_clone(), log.broken || log.is_mostly_history())
        };
        let result = if rewrite { self.rewrite() } else { file.and_then(|f| f.sync_data()) };
        result.map_err(|e| {
            // What the kernel could not write it has dropped: only a new file can be trusted.
            self.log.lock().broken = true;
            failed(&self.path(), e)
        })
    }
}

impl Log {
    fn open(dir: &Path) -> Result<Self, StoreError> {
        let path = dir.join("cursors.log");
        let io = |e| failed(&path, e);
        let mut file =
            OpenOptions::new().create(true).truncate(false).read(true).append(true).open(&path).map_err(io)?;
        let damaged = |what| StoreError::Damaged { path: path.display().to_string(), what };
        if file.metadata().map_err(io)?.len() > MAX_FILE_BYTES {
            return Err(damaged("it is longer than any cursor file"));
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(io)?;
        let mut log = Self {
            file,
            bytes: bytes.len() as u64,
            identity: None,
            table: Table::default(),
            dirty: false,
            since: None,
            broken: false,
        };
        let header = &bytes[..bytes.len().min(HEADER_BYTES)];
        if header.len() < HEADER_BYTES {
            // A crash while the file was made.
            if !MAGIC.starts_with(&header[..header.len().min(MAGIC.len())]) {
                return Err(damaged("it does not begin as a cursor file"));
            }
            log.truncate(0).and_then(|()| log.append(&file_header())).map_err(io)?;
            return Ok(log);
        }
        match header {
            [b'S', b'T', b'N', b'C', FORMAT] => {}
            [b'S', b'T', b'N', b'C', format] => {
                return Err(StoreError::Format { path: path.display().to_string(), format: *format });
            }
            _ => return Err(damaged("it does not begin as a cursor file")),
        }
        let good = log.read(&bytes);
        if good < bytes.len() {
            log.truncate(good as u64).map_err(io)?;
        }
        Ok(log)
    }

    /// Takes in records up to the first that is torn or changed; returns where that is.
    fn read(&mut self, bytes: &[u8]) -> usize {
        let mut at = HEADER_BYTES;
        while let Some(payload) = record(&bytes[at..]) {
            if self.take(payload).is_none() {
                break;
            }
            at += RECORD_PREFIX_BYTES + payload.len();
        }
        at
    }

    fn take(&mut self, payload: &[u8]) -> Option<()> {
        let (&kind, mut rest) = payload.split_first()?;
        match kind {
            IDENTITY => self.identity = Some(std::str::from_utf8(rest).ok()?.to_owned()),
            DELIVERED => {
                let seq = rest.try_get_u64_le().ok()?;
                self.table.apply(&Change::Delivered(ConversationId::new(rest).ok()?, Seq(seq)));
            }
            SENDS => {
                let (last, done) = (rest.try_get_u64_le().ok()?, rest.try_get_u64_le().ok()?);
                let conversation = ConversationId::new(rest).ok()?;
                self.table.apply(&Change::Sends { conversation, last: SendNo(last), done: SendNo(done) });
            }
            _ => return None,
        }
        Some(())
    }

    fn append(&mut self, records: &[u8]) -> io::Result<()> {
        self.dirty = true;
        if let Some(since) = &mut self.since {
            since.extend_from_slice(records);
        }
        if self.broken {
            // The next sync writes everything anew from memory.
            return Ok(());
        }
        if let Err(error) = self.file.write_all(records) {
            // Behind half a record nothing would ever be read again.
            self.broken = self.truncate(self.bytes).is_err();
            return Err(error);
        }
        self.bytes += records.len() as u64;
        Ok(())
    }

    fn truncate(&mut self, bytes: u64) -> io::Result<()> {
        self.file.set_len(bytes)?;
        self.bytes = bytes;
        Ok(())
    }

    fn is_mostly_history(&self) -> bool {
        self.bytes > REWRITE_ABOVE_BYTES && self.bytes > 2 * CONTENT_BYTES * self.table.0.len() as u64
    }

    fn content(&self) -> Vec<u8> {
        let mut out = file_header();
        if let Some(identity) = &self.identity {
            out.extend_from_slice(&identity_record(identity));
        }
        for (conversation, Kept { delivered, sends }) in &self.table.0 {
            if let Some(seq) = delivered {
                change_record(&Change::Delivered(conversation.clone(), *seq), &mut out);
            }
            if let Some((last, done)) = *sends {
                change_record(&Change::Sends { conversation: conversation.clone(), last, done }, &mut out);
            }
        }
        out
    }
}

fn file_header() -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    out.push(FORMAT);
    out
}

/// The payload of the record at the front, if it is whole.
fn record(bytes: &[u8]) -> Option<&[u8]> {
    let mut at = bytes;
    let (len, crc) = (at.try_get_u32_le().ok()? as usize, at.try_get_u32_le().ok()?);
    let payload = at.get(..len).filter(|_| len <= MAX_RECORD_BYTES)?;
    (crc32fast::hash(payload) == crc).then_some(payload)
}

fn put_record(out: &mut Vec<u8>, payload: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&[0; RECORD_PREFIX_BYTES]);
    payload(out);
    let body = &out[start + RECORD_PREFIX_BYTES..];
    let (len, crc) = (body.len() as u32, crc32fast::hash(body));
    out[start..start + 4].copy_from_slice(&len.to_le_bytes());
    out[start + 4..start + 8].copy_from_slice(&crc.to_le_bytes());
}

fn identity_record(identity: &str) -> Vec<u8> {
    let mut out = Vec::new();
    put_record(&mut out, |out| {
        out.push(IDENTITY);
        out.extend_from_slice(identity.as_bytes());
    });
    out
}

fn change_record(change: &Change, out: &mut Vec<u8>) {
    put_record(out, |out| match change {
        Change::Delivered(conversation, seq) => {
            out.push(DELIVERED);
            out.put_u64_le(seq.0);
            out.extend_from_slice(conversation.as_str().as_bytes());
        }
        Change::Sends { conversation, last, done } => {
            out.push(SENDS);
            out.put_u64_le(last.0);
            out.put_u64_le(done.0);
            out.extend_from_slice(conversation.as_str().as_bytes());
        }
    });
}

fn failed(path: &Path, source: io::Error) -> StoreError {
    StoreError::Io { path: path.display().to_string(), source: Arc::new(source) }
}

#[cfg(test)]
mod tests;
