//! Rates, dead shards and tokens that expire: what a device is refused for now, and what goes on beside it.

use stentor_gateway::config::RateLimit;
use stentor_proto::{
    Bytes,
    frame::ServerFrame,
    v1::{self, request::Call, response::Result as Answer},
};

use super::support::{Cluster, until};

fn send(conversation: &str, send_no: u64) -> v1::Send {
    let body = Bytes::from(format!("{send_no}"));
    v1::Send { conversation: conversation.into(), send_no, body, ..Default::default() }
}

#[tokio::test]
async fn a_send_over_the_rate_is_refused_for_now_with_all_behind_it() {
    let cluster = Cluster::with(2, |limits| limits.sends = RateLimit { per_s: 20, burst: 5 }).await;
    cluster.world.create("c", &["ann"], 0);
    let mut ann = cluster.device("ann", "phone").await;
    for n in 1..=12 {
        ann.send(send("c", n)).await;
    }
    let (mut accepted, mut refused) = (Vec::new(), Vec::new());
    for _ in 1..=12 {
        match ann.sent().await {
            (n, Ok(_)) => accepted.push(n),
            (n, Err(refusal)) => {
                assert_eq!((refusal.reason.as_str(), refusal.retryable), ("RATE_LIMITED", true));
                refused.push(n);
            }
        }
    }
    refused.sort_unstable();
    assert!(accepted.len() >= 5 && accepted.iter().chain(&refused).copied().eq(1..=12), "{accepted:?} {refused:?}");
    assert!(cluster.metric("stentor_gateway_rate_limited_total").await >= 1.0);
    // The device comes back to the first that was refused, as often as it must.
    let mut next = refused[0];
    while next <= 12 {
        ann.send(send("c", next)).await;
        if let (_, Ok(_)) = ann.sent().await {
            next += 1;
        }
    }
    assert!(cluster.world.bodies("c").into_iter().eq((1..=12).map(|n| Bytes::from(n.to_string()))), "once, in order");
}

#[tokio::test]
async fn of_a_run_over_the_rate_the_first_go_on() {
    for burst in [1, 3] {
        of_a_run_so_many_go_on(burst).await;
    }
}

async fn of_a_run_so_many_go_on(burst: u32) {
    let cluster = Cluster::with(2, |limits| limits.sends = RateLimit { per_s: 1, burst: burst.into() }).await;
    cluster.world.create("c", &["ann"], 0);
    let mut ann = cluster.device("ann", "phone").await;
    let item = |n: u64| v1::SendItem { body: Bytes::from(n.to_string()), ..Default::default() };
    let items = (1..=6).map(item).collect();
    ann.send(v1::SendRun { conversation: "c".into(), send_no: 1, done_no: 0, items }).await;
    let mut refused = Vec::new();
    let mut sent = None;
    while refused.len() < 6 - burst as usize || sent.is_none() {
        match ann.next().await {
            ServerFrame::Sent(of) => sent = Some((of.send_no, of.more)),
            ServerFrame::SendRefused(of) => refused.push((of.send_no, of.refusal.unwrap().reason)),
            _ => {}
        }
    }
    assert_eq!(sent, Some((1, burst - 1)));
    let numbers = refused.iter().map(|(n, reason)| (*n, reason.as_str()));
    assert!(numbers.eq((u64::from(burst) + 1..=6).map(|n| (n, "RATE_LIMITED"))), "{refused:?}");
    ann.send(send("c", 6)).await;
    let (_, behind) = ann.sent().await;
    assert_eq!(behind.unwrap_err().reason, "RATE_LIMITED", "until the device comes back to the first");
}

#[tokio::test]
async fn what_a_device_has_spent_goes_with_it_to_its_next_session() {
    let cluster = Cluster::with(2, |limits| limits.sends = RateLimit { per_s: 1, burst: 5 }).await;
    cluster.world.create("c", &["ann"], 0);
    let mut ann = cluster.device_with("ann", "phone", [1; 16]).await;
    for n in 1..=5 {
        ann.send(send("c", n)).await;
        assert!(ann.sent().await.1.is_ok());
    }
    drop(ann);
    until("the session has ended", async || cluster.metric("stentor_gateway_sessions").await < 0.5).await;
    let mut ann = cluster.device_with("ann", "phone", [2; 16]).await;
    let mut accepted = 0;
    for n in 6..=10 {
        ann.send(send("c", n)).await;
        accepted += u64::from(ann.sent().await.1.is_ok());
    }
    assert!(accepted < 5, "all of a new burst was there");
}

#[tokio::test]
async fn sends_of_a_stranger_cost_more() {
    let cluster = Cluster::start().await;
    cluster.world.create("c", &["bob"], 0);
    let mut ann = cluster.device("ann", "phone").await;
    let (mut strange, mut limited) = (0, 0);
    let mut n = 0;
    // Far fewer than the sends that a participant may make at once.
    while limited == 0 && n < 2_000 {
        n += 1;
        ann.send(send("c", n)).await;
        match ann.sent().await.1.unwrap_err().reason.as_str() {
            "NOT_A_PARTICIPANT" => strange += 1,
            "RATE_LIMITED" => limited += 1,
            other => panic!("{other}"),
        }
    }
    assert!(limited == 1 && strange >= 200, "{strange} then {limited}");
}

#[tokio::test]
async fn calls_subscriptions_and_sessions_have_rates() {
    let cluster = Cluster::with(2, |limits| {
        limits.calls = RateLimit { per_s: 1, burst: 3 };
        limits.sessions = RateLimit { per_s: 1, burst: 4 };
    })
    .await;
    cluster.world.create("c", &["ann"], 1);
    let mut ann = cluster.device("ann", "phone").await;
    let mut reasons = Vec::new();
    for id in 0..8 {
        let show = v1::ShowRequest { conversation: "c".into(), linearizable: false };
        ann.send(v1::Request { id, call: Some(Call::Show(show)) }).await;
        if let Some(Answer::Refusal(refusal)) = ann.response().await.result {
            reasons.push(refusal.reason);
        }
    }
    assert!(reasons.len() >= 3 && reasons.iter().all(|reason| reason == "RATE_LIMITED"), "{reasons:?}");
    let refusal = ann.subscribe("c", 0).await.refusal.unwrap();
    assert_eq!((refusal.reason.as_str(), refusal.retryable), ("RATE_LIMITED", true));
    let mut refused = 0;
    for n in 0..8 {
        let mut device = cluster.connect().await;
        device.hello(cluster.token("ann", &format!("d{n}")), [n + 10; 16]).await;
        match device.next().await {
            ServerFrame::Welcome(_) => {}
            ServerFrame::Fatal(fatal) => {
                let refusal = fatal.refusal.unwrap();
                assert_eq!((refusal.reason.as_str(), refusal.retryable), ("RATE_LIMITED", true));
                refused += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(refused >= 1, "burst of 4 and one a second, and 9 in a row");
    // Somebody else is not concerned.
    cluster.device("bob", "phone").await;
}

#[tokio::test]
async fn a_session_ends_with_its_token_and_a_fresh_one_goes_on() {
    let cluster = Cluster::start().await;
    let mut ann = cluster.connect().await;
    ann.hello(cluster.token_of("app", "ann", Some("phone"), 2), [1; 16]).await;
    ann.welcome().await;
    assert_eq!(ann.fatal().await, "TOKEN_EXPIRED");
    let again = cluster.device_with("ann", "phone", [1; 16]).await;
    assert_eq!(again.session_no, ann.session_no, "the same session");
    // One that is good for longer than a clock can tell.
    let mut bob = cluster.connect().await;
    bob.hello(cluster.token_of("app", "bob", Some("phone"), i64::from(u32::MAX)), [1; 16]).await;
    bob.welcome().await;
    bob.send(v1::Ping { token: 1 }).await;
    assert_eq!(bob.next().await, ServerFrame::Pong(v1::Pong { token: 1 }));
}

/// A name in the other shard than `c`'s.
fn elsewhere() -> String {
    let shard = |id: &str| stentor_proto::ids::Slot::of("app", id).0 < 5_000;
    (0..).map(|n| format!("d{n}")).find(|name| shard(name) != shard("c")).unwrap()
}

#[tokio::test]
async fn a_dead_shard_does_not_hold_the_whole_window() {
    let cluster = Cluster::start().await;
    let other = elsewhere();
    cluster.world.create("c", &["ann"], 0);
    cluster.world.create(&other, &["ann"], 0);
    let mut ann = cluster.device("ann", "phone").await;
    cluster.world.script(|script| script.stuck_in = Some("c".into()));
    for n in 1..=256 {
        ann.send(send("c", n)).await;
    }
    until("256 are taken", async || cluster.metric("stentor_gateway_sends_total").await >= 256.0).await;
    for n in 1..=300 {
        ann.send(send(&other, n)).await;
    }
    for n in 1..=300 {
        assert_eq!(ann.sent().await, (n, Ok(n)), "before any of the others is given up");
    }
    ann.send(send("c", 257)).await;
    let (n, refusal) = ann.sent().await;
    assert_eq!((n, refusal.unwrap_err().reason.as_str()), (257, "UNAVAILABLE"));
}
