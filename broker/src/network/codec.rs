//! Raft messages of openraft to and from their protobuf form. Must never trust a peer: whatever lacks a part or fails
//! its checksum is refused, not guessed.

use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, StreamAppendError, StreamAppendResult, TransferLeaderError,
    TransferLeaderRequest, TransferLeaderResponse, VoteRequest, VoteResponse,
};
use stentor_proto::{
    ids::{ReplicaId, ShardId},
    internal::{self, append_response},
};
use stentor_raft_store::{
    types::{RaftLogEntry, RaftLogId, TypeConfig, Vote},
    wire::{self, BadWire},
};
use thiserror::Error;

/// A message that cannot be used: the peer's fault (or a newer version of it); nothing changed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(crate) enum BadMessage {
    /// A field that must be there is not.
    #[error("a message without its {0}")]
    Missing(&'static str),
    /// An entry that is none.
    #[error(transparent)]
    Entry(#[from] BadWire),
    /// An answer of another kind than was asked for.
    #[error("an answer of an unexpected kind")]
    Unexpected,
}

type Request = AppendEntriesRequest<TypeConfig>;

/// Entry bytes of one append request; what does not fit goes with the next one.
const APPEND_BYTES: usize = 1024 * 1024;

/// An append request, and the last log id that it really carries: the request is cut where it grows too large.
pub(crate) struct EncodedAppend {
    /// The message.
    pub(crate) message: internal::AppendRequest,
    /// The position before its first entry.
    pub(crate) prev: Option<RaftLogId>,
    /// The last entry that went in.
    pub(crate) last: Option<RaftLogId>,
    /// Whether entries were left out.
    pub(crate) cut: bool,
    /// About how many bytes it has.
    pub(crate) bytes: usize,
}

pub(crate) fn encode_append(shard: ShardId, request: &Request) -> EncodedAppend {
    let (mut entries, mut bytes, mut last) = (Vec::with_capacity(request.entries.len()), 64, request.prev_log_id);
    let mut cut = false;
    for entry in &request.entries {
        let hint = wire::entry_bytes_hint(entry);
        if !entries.is_empty() && bytes + hint > APPEND_BYTES {
            cut = true;
            break;
        }
        let encoded = wire::entry_bytes(shard, entry);
        bytes += encoded.len();
        entries.push(encoded);
        last = Some(entry.log_id);
    }
    let message = internal::AppendRequest {
        vote: Some(wire::vote_to_proto(&request.vote)),
        prev: request.prev_log_id.as_ref().map(wire::log_id_to_proto),
        entries,
        commit: request.leader_commit.as_ref().map(wire::log_id_to_proto),
    };
    EncodedAppend { message, prev: request.prev_log_id, last, cut, bytes }
}

pub(crate) fn decode_append(shard: ShardId, message: internal::AppendRequest) -> Result<Request, BadMessage> {
    let vote = message.vote.as_ref().map(wire::vote_from_proto).ok_or(BadMessage::Missing("vote"))?;
    let prev_log_id = message.prev.as_ref().map(wire::log_id_from_proto);
    let first = prev_log_id.map_or(Some(0), |prev| prev.index.checked_add(1));
    // A peer's number: counting on from it must not overflow.
    let counted = message.entries.len() as u64 + 1;
    let first = first.filter(|first| first.checked_add(counted).is_some()).ok_or(BadMessage::Missing("prev"))?;
    let entries: Result<Vec<RaftLogEntry>, BadWire> =
        (first..).zip(&message.entries).map(|(index, bytes)| wire::decode_entry(shard, index, bytes)).collect();
    let leader_commit = message.commit.as_ref().map(wire::log_id_from_proto);
    Ok(Request { vote, prev_log_id, entries: entries?, leader_commit })
}

pub(crate) fn encode_append_response(response: &AppendEntriesResponse<TypeConfig>) -> internal::AppendResponse {
    use append_response::Result as R;
    let (result, partial_none) = match response {
        AppendEntriesResponse::Success => (Some(R::Success(true)), false),
        AppendEntriesResponse::PartialSuccess(Some(id)) => (Some(R::Partial(wire::log_id_to_proto(id))), false),
        AppendEntriesResponse::PartialSuccess(None) => (None, true),
        AppendEntriesResponse::Conflict => (Some(R::Conflict(true)), false),
        AppendEntriesResponse::HigherVote(vote) => (Some(R::HigherVote(wire::vote_to_proto(vote))), false),
    };
    internal::AppendResponse { result, partial_none }
}

/// What an answer means for the request that carried (`prev`, `last`].
pub(crate) fn decode_append_response(
    message: &internal::AppendResponse,
    prev: Option<RaftLogId>,
    last: Option<RaftLogId>,
) -> Result<StreamAppendResult<TypeConfig>, BadMessage> {
    use append_response::Result as R;
    match &message.result {
        Some(R::Success(_)) => Ok(Ok(last)),
        Some(R::Partial(id)) => Ok(Ok(Some(wire::log_id_from_proto(id)))),
        Some(R::Conflict(_)) => {
            prev.map(|prev| Err(StreamAppendError::Conflict(prev))).ok_or(BadMessage::Missing("place of the conflict"))
        }
        Some(R::HigherVote(vote)) => Ok(Err(StreamAppendError::HigherVote(wire::vote_from_proto(vote)))),
        None if message.partial_none => Ok(Ok(None)),
        None => Err(BadMessage::Missing("result")),
    }
}

pub(crate) fn encode_vote(request: &VoteRequest<TypeConfig>) -> internal::VoteRequest {
    internal::VoteRequest {
        vote: Some(wire::vote_to_proto(&request.vote)),
        last: request.last_log_id.as_ref().map(wire::log_id_to_proto),
        leadership_transfer: request.leadership_transfer,
    }
}

pub(crate) fn decode_vote(message: &internal::VoteRequest) -> Result<VoteRequest<TypeConfig>, BadMessage> {
    let vote = message.vote.as_ref().map(wire::vote_from_proto).ok_or(BadMessage::Missing("vote"))?;
    let mut request = VoteRequest::new(vote, message.last.as_ref().map(wire::log_id_from_proto));
    request.leadership_transfer = message.leadership_transfer;
    Ok(request)
}

pub(crate) fn encode_vote_response(response: &VoteResponse<TypeConfig>) -> internal::VoteResponse {
    internal::VoteResponse {
        vote: Some(wire::vote_to_proto(&response.vote)),
        granted: response.vote_granted,
        last: response.last_log_id.as_ref().map(wire::log_id_to_proto),
    }
}

pub(crate) fn decode_vote_response(message: &internal::VoteResponse) -> Result<VoteResponse<TypeConfig>, BadMessage> {
    let vote: Vote = message.vote.as_ref().map(wire::vote_from_proto).ok_or(BadMessage::Missing("vote"))?;
    Ok(VoteResponse::new(vote, message.last.as_ref().map(wire::log_id_from_proto), message.granted))
}

pub(crate) fn encode_transfer(request: &TransferLeaderRequest<TypeConfig>) -> internal::TransferRequest {
    internal::TransferRequest {
        from_leader: Some(wire::vote_to_proto(request.from_leader())),
        to: request.to_node_id().to_u64(),
        last: request.last_log_id().map(wire::log_id_to_proto),
    }
}

pub(crate) fn decode_transfer(
    message: &internal::TransferRequest,
) -> Result<TransferLeaderRequest<TypeConfig>, BadMessage> {
    let from = message.from_leader.as_ref().map(wire::vote_from_proto).ok_or(BadMessage::Missing("vote"))?;
    let last = message.last.as_ref().map(wire::log_id_from_proto);
    Ok(TransferLeaderRequest::new(from, ReplicaId::from_u64(message.to), last))
}

pub(crate) fn encode_transfer_response(response: &TransferLeaderResponse<TypeConfig>) -> internal::TransferResponse {
    match response {
        Ok(()) => internal::TransferResponse { accepted: true, ..Default::default() },
        Err(TransferLeaderError::VoteChanged { expected, actual }) => internal::TransferResponse {
            expected_vote: Some(wire::vote_to_proto(expected)),
            actual_vote: Some(wire::vote_to_proto(actual)),
            ..Default::default()
        },
        Err(TransferLeaderError::LogNotFlushed { expected, actual }) => internal::TransferResponse {
            not_flushed: true,
            expected_last: expected.as_ref().map(wire::log_id_to_proto),
            actual_last: actual.as_ref().map(wire::log_id_to_proto),
            ..Default::default()
        },
    }
}

pub(crate) fn decode_transfer_response(
    message: &internal::TransferResponse,
) -> Result<TransferLeaderResponse<TypeConfig>, BadMessage> {
    if message.accepted {
        return Ok(Ok(()));
    }
    if message.not_flushed {
        return Ok(Err(TransferLeaderError::LogNotFlushed {
            expected: message.expected_last.as_ref().map(wire::log_id_from_proto),
            actual: message.actual_last.as_ref().map(wire::log_id_from_proto),
        }));
    }
    let expected = message.expected_vote.as_ref().map(wire::vote_from_proto);
    let actual = message.actual_vote.as_ref().map(wire::vote_from_proto);
    match (expected, actual) {
        (Some(expected), Some(actual)) => Ok(Err(TransferLeaderError::VoteChanged { expected, actual })),
        _ => Err(BadMessage::Missing("vote")),
    }
}

#[cfg(test)]
#[path = "codec_tests.rs"]
mod tests;
