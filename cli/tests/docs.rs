//! Keeps the documentation true where a program can: the table of refusal reasons, the frames, the sections that source
//! files point to, and the files that the documentation points to.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use stentor_proto::reason::Reason;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap()
}

fn files(folder: &Path, extension: &str, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            files(&path, extension, found);
        } else if path.extension().is_some_and(|e| e == extension) {
            found.push(path);
        }
    }
}

fn all(extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    files(&root(), extension, &mut found);
    found
}

#[test]
fn the_table_of_refusal_reasons_is_that_of_the_code() {
    let text = read("docs/wire.md");
    let table: Vec<&str> = text.split("## Refusal reasons").nth(1).unwrap().lines().collect();
    let rows: Vec<&str> = table.iter().copied().filter(|line| line.contains("| `")).collect();
    let row = |reason: &Reason| {
        let retryable = if reason.retryable() { "yes" } else { "no" };
        format!("| {} | `{}` | {retryable} | {} |", *reason as u32, reason.code(), reason.text())
    };
    assert_eq!(rows, Reason::ALL.iter().map(row).collect::<Vec<_>>());
}

#[test]
fn the_table_of_frames_is_that_of_the_code() {
    let text = read("docs/wire.md");
    let section = text.split("## Client frames").nth(1).unwrap().split("### Versions").next().unwrap();
    let documented: BTreeSet<(String, String)> = section
        .lines()
        .filter_map(|line| {
            let mut cells = line.strip_prefix("| ")?.split(" | ");
            let (kind, name) = (cells.next()?, cells.next()?);
            kind.parse::<u8>().ok()?;
            Some((name.trim_matches('`').to_owned(), kind.to_owned()))
        })
        .collect();
    let code = read("proto/src/frame.rs");
    let in_code = code.lines().filter_map(|line| {
        let (name, kind) = line.trim().strip_suffix(',')?.split_once(" = ")?;
        let is_frame = name.chars().all(char::is_alphanumeric) && kind.parse::<u8>().is_ok();
        is_frame.then(|| (name.to_owned(), kind.to_owned()))
    });
    assert_eq!(documented, in_code.collect());
}

#[test]
fn sections_that_source_files_point_to_exist() {
    let mut missing = Vec::new();
    for path in all("rs").into_iter().chain(all("proto")) {
        let text = fs::read_to_string(&path).unwrap();
        for after in text.split("docs/").skip(1) {
            let Some((page, rest)) = after.split_once(".md") else { continue };
            if !page.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"/-".contains(&b)) {
                continue;
            }
            let Ok(document) = fs::read_to_string(root().join(format!("docs/{page}.md"))) else {
                missing.push(format!("{}: docs/{page}.md", path.display()));
                continue;
            };
            let Some(section) = rest.strip_prefix(", \"").and_then(|rest| rest.split('"').next()) else { continue };
            if !document.lines().any(|line| line.trim_start_matches('#').trim() == section) {
                missing.push(format!("{}: docs/{page}.md, {section:?}", path.display()));
            }
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
}

#[test]
fn files_that_the_documentation_points_to_exist() {
    let mut missing = Vec::new();
    for path in all("md").into_iter().filter(|path| !path.ends_with("CHANGELOG.md")) {
        let text = fs::read_to_string(&path).unwrap().replace("```", "");
        for quoted in text.split('`').skip(1).step_by(2) {
            let is_source = [".rs", ".proto", ".sh", ".toml"].iter().any(|end| quoted.ends_with(end));
            // `{a,b}.rs` and names without a folder are for people.
            if is_source && quoted.contains("/src/") && !quoted.contains('{') && !root().join(quoted).exists() {
                missing.push(format!("{}: {quoted}", path.display()));
            }
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
}
