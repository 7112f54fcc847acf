//! Keeps the shape of the workspace: which crate may use which, and what every file must look like. It stands in this
//! crate because every other one builds on it. Must never need anything but the sources of the clone.

// Helpers of tests are outside of what clippy takes for tests.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use toml::{Table, Value};

/// Who may depend on whom, the crate's own folder first (docs/architecture.md, "Layout"). A new crate gets a line here.
const ALLOWED: &[(&str, &[&str])] = &[
    ("proto", &[]),
    ("engine", &["proto"]),
    ("transport", &["proto"]),
    ("raft-store", &["engine", "proto"]),
    ("broker", &["engine", "transport", "raft-store", "proto"]),
    ("gateway", &["engine", "transport", "proto"]),
    ("client", &["engine", "transport", "proto"]),
    ("cli", &["proto", "engine", "transport", "raft-store", "broker", "gateway", "client", "bench"]),
    ("bench", &["client", "transport", "proto"]),
    ("chaos", &["broker", "gateway", "client", "raft-store", "engine", "transport", "proto"]),
];

/// Libraries that belong to one crate: what they do happens there and nowhere else.
const OWNED: &[(&str, &str)] = &[
    ("rocksdb", "raft-store"),
    ("quinn", "transport"),
    ("quinn-proto", "transport"),
    ("quinn-udp", "transport"),
    ("rustls", "transport"),
    ("tokio-rustls", "transport"),
    ("rcgen", "transport"),
    ("hyper", "transport"),
    ("hyper-util", "transport"),
    ("axum", "transport"),
    ("socket2", "transport"),
];

/// The features with which tonic opens sockets.
const TONIC_SOCKETS: &[&str] = &["transport", "channel", "server", "tls-ring", "tls-aws-lc", "tls-native-roots"];

/// The engine decides, and so may use nothing that acts, waits or draws lots.
const ENGINE: &[&str] =
    &["stentor-proto", "bytes", "prost", "thiserror", "crc32fast", "twox-hash", "hashbrown", "foldhash"];

/// What opens a socket; only transport may.
const SOCKETS: &[&str] = &["TcpListener::bind(", "TcpStream::connect(", "UdpSocket::bind(", "UnixListener::bind("];

/// A file longer than this is two files; the tests at its end are not counted.
const MAX_LINES: usize = 1_000;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn manifest(path: &Path) -> Table {
    read(path).parse().unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn members() -> Vec<String> {
    let members = manifest(&root().join("Cargo.toml"))["workspace"]["members"].as_array().unwrap().clone();
    members.iter().map(|m| m.as_str().unwrap().to_owned()).collect()
}

/// (name, declaration) of everything that a crate uses; `kinds` are the tables to look into.
fn dependencies(crate_dir: &str, kinds: &[&str]) -> Vec<(String, Value)> {
    let manifest = manifest(&root().join(crate_dir).join("Cargo.toml"));
    let mut tables = vec![&manifest];
    if let Some(targets) = manifest.get("target").and_then(Value::as_table) {
        tables.extend(targets.values().filter_map(Value::as_table));
    }
    let kinds = tables.iter().flat_map(|table| kinds.iter().filter_map(|kind| table.get(*kind)?.as_table()));
    kinds.flatten().map(|(name, declared)| (name.clone(), declared.clone())).collect()
}

const ALL: &[&str] = &["dependencies", "build-dependencies", "dev-dependencies"];
const SHIPPED: &[&str] = &["dependencies", "build-dependencies"];

/// Every Rust file of the clone, relative to its root.
fn sources() -> Vec<PathBuf> {
    let mut dirs: Vec<PathBuf> = members().into_iter().map(|m| root().join(m)).collect();
    dirs.push(root().join("fuzz"));
    let mut files = Vec::new();
    while let Some(dir) = dirs.pop() {
        // fuzz/ may be absent, and cargo-fuzz leaves its builds in it.
        for entry in fs::read_dir(&dir).into_iter().flatten().map(Result::unwrap) {
            let path = entry.path();
            match path.is_dir() {
                true if entry.file_name() != "target" => dirs.push(path),
                false if path.extension().is_some_and(|e| e == "rs") => files.push(path),
                _ => {}
            }
        }
    }
    assert!(files.len() > 20, "the sources were not found");
    files.iter().map(|file| file.strip_prefix(root()).unwrap().to_owned()).collect()
}

/// A file's code without its tests, which stand last.
fn code(file: &Path) -> String {
    let text = read(&root().join(file));
    let end = text.find("\n#[cfg(test)]\nmod ").unwrap_or(text.len());
    text[..end].to_owned()
}

/// Files that are nothing but tests: `tests/…`, `…_tests.rs`, `…/tests.rs`, and the benches.
fn is_test(file: &Path) -> bool {
    let part = |name: &str| file.components().any(|c| c.as_os_str() == name);
    let stem = file.file_stem().unwrap().to_string_lossy();
    part("tests") || part("benches") || stem == "tests" || stem.ends_with("_tests")
}

fn none(problems: impl IntoIterator<Item = String>) {
    let problems: Vec<_> = problems.into_iter().collect();
    assert!(problems.is_empty(), "\n{}\n", problems.join("\n"));
}

#[test]
fn crates_depend_on_each_other_in_one_direction() {
    let mut problems = Vec::new();
    for member in members() {
        let Some((_, allowed)) = ALLOWED.iter().find(|(name, _)| *name == member) else {
            problems.push(format!("{member} has no line in the table of this test"));
            continue;
        };
        let ours = dependencies(&member, ALL)
            .into_iter()
            .filter_map(|(name, _)| Some(name.strip_prefix("stentor-")?.to_owned()));
        let wrong = ours.filter(|other| !allowed.contains(&&**other) && *other != member);
        problems.extend(wrong.map(|other| format!("{member} must not depend on {other}")));
    }
    none(problems);
}

#[test]
fn each_library_of_one_crate_is_used_by_that_crate_alone() {
    let mut problems = Vec::new();
    for member in members() {
        for (name, declared) in dependencies(&member, ALL) {
            let owner = OWNED.iter().find(|(library, _)| *library == name).map(|(_, owner)| *owner);
            if let Some(owner) = owner.filter(|owner| *owner != member) {
                problems.push(format!("{name} belongs to {owner}; {member} must not use it"));
            }
            let features = declared.get("features").and_then(Value::as_array).cloned().unwrap_or_default();
            let opens = features.iter().filter_map(Value::as_str).any(|f| TONIC_SOCKETS.contains(&f));
            if name == "tonic" && opens && member != "transport" {
                problems.push(format!("{member} must leave tonic's sockets to transport"));
            }
        }
    }
    let tonic = &manifest(&root().join("Cargo.toml"))["workspace"]["dependencies"]["tonic"];
    assert_eq!(tonic["default-features"].as_bool(), Some(false), "tonic's default features open sockets");
    none(problems);
}

#[test]
fn the_engine_uses_nothing_that_acts() {
    let used = dependencies("engine", SHIPPED).into_iter().map(|(name, _)| name);
    none(used.filter(|name| !ENGINE.contains(&&**name)).map(|name| format!("engine must not use {name}")));
}

#[test]
fn only_transport_opens_sockets() {
    let files = sources().into_iter().filter(|file| !file.starts_with("transport") && !is_test(file));
    none(files.flat_map(|file| {
        let code = code(&file);
        let found = SOCKETS.iter().filter(move |call| code.contains(**call));
        found.map(move |call| format!("{}: {call}…) belongs to transport", file.display())).collect::<Vec<_>>()
    }));
}

#[test]
fn every_crate_follows_the_lints_of_the_house() {
    none(members().into_iter().filter_map(|member| {
        let manifest = manifest(&root().join(&member).join("Cargo.toml"));
        let inherits = |table: &str, key: &str| manifest.get(table)?.get(key)?.get("workspace")?.as_bool();
        let lints = manifest.get("lints").and_then(|l| l.get("workspace")).and_then(Value::as_bool);
        let follows = lints == Some(true) && inherits("package", "edition") == Some(true);
        (!follows).then(|| format!("{member}/Cargo.toml must take lints and edition from the workspace"))
    }));
}

#[test]
fn the_engines_bans_stand_and_repeat_those_of_the_house() {
    let (house, engine) = (manifest(&root().join("clippy.toml")), manifest(&root().join("engine/clippy.toml")));
    let missing = house.iter().filter(|(key, value)| engine.get(*key) != Some(value));
    none(missing.map(|(key, value)| format!("engine/clippy.toml must repeat {key} = {value}")));
    assert_eq!(house["too-many-lines-threshold"].as_integer(), Some(70));
    let paths = |key: &str| -> BTreeSet<String> {
        let bans = engine[key].as_array().unwrap();
        bans.iter().map(|ban| ban["path"].as_str().unwrap().to_owned()).collect()
    };
    let (methods, types) = (paths("disallowed-methods"), paths("disallowed-types"));
    let methods =
        ["std::time::Instant::now", "std::time::SystemTime::now", "std::thread::spawn"].map(|m| (m, &methods));
    let types = ["std::collections::HashMap", "std::collections::HashSet"].map(|t| (t, &types));
    let gone = methods.into_iter().chain(types).filter(|(path, bans)| !bans.contains(*path));
    none(gone.map(|(path, _)| format!("engine/clippy.toml must ban {path}")));
}

#[test]
fn every_file_says_what_it_is_for() {
    let silent = sources().into_iter().filter(|file| !read(&root().join(file)).starts_with("//! "));
    none(silent.map(|file| format!("{} must open with //!", file.display())));
}

#[test]
fn files_are_short_and_named_for_what_they_do() {
    let mut problems = Vec::new();
    for file in sources() {
        let lines = if is_test(&file) { 0 } else { code(&file).lines().count() };
        if lines > MAX_LINES {
            problems.push(format!("{} has {lines} lines without its tests", file.display()));
        }
        let shapeless = ["common", "utils", "util", "helpers", "misc"];
        if file.iter().any(|part| shapeless.contains(&part.to_string_lossy().trim_end_matches(".rs"))) {
            problems.push(format!("{} has a name that says nothing", file.display()));
        }
    }
    none(problems);
}

#[test]
fn nothing_is_put_off() {
    // Spelled in two parts, so that this file passes its own test.
    let words = [
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("for n", "ow"),
        concat!("place", "holder"),
        concat!("simpl", "ified"),
        concat!("not implem", "ented"),
    ];
    let mut problems = Vec::new();
    for file in sources() {
        for (number, line) in read(&root().join(&file)).lines().enumerate() {
            let comment = line.find("//").map_or("", |at| &line[at..]);
            // What is refused for the moment is a retryable refusal: the wording of the house.
            let comment = if comment.contains("refuse") { comment.replace(words[2], "") } else { comment.to_owned() };
            let found = words.iter().filter(|word| comment.contains(**word));
            problems.extend(found.map(|word| format!("{}:{}: {word}", file.display(), number + 1)));
        }
    }
    none(problems);
}
