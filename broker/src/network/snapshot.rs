//! Carries a shard's snapshot to a replica that needs one: chunks on a stream of their own, staged and checked by the
//! receiver's store. Must never install a snapshot that did not come whole.

use futures_util::stream;
use openraft::{
    Snapshot,
    errors::{NetworkError, StreamingError, Unreachable},
    raft::SnapshotResponse,
};
use stentor_engine::limits;
use stentor_proto::{
    ids::{ReplicaId, ShardId},
    internal::{PeerError, SnapshotAnswer, SnapshotChunk, SnapshotHead, peer_client::PeerClient},
};
use stentor_raft_store::{
    RowChunk, SnapshotRows, Store,
    types::{TypeConfig, Vote},
    wire,
};
use stentor_transport::grpc::Channel;
use tonic::{Status, Streaming};

use super::link::Route;
use crate::{
    raft::Raft,
    replaced::{REPLACED, Replaced},
};

type Error = StreamingError<TypeConfig>;

/// Sends one snapshot; returns when the peer has installed or refused it.
pub(crate) async fn send(
    (channel, replaced): (Channel, &Replaced),
    route: Route,
    vote: Vote,
    rows: SnapshotRows,
) -> Result<SnapshotResponse<TypeConfig>, Error> {
    let head = SnapshotHead {
        shard: route.shard.0,
        from: route.from.to_u64(),
        to: route.to.to_u64(),
        vote: Some(wire::vote_to_proto(&vote)),
        applied: Some(rows.applied().clone()),
    };
    let (failed, read_failure) = tokio::sync::oneshot::channel();
    let chunks = stream::unfold((Some(head), rows, Some(failed)), async |(head, mut rows, mut failed)| {
        if let Some(head) = head {
            let chunk = SnapshotChunk { head: Some(head), ..Default::default() };
            return Some((chunk, (None, rows, failed)));
        }
        match rows.next_chunk().await {
            Ok(Some(chunk)) => {
                let RowChunk { rows: bytes, crc, last, row_count } = chunk;
                let chunk = SnapshotChunk { head: None, rows: bytes, crc, last, row_count };
                Some((chunk, (None, rows, failed)))
            }
            Ok(None) => None,
            Err(error) => {
                // The stream just ends: the receiver misses the last chunk and installs nothing.
                failed.take().map(|failed| failed.send(error));
                None
            }
        }
    });
    let mut client = PeerClient::new(channel).max_encoding_message_size(limits::PEER_MESSAGE_BYTES);
    let sent = client.snapshot(Box::pin(chunks)).await;
    if let Ok(error) = {
        let mut failure = read_failure;
        failure.try_recv()
    } {
        return Err(StreamingError::Unreachable(Unreachable::new(&error)));
    }
    let answer = sent.map_err(|status| StreamingError::Network(NetworkError::new(&status)))?.into_inner();
    match (answer.vote, answer.error) {
        (Some(vote), None) => Ok(SnapshotResponse::new(wire::vote_from_proto(&vote))),
        (_, error) => {
            let error = error.unwrap_or_default();
            if error.reason == REPLACED {
                replaced.note(route.shard);
            }
            let text = format!("{}: {}", error.reason, error.message);
            Err(StreamingError::Unreachable(Unreachable::from_string(text)))
        }
    }
}

/// What the first chunk says.
pub(crate) struct Announced {
    pub(crate) shard: ShardId,
    pub(crate) from: ReplicaId,
    pub(crate) to: ReplicaId,
    vote: Vote,
    applied: stentor_proto::internal::AppliedRow,
}

/// Reads the first chunk of an incoming snapshot.
pub(crate) async fn announced(inbound: &mut Streaming<SnapshotChunk>) -> Result<Announced, Status> {
    let missing = || Status::invalid_argument("a snapshot without its head");
    let head = inbound.message().await?.and_then(|chunk| chunk.head).ok_or_else(missing)?;
    let vote = head.vote.as_ref().map(wire::vote_from_proto).ok_or_else(missing)?;
    let applied = head.applied.ok_or_else(missing)?;
    let (from, to) = (ReplicaId::from_u64(head.from), ReplicaId::from_u64(head.to));
    Ok(Announced { shard: ShardId(head.shard), from, to, vote, applied })
}

/// Stages the rest, then lets openraft install it.
pub(crate) async fn receive(
    store: &Store,
    raft: &Raft,
    announced: Announced,
    mut inbound: Streaming<SnapshotChunk>,
) -> Result<SnapshotAnswer, Status> {
    let mut receiver = match store.receive_snapshot(announced.shard, &announced.applied).await {
        Ok(receiver) => receiver,
        Err(error) => return Ok(refused("STORE", &error)),
    };
    let mut whole = false;
    while let Some(chunk) = inbound.message().await? {
        whole = chunk.last;
        let chunk = RowChunk { rows: chunk.rows, crc: chunk.crc, last: chunk.last, row_count: chunk.row_count };
        if let Err(error) = receiver.push(chunk).await {
            return Ok(refused("CHUNK", &error));
        }
    }
    if !whole {
        return Err(Status::aborted("the snapshot ended before its last chunk"));
    }
    let rows = match receiver.finish().await {
        Ok(rows) => rows,
        Err(error) => return Ok(refused("STORE", &error)),
    };
    let meta = match wire::snapshot_meta(&announced.applied) {
        Ok(meta) => meta,
        Err(error) => return Ok(refused("META", &error)),
    };
    match raft.install_full_snapshot(announced.vote, Snapshot { meta, snapshot: rows }).await {
        Ok(response) => Ok(SnapshotAnswer { vote: Some(wire::vote_to_proto(&response.vote)), error: None }),
        Err(error) => Ok(refused("RAFT", &error)),
    }
}

fn refused(reason: &str, error: &dyn std::error::Error) -> SnapshotAnswer {
    let error = PeerError { reason: reason.into(), message: error.to_string() };
    SnapshotAnswer { vote: None, error: Some(error) }
}
