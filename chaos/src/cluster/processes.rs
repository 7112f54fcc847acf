//! A cluster of real processes in a folder of its own, driven by the binary's own commands as an operator would. Must never
//! outlive this value: whatever happens, the processes are taken down.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
};

use rustix::process::{Pid, Signal};
use serde::Deserialize;
use tempfile::TempDir;
use tokio::process::{Child, Command};

use super::ClusterError;

/// What is read of `cluster.json`.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct ClusterFile {
    pub(super) nodes: Vec<Node>,
    pub(super) ca: PathBuf,
    pub(super) app: String,
    pub(super) signing_key: SigningKey,
}

/// A node of it.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Node {
    pub(super) name: String,
    pub(super) role: String,
    pub(super) pid: Option<i32>,
    pub(super) quic: Option<String>,
}

/// A development key of it.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct SigningKey {
    pub(super) kid: String,
    pub(super) private_key: PathBuf,
}

/// A running cluster.
#[derive(Debug)]
pub(super) struct Processes {
    binary: PathBuf,
    /// `None` once it is to be kept.
    folder: Option<TempDir>,
    dir: PathBuf,
}

impl Processes {
    /// Three brokers and two gateways.
    pub(super) async fn up(binary: PathBuf) -> Result<Self, ClusterError> {
        let folder = tempfile::Builder::new().prefix("stentor-chaos-").tempdir();
        let folder = folder.map_err(ClusterError::io("a folder for the cluster"))?;
        let dir = folder.path().to_owned();
        let processes = Self { binary, folder: Some(folder), dir };
        processes.run(&["cluster", "up", "--brokers", "3", "--gateways", "2"]).await?;
        Ok(processes)
    }

    /// A command of the binary against this cluster.
    pub(super) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(arguments).arg("--dir").arg(&self.dir).kill_on_drop(true);
        for name in ["STENTOR_DIR", "STENTOR_TOKEN", "STENTOR_CA", "STENTOR_TEST_ALTER_DELIVERY"] {
            command.env_remove(name);
        }
        command
    }

    /// Starts one whose output is read as it comes.
    pub(super) fn spawn(&self, arguments: &[&str], stdin: Stdio) -> Result<Child, ClusterError> {
        let mut command = self.command(arguments);
        // What it says besides goes to a file: a pipe that nobody reads would stop it.
        let said = std::fs::File::create(self.dir.join(format!("{}.said", arguments.first().unwrap_or(&""))));
        let said = said.map_err(ClusterError::io("a file for what a command says"))?;
        let spawned = command.stdin(stdin).stdout(Stdio::piped()).stderr(said).spawn();
        spawned.map_err(ClusterError::io(format!("start {}", self.binary.display())))
    }

    /// Runs one to its end; what it printed.
    pub(super) async fn run(&self, arguments: &[&str]) -> Result<String, ClusterError> {
        let output = self.command(arguments).stdin(Stdio::null()).output().await;
        let output = output.map_err(ClusterError::io(format!("start {}", self.binary.display())))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said.lines().rev().take(3).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("; ");
        let code = output.status.code().unwrap_or(-1);
        Err(ClusterError::Command { command: arguments.join(" "), code, said: last })
    }

    /// The same for a command that says with its exit code that what it printed is bad news.
    pub(super) async fn ask(&self, arguments: &[&str]) -> Result<(bool, String), ClusterError> {
        let output = self.command(arguments).stdin(Stdio::null()).output().await;
        let output = output.map_err(ClusterError::io(format!("start {}", self.binary.display())))?;
        Ok((output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned()))
    }

    pub(super) fn file(&self) -> Result<ClusterFile, ClusterError> {
        let path = self.dir.join("cluster.json");
        let text = std::fs::read(&path).map_err(ClusterError::io(path.display().to_string()))?;
        let unreadable = |error: serde_json::Error| ClusterError::Output {
            command: "cluster up".into(),
            why: format!("cluster.json: {error}"),
        };
        serde_json::from_slice(&text).map_err(unreadable)
    }

    /// The nodes of a role.
    pub(super) fn nodes(&self, role: &str) -> Result<Vec<String>, ClusterError> {
        Ok(self.file()?.nodes.into_iter().filter(|node| node.role == role).map(|node| node.name).collect())
    }

    pub(super) async fn kill(&self, node: &str) -> Result<(), ClusterError> {
        self.run(&["cluster", "kill", node]).await.map(drop)
    }

    /// Kills several between two ticks of a clock: their pids are known before the first signal goes out, and nothing
    /// is waited for until the last one has.
    pub(super) fn kill_at_once(&self, nodes: &[String]) -> Result<(), ClusterError> {
        let file = self.file()?;
        let of_these = file.nodes.iter().filter(|node| nodes.contains(&node.name));
        let pids: Vec<Pid> = of_these.filter_map(|node| Pid::from_raw(node.pid?)).collect();
        for pid in pids {
            let killed = rustix::process::kill_process(pid, Signal::KILL);
            killed.map_err(|error| ClusterError::io("kill a broker")(error.into()))?;
        }
        Ok(())
    }

    pub(super) async fn start(&self, node: &str) -> Result<(), ClusterError> {
        self.run(&["cluster", "start", node]).await.map(drop)
    }

    /// Starts several, which may need each other to become ready.
    pub(super) async fn start_all(&self, nodes: &[String]) -> Result<(), ClusterError> {
        let starts = nodes.iter().map(|node| self.start(node));
        futures_util::future::try_join_all(starts).await.map(drop)
    }

    /// Keeps the folder with data and logs, for a look at what went wrong.
    pub(super) fn keep(&mut self) -> PathBuf {
        if let Some(folder) = self.folder.take() {
            // Its processes still go when this value does.
            let _ = folder.keep();
        }
        self.dir.clone()
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        // Not the runtime's: it may be going down itself.
        let down = std::process::Command::new(&self.binary)
            .args(["cluster", "down", "--dir"])
            .arg(&self.dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        if !down.is_ok_and(|status| status.success()) {
            kill_what_is_left(self.file().map(|file| file.nodes).unwrap_or_default(), &self.dir);
        }
    }
}

/// The last resort: those of the folder's own processes that are still there.
fn kill_what_is_left(nodes: Vec<Node>, dir: &Path) {
    for pid in nodes.iter().filter_map(|node| node.pid) {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let is_ours = String::from_utf8_lossy(&line).contains(&*dir.to_string_lossy());
        if let Some(pid) = Pid::from_raw(pid).filter(|_| is_ours) {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
    }
}
