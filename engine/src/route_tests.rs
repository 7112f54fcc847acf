//! Tests of the pipe against a flaky leader that follows apply's send_no rule.

use proptest::prelude::*;

use super::*;

const LIMITS: PipeLimits = PipeLimits { entries: 16, bytes: 1024 };

fn broker(n: u32) -> BrokerId {
    BrokerId(n)
}

/// What a proposal of the model says: the send number of one device in one conversation.
fn command(send_no: u64) -> Bytes {
    send_no.to_le_bytes().to_vec().into()
}

fn send_no(command: &Bytes) -> u64 {
    u64::from_le_bytes(command[..].try_into().unwrap())
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Answer {
    Accepted { seq: usize },
    OutOfOrder,
}

/// The shard (its log of accepted sends), streams that carry proposals and answers, and the device behind the pipe.
struct World {
    pipe: Pipe<u64>,
    log: Vec<u64>,
    /// Every stream there ever was; the last one is the present one, the others are zombies that still reach apply.
    streams: Vec<VecDeque<(u64, u64)>>,
    answers: VecDeque<(usize, u64, Answer)>,
    next_send: u64,
    results: Vec<Option<usize>>,
}

#[derive(Debug, Clone)]
enum Op {
    Send,
    Apply { stream: usize },
    Answer,
    LoseAnswer,
    Break { zombie: bool },
    NotLeader,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        6 => Just(Op::Send),
        6 => (0..3usize).prop_map(|stream| Op::Apply { stream }),
        6 => Just(Op::Answer),
        1 => any::<bool>().prop_map(|zombie| Op::Break { zombie }),
        1 => Just(Op::NotLeader),
        1 => Just(Op::LoseAnswer),
    ];
    proptest::collection::vec(op, 0..300)
}

impl World {
    fn new() -> Self {
        Self {
            pipe: Pipe::new(1, LIMITS),
            log: Vec::new(),
            streams: vec![VecDeque::new()],
            answers: VecDeque::new(),
            next_send: 1,
            results: Vec::new(),
        }
    }

    fn flush(&mut self) {
        let stream = self.streams.last_mut().unwrap();
        self.pipe.send(|id, command| stream.push_back((id, send_no(command))));
    }

    fn step(&mut self, op: &Op) {
        match *op {
            Op::Send => {
                if self.pipe.push(command(self.next_send), self.next_send, 0).is_ok() {
                    self.results.push(None);
                    self.next_send += 1;
                    self.flush();
                }
            }
            Op::Apply { stream } => {
                let stream = self.streams.len().saturating_sub(1 + stream);
                let Some((id, send_no)) = self.streams[stream].pop_front() else { return };
                let last = self.log.len() as u64;
                let answer = if send_no == last + 1 {
                    self.log.push(send_no);
                    Answer::Accepted { seq: self.log.len() }
                } else if send_no <= last {
                    Answer::Accepted { seq: send_no as usize }
                } else {
                    Answer::OutOfOrder
                };
                self.answers.push_back((stream, id, answer));
            }
            Op::Answer => {
                let Some((_, id, answer)) = self.answers.pop_front() else { return };
                let Some(Answered { tag: send_no, .. }) = self.pipe.answered(id) else { return };
                let Answer::Accepted { seq } = answer else { panic!("a pipe in order met OUT_OF_ORDER") };
                assert!(self.results[send_no as usize - 1].replace(seq).is_none(), "answered twice");
            }
            Op::LoseAnswer => {
                // Only a broken stream loses answers.
                self.answers.clear();
                self.step(&Op::Break { zombie: false });
            }
            Op::Break { zombie } => {
                if !zombie {
                    self.streams.last_mut().unwrap().clear();
                }
                self.streams.push(VecDeque::new());
                self.pipe.reset();
                self.flush();
            }
            Op::NotLeader => {
                // The same stream goes on: what it carries is refused, one by one, and the first refusal resets.
                self.streams.last_mut().unwrap().clear();
                self.pipe.reset();
                self.flush();
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]
    #[test]
    fn nothing_is_doubled_or_reordered_by_a_flaky_leader(ops in ops()) {
        let mut world = World::new();
        for op in &ops {
            world.step(op);
            prop_assert!(world.pipe.len() <= LIMITS.entries);
        }
        world.step(&Op::Break { zombie: true });
        for _ in 0..1_000 {
            world.step(&Op::Apply { stream: 0 });
            world.step(&Op::Answer);
        }
        prop_assert!(world.pipe.is_empty());
        prop_assert!(world.log.iter().copied().eq(1..world.next_send));
        prop_assert!(world.results.iter().enumerate().all(|(i, seq)| *seq == Some(i + 1)));
    }
}

#[test]
fn a_full_pipe_refuses_and_changes_nothing() {
    let mut pipe = Pipe::new(1, PipeLimits { entries: 2, bytes: 100 });
    pipe.push(Bytes::from(vec![0; 200]), 'a', 0).unwrap();
    assert_eq!(pipe.push(Bytes::from_static(b"x"), 'b', 0), Err(Full));
    let mut ids = Vec::new();
    pipe.send(|id, _| ids.push(id));
    assert_eq!(pipe.answered(ids[0]).map(|a| a.tag), Some('a'));
    assert_eq!(pipe.answered(ids[0]), None);
    pipe.push(Bytes::from_static(b"x"), 'b', 5).unwrap();
    pipe.push(Bytes::from_static(b"y"), 'c', 6).unwrap();
    assert_eq!(pipe.push(Bytes::from_static(b"z"), 'd', 7), Err(Full));
    assert_eq!(pipe.oldest_ms(), Some(5));
}

#[test]
fn answers_may_come_in_any_order_and_old_attempts_meet_nobody() {
    let mut pipe = Pipe::new(10, LIMITS);
    for tag in 0..4 {
        pipe.push(command(tag), tag, 0).unwrap();
    }
    let mut first = Vec::new();
    pipe.send(|id, _| first.push(id));
    assert_eq!(first, [10, 11, 12, 13]);
    assert_eq!(pipe.answered(12).map(|a| a.tag), Some(2));
    assert!(pipe.awaits(11) && !pipe.awaits(12));
    pipe.reset();
    assert_eq!(pipe.answered(11), None);
    let mut second = Vec::new();
    pipe.send(|id, command| second.push((id, send_no(command))));
    assert_eq!(second, [(14, 0), (15, 1), (16, 3)]);
    assert_eq!(pipe.answered(16).map(|a| a.tag), Some(3));
    assert_eq!(pipe.answered(14).map(|a| a.tag), Some(0));
    assert_eq!(pipe.len(), 1);
}

#[test]
fn what_waited_too_long_is_given_up_from_the_front() {
    let mut pipe = Pipe::new(1, LIMITS);
    for (tag, at_ms) in [(0, 5), (1, 6), (2, 9)] {
        pipe.push(command(tag), tag, at_ms).unwrap();
    }
    let mut ids = Vec::new();
    pipe.send(|id, _| ids.push(id));
    assert_eq!(pipe.answered(ids[1]).map(|a| a.tag), Some(1));
    let mut gone = Vec::new();
    pipe.expire(8, |tag, what| gone.push((tag, what)));
    assert_eq!(gone, [(0, Expired::Unknown)]);
    assert_eq!(pipe.answered(ids[0]), None);
    assert_eq!(pipe.answered(ids[2]).map(|a| a.tag), Some(2));
    assert!(pipe.is_empty());
}

#[test]
fn what_was_sent_on_any_route_is_never_said_to_have_not_happened() {
    let mut pipe = Pipe::new(1, LIMITS);
    pipe.push(command(0), 0, 1).unwrap();
    pipe.send(|_, _| {});
    pipe.reset();
    pipe.push(command(1), 1, 2).unwrap();
    let mut gone = Vec::new();
    pipe.expire(2, |tag, what| gone.push((tag, what)));
    assert_eq!(gone, [(0, Expired::Unknown), (1, Expired::Unsent)]);
}

#[test]
fn a_refusal_after_an_attempt_without_an_answer_is_doubted() {
    let mut pipe = Pipe::new(1, LIMITS);
    (0..3).for_each(|tag| pipe.push(command(tag), tag, 1).unwrap());
    let mut ids = Vec::new();
    pipe.send(|id, _| ids.push(id));
    pipe.not_proposed(ids[0]);
    pipe.reset();
    pipe.push(command(3), 3, 1).unwrap();
    ids.clear();
    pipe.send(|id, _| ids.push(id));
    // Doubt stays, whatever a later attempt is told.
    pipe.not_proposed(ids[1]);
    pipe.reset();
    ids.clear();
    pipe.send(|id, _| ids.push(id));
    let told: Vec<_> = ids.iter().filter_map(|&id| pipe.answered(id)).map(|a| (a.tag, a.doubt)).collect();
    assert_eq!(told, [(0, true), (1, true), (2, true), (3, true)], "the second reset said nothing of these attempts");

    let mut pipe = Pipe::new(1, LIMITS);
    (0..2).for_each(|tag| pipe.push(command(tag), tag, 1).unwrap());
    ids.clear();
    pipe.send(|id, _| ids.push(id));
    pipe.not_proposed(ids[0]);
    pipe.reset();
    ids.clear();
    pipe.send(|id, _| ids.push(id));
    let told: Vec<_> = ids.iter().filter_map(|&id| pipe.answered(id)).map(|a| (a.tag, a.doubt)).collect();
    assert_eq!(told, [(0, false), (1, true)]);
}

#[test]
fn a_redirect_is_followed_once_at_once_and_then_slowly() {
    let mut route = Route::default();
    assert!(route.placed(vec![broker(1), broker(2), broker(3)], None));
    assert_eq!(route.target(), Some(broker(1)));
    assert_eq!(route.not_leader(broker(1), Some(broker(3))), Some(0));
    assert_eq!(route.target(), Some(broker(3)));
    assert_eq!(route.not_leader(broker(1), Some(broker(2))), None, "a late answer moves nothing");
    assert!(route.not_leader(broker(3), Some(broker(1))) > Some(0));
    assert!(route.not_leader(broker(1), None) > Some(10));
    assert_eq!(route.target(), Some(broker(2)));
    route.confirmed();
    assert_eq!(route.lost(broker(2)), Some(10));
    assert_eq!(route.target(), Some(broker(3)));
    assert_eq!(route.lost(broker(3)).map(|ms| ms > 10), Some(true));
    assert_eq!(route.target(), Some(broker(1)), "round and round");
}

#[test]
fn a_leader_that_is_not_ready_is_asked_again_but_not_for_ever() {
    let mut route = Route::default();
    route.placed(vec![broker(1), broker(2), broker(3)], None);
    // The old one is gone, and nobody knows the new one for a while.
    route.lost(broker(1));
    let ask = |route: &mut Route| route.target().map(|target| route.not_leader(target, None));
    for _ in 0..7 {
        ask(&mut route);
    }
    while route.target() != Some(broker(2)) {
        ask(&mut route);
    }
    for round in 0..2 {
        let pauses: Vec<_> = (0..5).filter_map(|_| route.not_leader(broker(2), Some(broker(2)))).collect();
        assert_eq!((pauses, route.target()), (vec![10, 20, 40, 80, 160], Some(broker(2))), "{round}");
        if round == 0 {
            route.confirmed();
        }
    }
    assert_eq!(route.not_leader(broker(2), Some(broker(2))), Some(10));
    assert_eq!(route.target(), Some(broker(3)), "it may be cut off, and somebody else know who leads now");
    route.not_leader(broker(3), Some(broker(2)));
    assert_eq!(route.not_leader(broker(2), Some(broker(2))), Some(10), "told of it again, it is asked again");
    assert_eq!(route.target(), Some(broker(2)));
}

#[test]
fn a_new_placement_keeps_a_working_target() {
    let mut route = Route::default();
    route.placed(vec![broker(1), broker(2)], Some(broker(2)));
    assert!(!route.placed(vec![broker(2), broker(3)], Some(broker(3))));
    assert!(route.placed(vec![broker(1), broker(3)], Some(broker(3))));
    assert_eq!(route.target(), Some(broker(3)));
    let mut none = Route::default();
    assert!(!none.placed(vec![], None));
    assert_eq!(none.lost(broker(1)), None);
}
