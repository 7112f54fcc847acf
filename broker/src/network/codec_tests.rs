//! Every Raft message survives its way, and damaged ones are refused. Must cover each field that decides safety.

use openraft::EntryPayload;
use proptest::prelude::*;
use stentor_proto::ids::{BrokerId, Incarnation};
use stentor_raft_store::types::BundleBytes;

use super::*;

const SHARD: ShardId = ShardId(4);

fn replica(broker: u32) -> ReplicaId {
    ReplicaId { broker: BrokerId(broker), incarnation: Incarnation(1) }
}

fn request(prev: Option<u64>, payloads: Vec<Vec<u8>>) -> Request {
    let prev_log_id = prev.map(|index| wire::log_id(2, index));
    let first = prev.map_or(0, |index| index + 1);
    let entries = (first..)
        .zip(payloads)
        .map(|(index, payload)| RaftLogEntry {
            log_id: wire::log_id(3, index),
            payload: EntryPayload::Normal(BundleBytes::new(payload.into())),
        })
        .collect();
    Request { vote: Vote::new_committed(3, replica(1)), prev_log_id, entries, leader_commit: Some(wire::log_id(1, 1)) }
}

proptest! {
    #[test]
    fn appends_round_trip(prev in proptest::option::of(0u64..1 << 40), payloads: Vec<Vec<u8>>) {
        let request = request(prev, payloads);
        let encoded = encode_append(SHARD, &request);
        prop_assert!(!encoded.cut);
        let decoded = decode_append(SHARD, encoded.message).unwrap();
        prop_assert_eq!(decoded.vote, request.vote);
        prop_assert_eq!(decoded.prev_log_id, request.prev_log_id);
        prop_assert_eq!(decoded.leader_commit, request.leader_commit);
        prop_assert_eq!(format!("{:?}", decoded.entries), format!("{:?}", request.entries));
    }

    #[test]
    fn votes_round_trip(term: u64, broker: u32, committed: bool, granted: bool, transfer: bool, last: Option<u64>) {
        let vote = Vote { committed, ..Vote::new(term, replica(broker)) };
        let mut request = VoteRequest::new(vote, last.map(|index| wire::log_id(1, index)));
        request.leadership_transfer = transfer;
        prop_assert_eq!(decode_vote(&encode_vote(&request)).unwrap(), request);
        let response = VoteResponse::new(vote, last.map(|index| wire::log_id(1, index)), granted);
        prop_assert_eq!(decode_vote_response(&encode_vote_response(&response)).unwrap(), response);
    }
}

#[test]
fn a_large_append_is_cut_and_says_so() {
    let encoded = encode_append(SHARD, &request(Some(7), vec![vec![1; 600 * 1024]; 3]));
    assert!(encoded.cut);
    assert_eq!(encoded.message.entries.len(), 1);
    assert_eq!(encoded.last, Some(wire::log_id(3, 8)));
    let encoded = encode_append(SHARD, &request(Some(7), vec![vec![1; 3 * 1024 * 1024]]));
    assert!(!encoded.cut, "one entry always travels, whatever its size");
}

#[test]
fn a_damaged_entry_and_an_entry_of_another_shard_are_refused() {
    let good = encode_append(SHARD, &request(None, vec![b"bundle".to_vec()])).message;
    assert!(decode_append(ShardId(5), good.clone()).is_err());
    let mut bad = good.clone();
    let mut entry = bad.entries[0].to_vec();
    *entry.last_mut().unwrap() ^= 1;
    bad.entries[0] = entry.into();
    assert!(matches!(decode_append(SHARD, bad), Err(BadMessage::Entry(_))));
    let bad = internal::AppendRequest { vote: None, ..good };
    assert_eq!(decode_append(SHARD, bad).unwrap_err(), BadMessage::Missing("vote"));
}

#[test]
fn answers_round_trip() {
    let (prev, last) = (Some(wire::log_id(1, 1)), Some(wire::log_id(1, 3)));
    let vote = Vote::new(9, replica(2));
    for (response, expected) in [
        (AppendEntriesResponse::Success, Ok(last)),
        (AppendEntriesResponse::PartialSuccess(prev), Ok(prev)),
        (AppendEntriesResponse::PartialSuccess(None), Ok(None)),
        (AppendEntriesResponse::Conflict, Err(StreamAppendError::Conflict(wire::log_id(1, 1)))),
        (AppendEntriesResponse::HigherVote(vote), Err(StreamAppendError::HigherVote(vote))),
    ] {
        let message = encode_append_response(&response);
        assert_eq!(decode_append_response(&message, prev, last), Ok(expected));
    }
    let conflict = encode_append_response(&AppendEntriesResponse::Conflict);
    assert!(decode_append_response(&conflict, None, last).is_err(), "a conflict before the first entry is a lie");
    assert!(decode_append_response(&internal::AppendResponse::default(), prev, last).is_err());
}

#[test]
fn transfers_round_trip() {
    let vote = Vote::new_committed(9, replica(2));
    let request = TransferLeaderRequest::new(vote, replica(3), Some(wire::log_id(9, 4)));
    assert_eq!(decode_transfer(&encode_transfer(&request)).unwrap(), request);
    for response in [
        Ok(()),
        Err(TransferLeaderError::VoteChanged { expected: vote, actual: Vote::new(10, replica(1)) }),
        Err(TransferLeaderError::LogNotFlushed { expected: Some(wire::log_id(9, 4)), actual: None }),
    ] {
        assert_eq!(decode_transfer_response(&encode_transfer_response(&response)).unwrap(), response);
    }
}

#[test]
fn an_index_at_the_end_of_all_numbers_is_refused() {
    for index in [u64::MAX, u64::MAX - 1] {
        let prev = Some(internal::RaftLogId { term: 1, index });
        let vote = Some(wire::vote_to_proto(&Vote::new(1, replica(1))));
        let message = internal::AppendRequest { vote, prev, entries: vec![Default::default()], commit: None };
        assert!(decode_append(SHARD, message).is_err());
    }
}
