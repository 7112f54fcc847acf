//! Three brokers, end to end over the public API: founding, sending, reading, losing and regaining a broker. Must prove
//! that nothing acknowledged is lost or doubled, and that readers see only what they may.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use futures_util::StreamExt;
use stentor_broker::status;
use stentor_engine::limits;
use stentor_proto::{
    Bytes,
    ids::ConversationId,
    v1::{
        HistoryRequest, ListRequest, ParticipantRequest, Role, Send, SendAnswer, VerifyLocalRequest,
        admin_client::AdminClient, conversations_client::ConversationsClient, item, messages_client::MessagesClient,
        send_answer::Answer,
    },
};
use support::{Cluster, bodies, eventually, with_token};
use tonic::{Code, Status};

fn reason(status: &Status) -> String {
    status::to_refusal(status).map(|r| r.reason).unwrap_or_else(|| panic!("no refusal: {status:?}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_broker_takes_calls_and_seqs_are_dense() {
    let cluster = Cluster::start(3, 4).await;
    let ann: Vec<_> = (0..3).map(|n| cluster.caller(n, "ann")).collect();
    ann[0].create("general", &["bob"]).await.unwrap();
    // Two events of the creation came before: `created` and bob's.
    for n in 0..30u64 {
        let sent = ann[n as usize % 3].send("general", &format!("key-{n}"), &format!("text {n}")).await.unwrap();
        assert_eq!((sent.seq, sent.repeat), (n + 3, false));
    }
    let again = ann[1].send("general", "key-7", "text 7").await.unwrap();
    assert_eq!((again.seq, again.repeat), (10, true));
    let reused = ann[1].send("general", "key-7", "another text").await.unwrap_err();
    assert_eq!(reason(&reused), "CLIENT_ID_REUSED");
    for n in 0..3 {
        for linearizable in [false, true] {
            let items = cluster.caller(n, "bob").all("general", linearizable).await.unwrap();
            let seen = bodies("general", &items);
            // Who joins sees from his own addition on.
            assert_eq!(seen.iter().map(|(seq, _)| *seq).collect::<Vec<_>>(), (2..=32).collect::<Vec<_>>());
            assert_eq!(seen[30].1, "text 29");
        }
    }
    cluster.stop().await;
}

/// What comes together is proposed together; the answers keep the order of the sends all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_send_stream_answers_in_order_whatever_its_sends_are() {
    let cluster = Cluster::start(3, 4).await;
    let ann = cluster.caller(0, "ann");
    for conversation in ["a", "b"] {
        ann.create(conversation, &[]).await.unwrap();
    }
    let phone = cluster.token("ann", Some("phone"), false);
    let mut sends = Vec::new();
    for n in 1..=400u64 {
        for conversation in ["a", "b"] {
            let body = if n == 100 { String::new() } else { format!("{conversation}-{n}") };
            let client_id = if n % 150 == 0 { format!("key-{n}") } else { String::new() };
            sends.push(Send {
                conversation: conversation.into(),
                send_no: n,
                body: body.into(),
                client_id,
                ..Send::default()
            });
        }
    }
    // A gap, a repeat of something in the middle, and a conversation that does not exist.
    sends.push(Send { conversation: "a".into(), send_no: 402, body: "gap".into(), ..Send::default() });
    sends.push(sends[20].clone());
    sends.push(Send { conversation: "nowhere".into(), send_no: 1, body: "x".into(), ..Send::default() });
    let asked: Vec<_> = sends.iter().map(|send| (send.conversation.clone(), send.send_no)).collect();
    let mut client = MessagesClient::new(cluster.api(1));
    let outgoing = with_token(futures_util::stream::iter(sends), &phone);
    let answers: Vec<SendAnswer> =
        client.send_stream(outgoing).await.unwrap().into_inner().map(Result::unwrap).collect().await;
    let answers: Vec<_> = answers.into_iter().map(|answer| answer.answer.unwrap()).collect();
    let whose = |answer: &Answer| match answer {
        Answer::Sent(sent) => (sent.conversation.clone(), sent.send_no),
        Answer::Refused(refused) => (refused.conversation.clone(), refused.send_no),
    };
    assert_eq!(answers.iter().map(whose).collect::<Vec<_>>(), asked);
    let told = |answer: &Answer| match answer {
        Answer::Sent(sent) => Ok((sent.seq, sent.repeat)),
        Answer::Refused(refused) => Err(refused.refusal.clone().unwrap().reason),
    };
    for (n, pair) in (1..=400u64).zip(answers.chunks(2)) {
        // Each conversation begins with the event of its creation; the empty body takes a number and no seq.
        let expected = if n == 100 { Err("EMPTY_BODY".into()) } else { Ok((n + 1 - u64::from(n > 100), false)) };
        assert_eq!(pair.iter().map(told).collect::<Vec<_>>(), [expected.clone(), expected], "{n}");
    }
    let rest: Vec<_> = answers[800..].iter().map(told).collect();
    assert_eq!(rest, [Err("OUT_OF_ORDER".into()), Ok((12, true)), Err("UNKNOWN_CONVERSATION".into())]);
    let items = ann.all("b", true).await.unwrap();
    let expected = (1..=400u64).filter(|n| *n != 100).map(|n| format!("b-{n}"));
    assert!(bodies("b", &items).into_iter().skip(1).map(|(_, body)| body).eq(expected));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_leader_is_replaced_and_catches_up_when_it_returns() {
    let mut cluster = Cluster::start(3, 2).await;
    cluster.caller(0, "ann").create("general", &[]).await.unwrap();
    let mut acknowledged = Vec::new();
    for n in 0..20 {
        acknowledged
            .push(cluster.caller(0, "ann").send("general", &format!("a-{n}"), &format!("a-{n}")).await.unwrap().seq);
    }
    let shard = shard_of(&cluster, "general").await;
    let leader = eventually("the shard has a leader", || cluster.leader_of(0, shard)).await;
    let other = (leader + 1) % 3;
    cluster.halt(leader).await;
    for n in 0..20 {
        let key = format!("b-{n}");
        let sent = eventually("writes resume", || async {
            cluster.caller(other, "ann").send("general", &key, &key).await.ok()
        });
        acknowledged.push(sent.await.seq);
    }
    assert_eq!(acknowledged, (2..=41).collect::<Vec<u64>>());
    // A retry of what the lost leader acknowledged gets its first answer from the new one.
    let again = cluster.caller(other, "ann").send("general", "a-3", "a-3").await.unwrap();
    assert_eq!((again.seq, again.repeat), (5, true));
    cluster.start_one(leader).await;
    cluster.ready().await;
    let items = cluster.caller(leader, "ann").all("general", true).await.unwrap();
    assert_eq!(bodies("general", &items).len(), 41);
    replicas_agree(&cluster, shard).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_brokers_restarted_at_once_lose_nothing() {
    let mut cluster = Cluster::start(3, 2).await;
    cluster.caller(0, "ann").create("general", &[]).await.unwrap();
    for n in 0..50 {
        cluster.caller(n % 3, "ann").send("general", &format!("k-{n}"), &format!("k-{n}")).await.unwrap();
    }
    for n in 0..3 {
        cluster.halt(n).await;
    }
    for n in 0..3 {
        cluster.start_one(n).await;
    }
    cluster.ready().await;
    let items = cluster.caller(1, "ann").all("general", true).await.unwrap();
    let seen = bodies("general", &items);
    assert_eq!(seen.len(), 51);
    assert!((0..50).all(|n| seen[n + 1] == (n as u64 + 2, format!("k-{n}"))));
    let shard = shard_of(&cluster, "general").await;
    replicas_agree(&cluster, shard).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_hide_what_they_should() {
    let cluster = Cluster::start(3, 2).await;
    let (ann, bob, eve) = (cluster.caller(0, "ann"), cluster.caller(1, "bob"), cluster.caller(2, "eve"));
    ann.create("general", &[]).await.unwrap();
    ann.send("general", "1", "before bob").await.unwrap();
    let change = |user: &str| ParticipantRequest {
        conversation: "general".into(),
        user: user.into(),
        role: Role::Writer as i32,
        expect_version: None,
    };
    let mut conversations = ConversationsClient::new(ann.channel.clone());
    assert_eq!(conversations.add_participant(ann.request(change("bob"))).await.unwrap().into_inner().seq, 3);
    ann.send("general", "2", "for both").await.unwrap();
    assert_eq!(conversations.remove_participant(ann.request(change("bob"))).await.unwrap().into_inner().seq, 5);
    ann.send("general", "3", "without bob").await.unwrap();
    assert_eq!(reason(&bob.all("general", false).await.unwrap_err()), "NOT_A_PARTICIPANT");
    assert_eq!(reason(&bob.send("general", "x", "x").await.unwrap_err()), "NOT_A_PARTICIPANT");
    conversations.add_participant(ann.request(change("bob"))).await.unwrap();
    let items = bob.all("general", false).await.unwrap();
    let steps: Vec<_> = items
        .iter()
        .map(|item| match item.item.as_ref().unwrap() {
            item::Item::Record(record) => (support::event("general", record).header.seq, 0),
            item::Item::Hidden(hidden) => (hidden.from, hidden.to),
        })
        .collect();
    assert_eq!(steps, [(1, 2), (3, 0), (4, 0), (5, 0), (6, 6), (7, 0)]);
    let last_two =
        HistoryRequest { conversation: "general".into(), before_seq: Some(u64::MAX), limit: 2, ..Default::default() };
    let page = bob.history(last_two).await.unwrap();
    assert_eq!((page.items.len(), page.more, page.head), (2, true, 7));
    assert_eq!(reason(&eve.all("general", false).await.unwrap_err()), "NOT_A_PARTICIPANT");
    assert_eq!(reason(&eve.all("nowhere", false).await.unwrap_err()), "UNKNOWN_CONVERSATION");
    // The outbox has told bob's shard.
    let listed = eventually("bob's list has the conversation", || async {
        let mut client = ConversationsClient::new(bob.channel.clone());
        let list = client.list(bob.request(ListRequest::default())).await.unwrap().into_inner();
        list.conversations.into_iter().next()
    });
    assert_eq!(listed.await.head, 7);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_input_gets_its_stable_reason() {
    let cluster = Cluster::start(3, 2).await;
    let ann = cluster.caller(0, "ann");
    ann.create("general", &[]).await.unwrap();
    let send = |body: Bytes, send_no| Send { conversation: "general".into(), body, send_no, ..Default::default() };
    for (message, expected, code) in [
        (send(Bytes::new(), 0), "EMPTY_BODY", Code::InvalidArgument),
        (send(vec![1; limits::MAX_BODY_BYTES + 1].into(), 0), "BODY_TOO_LARGE", Code::ResourceExhausted),
        (send("x".into(), 5), "OUT_OF_ORDER", Code::Aborted),
        (Send { conversation: "a\u{1}b".into(), ..send("x".into(), 0) }, "BAD_ID", Code::InvalidArgument),
    ] {
        let refused = ann.send_raw(message).await.unwrap_err();
        assert_eq!((reason(&refused).as_str(), refused.code()), (expected, code));
    }
    // A refused numbered send consumes its number, and the next one goes on.
    assert_eq!(reason(&ann.send_raw(send(Bytes::new(), 1)).await.unwrap_err()), "EMPTY_BODY");
    assert_eq!(ann.send_raw(send("x".into(), 2)).await.unwrap().seq, 2);
    let mut admin = AdminClient::new(ann.channel.clone());
    let refused = admin.status(ann.request(Default::default())).await.unwrap_err();
    assert_eq!((reason(&refused).as_str(), refused.code()), ("ADMIN_ONLY", Code::PermissionDenied));
    let refused = admin.status(with_token(Default::default(), "no token")).await.unwrap_err();
    assert_eq!(reason(&refused), "UNAUTHENTICATED");
    let conversation = ConversationId::new("general").unwrap();
    assert_eq!(conversation.as_str(), "general");
    cluster.stop().await;
}

async fn shard_of(cluster: &Cluster, conversation: &str) -> u32 {
    use stentor_proto::ids::{SLOTS, Slot};
    let shards = cluster.configs[0].bootstrap.as_ref().unwrap().shards;
    let slot = u32::from(Slot::of(support::APP, conversation).0);
    (0..shards).find(|n| slot < u32::from(SLOTS) * (n + 1) / shards).unwrap() + 1
}

/// Every broker reads every byte of its replica, and all come to the same.
async fn replicas_agree(cluster: &Cluster, shard: u32) {
    let token = cluster.token("operator", None, true);
    let reports = eventually("the replicas are at the same position", || async {
        let mut reports = Vec::new();
        for n in 0..cluster.configs.len() {
            let mut admin = AdminClient::new(cluster.api(n));
            let answer =
                admin.verify_local(with_token(VerifyLocalRequest::default(), &token)).await.unwrap().into_inner();
            assert_eq!(answer.problems, []);
            reports.push(answer.replicas.into_iter().find(|r| r.shard == shard).unwrap());
        }
        reports.windows(2).all(|w| w[0].applied_index == w[1].applied_index).then_some(reports)
    });
    let reports = reports.await;
    assert!(reports.windows(2).all(|w| w[0] == w[1]), "{reports:?}");
    assert!(reports[0].events > 0);
}
