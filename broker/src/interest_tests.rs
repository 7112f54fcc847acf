//! Interest under a full stream, at the end of a leadership and of a stream. Must show that nothing is lost silently:
//! each event comes as live or its head with a beat.

use futures_util::{FutureExt, StreamExt};
use hashbrown::HashSet;
use stentor_proto::ids::Seq;

use super::*;
use crate::queue::Batches;

fn event(conversation: &str, seq: u64, bytes: usize) -> Effect {
    Effect::FanOut {
        app: "app".into(),
        conversation: Bytes::copy_from_slice(conversation.as_bytes()),
        seq: Seq(seq),
        record: vec![7; bytes].into(),
    }
}

fn frames(batches: &mut Batches<BrokerFrame>) -> Vec<Frame> {
    let mut all = Vec::new();
    while let Some(Some(batch)) = batches.next().now_or_never() {
        all.extend(batch.into_iter().filter_map(|f| f.frame));
    }
    all
}

#[test]
fn only_the_interested_get_events_and_only_once() {
    let (interest, metrics) = (ShardInterest::new(ShardId(3), Watched::default()), Metrics::default());
    let (one, two) = (Attached::new("one".into()), Attached::new("two".into()));
    let (mut from_one, mut from_two) = (Batches::of(one.queue.clone()), Batches::of(two.queue.clone()));
    interest.add(&one, Topic::conversation("app", "a"));
    interest.add(&one, Topic::conversation("app", "a"));
    interest.add(&two, Topic::conversation("app", "b"));
    interest.fan_out(&[event("a", 1, 10), event("c", 1, 10), event("b", 4, 10)], &metrics);
    assert!(matches!(&frames(&mut from_one)[..], [Frame::Live(live)] if live.conversation == "a" && live.shard == 3));
    assert!(matches!(&frames(&mut from_two)[..], [Frame::Live(live)] if live.conversation == "b"));
    interest.remove(&one, Topic::conversation("app", "a"));
    interest.remove(&one, Topic::conversation("app", "a"));
    interest.fan_out(&[event("a", 2, 10)], &metrics);
    assert!(frames(&mut from_one).is_empty());
    assert_eq!(interest.streams(), HashSet::from_iter([two.id]));
}

#[test]
fn a_registration_that_fails_takes_no_newer_one_with_it() {
    let (interest, metrics) = (ShardInterest::new(ShardId(3), Watched::default()), Metrics::default());
    let stream = Attached::new("one".into());
    let mut out = Batches::of(stream.queue.clone());
    let older = interest.add(&stream, Topic::conversation("app", "a")).unwrap();
    interest.remove(&stream, Topic::conversation("app", "a"));
    let newer = interest.add(&stream, Topic::conversation("app", "a")).unwrap();
    interest.withdraw(&stream, Topic::conversation("app", "a"), older);
    interest.fan_out(&[event("a", 1, 10)], &metrics);
    assert_eq!(frames(&mut out).len(), 1, "the newer one stands");
    let newest = interest.add(&stream, Topic::conversation("app", "a")).unwrap();
    interest.withdraw(&stream, Topic::conversation("app", "a"), newer);
    interest.close(4);
    assert_eq!(frames(&mut out).len(), 1, "told that it is over, since it was still there");
    let after = interest.add(&stream, Topic::conversation("app", "a")).unwrap();
    interest.withdraw(&stream, Topic::conversation("app", "a"), newest);
    assert_eq!(interest.streams().len(), 1, "one of before the end does not end one of after it");
    interest.withdraw(&stream, Topic::conversation("app", "a"), after);
    assert!(interest.streams().is_empty());
}

#[test]
fn what_a_full_stream_drops_is_told_with_the_next_beat() {
    let (interest, metrics) = (ShardInterest::new(ShardId(3), Watched::default()), Metrics::default());
    let stream = Attached::new("one".into());
    let mut out = Batches::of(stream.queue.clone());
    interest.add(&stream, Topic::conversation("app", "a"));
    for seq in 1..=20 {
        interest.fan_out(&[event("a", seq, 1024 * 1024)], &metrics);
    }
    assert!(metrics.live_dropped.get() > 0);
    interest.beat(9, 700);
    let seen = frames(&mut out);
    let lives = seen.iter().filter(|f| matches!(f, Frame::Live(_))).count() as u64;
    assert_eq!(lives + metrics.live_dropped.get(), 20);
    let Some(Frame::Beat(beat)) = seen.last() else { panic!("{seen:?}") };
    assert_eq!((beat.term, beat.lease_ms, beat.heads.len(), beat.heads[0].head), (9, 700, 1, 20));
    interest.beat(9, 700);
    assert!(matches!(&frames(&mut out)[..], [Frame::Beat(beat)] if beat.heads.is_empty()));
}

#[test]
fn the_end_of_a_leadership_and_of_a_stream_leave_nothing_behind() {
    let interest = ShardInterest::new(ShardId(3), Watched::default());
    let (one, two) = (Attached::new("one".into()), Attached::new("two".into()));
    let mut out = Batches::of(one.queue.clone());
    interest.add(&one, Topic::conversation("app", "a"));
    interest.add(&two, Topic::conversation("app", "a"));
    interest.forget(&two);
    assert_eq!(interest.streams(), HashSet::from_iter([one.id]));
    interest.close(4);
    assert!(matches!(&frames(&mut out)[..], [Frame::Beat(beat)] if beat.closing && beat.term == 4));
    assert!(interest.streams().is_empty());
    assert_eq!(one.interests.load(Ordering::Relaxed), 0);
}

#[test]
fn a_users_head_goes_to_whoever_wants_it_and_is_not_lost_when_there_is_no_room() {
    let (interest, metrics) = (ShardInterest::new(ShardId(3), Watched::default()), Metrics::default());
    let stream = Attached::new("one".into());
    let mut out = Batches::of(stream.queue.clone());
    interest.add(&stream, Topic::user("app", "ann"));
    let changed = |head| [Effect::UserChanged { app: "app".into(), user: "ann".into(), head: Seq(head) }];
    interest.fan_out(&changed(4), &metrics);
    assert!(matches!(&frames(&mut out)[..], [Frame::Head(hint)] if (hint.user.as_str(), hint.head) == ("ann", 4)));
    interest.fan_out(&[event("ann", 1, 10)], &metrics);
    assert!(frames(&mut out).is_empty(), "a conversation of that name is something else");
    interest.add(&stream, Topic::conversation("app", "a"));
    // Not one byte of room is left.
    for bytes in [1 << 20, 1 << 16, 1 << 12, 1 << 8, 1] {
        (1..=40).for_each(|seq| interest.fan_out(&[event("a", seq, bytes)], &metrics));
    }
    interest.fan_out(&changed(5), &metrics);
    interest.beat(9, 700);
    let seen = frames(&mut out);
    let Some(Frame::Beat(beat)) = seen.last() else { panic!("{seen:?}") };
    assert!(beat.heads.iter().any(|hint| (hint.user.as_str(), hint.head) == ("ann", 5)), "{:?}", beat.heads);
}

#[test]
fn a_shard_is_watched_as_long_as_any_stream_is_interested() {
    let watched = Watched::default();
    let interest = ShardInterest::new(ShardId(3), watched.clone());
    let is_watched = || watched.lock().contains(&ShardId(3));
    let (one, two) = (Attached::new("one".into()), Attached::new("two".into()));
    assert!(!is_watched());
    interest.add(&one, Topic::conversation("app", "a"));
    interest.add(&one, Topic::conversation("app", "b"));
    interest.add(&two, Topic::user("app", "ann"));
    interest.remove(&one, Topic::conversation("app", "a"));
    interest.forget(&two);
    assert!(is_watched());
    interest.remove(&one, Topic::conversation("app", "b"));
    assert!(!is_watched());
    interest.add(&two, Topic::user("app", "ann"));
    interest.forget(&two);
    assert!(!is_watched());
    interest.add(&one, Topic::user("app", "ann"));
    assert!(is_watched());
    interest.close(4);
    assert!(!is_watched());
}

#[test]
fn a_stream_at_its_bound_keeps_what_it_has_and_gets_no_more() {
    let interest = ShardInterest::new(ShardId(3), Watched::default());
    let stream = Attached::new("one".into());
    let first = interest.add(&stream, Topic::conversation("app", "a")).unwrap();
    stream.interests.store(limits::GATEWAY_INTERESTS, Ordering::Relaxed);
    assert_eq!(interest.add(&stream, Topic::conversation("app", "b")), None);
    let again = interest.add(&stream, Topic::conversation("app", "a"));
    assert!(again > Some(first), "what is registered may be registered anew");
    assert_eq!(interest.state.lock().topics.len(), 1, "a refused one leaves nothing behind");
}
