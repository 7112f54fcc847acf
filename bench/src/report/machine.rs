//! The machine that a run was made on. Must never say anything about people or networks: reports are passed on.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

/// What figures depend on besides the program.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// CPUs that may be used.
    pub cpus: usize,
    /// What they call themselves; empty if they do not.
    pub cpu: String,
    /// Memory.
    pub memory_mib: u64,
    /// The kernel's version.
    pub kernel: String,
    /// The file system under a cluster that is started here.
    pub file_system: String,
    /// Processes that wanted to run in the minute before: noise, where it is not small.
    pub load_before: f64,
}

impl Machine {
    /// This one, with a folder for clusters.
    pub fn this(dir: &Path) -> Self {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let (cpu, memory) = (text("/proc/cpuinfo"), text("/proc/meminfo"));
        let load = text("/proc/loadavg");
        let memory_kib =
            after(&memory, "MemTotal:").and_then(|rest| rest.split_ascii_whitespace().next()?.parse().ok());
        Self {
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            cpu: after(&cpu, "model name").map_or_else(String::new, |name| name.trim_matches([' ', '\t', ':']).into()),
            memory_mib: memory_kib.unwrap_or(0u64) / 1_024,
            kernel: text("/proc/sys/kernel/osrelease").trim().into(),
            file_system: file_system(&text("/proc/self/mounts"), &dir.canonicalize().unwrap_or_else(|_| dir.into())),
            load_before: load.split_ascii_whitespace().next().and_then(|load| load.parse().ok()).unwrap_or(0.0),
        }
    }
}

fn after<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(name))
}

/// The type of the mount that a folder is on.
fn file_system(mounts: &str, dir: &Path) -> String {
    let mount = |line: &str| {
        let mut fields = line.split(' ').skip(1);
        Some((PathBuf::from(fields.next()?), fields.next()?.to_owned()))
    };
    let over = mounts.lines().filter_map(mount).filter(|(path, _)| dir.starts_with(path));
    over.max_by_key(|(path, _)| path.as_os_str().len()).map_or_else(String::new, |(_, kind)| kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_innermost_mount_counts() {
        let mounts = "/dev/a / ext4 rw 0 0\ntmpfs /tmp tmpfs rw 0 0\ntmpfs /tmpfoo xfs rw 0 0\n";
        let of = |dir: &str| file_system(mounts, Path::new(dir));
        assert_eq!([of("/tmp/x"), of("/var"), of("/tmpfo")], ["tmpfs", "ext4", "ext4"]);
    }

    #[test]
    fn this_machine_is_described() {
        let machine = Machine::this(Path::new("/"));
        assert!(machine.cpus > 0 && machine.memory_mib > 0 && !machine.kernel.is_empty(), "{machine:?}");
    }
}
