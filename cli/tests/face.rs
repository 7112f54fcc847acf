//! The public face against a running cluster: what is promised about lines, fields, repeats, refusals and exit codes.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod support;

use serde_json::{Value, json};
use support::{Cluster, run};

#[test]
fn messages_go_in_and_come_out_as_they_were() {
    let cluster = Cluster::start();
    let group = cluster.group(&["bob"]);
    every_line_is_acknowledged_in_order(&cluster, &group);
    a_repeat_gets_the_first_result(&cluster, &group);
    bodies_arrive_as_sent(&cluster);
    bad_bodies_are_refused_and_disturb_nothing(&cluster);
    strangers_are_refused(&cluster, &group);
    history_can_be_read_from_either_end(&cluster);
    the_reader_who_left_sees_no_more(&cluster);
}

fn seqs(rows: &[Value]) -> Vec<u64> {
    rows.iter().map(|row| row["seq"].as_u64().unwrap()).collect()
}

fn every_line_is_acknowledged_in_order(cluster: &Cluster, group: &str) {
    let acks = cluster.run(&["send", group, "--stdin", "--json"], "one\ntwo\n三\n".as_bytes()).well().rows();
    assert_eq!(acks.iter().map(|a| a["line"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2, 3]);
    // Created, bob added, then these.
    assert_eq!(seqs(&acks), [3, 4, 5]);
    assert!(acks.iter().all(|a| a["client_id"].is_string() && a["stamp_ms"].as_u64().unwrap() > 0), "{acks:?}");

    let tail = ["tail", group, "--after-seq", "0", "--count", "4", "--json", "--user", "bob", "--timeout", "60"];
    let events = cluster.run(&tail, b"").well().rows();
    assert_eq!(events[0], json!({ "hidden": { "from": 1, "to": 1, "reason": "before_join" } }));
    let events = &events[1..];
    assert_eq!(seqs(events), [2, 3, 4, 5]);
    assert_eq!((&events[0]["kind"], &events[0]["subject"]), (&json!("participant_added"), &json!("bob")));
    let said = |n: usize| (events[n]["kind"].clone(), events[n]["sender"].clone(), events[n]["body"].clone());
    assert_eq!(said(3), (json!("message"), json!("ann"), json!("三")));
    assert_eq!(events[1]["client_id"], acks[0]["client_id"]);
    assert_eq!(events[1]["content_type"], "text/plain; charset=utf-8");
    assert_eq!(events[1]["conversation"], group);
}

fn a_repeat_gets_the_first_result(cluster: &Cluster, group: &str) {
    let send = ["send", group, "again", "--client-id", "k1", "--json"];
    let first = cluster.run(&send, b"").well().rows().remove(0);
    assert_eq!(first.get("repeat"), None);
    let repeat = cluster.run(&send, b"").well().rows().remove(0);
    assert_eq!((&repeat["seq"], &repeat["repeat"]), (&first["seq"], &json!(true)));
    let other = cluster.run(&["send", group, "otherwise", "--client-id", "k1", "--json"], b"");
    assert_eq!((other.code, &other.rows()[0]["error"]["reason"]), (3, &json!("CLIENT_ID_REUSED")));
}

/// 256 bodies of random bytes and lines in an older encoding.
fn bodies_arrive_as_sent(cluster: &Cluster) {
    let group = cluster.group(&["bob"]);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    let mut body = |n: usize| (0..=n).map(|_| random()).map(|b| if b == b'\n' { b'\r' } else { b }).collect();
    let mut bodies: Vec<Vec<u8>> = (0..256).map(&mut body).collect();
    bodies.push(b"caf\xe9 au lait \x15\x1e\r".to_vec());
    let input = bodies.join(&b'\n');
    cluster.run(&["send", &group, "--stdin", "--json"], &input).well();
    let events = cluster.run(&["history", &group, "--json", "--kind", "message", "--user", "bob"], b"").well().rows();
    assert_eq!(events.len(), bodies.len());
    for (event, body) in events.iter().zip(&bodies) {
        let seen = match event["body"].as_str() {
            Some(text) => text.as_bytes().to_vec(),
            None => from_base64(event["body_base64"].as_str().unwrap()),
        };
        assert_eq!(&seen, body);
    }
}

fn from_base64(text: &str) -> Vec<u8> {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.decode(text).unwrap()
}

fn bad_bodies_are_refused_and_disturb_nothing(cluster: &Cluster) {
    let group = cluster.group(&[]);
    let input = [b"before".to_vec(), Vec::new(), vec![b'x'; 2_000_000], b"after".to_vec()].join(&b'\n');
    let ended = cluster.run(&["send", &group, "--stdin", "--json"], &input);
    assert_eq!(ended.code, 3, "{}", ended.stderr);
    let rows = ended.rows();
    let reason = |n: usize| rows[n]["error"]["reason"].as_str().unwrap_or("none");
    assert_eq!([reason(0), reason(1), reason(2), reason(3)], ["none", "EMPTY_BODY", "BODY_TOO_LARGE", "none"]);
    assert_eq!((rows[0]["seq"].as_u64(), rows[3]["seq"].as_u64()), (Some(2), Some(3)));
}

fn strangers_are_refused(cluster: &Cluster, group: &str) {
    let send = cluster.run(&["send", group, "x", "--json", "--user", "eve"], b"");
    assert_eq!((send.code, &send.rows()[0]["error"]["reason"]), (3, &json!("NOT_A_PARTICIPANT")));
    assert_eq!(send.rows()[0]["error"]["retryable"], false);
    for verb in [&["history", group][..], &["tail", group, "--timeout", "60"], &["conversation", "show", group]] {
        let mut args = verb.to_vec();
        args.extend(["--json", "--user", "eve"]);
        let ended = cluster.run(&args, b"");
        assert_eq!((ended.code, &ended.error()["reason"]), (3, &json!("NOT_A_PARTICIPANT")), "{verb:?}");
    }
    let nowhere = cluster.run(&["send", "no-such", "x", "--json"], b"");
    assert_eq!((nowhere.code, &nowhere.rows()[0]["error"]["reason"]), (3, &json!("UNKNOWN_CONVERSATION")));
}

fn history_can_be_read_from_either_end(cluster: &Cluster) {
    let group = cluster.group(&[]);
    let lines: String = (1..=40).map(|n| format!("{n}\n")).collect();
    cluster.run(&["send", &group, "--stdin"], lines.as_bytes()).well();
    let history = |args: &[&str]| {
        let mut all = vec!["history", &group, "--json"];
        all.extend(args);
        seqs(&cluster.run(&all, b"").well().rows())
    };
    assert_eq!(history(&[]), (1..=41).collect::<Vec<_>>());
    assert_eq!(history(&["--limit", "3"]), [39, 40, 41]);
    assert_eq!(history(&["--after-seq", "5", "--limit", "3"]), [6, 7, 8]);
    assert_eq!(history(&["--before-seq", "5", "--limit", "2"]), [3, 4]);
    assert_eq!(history(&["--before-seq", "4"]), [1, 2, 3]);
    assert_eq!(history(&["--kind", "created", "--limit", "1", "--linearizable"]), [1]);
}

fn the_reader_who_left_sees_no_more(cluster: &Cluster) {
    let group = cluster.group(&["bob"]);
    cluster.run(&["send", &group, "--stdin"], b"one\ntwo\n").well();
    let removed = cluster.run(&["conversation", "remove", &group, "bob", "--json"], b"").well().rows().remove(0);
    assert_eq!(removed["seq"], 5);
    cluster.run(&["send", &group, "three"], b"").well();
    let refused = cluster.run(&["send", &group, "x", "--json", "--user", "bob"], b"");
    assert_eq!((refused.code, &refused.rows()[0]["error"]["reason"]), (3, &json!("NOT_A_PARTICIPANT")));
    cluster.run(&["conversation", "add", &group, "bob"], b"").well();
    let rows = cluster.run(&["history", &group, "--json", "--user", "bob"], b"").well().rows();
    let hidden: Vec<&Value> = rows.iter().map(|row| &row["hidden"]).filter(|hidden| hidden.is_object()).collect();
    let before = json!({ "from": 1, "to": 1, "reason": "before_join" });
    let away = json!({ "from": 6, "to": 6, "reason": "not_participant" });
    assert_eq!(hidden, [&before, &away]);
    assert_eq!(rows.last().unwrap()["kind"], "participant_added");
}

#[test]
fn a_stopped_cluster_comes_back_with_its_conversations_and_ports() {
    let cluster = Cluster::start();
    let group = cluster.group(&["bob"]);
    cluster.run(&["send", &group, "--stdin"], b"one\ntwo\n").well();
    let ports = |dir: &std::path::Path| {
        let text = std::fs::read_to_string(dir.join("cluster.json")).unwrap();
        let file: Value = serde_json::from_str(&text).unwrap();
        let nodes = file["nodes"].as_array().unwrap().clone();
        nodes.iter().map(|n| (n["name"].clone(), n["api"].clone(), n["quic"].clone())).collect::<Vec<_>>()
    };
    let before = ports(cluster.dir.path());
    let again = Cluster::start_in(cluster.stop());
    assert_eq!(ports(again.dir.path()), before);
    again.run(&["send", &group, "three"], b"").well();
    let rows = again.run(&["history", &group, "--json", "--kind", "message", "--user", "bob"], b"").well().rows();
    assert_eq!(rows.iter().map(|row| row["body"].as_str().unwrap()).collect::<Vec<_>>(), ["one", "two", "three"]);
    assert_eq!(seqs(&rows), [3, 4, 5]);
    the_cluster_says_how_it_is(&again);
}

fn the_cluster_says_how_it_is(cluster: &Cluster) {
    let status = cluster.run(&["admin", "status", "--json"], b"").well().rows().remove(0);
    let states: Vec<&Value> = status["nodes"].as_array().unwrap().iter().map(|node| &node["state"]).collect();
    assert_eq!(states, [&json!("up"), &json!("up"), &json!("up")], "{status}");
    assert!(status["shards"].as_array().unwrap().iter().all(|shard| shard["quorum"] == true), "{status}");
    let verified = cluster.run(&["admin", "verify", "--json"], b"").well().rows().remove(0);
    // Four data shards and the meta shard, three replicas each.
    assert_eq!((&verified["shards"], &verified["replicas"]), (&json!(5), &json!(15)), "{verified}");
    assert!(verified["events"].as_u64().unwrap() >= 4 && verified["problems"] == json!([]), "{verified}");
    let moved = cluster.run(&["admin", "transfer-leader", "1", "broker-2", "--json"], b"").well().rows().remove(0);
    assert_eq!(moved["leader"], "broker-2");
}

#[test]
fn misuse_exits_2_and_says_why() {
    let nowhere = tempfile::tempdir().unwrap();
    let dir = nowhere.path().to_str().unwrap();
    for args in [
        &["send", "--no-such-flag"][..],
        &["send", "c", "x", "--json"],
        &["send", "c", "x", "--json", "--dir", dir],
        &["history", "c", "--json", "--token", "t", "--server", "127.0.0.1:1"],
        &["dev", "--demo", dir, "--exit", "--json"],
        &["token", "--user", "ann", "--dir", dir],
    ] {
        let ended = run(args, b"");
        assert_eq!(ended.code, 2, "{args:?}: {}", ended.stderr);
        assert!(ended.stdout.is_empty() && !ended.stderr.is_empty(), "{args:?}");
    }
}

#[test]
fn what_is_not_built_says_so() {
    for args in [
        &["chaos", "--json"][..],
        &["admin", "move", "1", "broker-1", "broker-2", "--json"],
        &["admin", "backup", "--json", "--dir", "d"],
    ] {
        let ended = run(args, b"");
        assert_eq!((ended.code, &ended.error()["reason"]), (2, &json!("NOT_BUILT")), "{args:?}");
    }
}
