//! Every scenario of `stentor bench` for a moment, against one small cluster: that its counts are right and its report is
//! whole. Must never judge a time: that is for quiet machines.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod support;

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use serde_json::Value;
use support::{
    Ended,
    brokers::{Brokers, eventually},
    run,
};

/// Runs a scenario for two repeats and reads its report.
fn bench(cluster: &Brokers, scenario: &str) -> Value {
    let mut args = vec!["bench"];
    args.extend(scenario.split(' '));
    args.extend(["--seconds", "0.4", "--warm-up", "0.1", "--repeats", "2", "--json"]);
    let ended = cluster.run(&args, b"").well();
    assert!(ended.stderr.is_empty(), "{scenario}: {}", ended.stderr);
    let report = ended.rows().remove(0);
    let name = scenario.split(' ').next().unwrap();
    assert_eq!((report["format"].as_u64(), report["scenario"].as_str()), (Some(1), Some(name)), "{report}");
    let phase = report["phases"].as_array().unwrap().last().unwrap().clone();
    assert_eq!(phase["runs"].as_array().unwrap().len(), 2, "{phase}");
    for run in phase["runs"].as_array().unwrap() {
        is_whole(scenario, run);
    }
    phase
}

/// What every outcome has. The run has compared counts itself, and would have failed.
fn is_whole(scenario: &str, run: &Value) {
    let number = |key: &str| run[key].as_f64().unwrap_or(-1.0);
    assert_eq!(run["errors"], 0, "{scenario}: {run}");
    assert!(number("count") > 0.0 && number("rate_per_s") > 0.0, "{scenario}: {run}");
    assert_eq!(run["latency"]["count"], run["count"], "{scenario}: {run}");
    assert!(number("server_cpu_us") >= 0.0 && number("flushes_per_message") >= 0.0, "{scenario}: {run}");
    let processes: Vec<&str> = run["processes"].as_object().unwrap().keys().map(String::as_str).collect();
    let mut expected = if scenario.contains("--workers") { vec!["bench-1", "bench-2"] } else { vec!["bench"] };
    expected.extend(["broker-1", "broker-2", "broker-3", "gateway-1"]);
    assert_eq!(processes, expected, "{scenario}");
}

fn figure(phase: &Value, name: &str) -> f64 {
    phase["median"]["figures"][name].as_f64().unwrap_or_else(|| panic!("no {name} in {phase}"))
}

#[test]
fn every_scenario_runs_and_its_counts_are_right() {
    let cluster = Brokers::start(4);
    bench(&cluster, "send --conversations 8 --window 32 --size 100");
    bench(&cluster, "send --conversations 40 --window 8");
    bench(&cluster, "send --conversations 1 --window 300 --size 1");
    bench(&cluster, "send --conversations 4 --window 16 --sessions 16 --via api");
    let open = bench(&cluster, "send --conversations 4 --window 64 --rate 200");
    assert!(figure(&open, "late_count") > 0.0);
    let fanout = bench(&cluster, "fanout --conversations 2 --devices 6 --devices-per-user 2 --stuck 1 --window 4");
    assert!(figure(&fanout, "sent_count") > 0.0);
    bench(&cluster, "fanout --devices 3 --rate 50 --size 3");
    let cursors = bench(&cluster, "cursors --devices 4 --window 8");
    assert!(figure(&cursors, "delivery_count") > 0.0);
    bench(&cluster, "connect --concurrency 2");
    bench(&cluster, "connect --concurrency 2 --resumed --rate 40");
    let idle = bench(&cluster, "idle --devices 5 --conversations 2");
    assert_eq!(figure(&idle, "connections"), 7.5, "5 in the first repeat, 10 in the second");
    let resume = bench(&cluster, "resume --devices 25 --conversations 3 --missed 4 --within 0.2");
    assert_eq!((figure(&resume, "missed_messages"), resume["median"]["count"].as_u64()), (12.0, Some(25)));
    bench(&cluster, "history --conversations 12 --messages 30 --page 10 --sessions 2");
    let mixed = bench(&cluster, "mixed --users 20 --conversations 30 --largest 20 --rate 200 --churn 300");
    assert!(figure(&mixed, "sent_count") > 0.0);
    let searched = cluster.run(
        &[
            "bench",
            "send",
            "--find-p99",
            "60000",
            "--conversations",
            "2",
            "--window",
            "8",
            "--seconds",
            "0.3",
            "--json",
        ],
        b"",
    );
    // A machine that is busy with other tests may hold no rate at all; that is told, and is no wrong count.
    assert!(searched.code == 0 || searched.stderr.contains("no rate holds"), "{}", searched.stderr);
}

/// A load generator that waits for coordinators; killed when dropped.
struct Worker {
    child: Child,
    address: String,
}

impl Worker {
    fn start(cluster: &Brokers) -> Self {
        let mut command = support::stentor(&["bench", "worker", "--listen", "127.0.0.1:0", "--json", "--dir"]);
        // What is killed cannot clear away its keys: they go with the cluster's folder.
        command.env("TMPDIR", cluster.dir());
        let mut child = command.arg(cluster.dir()).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let said: Value = serde_json::from_str(&line).unwrap();
        Self { child, address: said["listening"].as_str().unwrap().to_owned() }
    }

    fn kill(&mut self) {
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.kill();
    }
}

#[test]
fn several_workers_make_one_load() {
    let cluster = Brokers::start(4);
    let workers = [Worker::start(&cluster), Worker::start(&cluster)];
    let addresses = format!("{},{}", workers[0].address, workers[1].address);
    let together = |scenario: &str| bench(&cluster, &format!("{scenario} --workers {addresses}"));
    together("send --conversations 9 --window 32 --size 100");
    together("send --conversations 4 --window 16 --sessions 4 --via api");
    let open = together("send --conversations 4 --window 64 --rate 200");
    assert!(figure(&open, "late_count") > 0.0);
    together("fanout --conversations 3 --devices 4 --devices-per-user 2 --stuck 1 --window 4");
    together("cursors --conversations 2 --devices 3 --window 8");
    together("connect --concurrency 3");
    let idle = together("idle --devices 5 --conversations 2");
    assert_eq!(figure(&idle, "connections"), 7.5, "5 in the first repeat, 10 in the second");
    let resume = together("resume --devices 25 --conversations 3 --missed 4 --within 0.2");
    assert_eq!((figure(&resume, "missed_messages"), resume["median"]["count"].as_u64()), (12.0, Some(25)));
    together("history --conversations 12 --messages 30 --page 10 --sessions 2");
    for refused in ["send --conversations 1", "mixed", "fanout --local"] {
        let mut args: Vec<_> = ["bench"].into_iter().chain(refused.split(' ')).collect();
        args.extend(["--json", "--workers", &addresses]);
        let ended = cluster.run(&args, b"");
        assert_eq!((ended.code, ended.stdout.as_str()), (2, ""), "{refused}: {}", ended.stderr);
    }
}

#[test]
fn a_worker_that_dies_fails_the_run_and_one_that_is_left_alone_is_free_again() {
    let cluster = Brokers::start(2);
    let mut workers = [Worker::start(&cluster), Worker::start(&cluster)];
    let addresses = format!("{},{}", workers[0].address, workers[1].address);
    let dir = cluster.dir().to_str().unwrap().to_owned();
    let endless = |addresses: &str| {
        let args = ["bench", "send", "--conversations", "4", "--seconds", "600", "--json", "--dir", &dir, "--workers"];
        support::stentor(&args)
            .arg(addresses)
            .env("TMPDIR", &dir)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let sessions = || cluster.metric("gateway-1", "stentor_gateway_sessions ");
    let once = |address: &str| {
        let args = ["bench", "send", "--conversations", "4", "--seconds", "0.2", "--warm-up", "0", "--repeats", "1"];
        cluster.run(&[&args[..], &["--json", "--workers", address]].concat(), b"")
    };
    let led = endless(&addresses);
    eventually("both workers' devices are connected", || (sessions() >= 2).then_some(()));
    let busy = once(&workers[0].address);
    assert_eq!((busy.code, busy.error()["reason"].as_str()), (3, Some("WORKER_BUSY")), "{}", busy.stderr);
    workers[1].kill();
    let ended = Ended::new(led.wait_with_output().unwrap());
    assert_eq!((ended.code, ended.stdout.as_str()), (1, ""), "{}", ended.stderr);
    assert!(ended.stderr.contains(&workers[1].address), "{}", ended.stderr);
    let free = |what| {
        eventually(what, || {
            let ended = once(&workers[0].address);
            (ended.code != 3).then(|| ended.well())
        });
        eventually("all devices are gone", || (sessions() == 0).then_some(()));
    };
    free("the other worker serves the next coordinator");
    let mut led = endless(&workers[0].address);
    eventually("the worker's devices are connected", || (sessions() >= 1).then_some(()));
    led.kill().unwrap();
    led.wait().unwrap();
    free("the worker serves on when its coordinator has died");
}

#[test]
fn a_cluster_of_its_own_is_started_measured_shown_and_taken_down() {
    let folder = tempfile::tempdir().unwrap();
    let (page, report) = (folder.path().join("report.html"), folder.path().join("a.json"));
    let mut command = support::stentor(&["bench", "send", "--local", "--shards", "2", "--size", "64"]);
    command.args(["--seconds", "0.4", "--warm-up", "0", "--repeats", "3", "--json", "--html"]).arg(&page);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let prefix = format!("stentor-bench-{}-", child.id());
    let ended = Ended::new(child.wait_with_output().unwrap()).well();
    assert_eq!(ended.rows()[0]["cluster"]["shards"], 2);
    assert!(std::fs::read_to_string(&page).unwrap().contains("<svg"));
    std::fs::write(&report, &ended.stdout).unwrap();
    assert_eq!(folders(&prefix), Vec::<PathBuf>::new(), "the cluster's folder is gone");
    let report = report.to_str().unwrap();
    let compared = run(&["bench", "compare", report, report, "--json"], b"").well().rows().remove(0);
    assert_eq!(compared["worse"], 0);
    let nothing = run(&["bench", "send", "--json"], b"");
    assert_eq!((nothing.code, nothing.stdout.as_str()), (2, ""));
}

/// Those beside us that need nothing installed, and our own side by both doors: that each is driven and measured.
#[test]
fn the_floors_are_measured_beside_us() {
    let works = ["handshake", "forward", "raw-api"];
    let mut args = vec!["bench", "peers", "--quick", "--repeats", "1", "--seconds", "2", "--json"];
    works.iter().for_each(|work| args.extend(["--only", work]));
    let table = run(&args, b"").well().rows().remove(0);
    let rows = table["rows"].as_array().unwrap();
    for row in rows {
        let positive = |key: &str| row[key].as_f64().is_some_and(|figure| figure > 0.0);
        assert!(["ours", "theirs", "ratio"].into_iter().all(positive) && row["note"].is_null(), "{row}");
    }
    let measured = |work: &str| rows.iter().any(|row| row["work"] == work && row["held"].is_boolean());
    assert!(works.into_iter().all(measured), "{table}");
}

#[test]
fn a_run_that_is_stopped_takes_its_cluster_down() {
    let args = ["bench", "send", "--local", "--shards", "2", "--seconds", "600", "--warm-up", "0", "--json"];
    let child = support::stentor(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let prefix = format!("stentor-bench-{}-", child.id());
    let folder = eventually("the cluster has been started", || folders(&prefix).pop());
    // Whenever it comes, in the start as well as under load.
    let pids =
        eventually("all nodes have a process", || pids(&folder.join("cluster.json")).filter(|all| all.len() == 4));
    let interrupted = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(interrupted.success());
    let ended = Ended::new(child.wait_with_output().unwrap());
    assert_eq!((ended.code, ended.stdout.as_str()), (1, ""), "{}", ended.stderr);
    assert!(folders(&prefix).is_empty());
    let alive = pids.iter().filter(|pid| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(&prefix)
    });
    assert_eq!(alive.count(), 0);
}

/// Folders of clusters whose names begin so.
fn folders(prefix: &str) -> Vec<PathBuf> {
    let all = std::fs::read_dir(std::env::temp_dir()).unwrap().map(|entry| entry.unwrap());
    all.filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix)).map(|entry| entry.path()).collect()
}

/// The processes of a cluster; `None` while it has no file.
fn pids(cluster_json: &Path) -> Option<Vec<u64>> {
    let file: Value = serde_json::from_slice(&std::fs::read(cluster_json).ok()?).ok()?;
    Some(file["nodes"].as_array()?.iter().filter_map(|node| node["pid"].as_u64()).collect())
}

#[test]
fn a_worse_report_ends_with_1_and_says_what_is_worse() {
    let folder = tempfile::tempdir().unwrap();
    let report = |name: &str, slower: f64| {
        let run = |n: f64| {
            serde_json::json!({
                "seconds": 1.0, "count": 100, "rate_per_s": (1000.0 + n) / slower, "errors": 0,
                "latency": { "count": 100, "mean_ms": 1.0, "p50_ms": 1.0, "p90_ms": 1.0, "p99_ms": 1.0,
                             "p999_ms": 1.0, "max_ms": 1.0 },
                "server_cpu_us": (30.0 + n / 100.0) * slower, "client_cpu_us": null,
                "flushes_per_message": null, "bytes_written_per_message": null,
            })
        };
        let value = serde_json::json!({
            "format": 1, "version": "0.1.0", "began": "", "scenario": "send", "settings": {},
            "machine": { "cpus": 2, "cpu": "", "memory_mib": 1, "kernel": "", "file_system": "", "load_before": 0.0 },
            "cluster": { "local": true, "brokers": 3, "gateways": 1, "shards": 16 },
            "timing": { "warm_up_s": 1.0, "seconds": 1.0, "repeats": 3 },
            "phases": [{ "name": "send", "runs": [run(1.0), run(2.0), run(3.0)], "median": run(2.0) }],
        });
        let path = folder.path().join(name);
        std::fs::write(&path, value.to_string()).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (fast, slow) = (report("fast.json", 1.0), report("slow.json", 1.2));
    let worse = run(&["bench", "compare", &fast, &slow], b"");
    assert_eq!(worse.code, 1, "{}", worse.stdout);
    assert!(worse.stdout.contains("worse") && worse.stderr.contains("2 figures got worse"), "{}", worse.stdout);
    run(&["bench", "compare", &slow, &fast], b"").well();
    assert_eq!(run(&["bench", "compare", &fast, "no-such.json"], b"").code, 2);
}
