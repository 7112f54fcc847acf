//! Damage that was found while a directory was in use: noted in it, so that no later start works on it again, and
//! published, so that this broker stops. Must never be taken back by this program: whoever deletes the directory does.

use std::{
    io,
    path::{Path, PathBuf},
};

use parking_lot::Mutex;
use tokio::sync::watch;

use crate::{
    db::DbError,
    disk::Disk,
    store::{Failure, REBUILD},
    wal,
};

const NAME: &str = "damaged";
/// What was noted is for people; a longer text is none of ours.
const MAX_NOTE_BYTES: usize = 4 * 1024;

/// Where damage is noted.
pub(crate) struct Quarantine {
    disk: Disk,
    dir: PathBuf,
    failed: watch::Sender<Option<Failure>>,
    /// Held while a note is under way.
    noting: Mutex<()>,
}

/// What an earlier process noted.
pub(crate) fn noted(disk: &Disk, dir: &Path) -> io::Result<Option<String>> {
    match disk.read(&dir.join(NAME)) {
        Ok(mut note) => {
            note.truncate(MAX_NOTE_BYTES);
            Ok(Some(String::from_utf8_lossy(&note).into_owned()))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

impl Quarantine {
    pub(crate) fn new(disk: &Disk, dir: &Path, failed: &watch::Sender<Option<Failure>>) -> Self {
        Self { disk: disk.clone(), dir: dir.to_path_buf(), failed: failed.clone(), noting: Mutex::default() }
    }

    /// Stored bytes are not what was written: for good. Blocks on the disk, once.
    pub(crate) fn condemn(&self, what: &str) {
        let _noting = self.noting.lock();
        // Published first: while the note is on its way, which may take a bad disk seconds, nothing is served or
        // acknowledged any more.
        let failure = format!("DAMAGED: {}: {what}; {REBUILD}", self.dir.display());
        wal::fail(&self.failed, &Failure { what: failure });
        if let Err(error) = self.note(what) {
            // It stops all the same, and whoever reads there again finds it again.
            tracing::error!(%error, "the damage cannot be noted in the directory");
        }
    }

    /// The disk refuses: the broker stops, and the directory stays as good as it is.
    pub(crate) fn refuse(&self, what: String) -> Failure {
        let failure = Failure { what };
        wal::fail(&self.failed, &failure);
        failure
    }

    /// Waits for a note that is under way: who stops because of it must not end the process before it is written.
    pub(crate) fn settle(&self) {
        drop(self.noting.lock());
    }

    /// The same, if the error says so: RocksDB may meet damage in its own work.
    pub(crate) fn judge(&self, error: &DbError) {
        if let DbError::Corrupt(what) = error {
            self.condemn(what);
        }
    }

    fn note(&self, what: &str) -> io::Result<()> {
        if noted(&self.disk, &self.dir)?.is_some() {
            return Ok(());
        }
        let mut file = self.disk.create(&self.dir.join(NAME))?;
        file.write_all(what.as_bytes())?;
        file.sync_all()?;
        self.disk.sync_dir(&self.dir)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
mod tests {
    use std::{fs::OpenOptions, process::Command, sync::Arc, thread, time::Duration};

    use super::*;

    #[test]
    fn damage_is_published_while_its_note_is_under_way() {
        let dir = tempfile::tempdir().unwrap();
        // Whoever reads from a pipe waits for somebody who writes: a disk that takes its time.
        let note = dir.path().join(NAME);
        assert!(Command::new("mkfifo").arg(&note).status().unwrap().success());
        let failed = watch::Sender::new(None);
        let mut published = failed.subscribe();
        let quarantine = Arc::new(Quarantine::new(&Disk::Real, dir.path(), &failed));
        let condemning = thread::spawn(move || quarantine.condemn("rot"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let told = async { tokio::time::timeout(Duration::from_secs(10), published.wait_for(Option::is_some)).await };
        assert!(runtime.block_on(told).is_ok(), "it waits for the disk");
        assert!(!condemning.is_finished());
        drop(OpenOptions::new().write(true).open(&note).unwrap());
        condemning.join().unwrap();
    }
}
