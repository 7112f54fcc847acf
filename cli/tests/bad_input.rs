//! What bad input gets, as far as it shows on the command line: a stable reason, a clear sentence, nothing lost, nothing
//! else disturbed. Bodies, kinds and unknown conversations are in `face.rs`.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod support;

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde_json::Value;
use stentor_proto::ids::{AppId, DeviceId, UserId};
use stentor_transport::token::{self, Claims};
use support::{Cluster, DEADLINE, Ended, processes::Processes, run, stentor};

/// Starts one node from a changed copy of its configuration; it must end by itself, and say why.
fn start(config: &Path, change: impl Fn(&str) -> String) -> Ended {
    let changed = config.with_extension("changed.toml");
    fs::write(&changed, change(&fs::read_to_string(config).unwrap())).unwrap();
    let role = if config.to_str().unwrap().contains("gateway") { "gateway" } else { "broker" };
    run(&[role, "--config", changed.to_str().unwrap()], b"")
}

fn fails(ended: &Ended, code: i32, words: &[&str]) {
    assert_eq!(ended.code, code, "{}", ended.stderr);
    for word in words {
        assert!(ended.stderr.contains(word), "{word:?} is not said: {}", ended.stderr);
    }
    assert!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
}

#[test]
fn a_node_that_cannot_start_says_why_and_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let cluster = Processes::up_in(folder.path().to_owned(), folder, 1, 2);
    let group = cluster.run(&["conversation", "create", "--json"], b"").well().rows().remove(0);
    let group = group["conversation"].as_str().unwrap();
    cluster.run(&["send", group, "--stdin"], b"one\ntwo\n").well();
    let (broker, gateway) = (cluster.config("broker-1"), cluster.config("gateway-1"));
    let same = |text: &str| text.to_owned();

    let elsewhere = |text: &str| {
        let line = |line: &str| match line.split_once("_listen = ") {
            Some((which, _)) => format!("{which}_listen = \"127.0.0.1:0\"\n"),
            None => format!("{line}\n"),
        };
        text.lines().map(line).collect()
    };
    fails(&start(&broker, elsewhere), 1, &["broker-1 is in use"]);
    cluster.run(&["cluster", "stop", "broker-1"], b"").well();
    cluster.run(&["cluster", "stop", "gateway-1"], b"").well();

    let misspelt = |text: &str| text.replacen("api_listen", "api_lisen", 1);
    fails(&start(&broker, misspelt), 2, &["unknown key `api_lisen`", "did you mean `api_listen`"]);
    let misspelt = |text: &str| text.replace("max_body_bytes", "max_body_byte");
    fails(&start(&gateway, misspelt), 2, &["unknown key `max_body_byte`", "did you mean `max_body_bytes`"]);
    fails(&start(&broker, |text| text.replacen('=', ":", 1)), 2, &["broker-1"]);
    fails(&run(&["broker", "--config", "no/such.toml"], b""), 2, &["no/such.toml"]);

    let node = |name: &str| cluster.nodes().into_iter().find(|n| n["name"] == name).unwrap();
    let api = node("broker-1")["api"].as_str().unwrap().to_owned();
    let taken = std::net::TcpListener::bind(&api).unwrap();
    fails(&start(&broker, same), 1, &[&api, "in use"]);
    drop(taken);
    let quic = node("gateway-1")["quic"].as_str().unwrap().to_owned();
    let taken = std::net::UdpSocket::bind(&quic).unwrap();
    fails(&start(&gateway, same), 1, &[&quic, "in use"]);
    drop(taken);

    let other = |text: &str| text.replacen("cluster_id = \"", "cluster_id = \"other-", 1);
    fails(&start(&broker, other), 1, &["cluster"]);

    let identity = cluster.dir.join("broker-1/identity");
    let bytes = fs::read(&identity).unwrap();
    let mut newer = bytes.clone();
    newer[8] = 9;
    fs::write(&identity, &newer).unwrap();
    fails(&start(&broker, same), 1, &["format 9", "broker-1"]);
    assert_eq!(fs::read(&identity).unwrap(), newer, "nothing was changed");
    fs::write(&identity, &bytes).unwrap();

    cluster.run(&["cluster", "start", "broker-1"], b"").well();
    cluster.run(&["cluster", "start", "gateway-1"], b"").well();
    let messages = cluster.run(&["history", group, "--kind", "message", "--json"], b"").well().rows();
    assert_eq!(messages.iter().map(|m| m["body"].as_str().unwrap()).collect::<Vec<_>>(), ["one", "two"]);
    let report = cluster.run(&["admin", "verify", "--json"], b"").well().rows().remove(0);
    assert_eq!(report["ok"], true, "{report}");
}

#[test]
fn a_bad_token_is_refused_with_its_reason_by_gateway_and_broker() {
    let cluster = Cluster::start();
    let file = fs::read_to_string(cluster.dir.path().join("cluster.json")).unwrap();
    let file: Value = serde_json::from_str(&file).unwrap();
    let own = fs::read_to_string(file["signing_key"]["private_key"].as_str().unwrap()).unwrap();
    let (foreign, _) = token::generate_key().unwrap();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let claims = |app: &str, expires_s: u64| Claims {
        app: AppId::new(app).unwrap(),
        user: UserId::new("ann").unwrap(),
        device: Some(DeviceId::new("phone").unwrap()),
        admin: false,
        expires_s,
    };
    let (later, before) = ((now + Duration::from_secs(3_600)).as_secs(), now.as_secs() - 3_600);
    let good = token::mint(&own, "dev", &claims("demo", later)).unwrap();
    // Another user's name under a signature that was made for ann's.
    let forged = {
        let stranger = token::mint(&foreign, "dev", &claims("demo", later)).unwrap();
        let (payload, signature) = (stranger.rsplit_once('.').unwrap().0, good.rsplit_once('.').unwrap().1);
        format!("{payload}.{signature}x")
    };
    for (what, token, reason) in [
        ("expired", token::mint(&own, "dev", &claims("demo", before)).unwrap(), "TOKEN_EXPIRED"),
        ("signed by a foreign key", token::mint(&foreign, "dev", &claims("demo", later)).unwrap(), "UNAUTHENTICATED"),
        ("of an unknown key", token::mint(&foreign, "x", &claims("demo", later)).unwrap(), "UNAUTHENTICATED"),
        ("forged", forged, "UNAUTHENTICATED"),
        ("of another app", token::mint(&own, "dev", &claims("other", later)).unwrap(), "WRONG_APP"),
        ("no token", "rubbish".into(), "UNAUTHENTICATED"),
        ("empty", " ".into(), "UNAUTHENTICATED"),
    ] {
        refused(&file, what, &token, reason);
    }
    let (server, ca) = (server(&file, "quic"), file["ca"].as_str().unwrap());
    let history = run(&["history", "c", "--json", "--token", &good, "--server", &server, "--ca", ca], b"");
    assert_eq!((history.code, &history.error()["reason"]), (3, &"UNKNOWN_CONVERSATION".into()), "{}", history.stderr);
    let admin =
        run(&["admin", "status", "--json", "--token", &good, "--server", &self::server(&file, "api"), "--ca", ca], b"");
    assert_eq!((admin.code, &admin.error()["reason"]), (3, &"ADMIN_ONLY".into()), "{}", admin.stderr);
}

fn server(file: &Value, kind: &str) -> String {
    file["nodes"].as_array().unwrap().iter().find_map(|node| node[kind].as_str()).unwrap().to_owned()
}

fn refused(file: &Value, what: &str, token: &str, reason: &str) {
    let ca = file["ca"].as_str().unwrap();
    let (quic, api) = (server(file, "quic"), server(file, "api"));
    let send = ["send", "c", "x", "--json", "--token", token, "--server", &quic, "--ca", ca];
    let list = ["conversation", "list", "--json", "--token", token, "--server", &api, "--ca", ca];
    for args in [&send[..], &list[..]] {
        let ended = run(args, b"");
        let said = ended.error();
        assert_eq!((ended.code, said["reason"].as_str()), (3, Some(reason)), "{what}, {}: {}", args[0], ended.stderr);
        assert_eq!(said["retryable"], false);
    }
}

#[test]
fn whoever_is_removed_while_he_sends_hears_it_for_what_comes_later() {
    let cluster = Cluster::start();
    let group = cluster.group(&["bob"]);
    let dir = cluster.dir.path().to_str().unwrap();
    let mut child = stentor(&["send", &group, "--stdin", "--json", "--user", "bob", "--dir", dir])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    let mut answers = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut answer = || serde_json::from_str::<Value>(&answers.next().unwrap().unwrap()).unwrap();
    input.write_all(b"before\n").unwrap();
    assert_eq!(answer()["seq"], 3);
    cluster.run(&["conversation", "remove", &group, "bob"], b"").well();
    input.write_all(b"after\n").unwrap();
    drop(input);
    assert_eq!(answer()["error"]["reason"], "NOT_A_PARTICIPANT");
    assert_eq!(child.wait().unwrap().code(), Some(3));
    let rows = cluster.run(&["history", &group, "--kind", "message", "--json"], b"").well().rows();
    assert_eq!(rows.len(), 1);
}

#[test]
fn a_device_or_a_folder_in_use_is_misuse_that_names_the_process() {
    let cluster = Cluster::start();
    let group = cluster.group(&[]);
    let dir = cluster.dir.path().to_str().unwrap();
    let mut holder = stentor(&["tail", &group, "--after-seq", "0", "--json", "--device", "phone", "--dir", dir])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(holder.stdout.take().unwrap()).lines();
    lines.next().unwrap().unwrap();
    let pid = holder.id().to_string();
    fails(&cluster.run(&["history", &group, "--device", "phone"], b""), 2, &["phone", &pid]);
    holder.kill().unwrap();
    holder.wait().unwrap();
    cluster.run(&["history", &group, "--device", "phone"], b"").well();
    fails(&run(&["dev", "--dir", dir], b""), 2, &["in use", &cluster.pid().to_string()]);
}

/// A file system of its own, gone when dropped. The nodes on it must be gone before.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// `None` where this test may not mount anything.
    fn new(at: &Path, size: &str) -> Option<Self> {
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={size}"), "none"]).arg(at).status();
        mounted.is_ok_and(|status| status.success()).then(|| Self(at.to_owned()))
    }

    fn grow(&self, size: &str) {
        let options = format!("remount,size={size}");
        assert!(Command::new("mount").args(["-o", &options]).arg(&self.0).status().unwrap().success());
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// The last words of a broker that ended; not asserted, since its log lies on the full disk too.
fn last_words(cluster: &Processes, name: &str) -> String {
    let log = fs::read_to_string(cluster.dir.join("logs").join(format!("{name}.log"))).unwrap();
    assert!(!log.contains("panicked"), "{name}: {log}");
    log.lines().last().unwrap_or_default().to_owned()
}

#[test]
fn a_full_disk_stops_the_brokers_and_loses_nothing_that_was_acknowledged() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("disk");
    fs::create_dir(&dir).unwrap();
    // The logs of three brokers take 132 MB in advance: all of them must have come up before there is no more room.
    let Some(disk) = SmallDisk::new(&dir, "160m") else {
        assert!(!rustix::process::geteuid().is_root(), "root could not mount a file system");
        eprintln!("not tried: only root may mount the small disk that this needs");
        return;
    };
    let cluster = Processes::up_in(dir, folder, 1, 2);
    let group = cluster.run(&["conversation", "create", "--json"], b"").well().rows().remove(0);
    let group = group["conversation"].as_str().unwrap().to_owned();
    let line = |n: u32| format!("{n} {}\n", "x".repeat(50_000));
    let lines: String = (1..=2_000).map(line).collect();
    let sent = cluster.run(&["send", &group, "--stdin", "--json", "--timeout", "15"], lines.as_bytes());
    assert_eq!(sent.code, 1, "some stay without an answer: {}", sent.stderr);
    let acknowledged: Vec<(u64, u64)> = sent
        .rows()
        .iter()
        .map(|row| (row["line"].as_u64().unwrap(), row["seq"].as_u64().unwrap_or_else(|| panic!("refused: {row}"))))
        .collect();
    assert!(!acknowledged.is_empty());
    let deadline = Instant::now() + DEADLINE;
    let failed = loop {
        let nodes = cluster.nodes();
        let failed: Vec<String> =
            nodes.iter().filter(|n| n["state"] == "failed").map(|n| n["name"].as_str().unwrap().to_owned()).collect();
        if failed.len() >= 2 {
            break failed;
        }
        assert!(Instant::now() < deadline, "the brokers go on: {nodes:?}");
        std::thread::sleep(Duration::from_millis(50));
    };
    disk.grow("2g");
    for name in &failed {
        println!("{name}: {}", last_words(&cluster, name));
    }
    // The third broker may only now find out that its last write failed, and end while the others start or after that.
    loop {
        let up = cluster.run(&["cluster", "up"], b"");
        let verified = cluster.run(&["admin", "verify", "--json"], b"");
        let report = verified.rows().into_iter().next().unwrap_or_default();
        if (up.code, verified.code) == (0, 0) {
            assert_eq!(report["ok"], true, "{report}");
            break;
        }
        let problems = report["problems"].as_array().cloned().unwrap_or_default();
        assert!(problems.iter().all(|problem| problem["kind"] == "unreachable"), "{report}");
        for n in cluster.nodes().iter().filter(|n| n["state"] == "failed") {
            println!("late: {}", last_words(&cluster, n["name"].as_str().unwrap()));
        }
        assert!(Instant::now() < deadline, "the brokers do not start again: {:?}, {report}", cluster.nodes());
    }
    let rows = cluster.run(&["history", &group, "--kind", "message", "--linearizable", "--json"], b"").well().rows();
    let number = |row: &Value| row["body"].as_str().unwrap().split(' ').next().unwrap().parse::<u64>().unwrap();
    let there: Vec<(u64, u64)> = rows.iter().map(|row| (number(row), row["seq"].as_u64().unwrap())).collect();
    assert_eq!(there[..acknowledged.len()], acknowledged, "each acknowledged line, once, in order, under its seq");
    assert!(there.iter().enumerate().all(|(n, &(line, _))| line == n as u64 + 1), "{there:?}");
    drop(cluster);
    drop(disk);
}
