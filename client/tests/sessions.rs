//! The SDK against a scripted gateway: what it does when connections, gateways and servers misbehave.

#![allow(clippy::unwrap_used, clippy::panic, unreachable_pub, missing_docs)]

mod gateway;

use std::{sync::Arc, time::Duration};

use futures_util::FutureExt;
use stentor_client::{
    ClientError, ClientId, ConversationId, Create, CursorStore, FileCursors, From, History, Incoming, Item,
    MemoryCursors, Message, Reason, Role, SendNo, Seq, UserId,
};
use stentor_proto::{
    frame::ClientFrame,
    v1::{self, request::Call, response},
};
use stentor_transport::quic::QuicError;

use self::gateway::{Gateway, event, events, next, seqs, soon, welcome};

fn id(text: &str) -> ConversationId {
    ConversationId::new(text).unwrap()
}

fn fatal(reason: Reason) -> v1::Fatal {
    v1::Fatal { refusal: Some(reason.refusal()) }
}

#[tokio::test]
async fn a_reconnect_resumes_from_the_cursor_and_nothing_comes_twice() {
    let gateway = Gateway::new();
    let (client, mut peer) = gateway.connected(gateway.client()).await;
    let c = id("c");
    client.subscribe(&c, From::Seq(Seq(0))).await.unwrap();
    let ClientFrame::Subscribe(subscribe) = peer.speech().await else { panic!() };
    assert_eq!((subscribe.after_seq, subscribe.from_head), (0, false));
    peer.events(&c, 1..=3).await;
    assert_eq!(seqs(&client, 3).await, [1, 2, 3]);
    peer.cut();
    let (mut peer, resume) = gateway.welcome().await;
    assert_eq!(resume.delivered, [v1::Cursor { conversation: "c".into(), seq: 3 }]);
    // A lost cursor move: the gateway begins too early.
    peer.events(&c, 2..=5).await;
    let hidden = v1::Hidden { from: 6, to: 8, reason: 3 };
    let hidden = v1::Item { item: Some(v1::item::Item::Hidden(hidden)) };
    peer.give(v1::Events { conversation: "c".into(), items: vec![hidden, event(&c, 9, b"body 9")] }).await;
    assert_eq!(seqs(&client, 6).await, [4, 5, 6, 7, 8, 9]);
}

#[tokio::test]
async fn the_same_session_goes_on_over_connections() {
    let gateway = Gateway::new();
    let (client, mut peer) = tokio::join!(soon("connect", gateway.client().agent("test").connect()), async {
        let mut peer = gateway.accept().await;
        let ClientFrame::Hello(hello) = peer.frame().await else { panic!() };
        assert_eq!((hello.token.as_str(), hello.agent.as_str(), hello.session_nonce.len()), ("token", "test", 16));
        peer.give(welcome()).await;
        (peer, hello)
    });
    let client = client.unwrap();
    assert_eq!(client.identity().unwrap().user.as_str(), "ann");
    peer.0.cut();
    let mut again = gateway.accept().await;
    let ClientFrame::Hello(hello) = again.frame().await else { panic!() };
    assert_eq!(hello.session_nonce, peer.1.session_nonce);
    let _ = peer.0.try_frame().await;
}

#[tokio::test]
async fn sends_go_back_to_the_first_that_was_refused_for_now() {
    let gateway = Gateway::new();
    let (client, mut peer) = gateway.connected(gateway.client()).await;
    let c = id("c");
    let mut answers = Vec::new();
    for n in 1..=6 {
        answers.push(client.send_pipelined(&c, Message::text(format!("m{n}"))).await.unwrap());
    }
    peer.tell_count(10).await;
    let first = peer.send().await;
    assert_eq!((first.send_no, first.done_no, &first.body[..]), (11, 10, &b"m1"[..]));
    assert!(first.sent_at_ms > 0);
    peer.accept(&first, 100).await;
    let mut flying = Vec::new();
    for n in 2..=6 {
        let send = peer.send().await;
        assert_eq!((send.send_no, send.body.clone()), (10 + n, format!("m{n}").into()));
        flying.push(send);
    }
    peer.refuse(&flying[0], Reason::Overloaded, 11).await;
    for send in &flying[1..] {
        peer.refuse(send, Reason::OutOfOrder, 11).await;
    }
    for (index, expected) in flying.iter().enumerate() {
        let send = peer.send().await;
        assert_eq!((send.send_no, &send.body), (expected.send_no, &expected.body));
        assert_eq!(send.sent_at_ms, expected.sent_at_ms, "a retry is the same send");
        peer.accept(&send, 101 + index as u64).await;
    }
    let mut got = Vec::new();
    for answer in answers {
        got.push(soon("an answer", answer).await.unwrap());
    }
    assert_eq!(got.iter().map(|s| s.seq.0).collect::<Vec<_>>(), (100..106).collect::<Vec<_>>());
    assert_eq!(got.iter().map(|s| s.send_no.0).collect::<Vec<_>>(), (11..17).collect::<Vec<_>>());
}

#[tokio::test]
async fn an_unanswered_send_goes_again_under_its_number_on_the_next_connection() {
    let gateway = Gateway::new();
    let (client, mut peer) = gateway.connected(gateway.client()).await;
    let key = ClientId::new("key").unwrap();
    let answer = client.send_pipelined(&id("c"), Message::text("x").client_id(key)).await.unwrap();
    peer.tell_count(0).await;
    let send = peer.send().await;
    peer.cut();
    let (mut peer, _) = gateway.welcome().await;
    let again = peer.send().await;
    assert_eq!(again, send);
    peer.give(v1::Sent { conversation: "c".into(), send_no: 1, seq: 5, stamp_ms: 7, repeat: true, more: 0 }).await;
    let sent = soon("the answer", answer).await.unwrap();
    assert_eq!((sent.seq, sent.send_no, sent.repeat), (Seq(5), SendNo(1), true));
}

#[tokio::test]
async fn refusals_are_typed_and_hold_up_nothing() {
    let gateway = Gateway::new();
    let (client, mut peer) = gateway.connected(gateway.client()).await;
    let c = id("c");
    let refused = client.send_pipelined(&c, Message::text("")).await.unwrap();
    let large = client.send_pipelined(&c, Message::bytes("x/y", vec![0; 60_001])).await.unwrap();
    let good = client.send_pipelined(&c, Message::text("good")).await.unwrap();
    peer.tell_count(0).await;
    let send = peer.send().await;
    peer.refuse(&send, Reason::EmptyBody, 1).await;
    let send = peer.send().await;
    assert_eq!((send.send_no, &send.body[..]), (2, &b"good"[..]));
    peer.accept(&send, 1).await;
    let reason = |error: ClientError| error.refusal().unwrap().reason.clone();
    assert_eq!(reason(soon("a refusal", refused).await.unwrap_err()), "EMPTY_BODY");
    assert_eq!(reason(soon("a refusal", large).await.unwrap_err()), "BODY_TOO_LARGE");
    assert_eq!(soon("an answer", good).await.unwrap().seq, Seq(1));
}

#[tokio::test]
async fn a_gap_drops_the_connection_and_the_next_one_fills_it() {
    let gateway = Gateway::new();
    let (client, mut peer) = gateway.connected(gateway.client()).await;
    let c = id("c");
    client.subscribe(&c, From::Seq(Seq(0))).await.unwrap();
    peer.speech().await;
    peer.events(&c, [1, 3]).await;
    assert_eq!(seqs(&client, 1).await, [1]);
    let (mut peer, resume) = gateway.welcome().await;
    assert_eq!(resume.delivered[0].seq, 1);
    peer.events(&c, 2..=3).await;
    assert_eq!(seqs(&client, 2).await, [2, 3]);
}

#[tokio::test]
async fn changed_bytes_drop_the_connection_and_never_reach_the_application() {
    let gateway = Gateway::new();
    let (client, mut peer) = gateway.connected(gateway.client()).await;
    let c = id("c");
    client.subscribe(&c, From::Seq(Seq(0))).await.unwrap();
    peer.speech().await;
    let mut damaged = events(&c, [1]);
    if let Some(v1::item::Item::Record(record)) = &mut damaged.items[0].item {
        let mut bytes = record.to_vec();
        *bytes.last_mut().unwrap() ^= 1;
        *record = bytes.into();
    }
    peer.give(damaged).await;
    let (mut peer, resume) = gateway.welcome().await;
    assert_eq!(resume.delivered[0].seq, 0);
    peer.events(&c, [1]).await;
    assert_eq!(seqs(&client, 1).await, [1]);
}

#[tokio::test]
async fn going_away_moves_the_session_to_another_gateway() {
    let (first, second) = Gateway::pair();
    let builder = first.client().gateway(second.address());
    let (client, (mut peer, other)) = tokio::join!(soon("connect", builder.connect()), async {
        tokio::select! {
            (peer, _) = first.welcome() => (peer, &second),
            (peer, _) = second.welcome() => (peer, &first),
        }
    });
    let client = client.unwrap();
    let answer = client.send_pipelined(&id("c"), Message::text("x")).await.unwrap();
    peer.tell_count(0).await;
    let send = peer.send().await;
    peer.give(v1::GoAway { reason: "drain".into(), within_ms: 20 }).await;
    let (mut elsewhere, _) = other.welcome().await;
    let left = soon("the end of the first connection", peer.connection.closed()).await;
    assert!(matches!(left, QuicError::ClosedByPeer { code: 0, .. }), "left on purpose: {left}");
    assert_eq!(elsewhere.send().await, send, "it had no answer, so it goes again");
    elsewhere.accept(&send, 3).await;
    assert_eq!(soon("the answer", answer).await.unwrap().seq, Seq(3));
}

#[tokio::test]
async fn a_refused_token_is_final() {
    let gateway = Gateway::new();
    let (client, ()) = tokio::join!(soon("connect", gateway.client().connect()), async {
        let mut peer = gateway.accept().await;
        peer.frame().await;
        peer.give(fatal(Reason::Unauthenticated)).await;
        peer.finish().await;
    });
    assert!(matches!(client, Err(ClientError::Ended(r)) if r.reason == "UNAUTHENTICATED"));
}

#[tokio::test]
async fn a_superseded_session_is_over_and_says_what_is_unknown() {
    let gateway = Gateway::new();
    let (client, mut peer) = gateway.connected(gateway.client()).await;
    let c = id("c");
    let unknown = client.send_pipelined(&c, Message::text("transmitted")).await.unwrap();
    let unsent = client.send_pipelined(&c, Message::text("waiting")).await.unwrap();
    peer.tell_count(0).await;
    peer.send().await;
    peer.give(fatal(Reason::SessionSuperseded)).await;
    peer.finish().await;
    assert!(matches!(soon("an answer", unknown).await, Err(ClientError::Unknown(_))));
    assert!(matches!(soon("an answer", unsent).await, Err(ClientError::Ended(_))));
    while soon("the end", client.next()).await.is_some() {}
    assert_eq!(client.ended().unwrap().reason, "SESSION_SUPERSEDED");
    assert!(matches!(client.send(&c, Message::text("late")).await, Err(ClientError::Ended(_))));
    assert!(matches!(client.show(&c).await, Err(ClientError::Ended(_))));
    assert!(client.next().await.is_none());
}

#[tokio::test]
async fn reads_are_repeated_over_reconnects_and_changes_are_not() {
    let gateway = Gateway::new();
    let (client, mut peer) = gateway.connected(gateway.client()).await;
    let (c, bob) = (id("c"), UserId::new("bob").unwrap());
    let history = async {
        let page = client.history(&c, History::after(Seq(4)).limit(10)).await.unwrap();
        assert_eq!((page.items.len(), page.head, page.more), (2, Seq(6), false));
        assert!(matches!(&page.items[1], Item::Event(e) if e.seq == Seq(6) && e.client_id == "laptop-46"));
    };
    let add = async {
        let error = client.add(&c, &bob, Role::Writer).await.unwrap_err();
        assert!(error.is_unknown() && error.to_string().contains("connection ended"), "{error}");
    };
    let server = async {
        peer.request().await;
        peer.request().await;
        peer.cut();
        let (mut peer, _) = gateway.welcome().await;
        let (refused, _) = peer.request().await;
        peer.respond(refused, response::Result::Refusal(Reason::Unavailable.refusal())).await;
        let (asked, Call::History(call)) = peer.request().await else { panic!() };
        assert_eq!((call.after_seq, call.limit), (Some(4), 10));
        let items = events(&c, 5..=6).items;
        peer.respond(asked, response::Result::History(v1::HistoryResponse { items, head: 6, more: false })).await;
        peer
    };
    soon("all of it", Box::pin(async { tokio::join!(history, add, server) })).await;
}

#[tokio::test]
async fn a_create_is_the_same_create_when_it_goes_again() {
    let gateway = Gateway::new();
    let (client, mut peer) = gateway.connected(gateway.client()).await;
    let create = client.create_conversation(Create::group([UserId::new("bob").unwrap()]).id(id("c")));
    let server = async {
        let (_, first) = peer.request().await;
        peer.cut();
        let (mut peer, _) = gateway.welcome().await;
        let (asked, again) = peer.request().await;
        assert_eq!(first, again);
        assert!(matches!(again, Call::Create(c) if !c.client_id.is_empty() && c.first_try_ms > 0));
        let created = v1::CreateResponse { conversation: "c".into(), seq: 2, repeat: true };
        peer.respond(asked, response::Result::Create(created)).await;
        peer
    };
    let (created, _peer) = soon("both", async { tokio::join!(create, server) }).await;
    assert_eq!(created.unwrap().seq, Seq(2));
}

#[tokio::test]
async fn a_request_without_an_answer_is_unknown() {
    let gateway = Gateway::new();
    let builder = gateway.client().request_timeout(Duration::from_millis(300));
    let (client, _peer) = gateway.connected(builder).await;
    assert!(client.show(&id("c")).await.unwrap_err().is_unknown());
}

#[tokio::test]
async fn a_page_with_a_gap_is_damaged() {
    let gateway = Gateway::new();
    let (client, mut peer) = gateway.connected(gateway.client()).await;
    let c = id("c");
    let (page, ()) = tokio::join!(client.history(&c, History::last(9)), async {
        let (asked, _) = peer.request().await;
        let items = events(&c, [5, 7]).items;
        peer.respond(asked, response::Result::History(v1::HistoryResponse { items, head: 7, more: false })).await;
    });
    assert!(matches!(page, Err(ClientError::Damaged(_))));
}

#[tokio::test]
async fn cursors_are_told_together_and_outlive_the_process() {
    let gateway = Gateway::new();
    let dir = tempfile::tempdir().unwrap();
    let c = id("c");
    let (client, mut peer) = gateway.connected(gateway.client().cursors(FileCursors::open(dir.path()).unwrap())).await;
    client.subscribe(&c, From::Cursor).await.unwrap();
    peer.speech().await;
    peer.events(&c, 1..=5).await;
    assert_eq!(seqs(&client, 5).await, [1, 2, 3, 4, 5]);
    client.delivered(&c, Seq(2));
    client.delivered(&c, Seq(4));
    client.read(&c, Seq(3));
    let cursor = |seq| vec![v1::Cursor { conversation: "c".into(), seq }];
    let ClientFrame::MoveCursors(moves) = peer.frame().await else { panic!() };
    assert_eq!(moves, v1::MoveCursors { delivered: cursor(4), read: cursor(3) });
    // The last move does not wait, and never passes what came.
    client.delivered(&c, Seq(99));
    let (_, last) = tokio::join!(soon("close", client.close()), peer.frame());
    assert_eq!(last, v1::MoveCursors { delivered: cursor(5), read: vec![] }.into());

    let store = FileCursors::open(dir.path()).unwrap();
    assert_eq!(store.delivered(&c), Some(Seq(5)));
    let (client, mut peer) = gateway.connected(gateway.client().cursors(store)).await;
    client.subscribe(&c, From::Cursor).await.unwrap();
    let ClientFrame::Subscribe(subscribe) = peer.speech().await else { panic!() };
    assert_eq!(subscribe.after_seq, 5);
    assert!(client.send(&c, Message::text("x")).now_or_never().is_none());
}

#[tokio::test]
async fn another_devices_cursors_are_refused() {
    let gateway = Gateway::new();
    let dir = tempfile::tempdir().unwrap();
    let (client, _peer) = gateway.connected(gateway.client().cursors(FileCursors::open(dir.path()).unwrap())).await;
    soon("close", client.close()).await;
    let builder = gateway.client().cursors(FileCursors::open(dir.path()).unwrap());
    let (client, ()) = tokio::join!(soon("connect", builder.connect()), async {
        let mut peer = gateway.accept().await;
        peer.frame().await;
        peer.give(v1::Welcome { device: "laptop".into(), ..welcome() }).await;
        let _ = peer.try_frame().await;
    });
    assert!(matches!(client, Err(ClientError::Store(_))));
}

#[tokio::test]
async fn what_waits_for_the_application_is_bounded_by_the_credit() {
    let gateway = Gateway::new();
    let connect = gateway.client().inbox_bytes(10_000).connect();
    let (client, (mut peer, resume)) = tokio::join!(soon("connect", connect), gateway.welcome());
    let client = client.unwrap();
    assert_eq!(resume.credit_bytes, 10_000);
    let c = id("c");
    client.subscribe(&c, From::Seq(Seq(0))).await.unwrap();
    peer.speech().await;
    let cost = |seq| stentor_engine::session::client::credit_cost(&event(&c, seq, format!("body {seq}").as_bytes()));
    let (mut left, mut seq, mut granted) = (10_000, 0, 0);
    while left >= cost(seq + 1) {
        seq += 1;
        left -= cost(seq);
        peer.events(&c, [seq]).await;
    }
    // Nothing is granted while nothing is taken: the first thing that the client says is this question.
    let (_, (asked, _)) = tokio::join!(client.show(&c), async {
        let request = match peer.frame().await {
            ClientFrame::Request(request) => (request.id, request.call),
            other => panic!("{other:?}"),
        };
        peer.respond(request.0, response::Result::Show(v1::Conversation::default())).await;
        request
    });
    assert!(asked > 0);
    assert_eq!(seqs(&client, seq as usize).await.len() as u64, seq);
    while granted < 5_000 {
        let ClientFrame::Credit(credit) = peer.frame().await else { panic!() };
        granted += credit.bytes;
    }
}

#[tokio::test]
async fn sending_waits_while_the_window_is_full() {
    let gateway = Gateway::new();
    let (client, mut peer) = gateway.connected(gateway.client().window(2)).await;
    let c = id("c");
    let first = client.send_pipelined(&c, Message::text("1")).await.unwrap();
    let second = client.send_pipelined(&c, Message::text("2")).await.unwrap();
    assert!(client.send_pipelined(&c, Message::text("3")).now_or_never().is_none());
    peer.tell_count(0).await;
    let send = peer.send().await;
    peer.accept(&send, 1).await;
    soon("an answer", first).await.unwrap();
    let third = soon("room", client.send_pipelined(&c, Message::text("3"))).await.unwrap();
    for seq in 2..=3 {
        let send = peer.send().await;
        assert_eq!(send.body, seq.to_string());
        peer.accept(&send, seq).await;
    }
    soon("the rest", client.flush()).await;
    assert_eq!(soon("an answer", third).await.unwrap().seq, Seq(3));
    assert_eq!(soon("an answer", second).await.unwrap().seq, Seq(2));
}

#[tokio::test]
async fn streams_end_with_their_reason() {
    let gateway = Gateway::new();
    let (client, mut peer) = gateway.connected(gateway.client()).await;
    let c = id("c");
    client.subscribe(&c, From::Head).await.unwrap();
    let ClientFrame::Subscribe(subscribe) = peer.speech().await else { panic!() };
    assert!(subscribe.from_head);
    peer.give(v1::ConversationState { conversation: "c".into(), head: 41, ..Default::default() }).await;
    peer.events(&c, [42]).await;
    assert_eq!(seqs(&client, 1).await, [42]);
    let refusal = Some(Reason::NotAParticipant.refusal());
    peer.give(v1::ConversationState { conversation: "c".into(), refusal, ..Default::default() }).await;
    assert!(matches!(next(&client).await, Incoming::Ended { refusal, .. } if refusal.reason == "NOT_A_PARTICIPANT"));
}

#[tokio::test]
async fn a_client_that_nobody_holds_leaves() {
    let gateway = Gateway::new();
    let store = Arc::new(MemoryCursors::new());
    let (client, mut peer) = gateway.connected(gateway.client().cursors(Arc::clone(&store))).await;
    let c = id("c");
    client.subscribe(&c, From::Cursor).await.unwrap();
    peer.speech().await;
    peer.events(&c, [1]).await;
    seqs(&client, 1).await;
    client.delivered(&c, Seq(1));
    drop(client);
    assert!(matches!(peer.frame().await, ClientFrame::MoveCursors(_)));
    assert_eq!(peer.try_frame().await, None);
    assert_eq!(store.delivered(&c), Some(Seq(1)));
}

#[tokio::test]
async fn an_unreachable_gateway_is_said_so_in_time() {
    let gateway = Gateway::new();
    // Nobody accepts.
    let builder = gateway.client().connect_timeout(Duration::from_millis(200));
    assert!(matches!(soon("an error", builder.connect()).await, Err(ClientError::Unreachable(_))));
    let nobody = stentor_client::Client::builder().token("t").connect().await;
    assert!(matches!(nobody, Err(ClientError::Config(_))));
}

#[tokio::test]
async fn who_follows_all_takes_up_conversations_that_begin_and_begin_again() {
    let gateway = Gateway::new();
    let (client, mut peer) = gateway.connected(gateway.client().follow_all()).await;
    let c = id("c");
    let state = |delivered, refusal| v1::ConversationState {
        conversation: "c".into(),
        head: 9,
        delivered,
        refusal,
        ..Default::default()
    };
    peer.give(state(0, None)).await;
    peer.events(&c, 1..=5).await;
    assert_eq!(seqs(&client, 5).await, [1, 2, 3, 4, 5], "nobody had to subscribe");
    peer.give(state(0, Some(Reason::NotAParticipant.refusal()))).await;
    let ended = loop {
        match next(&client).await {
            Incoming::Ended { refusal, .. } => break refusal.reason,
            Incoming::State { .. } | Incoming::UpToDate | Incoming::Connected { .. } => {}
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(ended, "NOT_A_PARTICIPANT");
    // The server has not heard of all that was delivered: it begins too early, and nothing comes twice.
    peer.give(state(2, None)).await;
    peer.events(&c, 3..=7).await;
    assert_eq!(seqs(&client, 2).await, [6, 7]);
}

#[tokio::test]
async fn a_session_outlives_its_token_when_somebody_gives_fresh_ones() {
    let gateway = Gateway::new();
    let asked = Arc::new(std::sync::atomic::AtomicU32::new(0));
    let source = move || {
        let n = asked.fetch_add(1, std::sync::atomic::Ordering::SeqCst) + 1;
        async move { Ok(format!("token-{n}")) }
    };
    let builder = gateway.client().token_source(source);
    let hello = async |peer: &mut gateway::Peer| {
        let ClientFrame::Hello(hello) = peer.frame().await else { panic!() };
        hello
    };
    let (client, (mut peer, first)) = tokio::join!(soon("connect", builder.connect()), async {
        let mut peer = gateway.accept().await;
        let first = hello(&mut peer).await;
        peer.give(welcome()).await;
        (peer, first)
    });
    let client = client.unwrap();
    assert_eq!(first.token, "token-1");
    peer.give(fatal(Reason::TokenExpired)).await;
    peer.cut();
    let again = hello(&mut gateway.accept().await).await;
    assert_eq!((again.token.as_str(), again.session_nonce), ("token-2", first.session_nonce));
    assert!(client.ended().is_none());
}
