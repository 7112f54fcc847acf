//! Which device this process acts as: a lock file in `D/devices/U/` makes sure that two processes here never act as the
//! same one, and a folder beside it keeps the device's cursors and send count. Must never wait for a lock.

use std::{
    fs::{self, File, TryLockError},
    io::{Read, Write},
    path::{Path, PathBuf},
};

use stentor_proto::ids::DeviceId;

use crate::failure::Failure;

/// More devices than anybody runs at once; ends the search in a folder that cannot be locked.
const MOST: u32 = 10_000;

/// A device that is this process's own until it is dropped.
#[derive(Debug)]
pub(crate) struct HeldDevice {
    /// Its id.
    pub(crate) device: DeviceId,
    /// Where its cursors and send count live.
    pub(crate) folder: PathBuf,
    /// Unlocked when closed, also by a crash.
    _lock: File,
}

/// Takes the named device, or the first free `cli-N`.
pub(crate) fn hold(dir: &Path, user: &str, device: Option<&str>) -> Result<HeldDevice, Failure> {
    let folder = dir.join("devices").join(folder_name(user));
    fs::create_dir_all(&folder)
        .map_err(|error| Failure::failed(format_args!("cannot create {}: {error}", folder.display())))?;
    if let Some(device) = device {
        let device = DeviceId::new(device)?;
        return match try_hold(&folder, &device)? {
            Ok(held) => Ok(held),
            Err(pid) => Err(Failure::misuse(format_args!("device {device} is held by process {pid}"))),
        };
    }
    for n in 1..=MOST {
        let device = DeviceId::new(format!("cli-{n}"))?;
        if let Ok(held) = try_hold(&folder, &device)? {
            return Ok(held);
        }
    }
    Err(Failure::failed(format_args!("no device is free in {}", folder.display())))
}

/// The inner error is the holder's pid, as far as it can be read.
fn try_hold(folder: &Path, device: &DeviceId) -> Result<Result<HeldDevice, String>, Failure> {
    let name = folder_name(device.as_str());
    let path = folder.join(format!("{name}.lock"));
    let failed = |error: std::io::Error| Failure::failed(format_args!("cannot lock {}: {error}", path.display()));
    let mut lock = File::options().read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut pid = String::new();
            let _ = lock.read_to_string(&mut pid);
            return Ok(Err(if pid.is_empty() { "unknown".into() } else { pid }));
        }
        Err(TryLockError::Error(error)) => return Err(failed(error)),
    }
    lock.set_len(0).and_then(|()| write!(lock, "{}", std::process::id())).map_err(failed)?;
    let own = folder.join(name);
    fs::create_dir_all(&own).map_err(failed)?;
    Ok(Ok(HeldDevice { device: device.clone(), folder: own, _lock: lock }))
}

/// Ids have no slash and no control character; what is left that a path would understand is a leading dot.
fn folder_name(id: &str) -> String {
    let id = id.replace('%', "%25");
    match id.strip_prefix('.') {
        Some(rest) => format!("%2E{rest}"),
        None => id,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_process_gets_a_device_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let first = hold(dir.path(), "ann", None).unwrap();
        let second = hold(dir.path(), "ann", None).unwrap();
        assert_eq!((first.device.as_str(), second.device.as_str()), ("cli-1", "cli-2"));
        assert_eq!(hold(dir.path(), "bob", None).unwrap().device.as_str(), "cli-1");
        drop(first);
        assert_eq!(hold(dir.path(), "ann", None).unwrap().device.as_str(), "cli-1");
    }

    #[test]
    fn a_named_device_that_is_held_is_misuse_and_names_the_holder() {
        let dir = tempfile::tempdir().unwrap();
        let _held = hold(dir.path(), "ann", Some("phone")).unwrap();
        let refused = hold(dir.path(), "ann", Some("phone")).unwrap_err();
        assert_eq!(refused.exit_code(), 2);
        let Failure::Misuse(text) = refused else { panic!() };
        assert!(text.contains(&std::process::id().to_string()), "{text}");
    }

    #[test]
    fn no_user_id_leaves_the_folder() {
        assert_eq!(folder_name(".."), "%2E.");
        assert_eq!(folder_name("."), "%2E");
        assert_ne!(folder_name("%2E"), folder_name("."));
        assert_eq!(folder_name("ann"), "ann");
    }
}
