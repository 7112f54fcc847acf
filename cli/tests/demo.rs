//! The demo of the real binary, and proof that its proof can fail.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod support;

use serde_json::{Value, json};
use support::{Ended, stentor};

fn demo(path: Option<&str>, alter: bool) -> (Ended, Value) {
    let mut args = vec!["dev", "--demo"];
    args.extend(path);
    args.extend(["--exit", "--json"]);
    let mut command = stentor(&args);
    if alter {
        command.env("STENTOR_TEST_ALTER_DELIVERY", "1");
    }
    let ended = Ended::new(command.output().unwrap());
    let report = ended.rows().pop().unwrap_or_default();
    (ended, report)
}

#[test]
fn the_bundled_sample_is_sent_and_delivered_whole() {
    let (ended, report) = demo(None, false);
    assert_eq!(ended.code, 0, "{report} {}", ended.stderr);
    assert_eq!(report["ok"], true);
    assert_eq!(report["files"], 3);
    assert_eq!(report["sent"], 3_668);
    assert_eq!(report["acknowledged"], 3_668);
    assert_eq!(report["skipped"], json!({ "empty": 3, "system": 329 }));
    assert_eq!(report["delivered"], report["expected_deliveries"]);
    assert!(report["delivered"].as_u64().unwrap() > 600_000, "{report}");
    assert!(report["absences"].as_u64().unwrap() > 20, "{report}");
    for fault in ["missing", "duplicate", "out_of_order", "altered"] {
        assert_eq!(report[fault], 0, "{fault}: {report}");
    }
}

#[test]
fn one_changed_byte_of_one_delivery_fails_the_proof() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("talk.txt");
    std::fs::write(&file, b"[12:00] <ann> hello\n[12:01] <bob> caf\xe9\n[12:02]  * ann waves\n").unwrap();
    let path = file.to_str().unwrap();
    let (ended, report) = demo(Some(path), false);
    assert_eq!((ended.code, &report["ok"]), (0, &json!(true)), "{report} {}", ended.stderr);
    let (ended, report) = demo(Some(path), true);
    assert_eq!((ended.code, &report["ok"], &report["altered"]), (1, &json!(false), &json!(1)), "{report}");
}
