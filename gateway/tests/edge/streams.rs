//! Streams of conversations: live, pulled, resumed; slow devices; removals; lost events that need no later one.

use stentor_proto::{frame::ServerFrame, v1};

use super::support::{Cluster, until};

fn resume(cursors: &[(&str, u64)], only_listed: bool) -> v1::Resume {
    let cursor = |&(conversation, seq): &(&str, u64)| v1::Cursor { conversation: conversation.into(), seq };
    v1::Resume { delivered: cursors.iter().map(cursor).collect(), only_listed, ..Default::default() }
}

async fn live(cluster: &Cluster, conversation: &str) {
    until("interest is registered", async || cluster.world.has_interest(conversation)).await;
}

#[tokio::test]
async fn a_stream_catches_up_and_goes_on_live() {
    let cluster = Cluster::start().await;
    cluster.world.create("c", &["ann", "bob"], 10);
    let mut ann = cluster.device("ann", "phone").await;
    let state = ann.subscribe("c", 4).await;
    assert_eq!((state.head, state.refusal), (10, None));
    ann.events("c", 4, 10).await;
    let mut bob = cluster.device("bob", "laptop").await;
    bob.send(v1::Subscribe { conversation: "c".into(), after_seq: 0, from_head: true }).await;
    assert_eq!(bob.state().await.head, 10);
    cluster.world.append("c", b"eleven");
    cluster.world.append("c", b"twelve");
    assert_eq!(ann.events("c", 10, 12).await, ["eleven", "twelve"]);
    assert_eq!(bob.events("c", 10, 12).await, ["eleven", "twelve"]);
    assert_eq!(cluster.world.registrations(), 1, "interest is counted per gateway, not per session");
    // One leaves, the other stays.
    bob.send(v1::Unsubscribe { conversation: "c".into() }).await;
    until("bob left", async || cluster.metric("stentor_gateway_subscriptions").await < 1.5).await;
    cluster.world.append("c", b"thirteen");
    assert_eq!(ann.events("c", 12, 13).await, ["thirteen"]);
    drop(ann);
    until("interest is dropped", async || !cluster.world.has_interest("c")).await;
}

#[tokio::test]
async fn streams_that_cannot_be_are_refused_with_their_reason() {
    let cluster = Cluster::start().await;
    cluster.world.create("c", &["bob"], 3);
    cluster.world.create("mine", &["ann"], 3);
    let mut ann = cluster.device("ann", "phone").await;
    for (conversation, after, reason) in [
        ("nowhere", 0, "UNKNOWN_CONVERSATION"),
        ("c", 0, "NOT_A_PARTICIPANT"),
        ("mine", 4, "CURSOR_BEYOND_HEAD"),
        ("", 0, "BAD_ID"),
    ] {
        let state = ann.subscribe(conversation, after).await;
        assert_eq!(state.refusal.unwrap().reason, reason, "{conversation}");
    }
    assert_eq!(ann.subscribe("mine", 3).await.refusal, None, "nothing else is disturbed");
}

#[tokio::test]
async fn an_interest_that_is_refused_for_now_is_asked_for_again_alone() {
    let cluster = Cluster::start().await;
    let in_one_shard = ["c0", "c1", "c2", "c3", "c4", "c5", "c6", "c7"];
    in_one_shard.iter().for_each(|name| cluster.world.create(name, &["ann"], 1));
    let mut ann = cluster.device("ann", "phone").await;
    for name in &in_one_shard[1..] {
        ann.subscribe(name, 1).await;
        live(&cluster, name).await;
    }
    cluster.world.script(|script| script.refuse_interest_in = Some("c0".into()));
    ann.send(v1::Subscribe { conversation: "c0".into(), after_seq: 0, from_head: false }).await;
    until("it is asked for again", async || cluster.world.registrations_of("c0") >= 3).await;
    cluster.world.script(|script| script.refuse_interest_in = None);
    assert_eq!(ann.state().await.conversation, "c0");
    ann.events("c0", 0, 1).await;
    for name in &in_one_shard[1..] {
        assert_eq!(cluster.world.registrations_of(name), 1, "{name} was registered all the time");
    }
}

/// A device that begins and ends a stream again and again makes the gateway hold one question, not one for each time.
#[tokio::test]
async fn streams_that_come_and_go_leave_no_questions_behind() {
    let cluster = Cluster::start().await;
    cluster.world.create("c", &["ann", "bob"], 3);
    let (mut ann, mut bob) = (cluster.device("ann", "phone").await, cluster.device("bob", "laptop").await);
    bob.subscribe("c", 0).await;
    cluster.world.script(|script| script.hold_heads = true);
    let begin = || v1::Subscribe { conversation: "c".into(), after_seq: 0, from_head: false };
    for token in 0..50 {
        ann.send(begin()).await;
        // Answered after the interest, which is there for bob, was heard of and heads were asked for.
        ann.send(v1::Ping { token }).await;
        assert_eq!(ann.next().await, ServerFrame::Pong(v1::Pong { token }));
        ann.send(v1::Unsubscribe { conversation: "c".into() }).await;
    }
    ann.send(begin()).await;
    let show = v1::ShowRequest { conversation: "c".into(), linearizable: false };
    ann.send(v1::Request { id: 1, call: Some(v1::request::Call::Show(show)) }).await;
    ann.response().await;
    assert_eq!(cluster.world.held_heads(), 1, "what was asked before the call has come before it");
    cluster.world.script(|script| script.hold_heads = false);
    assert_eq!(ann.state().await.head, 3);
    ann.events("c", 0, 3).await;
}

#[tokio::test]
async fn a_resume_brings_every_conversation_up_to_date() {
    let cluster = Cluster::start().await;
    for n in 0..7 {
        cluster.world.create(&format!("c{n}"), &["ann"], 20 + n);
    }
    let mut ann = cluster.device("ann", "phone").await;
    ann.send(resume(&[("c0", 20), ("c1", 5), ("gone", 3)], false)).await;
    let mut next = [20, 5, 0, 0, 0, 0, 0].map(|cursor: u64| cursor + 1);
    let (mut states, mut refused) = (0, 0);
    let conversations = loop {
        match ann.next().await {
            ServerFrame::ConversationState(state) if state.refusal.is_some() => refused += 1,
            ServerFrame::ConversationState(_) => states += 1,
            ServerFrame::Events(events) => {
                let n: usize = events.conversation[1..].parse().unwrap();
                next[n] += events.items.len() as u64;
            }
            ServerFrame::UpToDate(done) => break done.conversations,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!((states, refused, conversations), (7, 1, 8));
    assert_eq!(next.to_vec(), (0..7).map(|n| 20 + n + 1).collect::<Vec<u64>>(), "all were there before it was said");
    // The device's only frames were the resume and credit; live events follow.
    cluster.world.append("c3", b"live");
    assert_eq!(ann.events("c3", 23, 24).await, ["live"]);
}

#[tokio::test]
async fn a_resume_of_what_is_listed_needs_no_list() {
    let cluster = Cluster::start().await;
    cluster.world.create("c", &["ann"], 2);
    cluster.world.create("d", &["ann"], 2);
    let mut ann = cluster.device("ann", "phone").await;
    ann.send(resume(&[("c", 2)], true)).await;
    assert_eq!(ann.state().await.conversation, "c");
    assert_eq!(ann.next().await, ServerFrame::UpToDate(v1::UpToDate { conversations: 1 }));
    let mut bob = cluster.device("bob", "phone").await;
    bob.send(resume(&[], true)).await;
    assert_eq!(bob.next().await, ServerFrame::UpToDate(v1::UpToDate { conversations: 0 }));
}

/// Must show 7: the event is applied after the catch-up was read and before the new leader knows of the interest, its
/// live copy is lost with the old leader, and no later event follows.
#[tokio::test]
async fn an_event_between_catch_up_and_registration_at_a_change_of_leader_comes_by_itself() {
    let cluster = Cluster::start().await;
    cluster.world.create("c", &["ann"], 5);
    let mut ann = cluster.device("ann", "phone").await;
    cluster.world.script(|script| script.hold_reads = true);
    ann.subscribe("c", 0).await;
    until("the page is asked for", async || cluster.world.held_reads() == 1).await;
    cluster.world.script(|script| script.hold_reads = false);
    ann.events("c", 0, 5).await;
    cluster.world.script(|script| script.lose_live = true);
    cluster.world.append("c", b"lost with the old leader");
    cluster.world.lead(2);
    cluster.world.cut(1);
    assert_eq!(ann.events("c", 5, 6).await, ["lost with the old leader"]);
}

#[tokio::test]
async fn an_event_applied_while_a_page_is_read_needs_no_later_event() {
    let cluster = Cluster::start().await;
    cluster.world.create("c", &["ann"], 5);
    let mut ann = cluster.device("ann", "phone").await;
    cluster.world.script(|script| script.hold_reads = true);
    ann.subscribe("c", 0).await;
    until("the page is asked for", async || cluster.world.held_reads() == 1).await;
    // The page is read now, with 6 in it or not: either way it comes once.
    cluster.world.append("c", b"six");
    cluster.world.script(|script| script.hold_reads = false);
    ann.events("c", 0, 6).await;
    cluster.world.append("c", b"seven");
    assert_eq!(ann.events("c", 6, 7).await, ["seven"]);
}

#[tokio::test]
async fn a_leader_without_beats_is_left_and_nothing_is_missed() {
    let cluster = Cluster::start().await;
    cluster.world.create("c", &["ann"], 1);
    let mut ann = cluster.device("ann", "phone").await;
    ann.subscribe("c", 1).await;
    live(&cluster, "c").await;
    // The old leader is cut off without knowing; the new one applies an event.
    cluster.world.script(|script| script.mute = true);
    cluster.world.lead(2);
    cluster.world.script(|script| script.mute = false);
    cluster.world.append("c", b"by the new leader");
    assert_eq!(ann.events("c", 1, 2).await, ["by the new leader"]);
}

#[tokio::test]
async fn a_slow_device_is_bounded_catches_up_and_holds_nobody_up() {
    const EVENTS: u64 = 1_500;
    let cluster = Cluster::start().await;
    cluster.world.create("c", &["ann", "bob"], 0);
    let mut slow = cluster.device("ann", "phone").await;
    let mut fast = cluster.device("bob", "laptop").await;
    slow.gives_credit = false;
    slow.subscribe("c", 0).await;
    fast.subscribe("c", 0).await;
    let body = vec![b'x'; 4_096];
    for n in 0..EVENTS {
        cluster.world.append("c", &body);
        // Few at a time: it is the slow one's own queue that must stop it, not a burst.
        if n % 5 == 4 {
            // The fast one gets everything while the slow one reads nothing.
            fast.events("c", n - 4, n + 1).await;
        }
    }
    assert!(cluster.metric("stentor_gateway_dropped_pushes_total").await > 0.0);
    // 6 MiB were sent, at most the credit of 256 KiB and some pages of it lie in the gateway.
    let delivered = cluster.metric("stentor_gateway_delivered_events_total").await as u64;
    let pulled = cluster.metric("stentor_gateway_pulled_events_total").await as u64;
    assert!(delivered + pulled < EVENTS + 200, "{delivered} {pulled}");
    slow.gives_credit = true;
    slow.send(v1::Credit { bytes: 256 * 1024 }).await;
    slow.events("c", 0, EVENTS).await;
    cluster.world.append("c", b"live again");
    assert_eq!(slow.events("c", EVENTS, EVENTS + 1).await, ["live again"]);
}

#[tokio::test]
async fn the_own_removal_is_the_last_event_and_ends_the_stream() {
    let cluster = Cluster::start().await;
    cluster.world.create("c", &["ann", "bob"], 2);
    let mut ann = cluster.device("ann", "phone").await;
    let mut bob = cluster.device("bob", "phone").await;
    ann.subscribe("c", 2).await;
    bob.subscribe("c", 2).await;
    live(&cluster, "c").await;
    cluster.world.remove("c", "ann");
    cluster.world.append("c", b"not for ann");
    ann.events("c", 2, 3).await;
    let state = ann.state().await;
    assert_eq!((state.conversation.as_str(), state.refusal.unwrap().reason.as_str()), ("c", "NOT_A_PARTICIPANT"));
    bob.events("c", 2, 4).await;
    ann.send(v1::Ping { token: 1 }).await;
    assert_eq!(ann.next().await, ServerFrame::Pong(v1::Pong { token: 1 }), "and nothing after it");
}

#[tokio::test]
async fn many_devices_in_many_conversations_each_get_everything_once() {
    let cluster = Cluster::start().await;
    let users: Vec<String> = (0..8).map(|n| format!("u{n}")).collect();
    let names: Vec<&str> = users.iter().map(String::as_str).collect();
    for n in 0..5 {
        cluster.world.create(&format!("c{n}"), &names, 3);
    }
    let mut devices = Vec::new();
    for user in &users {
        let mut device = cluster.device(user, "phone").await;
        device.send(resume(&[], false)).await;
        devices.push(device);
    }
    for n in 0..40 {
        cluster.world.append(&format!("c{}", n % 5), format!("{n}").as_bytes());
        if n == 20 {
            cluster.world.cut(1);
        }
    }
    for device in &mut devices {
        let mut next = [1u64; 5];
        while next != [12; 5] {
            if let ServerFrame::Events(events) = device.next().await {
                let n: usize = events.conversation[1..].parse().unwrap();
                for item in events.items {
                    let Some(v1::item::Item::Record(record)) = item.item else { panic!("hidden") };
                    assert_eq!(stentor_proto::record::header(&record).unwrap().seq, next[n]);
                    next[n] += 1;
                }
            }
        }
    }
}

/// A stream that waits is forgotten but for its place. What comes then, in whatever way, goes on where it stood.
#[tokio::test]
async fn streams_that_wait_rest_and_go_on_where_they_stood() {
    let cluster = Cluster::start().await;
    cluster.world.create("c", &["ann", "bob"], 5);
    cluster.world.create("d", &["ann"], 5);
    let (mut ann, mut bob) = (cluster.device("ann", "phone").await, cluster.device("bob", "laptop").await);
    ann.send(resume(&[("c", 3), ("d", 5)], true)).await;
    ann.events("c", 3, 5).await;
    bob.subscribe("c", 5).await;
    let all_rest = async || {
        let resting = async || cluster.metric("stentor_gateway_resting_subscriptions").await > 2.5;
        until("all rest", resting).await;
    };
    all_rest().await;
    cluster.world.append("c", b"live");
    assert_eq!(ann.events("c", 5, 6).await, ["live"]);
    assert_eq!(bob.events("c", 5, 6).await, ["live"]);
    // Lost on the way: the next leader's registration tells the head.
    all_rest().await;
    cluster.world.script(|script| script.lose_live = true);
    cluster.world.append("c", b"lost");
    cluster.world.script(|script| script.lose_live = false);
    cluster.world.lead(2);
    assert_eq!(ann.events("c", 6, 7).await, ["lost"]);
    assert_eq!(bob.events("c", 6, 7).await, ["lost"]);
    // A gap: what came before it is pulled.
    all_rest().await;
    let held = cluster.world.hold_back(|| cluster.world.append("c", b"held back"));
    drop(held);
    cluster.world.append("c", b"behind the gap");
    assert_eq!(ann.events("c", 7, 9).await, ["held back", "behind the gap"]);
    assert_eq!(bob.events("c", 7, 9).await, ["held back", "behind the gap"]);
    // Cursors are held against where it stands, and no further.
    all_rest().await;
    let cursor = |seq| v1::Cursor { conversation: "c".into(), seq };
    ann.send(v1::MoveCursors { delivered: vec![cursor(10)], read: vec![] }).await;
    assert_eq!(ann.cursors_moved().await.refused[0].conversation, "c");
    ann.send(v1::MoveCursors { delivered: vec![cursor(9)], read: vec![] }).await;
    assert_eq!(ann.cursors_moved().await.delivered, [cursor(9)]);
    // The own removal ends it.
    cluster.world.remove("c", "bob");
    assert_eq!(bob.state().await.refusal.unwrap().reason, "NOT_A_PARTICIPANT");
    ann.send(v1::Unsubscribe { conversation: "d".into() }).await;
    let one = async || (0.5..1.5).contains(&cluster.metric("stentor_gateway_resting_subscriptions").await);
    until("one is left", one).await;
}
