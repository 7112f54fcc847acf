//! The chat in a real terminal against a real cluster: two users talk, the cluster stands still and comes back, the
//! terminal is given back however the chat ends.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod support;

use rustix::process::{Pid, Signal, kill_process};
use support::{Cluster, run, stentor, terminal::Terminal};

const ENTER: &str = "\r";
const CTRL_C: &str = "\x03";
const CTRL_N: &str = "\x0e";
const PAGE_UP: &str = "\x1b[5~";

fn chat(cluster: &Cluster, user: &str, columns: u16, rows: u16) -> Terminal {
    let dir = cluster.dir.path().to_str().unwrap();
    Terminal::start(&["chat", "--dir", dir, "--user", user], columns, rows)
}

fn waits_given_back(terminal: &mut Terminal) {
    // The last bytes may still be on their way from the program to the screen.
    let deadline = std::time::Instant::now() + support::DEADLINE;
    while !terminal.is_given_back() {
        assert!(std::time::Instant::now() < deadline, "the terminal is not given back:\n{}", terminal.text());
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

#[test]
fn two_users_talk_through_a_cluster_that_stands_still_for_a_while() {
    let cluster = Cluster::start();
    let mut ann = chat(&cluster, "ann", 110, 24);
    ann.wait_for("no conversations");
    ann.press(CTRL_N);
    ann.wait_for("new conversation");
    ann.press("bob");
    ann.press(ENTER);
    ann.wait_for("ann added bob");
    ann.press("hello 三 e\u{301}");
    ann.press(ENTER);
    ann.wait_for("✓ 3");

    let mut bob = chat(&cluster, "bob", 100, 30);
    bob.wait_for("ann: hello 三");
    bob.wait("three are new to bob", |screen| screen.lines().any(|row| row.contains("@ ann") && row.contains(" 3│")));
    bob.press(ENTER);
    bob.wait_for("─ new ─");
    bob.press("good\x1b\rday");
    bob.press(ENTER);
    ann.wait("both lines of bob's", |screen| screen.contains(" good ") && screen.contains(" day"));

    stands_still_and_comes_back(&cluster, &mut ann, &mut bob);
    sizes(&mut ann);

    bob.signal(Signal::TERM);
    assert_eq!(bob.ended(), 0, "{}", bob.text());
    waits_given_back(&mut bob);
    ann.press(CTRL_C);
    assert_eq!(ann.ended(), 0, "{}", ann.text());
    waits_given_back(&mut ann);
    superseded(&cluster);
}

fn stands_still_and_comes_back(cluster: &Cluster, ann: &mut Terminal, bob: &mut Terminal) {
    let pid = Pid::from_raw(cluster.pid() as i32).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    ann.wait("the lost connection", |screen| screen.contains("no connection for"));
    ann.press("while away");
    ann.press(ENTER);
    ann.wait_for("while away");
    assert!(!bob.text().contains("while away"));
    ann.press(CTRL_C);
    ann.wait_for("1 not acknowledged");
    kill_process(pid, Signal::CONT).unwrap();
    bob.wait_for("while away");
    ann.wait("everything as it was", |screen| screen.contains("✓ 5") && !screen.contains("no connection for"));
    bob.press("back");
    bob.press(ENTER);
    ann.wait_for("back");
    let dir = cluster.dir.path().to_str().unwrap();
    let list = run(&["conversation", "list", "--json", "--dir", dir], b"").well().rows();
    let id = list[0]["conversation"].as_str().unwrap();
    let messages = run(&["history", id, "--kind", "message", "--json", "--dir", dir], b"").well().rows();
    let bodies: Vec<&str> = messages.iter().map(|m| m["body"].as_str().unwrap()).collect();
    assert_eq!(bodies, ["hello 三 e\u{301}", "good\nday", "while away", "back"], "each once, in order");
    // A long history, scrolled back to its beginning.
    let many: String = (1..=300).map(|n| format!("line {n}\n")).collect();
    run(&["send", id, "--stdin", "--user", "bob", "--dir", dir], many.as_bytes()).well();
    ann.wait_for("line 300");
}

fn sizes(ann: &mut Terminal) {
    ann.resize(20, 5);
    ann.wait("a small screen", |screen| screen.contains("line 300") && screen.contains("> ") && !screen.contains('│'));
    ann.resize(200, 60);
    ann.wait("a large screen", |screen| {
        screen.contains("line 300") && screen.contains("line 250") && screen.contains('│')
    });
    let deadline = std::time::Instant::now() + support::DEADLINE;
    while !ann.text().contains("the conversation begins here") {
        assert!(std::time::Instant::now() < deadline, "the beginning is not reached:\n{}", ann.text());
        ann.press(PAGE_UP);
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    ann.wait_for("ann created the conversation");
}

fn superseded(cluster: &Cluster) {
    let dir = cluster.dir.path();
    let text = std::fs::read_to_string(dir.join("cluster.json")).unwrap();
    let file: serde_json::Value = serde_json::from_str(&text).unwrap();
    let (token, ca) = (file["users"][0]["token"].as_str().unwrap(), file["ca"].as_str().unwrap());
    let nodes = file["nodes"].as_array().unwrap();
    let server = nodes.iter().find_map(|node| node["quic"].as_str()).unwrap();
    let args = ["chat", "--token", token, "--server", server, "--ca", ca];
    let mut first = Terminal::start(&args, 80, 24);
    first.wait_for("ann/phone");
    let mut second = Terminal::start(&args, 80, 24);
    second.wait_for("ann/phone");
    assert_eq!(first.ended(), 3, "{}", first.text());
    waits_given_back(&mut first);
    first.screen_says("SESSION_SUPERSEDED");
    drop(second);
    let mut command = stentor(&args);
    command.env("STENTOR_TEST_PANIC", "1").env("RUST_BACKTRACE", "0");
    let mut panics = Terminal::start_with(command, 80, 24);
    panics.wait_for("ann/phone");
    panics.press("x");
    assert_eq!(panics.ended(), 101, "{}", panics.text());
    waits_given_back(&mut panics);
    panics.screen_says("STENTOR_TEST_PANIC is set");
    let piped = run(&args, b"");
    assert_eq!(piped.code, 2, "{}", piped.stderr);
    assert!(piped.stderr.contains("terminal"), "{}", piped.stderr);
}
