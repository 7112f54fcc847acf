//! A cluster of real processes in a temporary folder, made by the real binary. Must never leave a process behind, also
//! when a test fails.

#![allow(dead_code, reason = "every test program uses its own part")]

use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use serde_json::Value;
use tempfile::TempDir;

use super::{Ended, run};

/// Generous: the machines that run this are small and busy.
pub(crate) const DEADLINE: Duration = Duration::from_secs(240);

/// A cluster made by `stentor cluster up`, killed when dropped.
pub(crate) struct Brokers {
    dir: TempDir,
}

/// Waits for a condition, with a deadline that only a fault reaches.
pub(crate) fn eventually<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

impl Brokers {
    /// Three brokers and a gateway, ready.
    pub(crate) fn start(shards: u32) -> Self {
        let cluster = Self { dir: tempfile::tempdir().unwrap() };
        let shards = shards.to_string();
        cluster.run(&["cluster", "up", "--brokers", "3", "--gateways", "1", "--shards", &shards], b"").well();
        cluster
    }

    /// Runs a command against it.
    pub(crate) fn run(&self, args: &[&str], stdin: &[u8]) -> Ended {
        let mut all = args.to_vec();
        all.extend(["--dir", self.dir.path().to_str().unwrap()]);
        run(&all, stdin)
    }

    /// The same, that a thread may take along.
    pub(crate) fn runner(&self) -> impl Fn(&[&str], &[u8]) -> Ended + Send + 'static {
        let dir = self.dir.path().to_str().unwrap().to_owned();
        move |args, stdin| {
            let mut all = args.to_vec();
            all.extend(["--dir", &dir]);
            run(&all, stdin)
        }
    }

    /// One verb of `stentor cluster` for a node, that must succeed.
    pub(crate) fn node(&self, verb: &str, node: &str) {
        self.run(&["cluster", verb, node], b"").well();
    }

    pub(crate) fn dir(&self) -> &std::path::Path {
        self.dir.path()
    }

    pub(crate) fn data_dir(&self, broker: &str) -> PathBuf {
        self.dir.path().join(broker)
    }

    pub(crate) fn wipe(&self, broker: &str) {
        fs::remove_dir_all(self.data_dir(broker)).unwrap();
    }

    /// Sets a number of a broker's configuration; it counts from its next start on.
    pub(crate) fn configure(&self, broker: &str, key: &str, value: u64) {
        let path = self.dir.path().join("config").join(format!("{broker}.toml"));
        let text = fs::read_to_string(&path).unwrap();
        let line = text.lines().find(|line| line.starts_with(&format!("{key} ="))).unwrap();
        fs::write(&path, text.replace(line, &format!("{key} = {value}"))).unwrap();
    }

    /// What a node wrote to its log so far.
    pub(crate) fn log(&self, node: &str) -> String {
        let path = self.dir.path().join("logs").join(format!("{node}.log"));
        String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
    }

    pub(crate) fn state(&self, node: &str) -> String {
        let status = self.run(&["cluster", "status", "--json"], b"").well().rows().remove(0);
        let nodes = status["nodes"].as_array().unwrap().clone();
        let node = nodes.into_iter().find(|n| n["name"] == node).unwrap();
        node["state"].as_str().unwrap().to_owned()
    }

    /// One figure of a node's `/metrics`; 0 when it has none.
    pub(crate) fn metric(&self, node: &str, name: &str) -> u64 {
        use std::io::{Read, Write};
        let text = fs::read_to_string(self.dir.path().join("cluster.json")).unwrap();
        let file: Value = serde_json::from_str(&text).unwrap();
        let nodes = file["nodes"].as_array().unwrap();
        let http = nodes.iter().find(|n| n["name"] == node).unwrap()["http"].as_str().unwrap().to_owned();
        let mut answer = String::new();
        let Ok(mut stream) = std::net::TcpStream::connect(http) else { return 0 };
        let asked = stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        if asked.is_err() || stream.read_to_string(&mut answer).is_err() {
            return 0;
        }
        answer.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok()).unwrap_or(0)
    }

    /// `admin verify` until it is clean, with three replicas of every shard and nobody but the placed members.
    pub(crate) fn verified(&self, shards: u64) -> Value {
        let report = eventually("verify is clean", || {
            let ended = self.run(&["admin", "verify", "--json"], b"");
            (ended.code == 0).then(|| ended.rows().remove(0))
        });
        assert_eq!((report["shards"].as_u64(), report["replicas"].as_u64()), (Some(shards), Some(3 * shards)));
        report
    }

    /// Every shard has a leader that a quorum answers.
    pub(crate) fn has_a_quorum_everywhere(&self) {
        eventually("every shard has a quorum", || {
            let ended = self.run(&["admin", "status", "--json"], b"");
            let status = (ended.code == 0).then(|| ended.rows().remove(0))?;
            let shards = status["shards"].as_array()?;
            (!shards.is_empty() && shards.iter().all(|shard| shard["quorum"] == true)).then_some(())
        });
    }

    /// Creates a group of ann and others; returns its id.
    pub(crate) fn group(&self, participants: &[&str]) -> String {
        let mut args = vec!["conversation", "create", "--kind", "group", "--user", "ann", "--json"];
        participants.iter().for_each(|user| args.extend(["--participant", user]));
        self.run(&args, b"").well().rows()[0]["conversation"].as_str().unwrap().to_owned()
    }

    /// The bodies of all messages, with their seqs.
    pub(crate) fn messages(&self, conversation: &str) -> Vec<(u64, String)> {
        let rows = eventually("the conversation can be read", || {
            let ended = self.run(&["history", conversation, "--json", "--kind", "message", "--linearizable"], b"");
            (ended.code == 0).then(|| ended.rows())
        });
        rows.iter().map(|row| (row["seq"].as_u64().unwrap(), row["body"].as_str().unwrap().to_owned())).collect()
    }
}

impl Drop for Brokers {
    fn drop(&mut self) {
        for node in ["gateway-1", "broker-1", "broker-2", "broker-3"] {
            let _ = self.run(&["cluster", "kill", node], b"");
        }
    }
}
