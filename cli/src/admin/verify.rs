//! `stentor admin verify`: every broker reads every byte of its replicas and checks the checksums; here the replicas are
//! compared. A replica that cannot be asked is a problem, never a smaller comparison.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use futures_util::future::join_all;
use serde::Serialize;
use stentor_proto::v1::{
    self, ReplicaReport, ShardPosition, StatusResponse, VerifyLocalRequest, VerifyLocalResponse,
    admin_client::AdminClient,
};
use stentor_transport::grpc::Channel;
use tokio::time::Instant;

use crate::{
    api::{self, Api},
    args::ContextArgs,
    failure::Failure,
    output::Output,
};

/// How long replicas may take to reach the same position.
const EQUAL_WITHIN: Duration = Duration::from_secs(30);
/// Reading everything takes its time; a broker that is silent for so long is not reading.
const READ_WITHIN: Duration = Duration::from_secs(600);

/// The pause before everything is read again.
const AGAIN: Duration = Duration::from_millis(100);
/// The kind of problem that no waiting mends.
const DAMAGED: &str = "damaged";

/// The verdict, as it is printed.
#[derive(Debug, Serialize)]
struct Report {
    ok: bool,
    shards: usize,
    replicas: usize,
    events: u64,
    problems: Vec<Problem>,
}

/// Something that is not as it must be.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
struct Problem {
    kind: String,
    node: String,
    shard: u32,
    what: String,
}

/// What each broker reported: by shard, then by the broker's number. Names are for people: two may be alike.
type Reports = BTreeMap<u32, BTreeMap<u32, Reported>>;

/// One replica, and the name of its broker.
#[derive(Debug)]
struct Reported {
    node: String,
    replica: ReplicaReport,
}

/// Verifies and prints; fails unless everything is well.
pub(super) async fn run(args: &ContextArgs, output: Output) -> Result<(), Failure> {
    let bar = output.progress(0, "reading replicas");
    bar.enable_steady_tick(Duration::from_millis(200));
    let report = verify(args).await;
    bar.finish_and_clear();
    let report = report?;
    if output.json() {
        output.value(&report)?;
    } else {
        print(&report, output)?;
    }
    if report.ok { Ok(()) } else { Err(Failure::failed(format_args!("{} problems", report.problems.len()))) }
}

async fn verify(args: &ContextArgs) -> Result<Report, Failure> {
    let api = super::api(args)?;
    let deadline = Instant::now() + EQUAL_WITHIN;
    loop {
        let cluster = super::ask(&api).await?;
        let positions = positions(&cluster);
        let wait = deadline.saturating_duration_since(Instant::now());
        let asked = api.channels().iter().map(|channel| ask(&api, channel.clone(), positions.clone(), wait));
        let (mut reports, mut problems) = (Reports::new(), BTreeSet::new());
        for answer in join_all(asked).await.into_iter().flatten() {
            problems.extend(answer.problems.iter().map(own));
            for replica in answer.replicas {
                let reported = Reported { node: answer.node.clone(), replica };
                reports.entry(replica.shard).or_default().insert(answer.broker, reported);
            }
        }
        // While somebody writes, replicas are read at different positions, and only equal ones can be compared; lost
        // replicas may be about to be replaced. Damage is there to stay, and the broker that found it goes.
        let settles = !equal_positions(&reports) || cluster.shards.iter().any(|shard| !shard.settled);
        if settles && !problems.iter().any(|p| p.kind == DAMAGED) && Instant::now() < deadline {
            tokio::time::sleep(AGAIN).await;
            continue;
        }
        problems.extend(unsettled(&cluster));
        problems.extend(absent(&cluster, &reports));
        problems.extend(differences(&reports));
        return Ok(summary(&cluster, &reports, problems));
    }
}

fn positions(cluster: &StatusResponse) -> Vec<ShardPosition> {
    let position = |s: &v1::ShardStatus| ShardPosition { shard: s.shard, applied_index: s.applied_index };
    cluster.shards.iter().map(position).collect()
}

/// `None` for a broker that cannot be asked: its replicas will be missing from the reports.
async fn ask(api: &Api, channel: Channel, at: Vec<ShardPosition>, wait: Duration) -> Option<VerifyLocalResponse> {
    let request = api.request(VerifyLocalRequest { at, wait_ms: wait.as_millis() as u32 });
    match tokio::time::timeout(READ_WITHIN, AdminClient::new(channel).verify_local(request)).await {
        Ok(Ok(answer)) => Some(answer.into_inner()),
        Ok(Err(status)) => {
            tracing::warn!(reason = api::refusal(&status).reason, "a broker could not verify: {}", status.message());
            None
        }
        Err(_) => None,
    }
}

fn own(problem: &v1::Problem) -> Problem {
    Problem { kind: problem.kind.clone(), node: problem.node.clone(), shard: problem.shard, what: problem.what.clone() }
}

fn equal_positions(reports: &Reports) -> bool {
    reports.values().all(|replicas| {
        let mut positions = replicas.values().map(|r| r.replica.applied_index);
        let first = positions.next();
        positions.all(|p| Some(p) == first)
    })
}

/// Shards whose members are not those of the placement: a lost replica is not replaced yet.
fn unsettled(cluster: &StatusResponse) -> Vec<Problem> {
    let problem = |s: &v1::ShardStatus| Problem {
        kind: "members".into(),
        node: s.leader.clone(),
        shard: s.shard,
        what: "the members are not those of the placement".into(),
    };
    cluster.shards.iter().filter(|s| !s.settled).map(problem).collect()
}

/// Replicas that should be there and did not report.
fn absent(cluster: &StatusResponse, reports: &Reports) -> Vec<Problem> {
    let mut problems = Vec::new();
    for shard in cluster.shards.iter() {
        let reported = reports.get(&shard.shard);
        if (shard.voter_ids.len(), shard.learner_ids.len()) != (shard.voters.len(), shard.learners.len()) {
            let what =
                "its members' numbers are not told, by a broker of an older version: what is missing cannot be known";
            let (kind, node) = ("unreachable".into(), shard.leader.clone());
            problems.push(Problem { kind, node, shard: shard.shard, what: what.into() });
        }
        let members = shard.voter_ids.iter().zip(&shard.voters).chain(shard.learner_ids.iter().zip(&shard.learners));
        for (broker, node) in members {
            if !reported.is_some_and(|replicas| replicas.contains_key(broker)) {
                let what = "this replica could not be read".into();
                problems.push(Problem { kind: "unreachable".into(), node: node.clone(), shard: shard.shard, what });
            }
        }
    }
    problems
}

/// Where replicas disagree with the one that most agree with.
fn differences(reports: &Reports) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (&shard, replicas) in reports {
        let all = || replicas.values().map(|reported| &reported.replica);
        let agree = |r: &ReplicaReport| all().filter(|other| same(r, other)).count();
        let Some(reference) = all().max_by_key(|r| agree(r)) else { continue };
        for Reported { node, replica } in replicas.values().filter(|reported| !same(reference, &reported.replica)) {
            let (kind, what) = difference(reference, replica);
            problems.push(Problem { kind: kind.into(), node: node.clone(), shard, what });
        }
    }
    problems
}

fn same(a: &ReplicaReport, b: &ReplicaReport) -> bool {
    (a.applied_index, a.chain_hash, a.state_hash, a.events, a.rows)
        == (b.applied_index, b.chain_hash, b.state_hash, b.events, b.rows)
}

fn difference(reference: &ReplicaReport, replica: &ReplicaReport) -> (&'static str, String) {
    let (kind, theirs, ours) = if reference.applied_index != replica.applied_index {
        ("position", reference.applied_index.to_string(), replica.applied_index.to_string())
    } else if reference.events != replica.events {
        ("events", reference.events.to_string(), replica.events.to_string())
    } else if reference.rows != replica.rows {
        ("rows", reference.rows.to_string(), replica.rows.to_string())
    } else if reference.chain_hash != replica.chain_hash {
        ("commands", format!("{:016x}", reference.chain_hash), format!("{:016x}", replica.chain_hash))
    } else {
        ("state", format!("{:016x}", reference.state_hash), format!("{:016x}", replica.state_hash))
    };
    (kind, format!("{kind}: {ours} here, {theirs} elsewhere"))
}

fn summary(cluster: &StatusResponse, reports: &Reports, problems: BTreeSet<Problem>) -> Report {
    let events = |replicas: &BTreeMap<u32, Reported>| replicas.values().map(|r| r.replica.events).max().unwrap_or(0);
    Report {
        ok: problems.is_empty() && !reports.is_empty(),
        shards: cluster.shards.len(),
        replicas: reports.values().map(BTreeMap::len).sum(),
        events: reports.values().map(events).sum(),
        problems: problems.into_iter().collect(),
    }
}

fn print(report: &Report, output: Output) -> Result<(), Failure> {
    let line = format!("{} shards, {} replicas, {} events", report.shards, report.replicas, report.events);
    output.text(&line)?;
    if report.ok {
        return output.text(&output.verdict(true, "every byte was read; all replicas agree"));
    }
    let mut rows = vec![["problem", "node", "shard", "what"].map(str::to_owned).to_vec()];
    let row = |p: &Problem| vec![p.kind.clone(), p.node.clone(), p.shard.to_string(), p.what.clone()];
    rows.extend(report.problems.iter().map(row));
    output.table(&rows)
}

#[cfg(test)]
mod tests {
    use stentor_proto::v1::ShardStatus;

    use super::*;

    fn replica(applied_index: u64, state_hash: u64) -> ReplicaReport {
        ReplicaReport { shard: 1, applied_index, chain_hash: 5, events: 9, rows: 3, state_hash }
    }

    fn reports(replicas: &[(&str, ReplicaReport)]) -> Reports {
        let reported = |(name, r): &(&str, ReplicaReport)| {
            (u32::from(name.as_bytes()[0] - b'a'), Reported { node: (*name).to_owned(), replica: *r })
        };
        [(1, replicas.iter().map(reported).collect())].into()
    }

    fn cluster() -> StatusResponse {
        let voters = ["a", "b", "c"].map(str::to_owned).to_vec();
        let voter_ids = vec![0, 1, 2];
        let shards = vec![ShardStatus { shard: 1, voters, voter_ids, settled: true, ..Default::default() }];
        StatusResponse { shards, ..Default::default() }
    }

    #[test]
    fn equal_replicas_are_well() {
        let reports = reports(&[("a", replica(7, 1)), ("b", replica(7, 1)), ("c", replica(7, 1))]);
        let problems = absent(&cluster(), &reports).into_iter().chain(differences(&reports)).collect();
        let report = summary(&cluster(), &reports, problems);
        assert!(report.ok, "{report:?}");
        assert_eq!((report.shards, report.replicas, report.events), (1, 3, 9));
    }

    #[test]
    fn the_one_that_differs_is_the_problem() {
        let reports = reports(&[("a", replica(7, 2)), ("b", replica(7, 1)), ("c", replica(7, 1))]);
        let problems = differences(&reports);
        assert_eq!(problems.iter().map(|p| (p.kind.as_str(), p.node.as_str())).collect::<Vec<_>>(), [("state", "a")]);
    }

    #[test]
    fn a_replica_that_did_not_answer_is_a_problem() {
        let reports = reports(&[("a", replica(7, 1)), ("b", replica(7, 1))]);
        let problems = absent(&cluster(), &reports);
        assert_eq!(problems.iter().map(|p| p.node.as_str()).collect::<Vec<_>>(), ["c"]);
        // Also when the one that did has its name.
        let mut alike = cluster();
        alike.shards[0].voters[2] = "b".into();
        assert_eq!(absent(&alike, &reports).iter().map(|p| p.node.as_str()).collect::<Vec<_>>(), ["b"]);
        let nothing = summary(&cluster(), &Reports::new(), BTreeSet::new());
        assert!(!nothing.ok);
    }

    #[test]
    fn members_that_are_not_the_placed_ones_are_a_problem() {
        let mut cluster = cluster();
        assert_eq!(unsettled(&cluster), []);
        cluster.shards[0].settled = false;
        assert_eq!(unsettled(&cluster)[0].shard, 1);
    }

    #[test]
    fn unequal_positions_are_seen() {
        assert!(!equal_positions(&reports(&[("a", replica(7, 1)), ("b", replica(8, 1))])));
        assert!(equal_positions(&reports(&[("a", replica(7, 1)), ("b", replica(7, 2))])));
    }
}
