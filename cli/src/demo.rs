//! The demo: replays real conversations as many users on many devices, each a real client over the network, and then
//! proves what every device got. Must never count anything as delivered that a device did not report itself.

mod device;
mod parse;
mod plan;
mod play;
mod proof;
mod report;

use std::{
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

use stentor_proto::{Bytes, ids::ConversationId};

use crate::{cluster_file::ClusterFile, failure::Failure, output::Output};

pub(crate) use plan::Plan;
pub(crate) use report::Report;

/// What is replayed when no path is given (sample/README.md has source and licence).
const SAMPLE: [(&str, &[u8]); 3] = [
    ("2005-06-27_12", include_bytes!("../sample/2005-06-27_12.txt")),
    ("2008-07-14_18", include_bytes!("../sample/2008-07-14_18.txt")),
    ("2016-12-19_20", include_bytes!("../sample/2016-12-19_20.txt")),
];

/// What is said in the bundled sample, in its order.
pub(crate) fn sample_texts() -> Vec<Bytes> {
    let lines = SAMPLE.iter().flat_map(|(_, bytes)| parse::parse(&Bytes::from_static(bytes)).lines);
    lines.map(|line| line.text).collect()
}

/// Reads and plans the conversations of a file, of a folder with one conversation a file, or of the bundled sample.
pub(crate) fn load(path: Option<&Path>) -> Result<Plan, Failure> {
    let files = match path {
        None => SAMPLE.iter().map(|(name, bytes)| ((*name).to_owned(), Bytes::from_static(bytes))).collect(),
        Some(path) => read(path)?,
    };
    let mut transcripts = Vec::new();
    for (name, bytes) in files {
        let transcript = parse::parse(&bytes);
        // A folder may have a README or a licence beside its conversations.
        if !transcript.lines.is_empty() {
            transcripts.push((ConversationId::new(name)?, transcript));
        }
    }
    if transcripts.is_empty() {
        let path = path.map(Path::display);
        return Err(Failure::misuse(format_args!(
            "{} has no lines of the form `[HH:MM] <name> text`",
            path.map_or_else(String::new, |path| path.to_string())
        )));
    }
    plan::plan(transcripts)
}

/// Files in the order of their names, each under the name that its conversation gets.
fn read(path: &Path) -> Result<Vec<(String, Bytes)>, Failure> {
    let failed = |error| Failure::misuse(format_args!("cannot read {}: {error}", path.display()));
    let mut paths: Vec<PathBuf> = match fs::metadata(path).map_err(failed)?.is_dir() {
        false => vec![path.to_owned()],
        true => fs::read_dir(path)
            .map_err(failed)?
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<Result<_, _>>()
            .map_err(failed)?,
    };
    paths.retain(|path| path.is_file());
    paths.sort();
    let mut files: Vec<(String, Bytes)> = Vec::new();
    for path in paths {
        let bytes = fs::read(&path)
            .map_err(|error| Failure::misuse(format_args!("cannot read {}: {error}", path.display())))?;
        let part = |part: Option<&std::ffi::OsStr>| part.unwrap_or_default().to_string_lossy().into_owned();
        let stem = part(path.file_stem());
        // `a.txt` and `a.log` are two conversations.
        let taken = files.iter().any(|(name, _)| *name == stem);
        files.push((if taken { part(path.file_name()) } else { stem }, bytes.into()));
    }
    Ok(files)
}

/// Plays the plan on a running cluster and proves the result.
pub(crate) async fn run(cluster: &ClusterFile, plan: Plan, output: Output) -> Result<Report, Failure> {
    let began = Instant::now();
    let (files, users, devices, skipped) =
        (plan.conversations.len(), plan.users.len(), plan.devices.len(), plan.skipped);
    let mut played = play::play(cluster, plan, output).await?;
    let report = Report::new(files, users, devices, skipped, &mut played, began.elapsed());
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_gives_its_conversations_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        write("b.txt", "[12:00] <ann> hi\n");
        write("a.txt", "[12:00] <bob> ho\n[12:01] <ann> hi\n");
        write("a.log", "[12:00] <cat> miau\n");
        write("README.md", "# About\n=====\n");
        let plan = load(Some(dir.path())).unwrap();
        let ids: Vec<&str> = plan.conversations.iter().map(|c| c.id.as_str()).collect();
        assert_eq!(ids, ["a", "a.txt", "b"]);
        assert_eq!(plan.users.len(), 3);
    }

    #[test]
    fn a_path_without_conversations_is_misuse() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(load(Some(dir.path())), Err(Failure::Misuse(_))));
        assert!(matches!(load(Some(&dir.path().join("absent"))), Err(Failure::Misuse(_))));
    }

    #[test]
    fn the_bundled_sample_is_planned() {
        assert_eq!(load(None).unwrap().conversations.len(), 3);
    }
}
