//! Cursor moves: coalesced, checked, fenced.

use stentor_proto::{internal::command::Op, v1};

use super::support::{Cluster, until};

fn moved(cursors: &[(&str, u64)]) -> v1::MoveCursors {
    let cursor = |&(conversation, seq): &(&str, u64)| v1::Cursor { conversation: conversation.into(), seq };
    v1::MoveCursors { delivered: cursors.iter().map(cursor).collect(), read: vec![] }
}

#[tokio::test]
async fn moves_of_a_while_become_one_command() {
    let cluster = Cluster::start().await;
    cluster.world.create("c", &["ann"], 100);
    cluster.world.create("d", &["ann"], 100);
    let mut ann = cluster.device("ann", "phone").await;
    ann.subscribe("c", 0).await;
    ann.events("c", 0, 100).await;
    for seq in 1..=100 {
        ann.send(moved(&[("c", seq)])).await;
    }
    let answer = ann.cursors_moved().await;
    assert_eq!((answer.delivered.len(), answer.refused.len()), (1, 0));
    until("the cursor", async || cluster.world.delivered("ann", "phone", "c") == Some(100)).await;
    let commands = cluster.world.commands(|op| matches!(op, Op::MoveCursors(_))).len();
    assert!(commands < 20, "{commands} commands for 100 moves");
    // A conversation without a stream here: its head is asked for.
    ann.send(moved(&[("d", 100)])).await;
    until("the other cursor", async || cluster.world.delivered("ann", "phone", "d") == Some(100)).await;
}

#[tokio::test]
async fn a_cursor_cannot_pass_the_head() {
    let cluster = Cluster::start().await;
    cluster.world.create("c", &["ann"], 5);
    cluster.world.create("d", &["ann"], 5);
    cluster.world.create("e", &["bob"], 5);
    let mut ann = cluster.device("ann", "phone").await;
    ann.subscribe("c", 5).await;
    for (conversation, reason) in [
        ("c", "CURSOR_BEYOND_HEAD"),
        ("d", "CURSOR_BEYOND_HEAD"),
        ("e", "NOT_A_PARTICIPANT"),
        ("nowhere", "UNKNOWN_CONVERSATION"),
        ("", "BAD_ID"),
    ] {
        ann.send(moved(&[(conversation, 6)])).await;
        let mut answer = ann.cursors_moved().await;
        let refused = answer.refused.pop().unwrap();
        assert_eq!((refused.conversation.as_str(), refused.refusal.unwrap().reason.as_str()), (conversation, reason));
    }
    assert!(cluster.world.commands(|op| matches!(op, Op::MoveCursors(_))).is_empty());
    ann.send(moved(&[("c", 5)])).await;
    assert_eq!(ann.cursors_moved().await.delivered.len(), 1, "nothing else is disturbed");
}

#[tokio::test]
async fn the_cursors_of_a_superseded_session_are_refused_and_end_it() {
    let cluster = Cluster::start().await;
    cluster.world.create("c", &["ann"], 5);
    let mut ann = cluster.device_with("ann", "phone", [1; 16]).await;
    ann.subscribe("c", 0).await;
    ann.events("c", 0, 5).await;
    // The device came back through another gateway: this one learns it from the user's shard.
    cluster.world.open_elsewhere("ann", "phone", [2; 16]);
    ann.send(moved(&[("c", 5)])).await;
    assert_eq!(ann.fatal().await, "SESSION_SUPERSEDED");
    assert_eq!(cluster.world.delivered("ann", "phone", "c"), None);
}

#[tokio::test]
async fn a_session_that_ends_takes_its_cursors_with_it() {
    let cluster = Cluster::start().await;
    cluster.world.create("c", &["ann"], 5);
    let mut ann = cluster.device("ann", "phone").await;
    ann.subscribe("c", 0).await;
    ann.events("c", 0, 5).await;
    ann.send(moved(&[("c", 4)])).await;
    ann.writer.finish().await;
    until("the cursor", async || cluster.world.delivered("ann", "phone", "c") == Some(4)).await;
    until("the session's end", async || cluster.metric("stentor_gateway_sessions").await < 0.5).await;
}
