//! Single rules of the device's half, each with the frames written out.

use bytes::BytesMut;
use stentor_proto::{
    frame::{self, ClientFrame, ServerFrame},
    ids::{ConversationId, SendNo, Seq},
    reason::Reason,
    v1::{self, item, request::Call, response},
};

use super::{
    super::{Answer, Config, Full, Output, Session, Start, Violation},
    model::{encode, refused},
};
use crate::limits;

type Device = Session<&'static str, &'static str>;

fn id(text: &str) -> ConversationId {
    ConversationId::new(text).unwrap()
}

fn give(device: &mut Device, now: u64, frame: impl Into<ServerFrame>) -> Result<(), Violation> {
    let frame = frame.into();
    device.handle(now, frame.kind(), frame.to_bytes().slice(frame::PREFIX_BYTES..))
}

/// What was written, runs as the sends that they stand for.
fn written(device: &mut Device, now: u64) -> Vec<ClientFrame> {
    let one_by_one = |frame| match frame {
        ClientFrame::SendRun(run) => super::sends_of(run).map(ClientFrame::Send).collect(),
        frame => vec![frame],
    };
    frames(device, now).into_iter().flat_map(one_by_one).collect()
}

fn frames(device: &mut Device, now: u64) -> Vec<ClientFrame> {
    let mut out = BytesMut::new();
    device.write_frames(now, &mut out, usize::MAX);
    let mut frames = Vec::new();
    while let Some((kind, message)) = frame::split(&mut out, 65_536).unwrap() {
        frames.push(ClientFrame::decode(kind, message).unwrap().unwrap());
    }
    frames
}

fn outputs(device: &mut Device) -> Vec<Output<&'static str, &'static str>> {
    std::iter::from_fn(|| device.poll()).collect()
}

fn welcome() -> v1::Welcome {
    v1::Welcome {
        version: 1,
        app: "a".into(),
        max_body_bytes: 100,
        max_frame_bytes: 65_536,
        max_in_flight: 4,
        max_run_sends: 128,
        ..Default::default()
    }
}

/// A connected device, its hello and resume out of the way.
fn open(device: &mut Device, now: u64) -> Vec<ClientFrame> {
    device.connected(now, "token", &[1; 16]);
    assert!(matches!(&written(device, now)[..], [ClientFrame::Hello(_)]), "nothing but a hello before the welcome");
    give(device, now, welcome()).unwrap();
    outputs(device);
    written(device, now)
}

fn device() -> Device {
    Session::new(Config::default(), 5)
}

fn text(body: &'static str) -> v1::Send {
    v1::Send { body: body.into(), ..Default::default() }
}

fn numbers(frames: &[ClientFrame]) -> Vec<(u64, u64, &[u8])> {
    let send = |f: &'_ ClientFrame| matches!(f, ClientFrame::Send(_));
    frames
        .iter()
        .filter(|f| send(f))
        .map(|f| match f {
            ClientFrame::Send(s) => (s.send_no, s.done_no, &s.body[..]),
            _ => unreachable!(),
        })
        .collect()
}

fn question(frames: &[ClientFrame]) -> Option<u64> {
    frames.iter().find_map(|f| match f {
        ClientFrame::Request(v1::Request { id, call: Some(Call::SendState(_)) }) => Some(*id),
        _ => None,
    })
}

fn state(id: u64, last: u64) -> v1::Response {
    let state = v1::SendStateResponse { last, done_no: last };
    v1::Response { id, result: Some(response::Result::SendState(state)) }
}

fn sent(send_no: u64, seq: u64) -> v1::Sent {
    v1::Sent { conversation: "c".into(), send_no, seq, ..Default::default() }
}

fn refuse(device: &mut Device, now: u64, send_no: u64, reason: Reason, last: u64) {
    let send = v1::Send { conversation: "c".into(), send_no, ..Default::default() };
    give(device, now, refused(&send, reason, last)).unwrap();
}

fn answers(device: &mut Device) -> Vec<(&'static str, Answer)> {
    outputs(device)
        .into_iter()
        .filter_map(|o| match o {
            Output::Answered { ticket, answer } => Some((ticket, answer)),
            _ => None,
        })
        .collect()
}

/// A device whose count is known to be `last` and that has sent these.
fn sending(last: u64, bodies: &[&'static str]) -> (Device, Vec<ClientFrame>) {
    let mut device = device();
    open(&mut device, 0);
    bodies.iter().for_each(|body| device.send(0, &id("c"), text(body), body).unwrap());
    let asked = question(&written(&mut device, 0)).expect("the count is asked for before anything is sent");
    give(&mut device, 0, state(asked, last)).unwrap();
    let frames = written(&mut device, 0);
    (device, frames)
}

#[test]
fn one_resume_has_every_cursor_and_nothing_else_is_said() {
    let mut device = device();
    (0..300).for_each(|n| device.subscribe(&id(&format!("c{n}")), Start::After(Seq(n))).unwrap());
    let frames = open(&mut device, 0);
    let [ClientFrame::Resume(resume)] = &frames[..] else { panic!("{frames:?}") };
    assert_eq!(resume.delivered.len(), 300);
    assert!(resume.delivered.iter().all(|c| c.conversation == format!("c{}", c.seq)));
    assert_eq!(written(&mut device, 100), []);
}

#[test]
fn a_lost_count_is_adopted_and_the_first_send_goes_alone() {
    let (mut device, frames) = sending(5, &["x", "y", "z"]);
    assert_eq!(numbers(&frames), [(6, 5, &b"x"[..])]);
    give(&mut device, 1, sent(6, 40)).unwrap();
    assert_eq!(numbers(&written(&mut device, 1)), [(7, 6, &b"y"[..]), (8, 6, b"z")]);
    assert_eq!(device.send_position(&id("c")), Some((SendNo(8), SendNo(6))));
}

#[test]
fn a_conversations_state_tells_the_count_without_a_question() {
    let mut device = device();
    device.subscribe(&id("c"), Start::After(Seq(0))).unwrap();
    device.send(0, &id("c"), text("x"), "x").unwrap();
    open(&mut device, 0);
    let state = v1::ConversationState { conversation: "c".into(), last_send_no: 9, ..Default::default() };
    give(&mut device, 0, state).unwrap();
    assert_eq!(numbers(&written(&mut device, 0)), [(10, 9, &b"x"[..])]);
}

#[test]
fn what_is_refused_for_now_goes_again_with_everything_behind_it_after_a_wait() {
    let (mut device, _) = sending(0, &["x", "y", "z"]);
    give(&mut device, 0, sent(1, 1)).unwrap();
    assert_eq!(numbers(&written(&mut device, 0)).len(), 2);
    refuse(&mut device, 10, 2, Reason::Overloaded, 1);
    device.send(10, &id("c"), text("w"), "w").unwrap();
    assert_eq!(written(&mut device, 10_000), [], "the answer to 3 is still out");
    refuse(&mut device, 10, 3, Reason::OutOfOrder, 1);
    let at = device.deadline().unwrap().max(10);
    device.tick(at).unwrap();
    assert_eq!(numbers(&written(&mut device, at)), [(2, 1, &b"y"[..])], "a probe, under its old number");
    give(&mut device, at, sent(2, 2)).unwrap();
    assert_eq!(numbers(&written(&mut device, at)), [(3, 2, &b"z"[..]), (4, 2, b"w")]);
}

#[test]
fn a_taken_number_is_anothers_and_the_send_gets_the_next() {
    let (mut device, _) = sending(5, &["x", "y"]);
    refuse(&mut device, 0, 6, Reason::SendNoTaken, 8);
    let at = 3_000;
    device.tick(at).unwrap();
    assert_eq!(numbers(&written(&mut device, at)), [(9, 8, &b"x"[..])]);
    give(&mut device, at, sent(9, 50)).unwrap();
    assert_eq!(numbers(&written(&mut device, at)), [(10, 9, &b"y"[..])]);
}

#[test]
fn a_passed_window_leaves_an_uncertain_send_unknown_and_a_certain_one_goes_again() {
    let (mut device, _) = sending(5, &["x"]);
    open(&mut device, 1);
    refuse(&mut device, 1, 6, Reason::DedupWindowPassed, 9);
    assert!(matches!(&answers(&mut device)[..], [("x", Answer::Unknown(r))] if r.reason == "DEDUP_WINDOW_PASSED"));

    let (mut device, _) = sending(5, &["x"]);
    refuse(&mut device, 0, 6, Reason::DedupWindowPassed, 9);
    assert_eq!(answers(&mut device), []);
    let at = 3_000;
    device.tick(at).unwrap();
    let asked = question(&written(&mut device, at)).expect("asks again");
    give(&mut device, at, state(asked, 9)).unwrap();
    assert_eq!(numbers(&written(&mut device, at)), [(10, 9, &b"x"[..])]);
}

#[test]
fn a_forgotten_state_makes_uncertain_sends_unknown_and_keeps_the_others() {
    let (mut device, _) = sending(5, &["x"]);
    let frames = open(&mut device, 1);
    assert_eq!(numbers(&frames), [(6, 5, &b"x"[..])], "the same number on the next connection");
    device.send(1, &id("c"), text("y"), "y").unwrap();
    refuse(&mut device, 1, 6, Reason::OutOfOrder, 0);
    let at = 3_000;
    device.tick(at).unwrap();
    let asked = question(&written(&mut device, at)).expect("a refusal alone proves nothing");
    give(&mut device, at, state(asked, 0)).unwrap();
    assert!(matches!(&answers(&mut device)[..], [("x", Answer::Unknown(_))]));
    assert_eq!(numbers(&written(&mut device, at)), [(1, 0, &b"y"[..])]);
}

#[test]
fn a_state_that_is_older_than_the_last_answer_is_not_the_count() {
    let (mut device, _) = sending(5, &["x", "y"]);
    give(&mut device, 0, sent(6, 40)).unwrap();
    written(&mut device, 0);
    open(&mut device, 1);
    // Read before 6 was applied, and here only now.
    refuse(&mut device, 1, 7, Reason::OutOfOrder, 5);
    let state = v1::ConversationState { conversation: "c".into(), last_send_no: 5, ..Default::default() };
    give(&mut device, 1, state).unwrap();
    let at = 3_000;
    device.tick(at).unwrap();
    let frames = written(&mut device, at);
    assert_eq!((answers(&mut device), numbers(&frames)), (vec![], vec![]), "nothing is concluded from it");
    give(&mut device, at, self::state(question(&frames).unwrap(), 6)).unwrap();
    assert_eq!(numbers(&written(&mut device, at)), [(7, 6, &b"y"[..])]);
}

#[test]
fn a_final_refusal_is_the_answer_unless_an_earlier_attempt_may_have_been_accepted() {
    let (mut device, _) = sending(0, &["x"]);
    refuse(&mut device, 0, 1, Reason::NotAParticipant, 1);
    assert!(matches!(&answers(&mut device)[..], [("x", Answer::Refused(_))]));

    let (mut device, _) = sending(0, &["x"]);
    open(&mut device, 1);
    refuse(&mut device, 1, 1, Reason::NotAParticipant, 0);
    assert!(matches!(&answers(&mut device)[..], [("x", Answer::Unknown(_))]));

    let (mut device, _) = sending(0, &["x"]);
    open(&mut device, 1);
    refuse(&mut device, 1, 1, Reason::EmptyBody, 1);
    assert!(matches!(&answers(&mut device)[..], [("x", Answer::Refused(_))]), "its stored result");
}

#[test]
fn an_answer_to_a_question_that_is_no_longer_asked_says_nothing() {
    let state_of =
        |last_send_no| v1::ConversationState { conversation: "c".into(), last_send_no, ..Default::default() };
    let nobody = || Some(response::Result::Refusal(Reason::NotAParticipant.refusal()));
    let mut device = device();
    open(&mut device, 0);
    device.send(0, &id("c"), text("x"), "x").unwrap();
    let asked = question(&written(&mut device, 0)).unwrap();
    // The user is added meanwhile, and the stream's state tells the count first.
    give(&mut device, 0, state_of(4)).unwrap();
    assert_eq!(numbers(&written(&mut device, 0)), [(5, 4, &b"x"[..])]);
    give(&mut device, 0, v1::Response { id: asked, result: nobody() }).unwrap();
    assert_eq!(answers(&mut device), []);
    // The same with a question that has not gone out yet, and a late answer that is no refusal.
    give(&mut device, 0, sent(5, 9)).unwrap();
    assert_eq!(answers(&mut device).len(), 1);
    device.send(0, &id("d"), text("y"), "y").unwrap();
    give(&mut device, 0, v1::ConversationState { conversation: "d".into(), ..state_of(7) }).unwrap();
    let frames = written(&mut device, 0);
    assert_eq!((question(&frames), numbers(&frames)), (None, vec![(8, 7, &b"y"[..])]));
}

#[test]
fn a_refused_question_answers_nothing_that_came_after_it_was_asked() {
    let mut device = device();
    open(&mut device, 0);
    device.send(0, &id("c"), text("x"), "x").unwrap();
    let asked = question(&written(&mut device, 0)).unwrap();
    // The user is added meanwhile, knows it, and sends.
    device.send(1, &id("c"), text("y"), "y").unwrap();
    assert_eq!(question(&written(&mut device, 1)), None);
    let result = Some(response::Result::Refusal(Reason::NotAParticipant.refusal()));
    give(&mut device, 2, v1::Response { id: asked, result }).unwrap();
    assert!(matches!(&answers(&mut device)[..], [("x", Answer::Refused(_))]));
    let again = question(&written(&mut device, 2)).expect("it is asked for the second");
    give(&mut device, 3, state(again, 3)).unwrap();
    assert_eq!(numbers(&written(&mut device, 3)), [(4, 3, &b"y"[..])]);
}

#[test]
fn a_body_over_the_limit_is_refused_here_and_holds_up_nothing() {
    static LARGE: [u8; 101] = [b'x'; 101];
    let mut device = device();
    open(&mut device, 0);
    device.send(0, &id("c"), v1::Send { body: (&LARGE[..]).into(), ..Default::default() }, "large").unwrap();
    device.send(0, &id("c"), text("small"), "small").unwrap();
    let asked = question(&written(&mut device, 0)).unwrap();
    give(&mut device, 0, state(asked, 0)).unwrap();
    assert_eq!(numbers(&written(&mut device, 0)), [(1, 0, &b"small"[..])]);
    assert!(matches!(&answers(&mut device)[..], [("large", Answer::Refused(r))] if r.reason == "BODY_TOO_LARGE"));
}

#[test]
fn the_connections_window_holds_over_all_conversations() {
    let mut device = device();
    open(&mut device, 0);
    let names = ["c1", "c2", "c3", "c4", "c5", "c6"];
    names.iter().for_each(|name| device.send(0, &id(name), text("x"), name).unwrap());
    let mut out = 0;
    while let Some(asked) = question(&written(&mut device, 0)) {
        give(&mut device, 0, state(asked, 0)).unwrap();
        out += numbers(&written(&mut device, 0)).len();
        if out == 4 {
            break;
        }
    }
    for n in 0..6 {
        let _ = give(&mut device, 0, state(n, 0));
    }
    assert_eq!(out + numbers(&written(&mut device, 0)).len(), 4);
    give(&mut device, 0, v1::Sent { conversation: "c1".into(), send_no: 1, seq: 1, ..Default::default() }).unwrap();
    assert_eq!(numbers(&written(&mut device, 0)).len(), 1);
}

#[test]
fn no_more_calls_are_out_than_a_gateway_reads_on_with() {
    let mut device = device();
    open(&mut device, 0);
    let call = || Call::List(v1::ListRequest::default());
    for _ in 0..limits::DEVICE_REQUESTS {
        device.request(call(), "r").unwrap();
    }
    assert_eq!(device.request(call(), "one more"), Err((Full::Requests, "one more")));
    let frames = written(&mut device, 0);
    assert_eq!(frames.len(), limits::SESSION_CALLS_IN_FLIGHT);
    let ClientFrame::Request(first) = &frames[0] else { panic!("{frames:?}") };
    let result = Some(response::Result::List(v1::ListResponse::default()));
    give(&mut device, 0, v1::Response { id: first.id, result }).unwrap();
    assert_eq!(written(&mut device, 0).len(), 1);
    device.disconnected();
    let lost = outputs(&mut device).iter().filter(|o| matches!(o, Output::Lost { maybe_done: true, .. })).count();
    assert_eq!(lost, limits::SESSION_CALLS_IN_FLIGHT, "only what was transmitted");
}

#[test]
fn a_gap_ends_the_connection_and_the_next_resumes_from_the_cursor() {
    let mut device = device();
    device.subscribe(&id("c"), Start::After(Seq(0))).unwrap();
    open(&mut device, 0);
    let events = |seqs: &[u64]| v1::Events {
        conversation: "c".into(),
        items: seqs.iter().map(|&s| v1::Item { item: Some(item::Item::Record(encode("c", s, b"x"))) }).collect(),
    };
    give(&mut device, 0, events(&[1, 2])).unwrap();
    assert!(matches!(give(&mut device, 0, events(&[3, 5])), Err(Violation::Stream { .. })));
    assert_eq!(outputs(&mut device).len(), 3, "what was in order is handed on");
    let frames = open(&mut device, 1);
    let [ClientFrame::Resume(resume)] = &frames[..] else { panic!("{frames:?}") };
    assert_eq!(resume.delivered, [v1::Cursor { conversation: "c".into(), seq: 3 }]);
}

#[test]
fn credit_is_given_back_as_the_application_takes_events_and_not_before() {
    let config = Config { credit_bytes: 1_000, ..Config::default() };
    let mut device = Device::new(config, 1);
    device.subscribe(&id("c"), Start::After(Seq(0))).unwrap();
    open(&mut device, 0);
    let body = [b'x'; 600];
    let item = v1::Item { item: Some(item::Item::Record(encode("c", 1, &body))) };
    give(&mut device, 0, v1::Events { conversation: "c".into(), items: vec![item] }).unwrap();
    let steps = outputs(&mut device);
    let [Output::Step { credit_bytes, .. }] = &steps[..] else { panic!("{steps:?}") };
    assert_eq!(written(&mut device, 0), []);
    let frames = open(&mut device, 1);
    let [ClientFrame::Resume(resume)] = &frames[..] else { panic!("{frames:?}") };
    assert_eq!(resume.credit_bytes, 1_000 - credit_bytes, "what is held is not room");
    device.consumed(*credit_bytes);
    assert_eq!(written(&mut device, 1), [ClientFrame::Credit(v1::Credit { bytes: *credit_bytes })]);
}

#[test]
fn cursor_moves_go_together_and_again_after_a_loss() {
    let mut device = device();
    device.subscribe(&id("c"), Start::After(Seq(7))).unwrap();
    open(&mut device, 0);
    assert_eq!(device.move_cursors(0, &id("c"), Seq(9), Seq(0)), Ok(Seq(7)), "no further than what came");
    device.move_cursors(50, &id("c"), Seq(0), Seq(5)).unwrap();
    assert_eq!(written(&mut device, 100), []);
    let moves = |delivered: &[u64], read: &[u64]| {
        let cursors =
            |seqs: &[u64]| seqs.iter().map(|&seq| v1::Cursor { conversation: "c".into(), seq }).collect::<Vec<_>>();
        ClientFrame::MoveCursors(v1::MoveCursors { delivered: cursors(delivered), read: cursors(read) })
    };
    assert_eq!(device.deadline(), Some(200));
    assert_eq!(written(&mut device, 200), [moves(&[7], &[5])]);
    let confirmed =
        v1::CursorsMoved { delivered: vec![v1::Cursor { conversation: "c".into(), seq: 7 }], ..Default::default() };
    give(&mut device, 210, confirmed).unwrap();
    let frames = open(&mut device, 300);
    assert_eq!(frames.last(), Some(&moves(&[], &[5])));
}

#[test]
fn going_away_waits_for_answers_and_stops_sending() {
    let (mut device, _) = sending(0, &["x", "y"]);
    give(&mut device, 0, v1::GoAway { reason: "drain".into(), within_ms: 1_000 }).unwrap();
    let at = device.deadline().unwrap();
    assert!(at <= 1_000);
    device.tick(at).unwrap();
    assert_eq!(outputs(&mut device).len(), 0);
    give(&mut device, at, sent(1, 1)).unwrap();
    assert_eq!(numbers(&written(&mut device, at)), [], "the next gateway gets it");
    device.tick(at).unwrap();
    assert!(matches!(outputs(&mut device).last(), Some(Output::Leave)));
}

#[test]
fn silence_is_pinged_and_then_ends_the_connection() {
    let mut device = device();
    open(&mut device, 0);
    let at = device.deadline().unwrap();
    device.tick(at).unwrap();
    assert!(matches!(&written(&mut device, at)[..], [ClientFrame::Ping(_)]));
    give(&mut device, at + 1, v1::Pong::default()).unwrap();
    let at = device.deadline().unwrap();
    device.tick(at).unwrap();
    let end = device.deadline().unwrap();
    assert_eq!(device.tick(end - 1), Ok(()));
    assert_eq!(device.tick(end), Err(Violation::Silent));
}

#[test]
fn a_gateway_that_answers_pings_but_no_sends_is_left() {
    let (mut device, _) = sending(0, &["x"]);
    for now in (0..30_000).step_by(1_000) {
        assert_eq!(device.tick(now), Ok(()));
        written(&mut device, now);
        give(&mut device, now, v1::Pong::default()).unwrap();
    }
    assert_eq!(device.tick(30_000), Err(Violation::NoAnswer));
}

#[test]
fn fatal_is_final_unless_it_may_pass() {
    let mut device = device();
    open(&mut device, 0);
    let fatal = |reason: Reason| v1::Fatal { refusal: Some(reason.refusal()) };
    assert!(matches!(give(&mut device, 0, fatal(Reason::Draining)), Err(Violation::Ended(_))));
    give(&mut device, 0, fatal(Reason::SessionSuperseded)).unwrap();
    assert!(matches!(&outputs(&mut device)[..], [Output::Final(r)] if r.reason == "SESSION_SUPERSEDED"));
}

#[test]
fn a_stream_that_is_refused_ends_or_is_tried_again() {
    let mut device = device();
    device.subscribe(&id("c"), Start::After(Seq(4))).unwrap();
    open(&mut device, 0);
    let state = |reason: Reason| v1::ConversationState {
        conversation: "c".into(),
        refusal: Some(reason.refusal()),
        ..Default::default()
    };
    give(&mut device, 0, state(Reason::Unavailable)).unwrap();
    let at = device.deadline().unwrap();
    device.tick(at).unwrap();
    let subscribe = v1::Subscribe { conversation: "c".into(), after_seq: 4, from_head: false };
    assert_eq!(written(&mut device, at), [ClientFrame::Subscribe(subscribe)]);
    give(&mut device, at, state(Reason::NotAParticipant)).unwrap();
    assert!(matches!(&outputs(&mut device)[..], [Output::Ended { .. }]));
    assert!(matches!(&open(&mut device, at)[..], [ClientFrame::Resume(r)] if r.delivered.is_empty()));
}

#[test]
fn what_is_left_at_the_end_says_whether_it_was_transmitted() {
    let (mut device, _) = sending(0, &["x", "y"]);
    device.request(Call::List(v1::ListRequest::default()), "list").unwrap();
    device.finish();
    let left = outputs(&mut device);
    let expected = [
        Output::Abandoned { ticket: "x", maybe_accepted: true },
        Output::Abandoned { ticket: "y", maybe_accepted: false },
        Output::Lost { ticket: "list", maybe_done: false },
    ];
    assert_eq!(left, expected);
}

#[test]
fn frames_in_the_wrong_state_and_unknown_versions_are_violations() {
    let mut device = device();
    assert!(matches!(give(&mut device, 0, v1::UpToDate::default()), Err(Violation::UnexpectedFrame(67))));
    device.connected(0, "token", &[1; 16]);
    assert!(matches!(give(&mut device, 0, sent(1, 1)), Err(Violation::UnexpectedFrame(68))));
    assert_eq!(give(&mut device, 0, v1::Welcome { version: 2, ..welcome() }), Err(Violation::Version(2)));
    give(&mut device, 0, welcome()).unwrap();
    assert!(matches!(give(&mut device, 0, welcome()), Err(Violation::UnexpectedFrame(64))));
}

#[test]
fn a_conversation_without_answers_leaves_the_window_to_the_others() {
    let mut device = device();
    open(&mut device, 0);
    let count = |device: &mut Device, now| {
        let question = question(&written(device, now)).unwrap();
        give(device, now, state(question, 0)).unwrap();
    };
    device.send(1, &id("c"), text("c1"), "c1").unwrap();
    count(&mut device, 1);
    assert_eq!(numbers(&written(&mut device, 1)).len(), 1);
    give(&mut device, 2, sent(1, 1)).unwrap();
    // Its shard dies with a whole window of sends.
    for ticket in ["c2", "c3", "c4", "c5", "c6"] {
        device.send(2, &id("c"), text(ticket), ticket).unwrap();
    }
    assert_eq!(numbers(&written(&mut device, 2)).len(), 4);
    device.send(3, &id("d"), text("d1"), "d1").unwrap();
    count(&mut device, 3);
    let stuck_at = 2 + limits::STUCK_SHARD_MS;
    device.tick(stuck_at - 1).unwrap();
    assert!(written(&mut device, stuck_at - 1).is_empty());
    assert_eq!(device.deadline(), Some(stuck_at));
    assert_eq!(numbers(&written(&mut device, stuck_at)), [(1, 0, &b"d1"[..])], "the other one goes on");
    assert!(written(&mut device, stuck_at + 1).is_empty(), "and the stuck one sends no more");
    give(&mut device, stuck_at + 2, v1::Sent { conversation: "d".into(), ..sent(1, 1) }).unwrap();
    // The shard lives again: its sends count again, and go on.
    for n in 2..=5 {
        give(&mut device, stuck_at + 3, sent(n, n)).unwrap();
    }
    assert_eq!(numbers(&written(&mut device, stuck_at + 3)), [(6, 5, &b"c6"[..])]);
    assert_eq!(answers(&mut device).len(), 6);
}

#[test]
fn what_is_ready_goes_as_one_run_and_its_answers_come_as_one() {
    let (mut device, _) = sending(7, &["probe"]);
    give(&mut device, 0, sent(8, 1)).unwrap();
    answers(&mut device);
    for body in ["a", "b", "c", "d", "e"] {
        device.send(0, &id("c"), text(body), body).unwrap();
    }
    let [ClientFrame::SendRun(run)] = &frames(&mut device, 0)[..] else { panic!("no run") };
    let bodies: Vec<_> = run.items.iter().map(|item| &item.body[..]).collect();
    assert_eq!((run.send_no, run.done_no, &run.conversation[..]), (9, 8, "c"));
    assert_eq!(bodies, [b"a", b"b", b"c", b"d"], "as far as the window goes");
    give(&mut device, 0, v1::Sent { more: 2, ..sent(9, 2) }).unwrap();
    let seqs = |(body, answer)| match answer {
        Answer::Sent { send_no, seq, .. } => (body, send_no.0, seq.0),
        other => panic!("{other:?}"),
    };
    assert_eq!(
        answers(&mut device).into_iter().map(seqs).collect::<Vec<_>>(),
        [("a", 9, 2), ("b", 10, 3), ("c", 11, 4)]
    );
    assert_eq!(numbers(&frames(&mut device, 0)), [(13, 11, &b"e"[..])], "one alone is no run");
    // A gateway that says more than was sent, or the same again, is believed no further.
    give(&mut device, 0, v1::Sent { more: u32::MAX, ..sent(11, 4) }).unwrap();
    assert_eq!(answers(&mut device).into_iter().map(seqs).collect::<Vec<_>>(), [("d", 12, 5), ("e", 13, 6)]);
}

#[test]
fn a_send_with_a_key_or_a_condition_goes_alone() {
    let (mut device, _) = sending(0, &["probe"]);
    give(&mut device, 0, sent(1, 1)).unwrap();
    device.send(0, &id("c"), text("a"), "a").unwrap();
    device.send(0, &id("c"), v1::Send { client_id: "k".into(), ..text("b") }, "b").unwrap();
    device.send(0, &id("c"), v1::Send { expect_version: Some(1), ..text("c") }, "c").unwrap();
    let sent: Vec<_> = frames(&mut device, 0).iter().map(ClientFrame::kind).collect();
    assert_eq!(sent, [5, 5, 5]);
}

/// The numbers of what was answered are behind the gap: no run may reach across it.
#[test]
fn a_run_stops_at_a_gap_in_the_numbers() {
    let (mut device, _) = sending(0, &["probe"]);
    give(&mut device, 0, sent(1, 1)).unwrap();
    for body in ["a", "b", "c", "d"] {
        device.send(0, &id("c"), text(body), body).unwrap();
    }
    assert_eq!(numbers(&written(&mut device, 0)).iter().map(|n| n.0).collect::<Vec<_>>(), [2, 3, 4, 5]);
    // 2 and 3 may have been applied, 4 and 5 were.
    refuse(&mut device, 0, 2, Reason::OutcomeUnknown, 0);
    refuse(&mut device, 0, 3, Reason::OutcomeUnknown, 0);
    give(&mut device, 0, v1::Sent { more: 1, ..sent(4, 4) }).unwrap();
    answers(&mut device);
    for body in ["x", "y"] {
        device.send(0, &id("c"), text(body), body).unwrap();
    }
    let later = 60_000;
    device.tick(later).unwrap();
    let runs: Vec<_> = frames(&mut device, later)
        .into_iter()
        .filter_map(|frame| match frame {
            ClientFrame::SendRun(run) => Some((run.send_no, run.items.into_iter().map(|i| i.body).collect::<Vec<_>>())),
            _ => None,
        })
        .collect();
    assert_eq!(runs, [(2, vec!["a".into(), "b".into()]), (6, vec!["x".into(), "y".into()])]);
}

#[test]
fn a_run_keeps_within_the_limits_of_its_connection() {
    let run_of = |welcome: v1::Welcome| {
        let mut device = device();
        open(&mut device, 0);
        device.send(0, &id("c"), text("probe"), "probe").unwrap();
        let asked = question(&written(&mut device, 0)).unwrap();
        give(&mut device, 0, state(asked, 0)).unwrap();
        written(&mut device, 0);
        device.connected(0, "token", &[1; 16]);
        written(&mut device, 0);
        give(&mut device, 0, welcome).unwrap();
        written(&mut device, 0);
        give(&mut device, 0, sent(1, 1)).unwrap();
        for _ in 0..4 {
            device.send(0, &id("c"), text("twelve bytes"), "x").unwrap();
        }
        frames(&mut device, 0).iter().map(ClientFrame::kind).collect::<Vec<_>>()
    };
    assert_eq!(run_of(welcome()), [10], "all in one");
    assert_eq!(run_of(v1::Welcome { max_run_sends: 0, ..welcome() }), [5; 4], "this gateway knows no runs");
    assert_eq!(run_of(v1::Welcome { max_run_sends: 2, ..welcome() }), [10, 10]);
    assert_eq!(run_of(v1::Welcome { max_frame_bytes: 49 + 2 * 60, ..welcome() }), [10, 10], "two to a frame");
}

#[test]
fn what_is_less_than_what_is_in_flight_waits_for_its_answers_but_not_for_long() {
    let mut device = device();
    device.connected(0, "token", &[1; 16]);
    written(&mut device, 0);
    give(&mut device, 0, v1::Welcome { max_in_flight: 64, ..welcome() }).unwrap();
    device.send(0, &id("c"), text("probe"), "probe").unwrap();
    let asked = question(&written(&mut device, 0)).unwrap();
    give(&mut device, 0, state(asked, 0)).unwrap();
    written(&mut device, 0);
    give(&mut device, 0, sent(1, 1)).unwrap();
    let say = |device: &mut Device, now, count: usize| {
        (0..count).for_each(|_| device.send(now, &id("c"), text("x"), "x").unwrap());
        frames(device, now).len()
    };
    assert_eq!(say(&mut device, 10, 1), 1, "nothing is in flight");
    assert_eq!(say(&mut device, 10, 1), 1, "as much is in flight");
    assert_eq!(say(&mut device, 10, 1), 0, "more is");
    assert_eq!(device.deadline(), Some(10 + limits::RUN_LINGER_MS));
    assert_eq!(say(&mut device, 10, 1), 1, "as much again: one run of two");
    assert_eq!(say(&mut device, 10, 3), 0);
    // An answer to one of four leaves as many in flight as are ready.
    give(&mut device, 11, sent(2, 2)).unwrap();
    assert_eq!(frames(&mut device, 11).len(), 1);
    assert_eq!(say(&mut device, 11, 1), 0);
    device.tick(11 + limits::RUN_LINGER_MS - 1).unwrap();
    assert_eq!(frames(&mut device, 11 + limits::RUN_LINGER_MS - 1).len(), 0);
    device.tick(11 + limits::RUN_LINGER_MS).unwrap();
    assert_eq!(frames(&mut device, 11 + limits::RUN_LINGER_MS).len(), 1, "no answer came, and it goes");
}
