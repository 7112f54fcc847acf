//! Sends: answered once and in order, whatever leaders and streams do; refusals that take their number.

use stentor_proto::{Bytes, frame::ServerFrame, reason::Reason, v1};

use super::support::{Cluster, Device, until};

fn send(conversation: &str, send_no: u64, body: &[u8]) -> v1::Send {
    v1::Send { conversation: conversation.into(), send_no, body: Bytes::copy_from_slice(body), ..Default::default() }
}

async fn refusal(device: &mut Device) -> (u64, String) {
    let (send_no, result) = device.sent().await;
    (send_no, result.unwrap_err().reason)
}

/// Sends numbers `from..=to` and gives the seqs of their answers.
async fn send_all(device: &mut Device, from: u64, to: u64) {
    for n in from..=to {
        device.send(send("c", n, format!("{n}").as_bytes())).await;
    }
}

async fn all_answered(device: &mut Device, from: u64, to: u64) {
    let mut answered = Vec::new();
    while answered.len() < (to - from + 1) as usize {
        let (send_no, seq) = device.sent().await;
        assert_eq!(seq.as_ref(), Ok(&send_no), "each number has its seq");
        answered.push(send_no);
    }
    answered.sort_unstable();
    assert!(answered.into_iter().eq(from..=to));
}

fn in_order(cluster: &Cluster, count: u64) {
    let bodies = cluster.world.bodies("c");
    assert!(bodies.into_iter().eq((1..=count).map(|n| Bytes::from(n.to_string()))), "once each and in order");
}

#[tokio::test]
async fn a_send_is_answered_with_its_seq() {
    let cluster = Cluster::start().await;
    cluster.world.create("c", &["ann"], 0);
    let mut device = cluster.device("ann", "phone").await;
    for body in [&b"hi"[..], &(0..=255).collect::<Vec<u8>>(), b"caf\xe9"] {
        let n = cluster.world.head("c") + 1;
        device.send(send("c", n, body)).await;
        assert_eq!(device.sent().await, (n, Ok(n)));
        assert_eq!(cluster.world.bodies("c").pop().unwrap(), body);
    }
    device.send(send("c", 3, b"again")).await;
    assert_eq!(device.sent().await, (3, Ok(3)), "a repeat has the first result");
    assert_eq!(cluster.world.head("c"), 3);
}

#[tokio::test]
async fn what_is_refused_for_good_takes_its_number_and_disturbs_nothing() {
    let cluster = Cluster::start().await;
    cluster.world.create("c", &["ann"], 0);
    let mut device = cluster.device("ann", "phone").await;
    device.send(send("c", 1, b"first")).await;
    device.send(send("c", 2, b"")).await;
    device.send(send("c", 3, &vec![b'x'; 61 * 1024])).await;
    device.send(v1::Send { kind: v1::EventKind::Created.into(), ..send("c", 4, b"x") }).await;
    device.send(v1::Send { content_type: "a\nb".into(), ..send("c", 5, b"x") }).await;
    device.send(v1::Send { client_id: "x".repeat(65), ..send("c", 6, b"x") }).await;
    device.send(send("c", 7, b"second")).await;
    assert_eq!(device.sent().await, (1, Ok(1)));
    for expected in [(2, "EMPTY_BODY"), (3, "BODY_TOO_LARGE"), (4, "BAD_KIND"), (5, "BAD_CONTENT_TYPE"), (6, "BAD_ID")]
    {
        let (send_no, reason) = refusal(&mut device).await;
        assert_eq!((send_no, reason.as_str()), expected);
    }
    assert_eq!(device.sent().await, (7, Ok(2)));
    // The stored result of a refused number is its refusal.
    device.send(send("c", 2, b"now with a body")).await;
    assert_eq!(refusal(&mut device).await, (2, "EMPTY_BODY".into()));
}

#[tokio::test]
async fn what_can_never_be_numbered_is_answered_at_once() {
    let cluster = Cluster::start().await;
    cluster.world.create("c", &["ann"], 0);
    let mut device = cluster.device("ann", "phone").await;
    device.send(send("c", 0, b"x")).await;
    assert_eq!(refusal(&mut device).await, (0, "MALFORMED".into()));
    device.send(v1::Send { done_no: 1, ..send("c", 1, b"x") }).await;
    assert_eq!(refusal(&mut device).await, (1, "MALFORMED".into()));
    device.send(send("", 1, b"x")).await;
    assert_eq!(refusal(&mut device).await, (1, "BAD_ID".into()));
    device.send(send("nowhere", 1, b"x")).await;
    assert_eq!(refusal(&mut device).await, (1, "UNKNOWN_CONVERSATION".into()));
    cluster.world.create("d", &["bob"], 0);
    device.send(send("d", 1, b"x")).await;
    assert_eq!(refusal(&mut device).await, (1, "NOT_A_PARTICIPANT".into()));
    device.send(send("c", 3, b"x")).await;
    let (_, result) = device.sent().await;
    let gap = result.unwrap_err();
    assert_eq!((gap.reason.as_str(), gap.retryable, gap.last), ("OUT_OF_ORDER", true, 0));
    device.send(send("c", 1, b"x")).await;
    assert_eq!(device.sent().await, (1, Ok(1)));
}

#[tokio::test]
async fn another_leader_is_found_and_everything_is_sent_again_in_order() {
    let cluster = Cluster::start().await;
    cluster.world.create("c", &["ann"], 0);
    let mut device = cluster.device("ann", "phone").await;
    send_all(&mut device, 1, 100).await;
    cluster.world.lead(2);
    send_all(&mut device, 101, 200).await;
    all_answered(&mut device, 1, 200).await;
    in_order(&cluster, 200);
    // A leader that nobody knows of is found by asking around.
    cluster.world.hint(Some(0));
    cluster.world.lead(1);
    send_all(&mut device, 201, 250).await;
    all_answered(&mut device, 201, 250).await;
    in_order(&cluster, 250);
}

#[tokio::test]
async fn a_broken_stream_neither_loses_nor_doubles_a_send() {
    let cluster = Cluster::start().await;
    cluster.world.create("c", &["ann"], 0);
    let mut device = cluster.device("ann", "phone").await;
    // Applied, but the answers are lost with the stream.
    cluster.world.script(|script| script.swallow_answers = true);
    send_all(&mut device, 1, 50).await;
    until("all are applied", async || cluster.world.head("c") == 50).await;
    cluster.world.script(|script| script.swallow_answers = false);
    cluster.world.cut(1);
    send_all(&mut device, 51, 60).await;
    all_answered(&mut device, 1, 60).await;
    in_order(&cluster, 60);
    assert!(cluster.metric("stentor_gateway_reroutes_total").await >= 1.0);
}

fn run(conversation: &str, send_no: u64, bodies: &[&str]) -> v1::SendRun {
    let item = |body: &&str| v1::SendItem { body: Bytes::copy_from_slice(body.as_bytes()), ..Default::default() };
    v1::SendRun { conversation: conversation.into(), send_no, done_no: 0, items: bodies.iter().map(item).collect() }
}

#[tokio::test]
async fn a_run_is_one_command_and_one_answer() {
    let cluster = Cluster::start().await;
    cluster.world.create("c", &["ann"], 0);
    let mut device = cluster.device("ann", "phone").await;
    device.send(run("c", 1, &["1", "2", "", "3"])).await;
    let ServerFrame::Sent(sent) = device.next().await else { panic!("not sent") };
    assert_eq!((sent.send_no, sent.seq, sent.more), (1, 1, 1));
    assert_eq!(refusal(&mut device).await, (3, "EMPTY_BODY".into()), "it takes its number and disturbs nothing");
    assert_eq!(device.sent().await, (4, Ok(3)));
    in_order(&cluster, 3);
    device.send(run("c", 4, &["3", "4"])).await;
    assert_eq!(device.sent().await, (4, Ok(3)), "a repeat has the first result");
    assert_eq!(device.sent().await, (5, Ok(4)));
    device.send(run("c", 9, &["x", "y"])).await;
    for expected in [9, 10] {
        assert_eq!(refusal(&mut device).await, (expected, "OUT_OF_ORDER".into()));
    }
    device.send(run("nowhere", 1, &["x", "y"])).await;
    for expected in [1, 2] {
        assert_eq!(refusal(&mut device).await, (expected, "UNKNOWN_CONVERSATION".into()));
    }
    assert_eq!(cluster.metric("stentor_gateway_sends_total").await, 10.0);
    device.send(run("c", 6, &["5"])).await;
    assert_eq!(device.sent().await, (6, Ok(5)), "a run of one");
}

#[tokio::test]
async fn a_run_without_an_answer_is_unknown_and_goes_again() {
    let cluster = Cluster::start().await;
    cluster.world.create("c", &["ann"], 0);
    let mut device = cluster.device("ann", "phone").await;
    cluster.world.script(|script| script.swallow_answers = true);
    device.send(run("c", 1, &["1", "2", "3"])).await;
    until("it is applied", async || cluster.world.head("c") == 3).await;
    cluster.world.script(|script| {
        script.swallow_answers = false;
        script.refuse_proposals = Some(Reason::Overloaded);
    });
    cluster.world.cut(1);
    for expected in [1, 2, 3] {
        assert_eq!(refusal(&mut device).await, (expected, "OUTCOME_UNKNOWN".into()));
    }
    cluster.world.script(|script| script.refuse_proposals = None);
    device.send(run("c", 1, &["1", "2", "3", "4"])).await;
    let ServerFrame::Sent(sent) = device.next().await else { panic!("not sent") };
    assert_eq!((sent.send_no, sent.seq, sent.more, sent.repeat), (1, 1, 2, true));
    assert_eq!(device.sent().await, (4, Ok(4)));
    in_order(&cluster, 4);
}

#[tokio::test]
async fn a_run_that_no_client_makes_ends_the_session() {
    let cluster = Cluster::start().await;
    cluster.world.create("c", &["ann"], 0);
    let long = "x".repeat(9 * 1024);
    let senseless = [
        (run("c", 1, &[]), "MALFORMED"),
        (run("c", 0, &["x"]), "MALFORMED"),
        (run("c", u64::MAX, &["x", "y"]), "MALFORMED"),
        (v1::SendRun { done_no: 1, ..run("c", 1, &["x"]) }, "MALFORMED"),
        (run("c", 1, &["x"; 129]), "MALFORMED"),
        (run("c", 1, &[&long, &long]), "MALFORMED"),
        (run("", 1, &["x"]), "BAD_ID"),
    ];
    for (run, reason) in senseless {
        let mut device = cluster.device("ann", "phone").await;
        device.send(run).await;
        let ServerFrame::Fatal(fatal) = device.next().await else { panic!("{reason}") };
        assert_eq!(fatal.refusal.unwrap().reason, reason);
    }
    assert_eq!(cluster.world.head("c"), 0);
}

/// The second attempt was refused, but the first one was applied: "refused" would be a lie.
#[tokio::test]
async fn a_refusal_after_an_attempt_without_an_answer_leaves_the_outcome_unknown() {
    let cluster = Cluster::start().await;
    cluster.world.create("c", &["ann"], 0);
    let mut device = cluster.device("ann", "phone").await;
    cluster.world.script(|script| script.swallow_answers = true);
    send_all(&mut device, 1, 1).await;
    until("it is applied", async || cluster.world.head("c") == 1).await;
    cluster.world.script(|script| {
        script.swallow_answers = false;
        script.refuse_proposals = Some(Reason::Overloaded);
    });
    cluster.world.cut(1);
    assert_eq!(refusal(&mut device).await, (1, "OUTCOME_UNKNOWN".into()));
    cluster.world.script(|script| script.refuse_proposals = None);
    send_all(&mut device, 1, 1).await;
    all_answered(&mut device, 1, 1).await;
    in_order(&cluster, 1);
}

#[tokio::test]
async fn a_leader_that_says_nothing_is_left() {
    let cluster = Cluster::start().await;
    cluster.world.create("c", &["ann"], 0);
    let mut device = cluster.device("ann", "phone").await;
    cluster.world.script(|script| script.stuck = true);
    send_all(&mut device, 1, 10).await;
    until("the gateway looks elsewhere", async || cluster.metric("stentor_gateway_reroutes_total").await >= 1.0).await;
    cluster.world.script(|script| script.stuck = false);
    all_answered(&mut device, 1, 10).await;
    in_order(&cluster, 10);
}

#[tokio::test]
async fn more_sends_than_may_be_in_flight_wait_in_the_stream() {
    let cluster = Cluster::start().await;
    cluster.world.create("c", &["ann"], 0);
    let mut device = cluster.device("ann", "phone").await;
    cluster.world.script(|script| script.stuck = true);
    send_all(&mut device, 1, 600).await;
    until("256 are taken", async || cluster.metric("stentor_gateway_sends_total").await >= 256.0).await;
    device.send(v1::Ping { token: 5 }).await;
    assert!((cluster.metric("stentor_gateway_sends_total").await - 256.0).abs() < 0.1);
    cluster.world.script(|script| script.stuck = false);
    cluster.world.cut(1);
    all_answered(&mut device, 1, 600).await;
    in_order(&cluster, 600);
}
