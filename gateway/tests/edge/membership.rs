//! A connected device that follows all of its user's conversations: being added begins a stream by itself, being removed
//! ends it with the removal's event.

use stentor_proto::{
    frame::ServerFrame,
    record,
    v1::{self, EventKind, item},
};

use super::support::{Cluster, Device, until};

fn resume() -> v1::Resume {
    v1::Resume::default()
}

async fn up_to_date(device: &mut Device) {
    while !matches!(device.next().await, ServerFrame::UpToDate(_)) {}
}

async fn follows(cluster: &Cluster, user: &str) {
    let topic = format!("user:{user}");
    until("interest in the user", async || cluster.world.has_interest(&topic)).await;
}

/// Events of a conversation until its stream ends: the kinds, and why it ended.
async fn rest(device: &mut Device, conversation: &str) -> (Vec<(u64, EventKind)>, String) {
    let mut kinds = Vec::new();
    loop {
        match device.next().await {
            ServerFrame::Events(events) if events.conversation == conversation => {
                for item in events.items {
                    let Some(item::Item::Record(bytes)) = item.item else { continue };
                    let key_crc = stentor_proto::ids::key_crc(b"app", conversation.as_bytes());
                    let event = record::decode(&bytes, key_crc).unwrap();
                    kinds.push((event.header.seq, event.header.kind()));
                }
            }
            ServerFrame::ConversationState(v1::ConversationState { refusal: Some(refusal), .. }) => {
                return (kinds, refusal.reason);
            }
            _ => {}
        }
    }
}

#[tokio::test]
async fn being_added_begins_the_stream_by_itself() {
    let cluster = Cluster::start().await;
    cluster.world.create("old", &["ann"], 2);
    cluster.world.create("new", &["bob"], 3);
    let mut ann = cluster.device("ann", "phone").await;
    ann.send(resume()).await;
    up_to_date(&mut ann).await;
    follows(&cluster, "ann").await;
    cluster.world.add("new", "ann");
    let state = ann.state().await;
    assert_eq!((state.conversation.as_str(), state.head), ("new", 4));
    ann.events("new", 0, 4).await;
    cluster.world.append("new", b"five");
    assert_eq!(ann.events("new", 4, 5).await, ["five"]);
    // A device that wants only what it names is not bothered.
    let mut bob = cluster.device("bob", "phone").await;
    bob.send(v1::Resume { only_listed: true, ..resume() }).await;
    up_to_date(&mut bob).await;
    assert!(!cluster.world.has_interest("user:bob"));
    drop(ann);
    until("interest is dropped", async || !cluster.world.has_interest("user:ann")).await;
}

/// The head of the user's own stream is lost with the leader; the next registration tells it, and only what changed is
/// read. No later change follows.
#[tokio::test]
async fn being_added_at_a_change_of_leader_shows_without_any_later_change() {
    let cluster = Cluster::start().await;
    for n in 0..5 {
        cluster.world.create(&format!("c{n}"), &["ann"], 1);
    }
    cluster.world.create("new", &["bob"], 3);
    let mut ann = cluster.device("ann", "phone").await;
    ann.send(resume()).await;
    up_to_date(&mut ann).await;
    follows(&cluster, "ann").await;
    until("the list is read", async || cluster.world.lists().len() == 3).await;
    cluster.world.script(|script| script.lose_live = true);
    cluster.world.add("new", "ann");
    cluster.world.lead(2);
    cluster.world.cut(1);
    let state = ann.state().await;
    assert_eq!((state.conversation.as_str(), state.head), ("new", 4));
    ann.events("new", 0, 4).await;
    assert!(cluster.world.lists()[3..].iter().all(|&changed_after| changed_after == 5), "only what changed");
    // Another change of leader, with nothing new, reads nothing.
    let before = cluster.world.lists().len();
    cluster.world.lead(1);
    cluster.world.cut(2);
    follows(&cluster, "ann").await;
    cluster.world.script(|script| script.lose_live = false);
    cluster.world.append("new", b"x");
    ann.events("new", 4, 5).await;
    assert_eq!(cluster.world.lists().len(), before);
}

#[tokio::test]
async fn a_live_stream_ends_with_the_removal_and_begins_again_with_the_addition() {
    let cluster = Cluster::start().await;
    cluster.world.create("c", &["ann", "bob"], 2);
    let mut ann = cluster.device("ann", "phone").await;
    ann.send(resume()).await;
    up_to_date(&mut ann).await;
    follows(&cluster, "ann").await;
    until("interest is registered", async || cluster.world.has_interest("c")).await;
    for _ in 0..3 {
        cluster.world.remove("c", "ann");
        let removal = cluster.world.head("c");
        let (events, why) = rest(&mut ann, "c").await;
        assert_eq!(
            (events.last().unwrap(), why.as_str()),
            (&(removal, EventKind::ParticipantRemoved), "NOT_A_PARTICIPANT")
        );
        cluster.world.append("c", b"not hers");
        cluster.world.add("c", "ann");
        assert_eq!(ann.state().await.head, cluster.world.head("c"));
    }
}

/// He was catching up when he was removed: the page that was under way is answered after it.
#[tokio::test]
async fn a_stream_that_catches_up_still_ends_with_the_removal() {
    let cluster = Cluster::start().await;
    cluster.world.create("c", &["ann"], 500);
    let mut ann = cluster.device("ann", "phone").await;
    cluster.world.script(|script| script.hold_reads = true);
    assert_eq!(ann.subscribe("c", 100).await.head, 500);
    until("the page is asked for", async || cluster.world.held_reads() == 1).await;
    cluster.world.remove("c", "ann");
    cluster.world.append("c", b"not hers");
    cluster.world.script(|script| script.hold_reads = false);
    let (events, why) = rest(&mut ann, "c").await;
    assert!(events.iter().map(|(seq, _)| *seq).eq(101..=501));
    assert_eq!((events[400].1, why.as_str()), (EventKind::ParticipantRemoved, "NOT_A_PARTICIPANT"));
    // A stream that begins after it does not.
    assert_eq!(ann.subscribe("c", 100).await.refusal.unwrap().reason, "NOT_A_PARTICIPANT");
}

/// Added again before the stream has come to the removal: the addition's news came first, and no later one follows.
#[tokio::test]
async fn an_addition_that_is_heard_of_before_the_removal_is_not_forgotten() {
    let cluster = Cluster::start().await;
    cluster.world.create("c", &["ann"], 2);
    let mut ann = cluster.device("ann", "phone").await;
    ann.send(resume()).await;
    up_to_date(&mut ann).await;
    follows(&cluster, "ann").await;
    until("interest is registered", async || cluster.world.has_interest("c")).await;
    let lists = cluster.world.lists().len();
    // The conversation's own news are late: as one push, held back until the list was read.
    let records = cluster.world.hold_back(|| {
        cluster.world.remove("c", "ann");
        cluster.world.add("c", "ann");
    });
    until("the list is read", async || cluster.world.lists().len() > lists).await;
    ann.send(v1::Ping { token: 1 }).await;
    while !matches!(ann.next().await, ServerFrame::Pong(_)) {}
    cluster.world.push("c", records);
    let (events, _) = rest(&mut ann, "c").await;
    assert_eq!(events, [(3, EventKind::ParticipantRemoved)]);
    let state = ann.state().await;
    assert_eq!((state.conversation.as_str(), state.head, state.refusal), ("c", 4, None));
}
