//! Runs the real binary: a development cluster in a child process, and commands against it. Must never leave a child
//! behind, also when a test fails.

#![allow(dead_code, reason = "every test program uses its own part")]

pub(crate) mod brokers;
pub(crate) mod device;
pub(crate) mod processes;
pub(crate) mod terminal;

use std::{
    io::Write,
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;
use tempfile::TempDir;

/// Generous: the machines that run this are small and busy.
pub(crate) const DEADLINE: Duration = Duration::from_secs(120);

/// The binary with arguments, without anything from the caller's environment that could steer it.
pub(crate) fn stentor(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_stentor"));
    command.args(args);
    for name in ["STENTOR_DIR", "STENTOR_TOKEN", "STENTOR_CA", "STENTOR_TEST_ALTER_DELIVERY", "STENTOR_TEST_PANIC"] {
        command.env_remove(name);
    }
    command
}

/// How a command ended.
pub(crate) struct Ended {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ended {
    pub(crate) fn new(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Self { code: output.status.code().unwrap_or(-1), stdout: text(output.stdout), stderr: text(output.stderr) }
    }

    /// The JSON lines of stdout.
    pub(crate) fn rows(&self) -> Vec<Value> {
        self.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The one error line of stderr.
    pub(crate) fn error(&self) -> Value {
        let line = self.stderr.lines().find(|line| line.starts_with("{\"error\"")).unwrap_or("null");
        serde_json::from_str::<Value>(line).unwrap()["error"].clone()
    }

    /// Fails the test unless it ended well.
    pub(crate) fn well(self) -> Self {
        assert_eq!(self.code, 0, "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        self
    }
}

/// Runs a command to its end.
pub(crate) fn run(args: &[&str], stdin: &[u8]) -> Ended {
    let mut child = stentor(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    let bytes = stdin.to_vec();
    // On a thread: a child that prints before it reads everything would block both.
    let writer = std::thread::spawn(move || {
        let _ = input.write_all(&bytes);
    });
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    Ended::new(output)
}

/// A running `stentor dev`, stopped when dropped.
pub(crate) struct Cluster {
    child: Child,
    pub(crate) dir: TempDir,
}

impl Cluster {
    /// Starts one in a folder of its own and waits until it is ready.
    pub(crate) fn start() -> Self {
        Self::start_in(tempfile::tempdir().unwrap())
    }

    /// Starts one in a folder that may have seen one before.
    pub(crate) fn start_in(dir: TempDir) -> Self {
        let mut child = stentor(&["dev", "--shards", "4", "--dir", dir.path().to_str().unwrap()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + DEADLINE;
        while !is_ready(dir.path(), child.id()) {
            if let Some(status) = child.try_wait().unwrap() {
                panic!("the cluster ended early: {status}");
            }
            assert!(Instant::now() < deadline, "the cluster is not ready");
            std::thread::sleep(Duration::from_millis(20));
        }
        Self { child, dir }
    }

    /// Runs a command against it.
    pub(crate) fn run(&self, args: &[&str], stdin: &[u8]) -> Ended {
        let mut all = args.to_vec();
        all.extend(["--dir", self.dir.path().to_str().unwrap()]);
        run(&all, stdin)
    }

    /// Creates a group of ann and others; returns its id.
    pub(crate) fn group(&self, participants: &[&str]) -> String {
        let mut args = vec!["conversation", "create", "--kind", "group", "--user", "ann", "--json"];
        participants.iter().for_each(|user| args.extend(["--participant", user]));
        self.run(&args, b"").well().rows()[0]["conversation"].as_str().unwrap().to_owned()
    }

    /// The process of all its nodes.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends it as Ctrl-C does and waits; the folder stays.
    pub(crate) fn stop(mut self) -> TempDir {
        terminate(&self.child);
        assert!(self.child.wait().unwrap().success());
        std::mem::replace(&mut self.dir, tempfile::tempdir().unwrap())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn is_ready(dir: &Path, pid: u32) -> bool {
    let Ok(text) = std::fs::read_to_string(dir.join("cluster.json")) else { return false };
    let file: Value = serde_json::from_str(&text).unwrap();
    file["nodes"][0]["pid"] == pid
}

fn terminate(child: &Child) {
    assert!(Command::new("kill").arg(child.id().to_string()).status().unwrap().success());
}
