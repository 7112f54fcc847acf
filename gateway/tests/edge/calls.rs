//! Calls on a connection: each answered with its id, by the shard that knows.

use stentor_proto::{
    internal::command::Op,
    v1::{self, ConversationKind, request::Call, response::Result as Answer},
};

use super::support::{Cluster, Device, until};

async fn call(device: &mut Device, id: u64, call: Call) -> Answer {
    device.send(v1::Request { id, call: Some(call) }).await;
    let response = device.response().await;
    assert_eq!(response.id, id);
    response.result.unwrap()
}

fn reason(answer: Answer) -> String {
    let Answer::Refusal(refusal) = answer else { panic!("{answer:?}") };
    refusal.reason
}

#[tokio::test]
async fn a_conversation_is_created_shown_read_and_listed() {
    let cluster = Cluster::start().await;
    for n in 0..5 {
        cluster.world.create(&format!("c{n}"), &["ann"], n + 1);
    }
    let mut ann = cluster.device("ann", "phone").await;
    let create = v1::CreateRequest {
        kind: ConversationKind::Group.into(),
        participants: vec!["bob".into()],
        ..Default::default()
    };
    let Answer::Create(created) = call(&mut ann, 1, Call::Create(create)).await else { panic!() };
    assert_eq!((created.seq, created.conversation.len()), (1, 32));
    let direct = v1::CreateRequest {
        kind: ConversationKind::Direct.into(),
        participants: vec!["bob".into()],
        ..Default::default()
    };
    let Answer::Create(direct) = call(&mut ann, 2, Call::Create(direct)).await else { panic!() };
    assert_eq!(direct.conversation, "direct/ann/bob");
    let keyed = |op: &Op| matches!(op, Op::Create(create) if create.client_key.is_some());
    assert_eq!(cluster.world.commands(keyed).len(), 2, "an attempt whose answer is lost is no second call");

    let show = v1::ShowRequest { conversation: "c3".into(), linearizable: false };
    let Answer::Show(shown) = call(&mut ann, 3, Call::Show(show)).await else { panic!() };
    assert_eq!(shown.head, 4);
    let history = v1::HistoryRequest { conversation: "c3".into(), after_seq: Some(1), ..Default::default() };
    let Answer::History(page) = call(&mut ann, 4, Call::History(history)).await else { panic!() };
    assert_eq!((page.items.len(), page.head, page.more), (3, 4, false));

    let mut names = Vec::new();
    let mut after = String::new();
    for id in 5.. {
        let list = v1::ListRequest { after, limit: 0 };
        let Answer::List(page) = call(&mut ann, id, Call::List(list)).await else { panic!() };
        names.extend(page.conversations.into_iter().map(|c| c.conversation));
        after = page.next;
        if after.is_empty() {
            break;
        }
    }
    assert_eq!(names, ["c0", "c1", "c2", "c3", "c4"]);
}

#[tokio::test]
async fn participants_come_and_go_and_the_send_state_is_told() {
    let cluster = Cluster::start().await;
    cluster.world.create("c", &["ann"], 0);
    let mut ann = cluster.device("ann", "phone").await;
    let bob = v1::ParticipantRequest { conversation: "c".into(), user: "bob".into(), ..Default::default() };
    let Answer::Participant(added) = call(&mut ann, 1, Call::Add(bob.clone())).await else { panic!() };
    let Answer::Participant(removed) = call(&mut ann, 2, Call::Remove(bob)).await else { panic!() };
    assert_eq!((added.seq, removed.seq), (1, 2));
    ann.send(v1::Send { conversation: "c".into(), send_no: 1, body: "x".into(), ..Default::default() }).await;
    assert_eq!(ann.sent().await, (1, Ok(3)));
    let state = v1::SendStateRequest { conversation: "c".into() };
    let Answer::SendState(state) = call(&mut ann, 3, Call::SendState(state)).await else { panic!() };
    assert_eq!((state.last, state.done_no), (1, 0));
}

#[tokio::test]
async fn calls_that_cannot_be_are_refused_with_their_reason() {
    let cluster = Cluster::start().await;
    cluster.world.create("c", &["bob"], 1);
    let mut ann = cluster.device("ann", "phone").await;
    let history = |conversation: &str| v1::HistoryRequest { conversation: conversation.into(), ..Default::default() };
    let both = v1::HistoryRequest { after_seq: Some(1), before_seq: Some(2), ..history("c") };
    let create = |kind: ConversationKind, participants: &[&str], conversation: &str| {
        Call::Create(v1::CreateRequest {
            kind: kind.into(),
            conversation: conversation.into(),
            participants: participants.iter().map(|&user| user.into()).collect(),
            ..Default::default()
        })
    };
    let cases = [
        (Call::History(history("nowhere")), "UNKNOWN_CONVERSATION"),
        (Call::History(history("c")), "NOT_A_PARTICIPANT"),
        (Call::History(history("")), "BAD_ID"),
        (Call::History(both), "MALFORMED"),
        (create(ConversationKind::Unspecified, &[], ""), "BAD_KIND"),
        (create(ConversationKind::Group, &["a/b"], ""), "BAD_ID"),
        (create(ConversationKind::Group, &[], "direct/x/y"), "BAD_ID"),
        (create(ConversationKind::Direct, &["bob", "eve"], ""), "DIRECT_IS_FIXED"),
        (create(ConversationKind::Group, &[], "c"), "ALREADY_EXISTS"),
        (Call::Show(v1::ShowRequest { conversation: "c".into(), linearizable: false }), "NOT_A_PARTICIPANT"),
        (Call::SendState(v1::SendStateRequest { conversation: "c".into() }), "NOT_A_PARTICIPANT"),
        (Call::Add(v1::ParticipantRequest { conversation: "c".into(), ..Default::default() }), "BAD_ID"),
    ];
    for (n, (asked, expected)) in cases.into_iter().enumerate() {
        assert_eq!(reason(call(&mut ann, n as u64, asked.clone()).await), expected, "{asked:?}");
    }
    ann.send(v1::Request { id: 77, call: None }).await;
    assert_eq!(reason(ann.response().await.result.unwrap()), "MALFORMED");
}

#[tokio::test]
async fn a_call_outlives_its_leader() {
    let cluster = Cluster::start().await;
    cluster.world.create("c", &["ann"], 3);
    let mut ann = cluster.device("ann", "phone").await;
    cluster.world.script(|script| script.hold_reads = true);
    let history = v1::HistoryRequest { conversation: "c".into(), ..Default::default() };
    ann.send(v1::Request { id: 1, call: Some(Call::History(history)) }).await;
    until("the read is held", async || cluster.world.held_reads() == 1).await;
    cluster.world.lead(2);
    cluster.world.cut(1);
    cluster.world.script(|script| script.hold_reads = false);
    let Some(Answer::History(page)) = ann.response().await.result else { panic!() };
    assert_eq!(page.items.len(), 3);
}

#[tokio::test]
async fn calls_of_one_id_are_each_answered_and_none_is_leaked() {
    let cluster = Cluster::start().await;
    for n in 0..3 {
        cluster.world.create(&format!("c{n}"), &["ann"], 1);
    }
    let mut ann = cluster.device("ann", "phone").await;
    // More pairs than calls may be open: a leaked one each would stop the connection from being read.
    for _ in 0..10 {
        for _ in 0..2 {
            ann.send(v1::Request { id: 7, call: Some(Call::List(v1::ListRequest::default())) }).await;
        }
        for _ in 0..2 {
            let response = ann.response().await;
            let Some(Answer::List(page)) = response.result else { panic!("{response:?}") };
            assert_eq!((response.id, page.conversations.len()), (7, 2));
        }
    }
}

#[tokio::test]
async fn a_call_that_may_have_been_applied_is_said_to_be_unknown() {
    let cluster = Cluster::start().await;
    let mut ann = cluster.device("ann", "phone").await;
    cluster.world.script(|script| script.swallow_answers = true);
    let create =
        v1::CreateRequest { conversation: "c".into(), kind: ConversationKind::Group.into(), ..Default::default() };
    let Answer::Refusal(refusal) = call(&mut ann, 1, Call::Create(create)).await else { panic!() };
    assert_eq!((refusal.reason.as_str(), refusal.retryable), ("OUTCOME_UNKNOWN", true));
    assert_eq!(cluster.world.head("c"), 1, "it was applied");
}
