//! `stentor admin`: what a cluster is doing, and whether its replicas agree. Must never leave out what could not be
//! reached.

mod verify;

use serde_json::{Value, json};
use stentor_proto::v1::{
    NodeStatus, ShardStatus, StatusRequest, StatusResponse, TransferLeaderRequest, TransferLeaderResponse,
    admin_client::AdminClient,
};
use stentor_transport::grpc::Channel;
use tonic::{Response, Status};

use crate::{
    api::Api,
    args::{AdminVerb, ContextArgs},
    context,
    failure::Failure,
    output::Output,
};

/// Calls the verb. Those that are not built never get here.
pub(crate) async fn run(verb: AdminVerb, output: Output) -> Result<(), Failure> {
    match verb {
        AdminVerb::Status(args) => status(&ask(&api(&args)?).await?, output),
        AdminVerb::Shards(args) => shards(&ask(&api(&args)?).await?, output),
        AdminVerb::Placement(args) => placement(&ask(&api(&args)?).await?, output),
        AdminVerb::TransferLeader { context, shard, broker } => transfer(&context, shard, broker, output).await,
        AdminVerb::Verify(args) => verify::run(&args, output).await,
        AdminVerb::Move(_)
        | AdminVerb::AddBroker(_)
        | AdminVerb::RemoveBroker(_)
        | AdminVerb::Drain(_)
        | AdminVerb::Backup(_)
        | AdminVerb::Restore(_) => Err(Failure::NotBuilt("this".into())),
    }
}

/// What the cluster says of itself: whichever broker answers has asked all the others.
async fn ask(api: &Api) -> Result<StatusResponse, Failure> {
    api.call(|channel| status_of(api.clone(), channel)).await
}

async fn status_of(api: Api, channel: Channel) -> Result<Response<StatusResponse>, Status> {
    AdminClient::new(channel).status(api.request(StatusRequest {})).await
}

fn status(cluster: &StatusResponse, output: Output) -> Result<(), Failure> {
    if output.json() {
        let node = |n: &NodeStatus| json!({ "name": n.name, "role": n.role, "state": n.state, "leaders": n.leaders, "lag": n.lag, "api": n.api });
        let shard = |s: &ShardStatus| json!({ "shard": s.shard, "leader": s.leader, "quorum": s.quorum });
        return output.value(&json!({
            "cluster_id": cluster.cluster_id,
            "placement_version": cluster.placement_version,
            "nodes": cluster.nodes.iter().map(node).collect::<Vec<_>>(),
            "shards": cluster.shards.iter().map(shard).collect::<Vec<_>>(),
        }));
    }
    let mut rows = vec![["node", "role", "state", "leaders", "lag", "api"].map(str::to_owned).to_vec()];
    rows.extend(cluster.nodes.iter().map(|n| {
        vec![n.name.clone(), n.role.clone(), n.state.clone(), n.leaders.to_string(), n.lag.to_string(), n.api.clone()]
    }));
    output.table(&rows)?;
    let without: Vec<u32> = cluster.shards.iter().filter(|s| !s.quorum).map(|s| s.shard).collect();
    let verdict = match without[..] {
        [] => output.verdict(true, &format!("all {} shards have a quorum", cluster.shards.len())),
        _ => output.verdict(false, &format!("without a quorum: {without:?}")),
    };
    output.text(&verdict)
}

fn shard_value(s: &ShardStatus) -> Value {
    json!({
        "shard": s.shard, "leader": s.leader, "term": s.term, "last_log_index": s.last_log_index,
        "applied_index": s.applied_index, "durable_checkpoint": s.durable_checkpoint, "quorum": s.quorum,
        "voters": s.voters, "learners": s.learners, "initialized": s.initialized,
    })
}

fn shards(cluster: &StatusResponse, output: Output) -> Result<(), Failure> {
    if output.json() {
        return cluster.shards.iter().try_for_each(|s| output.value(&shard_value(s)));
    }
    let names = ["shard", "leader", "term", "log", "applied", "checkpoint", "quorum"];
    let mut rows = vec![names.map(str::to_owned).to_vec()];
    rows.extend(cluster.shards.iter().map(|s| {
        let numbers = [s.term, s.last_log_index, s.applied_index, s.durable_checkpoint].map(|n| n.to_string());
        let mut row = vec![s.shard.to_string(), s.leader.clone()];
        row.extend(numbers);
        row.push(if s.quorum { "yes" } else { "no" }.into());
        row
    }));
    output.table(&rows)
}

fn placement(cluster: &StatusResponse, output: Output) -> Result<(), Failure> {
    if output.json() {
        let shard = |s: &ShardStatus| json!({ "shard": s.shard, "voters": s.voters, "learners": s.learners });
        return output.value(&json!({
            "placement_version": cluster.placement_version,
            "shards": cluster.shards.iter().map(shard).collect::<Vec<_>>(),
        }));
    }
    let mut rows = vec![["shard", "voters", "learners"].map(str::to_owned).to_vec()];
    rows.extend(cluster.shards.iter().map(|s| vec![s.shard.to_string(), s.voters.join(" "), s.learners.join(" ")]));
    output.table(&rows)
}

fn api(args: &ContextArgs) -> Result<Api, Failure> {
    Api::new(&context::admin(args)?)
}

async fn transfer(args: &ContextArgs, shard: u32, broker: String, output: Output) -> Result<(), Failure> {
    let api = api(args)?;
    let request = TransferLeaderRequest { shard, broker };
    let answer = api.change(|channel| transfer_leader(api.clone(), channel, request.clone())).await?;
    if output.json() {
        return output.value(&json!({ "shard": shard, "leader": answer.leader }));
    }
    output.text(&format!("shard {shard} is led by {}", answer.leader))
}

async fn transfer_leader(
    api: Api,
    channel: Channel,
    request: TransferLeaderRequest,
) -> Result<Response<TransferLeaderResponse>, Status> {
    AdminClient::new(channel).transfer_leader(api.request(request)).await
}
