//! Who is let in, and what ends a connection: each with its stable reason.

use stentor_proto::{
    Bytes,
    frame::{ClientFrame, ServerFrame},
    v1,
};

use super::support::{Cluster, PATIENCE, token, until};

#[tokio::test]
async fn a_device_is_welcomed_and_pinged() {
    let cluster = Cluster::start().await;
    let mut device = cluster.connect().await;
    device.hello(cluster.token("ann", "phone"), [7; 16]).await;
    let welcome = device.welcome().await;
    assert_eq!((welcome.app.as_str(), welcome.user.as_str(), welcome.device.as_str()), ("app", "ann", "phone"));
    assert_eq!((welcome.version, welcome.session_no, welcome.max_in_flight), (1, 1, 256));
    assert!(welcome.server_ms > 0 && welcome.max_body_bytes < welcome.max_frame_bytes);
    device.send(v1::Ping { token: 9 }).await;
    assert_eq!(device.next().await, ServerFrame::Pong(v1::Pong { token: 9 }));
    assert!(cluster.status("/readyz").await.contains("200"));
    assert!((cluster.metric("stentor_gateway_sessions").await - 1.0).abs() < 0.1);
}

#[tokio::test]
async fn bad_tokens_are_refused_with_their_reason() {
    let cluster = Cluster::start().await;
    let (foreign, _) = stentor_transport::token::generate_key().unwrap();
    let good = cluster.token("ann", "phone");
    let mut changed = good.clone().into_bytes();
    let at = changed.len() - 10;
    changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
    for (token, reason) in [
        (String::new(), "UNAUTHENTICATED"),
        ("not.a.token".into(), "UNAUTHENTICATED"),
        (String::from_utf8(changed).unwrap(), "UNAUTHENTICATED"),
        (token(&foreign, "app", "ann", Some("phone"), 3_600), "UNAUTHENTICATED"),
        (cluster.token_of("app", "ann", None, 3_600), "UNAUTHENTICATED"),
        (cluster.token_of("app", "ann", Some("phone"), -1), "TOKEN_EXPIRED"),
        (cluster.token_of("other", "ann", Some("phone"), 3_600), "WRONG_APP"),
        (cluster.token_of("nowhere", "ann", Some("phone"), 3_600), "WRONG_APP"),
    ] {
        let mut device = cluster.connect().await;
        device.hello(token.clone(), [7; 16]).await;
        assert_eq!(device.fatal().await, reason, "{token}");
    }
    assert!(cluster.world.commands(|_| true).is_empty(), "nothing reached a broker");
}

#[tokio::test]
async fn a_broken_hello_is_refused() {
    let cluster = Cluster::start().await;
    let hello = |min_version, max_version, nonce: Vec<u8>| v1::Hello {
        min_version,
        max_version,
        token: cluster.token("ann", "phone"),
        session_nonce: nonce.into(),
        agent: String::new(),
    };
    for (frame, reason) in [
        (ClientFrame::from(hello(2, 9, vec![1; 16])), "UNSUPPORTED_VERSION"),
        (hello(0, 0, vec![1; 16]).into(), "UNSUPPORTED_VERSION"),
        (hello(1, 1, vec![1; 3]).into(), "MALFORMED"),
        (v1::Send::default().into(), "UNEXPECTED_FRAME"),
        (v1::Resume::default().into(), "UNEXPECTED_FRAME"),
    ] {
        let mut device = cluster.connect().await;
        device.send(frame.clone()).await;
        assert_eq!(device.fatal().await, reason, "{frame:?}");
    }
}

#[tokio::test]
async fn a_stranger_cannot_send_long_frames_and_a_friend_can() {
    let cluster = Cluster::start().await;
    let mut stranger = cluster.connect().await;
    // The length and kind of a resume of 100,000 bytes, of which nothing more comes.
    stranger.raw(Bytes::from_static(&[0xa0, 0x86, 1, 0, 2])).await;
    assert_eq!(stranger.fatal().await, "FRAME_TOO_LARGE");
    let mut friend = cluster.device("ann", "phone").await;
    let cursor = |n| v1::Cursor { conversation: format!("nowhere/{n:0100}"), seq: 1 };
    let resume = v1::Resume { delivered: (0..1_000).map(cursor).collect(), only_listed: true, ..Default::default() };
    friend.send(resume).await;
    loop {
        if let ServerFrame::UpToDate(done) = friend.next().await {
            assert_eq!(done.conversations, 1_000);
            break;
        }
    }
}

#[tokio::test]
async fn frames_in_the_wrong_state_or_form_end_the_session() {
    let cluster = Cluster::start().await;
    let frame = |kind: u8, message: &[u8]| {
        let mut bytes = (message.len() as u32 + 1).to_le_bytes().to_vec();
        bytes.push(kind);
        bytes.extend_from_slice(message);
        Bytes::from(bytes)
    };
    let resume = ClientFrame::from(v1::Resume { only_listed: true, ..Default::default() }).to_bytes();
    let cases: Vec<(Bytes, &str)> = vec![
        (ClientFrame::from(v1::Hello::default()).to_bytes(), "UNEXPECTED_FRAME"),
        ([&resume[..], &resume[..]].concat().into(), "UNEXPECTED_FRAME"),
        (frame(63, b""), "UNEXPECTED_FRAME"),
        (frame(64, b""), "UNEXPECTED_FRAME"),
        (frame(5, &[0xff, 0xff, 0xff]), "MALFORMED"),
        (Bytes::from_static(&[0, 0, 0, 0]), "MALFORMED"),
        (Bytes::from_static(&[0xff, 0xff, 0xff, 0xff, 5]), "FRAME_TOO_LARGE"),
        (frame(5, &vec![0; 70_000]), "FRAME_TOO_LARGE"),
    ];
    for (n, (bytes, reason)) in cases.into_iter().enumerate() {
        let mut device = cluster.device("ann", &format!("d{n}")).await;
        // The gateway may have said why, and have closed, before all of it was written.
        let _ = device.writer.write(&mut [bytes]).await;
        assert_eq!(device.fatal().await, reason, "case {n}");
    }
}

#[tokio::test]
async fn a_frame_that_is_cut_short_is_malformed_and_a_skippable_one_is_skipped() {
    let cluster = Cluster::start().await;
    let mut device = cluster.device("ann", "phone").await;
    device.raw(Bytes::from_static(&[3, 0, 0, 0, 200, 1, 2])).await;
    device.send(v1::Ping { token: 1 }).await;
    assert_eq!(device.next().await, ServerFrame::Pong(v1::Pong { token: 1 }));
    device.raw(Bytes::from_static(&[30, 0, 0, 0, 5, 1, 2])).await;
    let (finished, reason) = tokio::join!(device.writer.finish(), async {
        let (kind, message) = tokio::time::timeout(PATIENCE, device.reader.next()).await.unwrap().unwrap().unwrap();
        ServerFrame::decode(kind, message).unwrap().unwrap()
    });
    let () = finished;
    let ServerFrame::Fatal(fatal) = reason else { panic!("{reason:?}") };
    assert_eq!(fatal.refusal.unwrap().reason, "MALFORMED");
}

#[tokio::test]
async fn a_newer_session_of_the_device_ends_the_older_one() {
    let cluster = Cluster::start().await;
    let mut old = cluster.device_with("ann", "phone", [1; 16]).await;
    let mut new = cluster.device_with("ann", "phone", [2; 16]).await;
    assert_eq!((old.session_no, new.session_no), (1, 2));
    assert_eq!(old.fatal().await, "SESSION_SUPERSEDED");
    // A replayed hello of the old session changes nothing.
    let mut replay = cluster.connect().await;
    replay.hello(cluster.token("ann", "phone"), [1; 16]).await;
    assert_eq!(replay.fatal().await, "SESSION_SUPERSEDED");
    new.send(v1::Ping { token: 3 }).await;
    assert_eq!(new.next().await, ServerFrame::Pong(v1::Pong { token: 3 }));
    // Another device of the same user is not concerned, nor is the same nonce on a new connection.
    let other = cluster.device_with("ann", "laptop", [3; 16]).await;
    assert_eq!(other.session_no, 1);
    let again = cluster.device_with("ann", "phone", [2; 16]).await;
    assert_eq!(again.session_no, 2);
    assert_eq!(new.fatal().await, "SESSION_SUPERSEDED");
}

#[tokio::test]
async fn draining_sends_devices_away_and_takes_no_new_ones() {
    let cluster = Cluster::with(2, |limits| limits.drain_ms = 300).await;
    cluster.world.create("c", &["ann"], 2);
    let mut device = cluster.device("ann", "phone").await;
    device.subscribe("c", 0).await;
    device.events("c", 0, 2).await;
    device.send(moved("c", 2)).await;
    let (addr, tls) = (cluster.quic, cluster.tls.clone());
    let world = cluster.world.clone();
    let stopping = tokio::spawn(cluster.gateway.shutdown());
    let away = loop {
        if let ServerFrame::GoAway(away) = device.next().await {
            break away;
        }
    };
    assert_eq!((away.reason.as_str(), away.within_ms), ("DRAINING", 300));
    assert!(stentor_transport::quic::connect(addr, &tls).await.is_err(), "a draining gateway takes nobody");
    assert_eq!(device.fatal().await, "DRAINING");
    drop(device);
    stopping.await.unwrap();
    until("the cursor", async || world.delivered("ann", "phone", "c") == Some(2)).await;
}

fn moved(conversation: &str, seq: u64) -> v1::MoveCursors {
    let cursor = v1::Cursor { conversation: conversation.into(), seq };
    v1::MoveCursors { delivered: vec![cursor], read: vec![] }
}
