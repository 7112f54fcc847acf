//! The folder of a development cluster: locked while it runs, removed afterwards if nobody asked for it. Must never be
//! shared by two clusters.

use std::{
    fs::{self, File, TryLockError},
    io::{Read, Write},
    path::{Path, PathBuf},
};

use crate::failure::Failure;

/// A locked folder.
#[derive(Debug)]
pub(crate) struct Home {
    dir: PathBuf,
    /// Unlocked when closed, also by a crash.
    _lock: File,
    /// Removes a temporary folder when dropped.
    _temporary: Option<tempfile::TempDir>,
}

impl Home {
    /// Opens and locks the folder, or makes a temporary one.
    pub(crate) fn open(dir: Option<&Path>) -> Result<Self, Failure> {
        let temporary = match dir {
            Some(_) => None,
            None => Some(tempfile::Builder::new().prefix("stentor-dev-").tempdir().map_err(Failure::failed)?),
        };
        let dir = match (dir, &temporary) {
            (_, Some(temporary)) => temporary.path(),
            (Some(dir), None) => dir,
            (None, None) => return Err(Failure::failed("no folder")),
        };
        let failed = |error| Failure::failed(format_args!("cannot use {}: {error}", dir.display()));
        fs::create_dir_all(dir).map_err(failed)?;
        // Absolute, since cluster.json is read from elsewhere.
        let dir = dir.canonicalize().map_err(failed)?;
        let lock = lock(&dir)?;
        Ok(Self { dir, _lock: lock, _temporary: temporary })
    }

    /// Where everything lies.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }
}

fn lock(dir: &Path) -> Result<File, Failure> {
    let path = dir.join("dev.lock");
    let failed = |error: std::io::Error| Failure::failed(format_args!("cannot lock {}: {error}", path.display()));
    let mut file = File::options().read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut pid = String::new();
            let _ = file.read_to_string(&mut pid);
            return Err(Failure::misuse(format_args!("{} is in use by process {pid}", dir.display())));
        }
        Err(TryLockError::Error(error)) => return Err(failed(error)),
    }
    file.set_len(0).and_then(|()| write!(file, "{}", std::process::id())).map_err(failed)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_in_use_is_refused_and_free_again_afterwards() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::open(Some(dir.path())).unwrap();
        assert!(matches!(Home::open(Some(dir.path())), Err(Failure::Misuse(_))));
        drop(home);
        assert!(Home::open(Some(dir.path())).is_ok());
    }

    #[test]
    fn a_temporary_folder_goes_with_its_home() {
        let home = Home::open(None).unwrap();
        let dir = home.dir().to_owned();
        drop(home);
        assert!(!dir.exists());
    }
}
