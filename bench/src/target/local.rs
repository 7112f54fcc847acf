//! A cluster of real processes in a folder of its own, made by the binary's own `cluster up`. Must never outlive its
//! value: whatever happens, the processes are taken down before their folder goes.

use std::{
    io::{Read, Seek},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use super::Target;
use crate::BenchError;

/// How large it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Brokers.
    pub brokers: u32,
    /// Gateways.
    pub gateways: u32,
    /// Data shards.
    pub shards: u32,
}

impl Default for Size {
    fn default() -> Self {
        Self { brokers: 3, gateways: 1, shards: 16 }
    }
}

/// Between two looks at a start that was given up.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// A running cluster; killed when dropped.
#[derive(Debug)]
pub struct Local {
    binary: PathBuf,
    /// `cluster up`, until it has ended.
    starting: Option<tokio::process::Child>,
    /// Gone after the processes.
    folder: TempDir,
}

impl Local {
    /// Starts one with the binary `stentor`; returns when all nodes are ready.
    pub async fn start(binary: &Path, size: Size) -> Result<Self, BenchError> {
        // Whose it is can be seen from outside.
        let prefix = format!("stentor-bench-{}-", std::process::id());
        let folder = tempfile::Builder::new().prefix(&prefix).tempdir();
        let folder = folder.map_err(BenchError::io("make a folder for the cluster"))?;
        // Made before it starts, so that a start that fails or is given up is cleared away too.
        let mut local = Self { binary: binary.to_owned(), starting: None, folder };
        let io = |error| BenchError::io(format!("start {}", binary.display()))(error);
        let mut said = tempfile::tempfile().map_err(io)?;
        let numbers = [size.brokers, size.gateways, size.shards].map(|number| number.to_string());
        let [brokers, gateways, shards] = &numbers;
        let mut command = tokio::process::Command::from(local.command(&["cluster", "up"]));
        command.args(["--brokers", brokers, "--gateways", gateways, "--shards", shards]);
        command.stdout(Stdio::null()).stderr(said.try_clone().map_err(io)?);
        let starting = local.starting.insert(command.spawn().map_err(io)?);
        let ended = starting.wait().await.map_err(io)?;
        local.starting = None;
        if ended.success() {
            return Ok(local);
        }
        let mut why = String::new();
        let _ = said.rewind().and_then(|()| said.read_to_string(&mut why));
        Err(BenchError::Cluster(format!("the cluster did not start: {}", why.trim())))
    }

    /// How to use it.
    pub fn target(&self) -> Result<Target, BenchError> {
        Target::read(self.folder.path())
    }

    /// Where it lies.
    pub fn dir(&self) -> &Path {
        self.folder.path()
    }

    fn command(&self, arguments: &[&str]) -> std::process::Command {
        let mut command = std::process::Command::new(&self.binary);
        command.args(arguments).arg("--dir").arg(self.folder.path()).stdin(Stdio::null());
        // Ctrl-C at this command must not reach it: see `Drop`.
        command.process_group(0);
        for name in ["STENTOR_DIR", "STENTOR_TOKEN", "STENTOR_CA"] {
            command.env_remove(name);
        }
        command
    }

    fn kill_all(&self) {
        let nodes = self.target().map(|target| target.nodes().to_vec()).unwrap_or_default();
        for node in nodes {
            // Waits for its end: a folder cannot be removed under a process that writes.
            let _ = self.command(&["cluster", "kill", &node.name]).stdout(Stdio::null()).stderr(Stdio::null()).status();
        }
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        // A start that is given up ends by itself when its nodes do. Killed before that, it would leave a node that it has
        // not noted yet, and give others the ports that its nodes are about to take.
        while let Some(starting) = &mut self.starting {
            if !self.folder.path().join("cluster.json").exists() {
                // It waits for other clusters that start, perhaps, and has no node yet. One that has ended is no fault.
                let _ = starting.start_kill();
            }
            match starting.try_wait() {
                Ok(None) => std::thread::sleep(LOOK_EVERY),
                _ => self.starting = None,
            }
            self.kill_all();
        }
        self.kill_all();
    }
}
