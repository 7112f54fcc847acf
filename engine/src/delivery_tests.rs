//! Tests of the delivery state machine against a model of a broker that drops, delays and changes leaders.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

fn run(first: u64, last: u64) -> Run {
    Run { first: Seq(first), last: Seq(last), removed_at: None }
}

/// What the fan-out carries to the session, in order.
#[derive(Debug, Clone, Copy)]
enum OnTheWay {
    Live(Run),
    Head(u64),
}

/// A conversation, its leader's stream to the gateway, and the session's side of it.
#[derive(Default)]
struct World {
    log: u64,
    removed_at: Option<u64>,
    registered: bool,
    way: VecDeque<OnTheWay>,
    dropped_head: u64,
    read: Option<Pull>,
    room: bool,
    delivered: Vec<u64>,
    delivery: Delivery,
    stopped: bool,
}

#[derive(Debug, Clone)]
enum Op {
    Apply { count: u64, dropped: bool },
    Remove,
    Arrive,
    Beat,
    Room(bool),
    Grant,
    Answer { items: u64 },
    ReadFails,
    Retry,
    LeaderChange,
    Duplicate(u64),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        4 => (1..4u64, any::<bool>()).prop_map(|(count, dropped)| Op::Apply { count, dropped }),
        1 => Just(Op::Remove),
        6 => Just(Op::Arrive),
        1 => Just(Op::Beat),
        2 => any::<bool>().prop_map(Op::Room),
        4 => Just(Op::Grant),
        4 => (0..5u64).prop_map(|items| Op::Answer { items }),
        1 => Just(Op::ReadFails),
        2 => Just(Op::Retry),
        1 => Just(Op::LeaderChange),
        1 => (1..6u64).prop_map(Op::Duplicate),
    ];
    proptest::collection::vec(op, 0..200)
}

impl World {
    fn new(after: u64, log: u64) -> Self {
        let mut world = Self { log, room: true, delivered: (1..=after).collect(), ..Default::default() };
        world.registered = true;
        let step = world.delivery.start(Seq(after), Seq(log));
        world.take(step, 0, 0);
        world
    }

    fn take(&mut self, step: Step, first: u64, last: u64) {
        match step.deliver {
            Deliver::Nothing => {}
            Deliver::All => self.delivered.extend(first..=last),
            Deliver::UpTo(seq) => self.delivered.extend(first..=seq.0),
        }
        if matches!(step.next, Next::Stop(_)) {
            self.stopped = true;
        }
    }

    fn apply(&mut self, count: u64, dropped: bool, removal: bool) {
        let first = self.log + 1;
        self.log += count;
        if removal {
            self.removed_at.get_or_insert(self.log);
        }
        if !self.registered || dropped {
            self.dropped_head = self.log;
            return;
        }
        let removed_at = self.removed_at.filter(|at| (first..=self.log).contains(at)).map(Seq);
        self.way.push_back(OnTheWay::Live(Run { first: Seq(first), last: Seq(self.log), removed_at }));
    }

    fn arrive(&mut self) {
        match self.way.pop_front() {
            Some(OnTheWay::Live(push)) => {
                let step = self.delivery.live(push, self.room);
                self.take(step, push.first.0, push.last.0);
            }
            Some(OnTheWay::Head(head)) => {
                let step = self.delivery.head(Seq(head));
                self.take(step, 0, 0);
            }
            None => {}
        }
    }

    fn answer(&mut self, items: u64) {
        let Some(pull) = self.read.take() else { return };
        let visible = self.removed_at.unwrap_or(self.log);
        if self.removed_at.is_some() && pull.after_seq.0 >= visible {
            let step = self.delivery.refused(Reason::NotAParticipant);
            return self.take(step, 0, 0);
        }
        let (first, last) = (pull.after_seq.0 + 1, visible.min(pull.after_seq.0 + items));
        let removed_at = self.removed_at.filter(|&at| at <= last).map(Seq);
        let page = (first <= last).then_some(Run { first: Seq(first), last: Seq(last), removed_at });
        let step = self.delivery.page(page, Seq(visible), last < visible);
        self.take(step, first, last);
    }

    fn step(&mut self, op: Op) {
        match op {
            Op::Apply { count, dropped } => self.apply(count, dropped, false),
            Op::Remove => self.apply(1, false, true),
            Op::Arrive => self.arrive(),
            Op::Beat if self.registered => self.way.push_back(OnTheWay::Head(self.dropped_head)),
            Op::Beat => {}
            Op::Room(room) => self.room = room,
            Op::Grant if self.room => {
                if let Some(pull) = self.delivery.pull(1) {
                    assert!(self.read.replace(pull).is_none(), "two pages at once");
                }
            }
            Op::Grant => {}
            Op::Answer { items } => self.answer(items),
            Op::ReadFails => {
                if self.read.take().is_some() {
                    let step = self.delivery.refused(Reason::Unavailable);
                    self.take(step, 0, 0);
                }
            }
            Op::Retry => {
                let step = self.delivery.retry();
                self.take(step, 0, 0);
            }
            Op::LeaderChange => {
                // Everything on the way is lost; the next registration tells the head.
                self.way.clear();
                self.registered = !self.registered;
                if self.registered {
                    self.way.push_back(OnTheWay::Head(self.log));
                }
            }
            Op::Duplicate(back) => {
                let first = self.log.saturating_sub(back) + 1;
                if first <= self.log && self.removed_at.is_none() {
                    self.way.push_back(OnTheWay::Live(run(first, self.log)));
                }
            }
        }
    }

    /// Nothing fails any more and no further event is applied: whatever was missed must come by itself.
    fn quiesce(&mut self) {
        self.room = true;
        if !self.registered {
            self.step(Op::LeaderChange);
        }
        self.step(Op::Beat);
        for _ in 0..10_000 {
            for op in [Op::Arrive, Op::Retry, Op::Grant, Op::Answer { items: 3 }] {
                self.step(op);
            }
            if self.way.is_empty() && self.read.is_none() && (self.delivery.is_live() || self.stopped) {
                return;
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]
    #[test]
    fn every_seq_comes_once_in_order_and_the_head_is_reached(after in 0..5u64, more in 0..5u64, ops in ops()) {
        let mut world = World::new(after, after + more);
        for op in ops {
            world.step(op);
            prop_assert!(world.delivered.iter().copied().eq(1..=world.delivered.len() as u64), "{:?}", world.delivered);
        }
        world.quiesce();
        let end = world.removed_at.unwrap_or(world.log);
        prop_assert!(world.delivered.iter().copied().eq(1..=end), "{:?} of {end}", world.delivered);
        prop_assert_eq!(world.stopped, world.removed_at.is_some());
        prop_assert!(world.stopped || world.delivery.is_live());
    }
}

/// Chance beside an operation.
#[derive(Debug, Clone, Copy)]
struct Dice {
    /// The inbox has room.
    fits: bool,
    /// The session looks into its inbox when this is 0.
    takes: u8,
    /// It tries to rest when this is 0.
    rests: u8,
}

fn dice() -> impl Strategy<Value = Vec<Dice>> {
    let dice = (any::<bool>(), 0..6u8, 0..3u8).prop_map(|(fits, takes, rests)| Dice { fits, takes, rests });
    proptest::collection::vec(dice, 200)
}

/// The same world with what a gateway has between: what was told to all streams, the session's inbox, and the rest.
#[derive(Default)]
struct Resting {
    world: World,
    told: Told,
    pushes: VecDeque<(Seq, Run)>,
    head: Option<HeadNews>,
    rests: bool,
}

impl Resting {
    /// What comes from the leader is told: the inbox drops what it has no room for, and remembers its head.
    fn tell(&mut self, kept: bool) {
        match self.world.way.pop_front() {
            Some(OnTheWay::Live(push)) => {
                let before = self.told.tell(push.last);
                let held = self.head.is_some_and(|news| news.holds_back());
                if kept && !held {
                    self.pushes.push_back((before, push));
                } else {
                    self.head(HeadNews::new(push.last, before, false));
                }
            }
            Some(OnTheWay::Head(head)) => {
                let before = self.told.tell(Seq(head));
                self.head(HeadNews::new(Seq(head), before, true));
            }
            None => {}
        }
    }

    fn head(&mut self, news: HeadNews) {
        self.head.get_or_insert(news).raise(news);
    }

    fn wake(&mut self, at: Seq) {
        assert_eq!(at.0, self.world.delivered.len() as u64, "it is told where it stands");
        self.world.delivery = Delivery::live_at(at);
    }

    /// The session takes all that is in its inbox, pushes first.
    fn take(&mut self) {
        for (before, push) in std::mem::take(&mut self.pushes) {
            if self.rests {
                self.wake(before);
            }
            let step = self.world.delivery.live(push, self.world.room);
            self.rests &= step.next == Next::Wait;
            self.world.take(step, push.first.0, push.last.0);
        }
        let Some(news) = self.head.take() else { return };
        if self.rests && news.holds_back() {
            self.wake(news.before);
            self.rests = false;
        }
        if !self.rests {
            let step = self.world.delivery.head(news.head);
            self.world.take(step, 0, 0);
        }
    }

    fn rest(&mut self) {
        let taken = self.pushes.is_empty() && self.head.is_none();
        if !self.rests && taken && self.world.delivery.rests_at() == Some(self.told.upto()) {
            self.rests = true;
            // Nothing of it may be needed any more.
            self.world.delivery = Delivery::new();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]
    #[test]
    fn a_stream_that_rests_gets_the_same(after in 0..5u64, more in 0..5u64, ops in ops(), dice in dice()) {
        let mut resting = Resting { world: World::new(after, after + more), ..Default::default() };
        resting.told.tell(Seq(after + more));
        for (op, dice) in ops.into_iter().zip(dice) {
            match op {
                // Several come before the session looks.
                Op::Arrive => resting.tell(dice.fits),
                op => resting.world.step(op),
            }
            if dice.rests == 0 {
                resting.rest();
            }
            if dice.takes == 0 {
                resting.take();
            }
            let delivered = &resting.world.delivered;
            prop_assert!(delivered.iter().copied().eq(1..=delivered.len() as u64), "{:?}", delivered);
        }
        resting.world.room = true;
        if !resting.world.registered {
            resting.world.step(Op::LeaderChange);
        }
        resting.world.step(Op::Beat);
        for _ in 0..10_000 {
            if resting.world.way.is_empty() && (resting.rests || resting.world.stopped) {
                break;
            }
            resting.tell(true);
            resting.take();
            resting.rest();
            for op in [Op::Retry, Op::Grant, Op::Answer { items: 3 }] {
                resting.world.step(op);
            }
        }
        let end = resting.world.removed_at.unwrap_or(resting.world.log);
        prop_assert!(resting.world.delivered.iter().copied().eq(1..=end), "{:?} of {end}", resting.world.delivered);
        prop_assert_eq!(resting.world.stopped, resting.world.removed_at.is_some());
        prop_assert!(resting.world.stopped || resting.rests, "a stream at the head rests in the end");
    }
}

#[test]
fn an_event_between_registration_and_catch_up_needs_no_later_event() {
    // Registered at head 5, catching up from 3; the event 6 is applied while the page is read, which ends at 5.
    let mut world = World::new(3, 5);
    world.step(Op::Grant);
    world.apply(1, false, false);
    world.arrive();
    let pull = world.read.take().unwrap();
    assert_eq!(pull.after_seq, Seq(3));
    let step = world.delivery.page(Some(run(4, 5)), Seq(5), false);
    assert_eq!(step.next, Next::Hungry);
    world.take(step, 4, 5);
    world.step(Op::Grant);
    world.answer(10);
    assert_eq!(world.delivered, [1, 2, 3, 4, 5, 6]);
    assert!(world.delivery.is_live());
}

#[test]
fn an_event_lost_with_its_leader_comes_with_the_next_registration() {
    let mut world = World::new(5, 5);
    assert!(world.delivery.is_live());
    world.step(Op::LeaderChange);
    world.apply(1, false, false);
    world.step(Op::LeaderChange);
    for op in [Op::Arrive, Op::Grant, Op::Answer { items: 10 }] {
        world.step(op);
    }
    assert_eq!(world.delivered, [1, 2, 3, 4, 5, 6]);
}

#[test]
fn live_events_wait_for_the_start() {
    let mut delivery = Delivery::new();
    assert_eq!(delivery.live(run(8, 8), true), Step::NOTHING);
    assert_eq!(delivery.start(Seq(7), Seq(7)).next, Next::Hungry);
    assert_eq!(delivery.pull(100), Some(Pull { after_seq: Seq(7), max_bytes: 100 }));
    assert_eq!(delivery.pull(100), None);
}

#[test]
fn the_own_removal_is_the_last_event() {
    let mut delivery = Delivery::new();
    let _ = delivery.start(Seq(1), Seq(1));
    let step = delivery.live(Run { first: Seq(2), last: Seq(9), removed_at: Some(Seq(4)) }, true);
    assert_eq!(step, Step { deliver: Deliver::UpTo(Seq(4)), next: Next::Stop(Reason::NotAParticipant) });
    assert_eq!(delivery.live(run(5, 5), true), Step::NOTHING);
    assert_eq!(delivery.head(Seq(20)), Step::NOTHING);
}

#[test]
fn a_page_that_cannot_be_read_is_asked_for_slowly() {
    let mut delivery = Delivery::new();
    assert_eq!(delivery.start(Seq(0), Seq(4)).next, Next::Hungry);
    let _ = delivery.pull(10);
    assert_eq!(delivery.page(None, Seq(0), false).next, Next::Rest);
    assert_eq!(delivery.retry().next, Next::Hungry);
    let _ = delivery.pull(10);
    assert_eq!(delivery.page(Some(run(2, 4)), Seq(4), false).next, Next::Rest);
    assert_eq!(delivery.refused(Reason::NotAParticipant).next, Next::Stop(Reason::NotAParticipant));
}

fn record(seq: u64, kind: EventKind, subject: &'static str) -> Item {
    let header = EventHeader { seq, kind: kind.into(), subject: subject.into(), ..Default::default() };
    let mut out = Vec::new();
    record::encode(&header, b"x", 0, 0, &mut out);
    Item { item: Some(item::Item::Record(out.into())) }
}

#[test]
fn pages_are_read_for_density_and_removal() {
    let hidden = |from, to| Item {
        item: Some(item::Item::Hidden(stentor_proto::v1::Hidden { from, to, ..Default::default() })),
    };
    let items = [hidden(3, 5), record(6, EventKind::Message, ""), record(7, EventKind::ParticipantRemoved, "ann")];
    assert_eq!(run_of_items(&items, "bob"), Ok(Some(run(3, 7))));
    let removed = Run { removed_at: Some(Seq(7)), ..run(3, 7) };
    assert_eq!(run_of_items(&items, "ann"), Ok(Some(removed)));
    let back = [items[2].clone(), record(8, EventKind::ParticipantAdded, "ann")];
    assert_eq!(run_of_items(&back, "ann"), Ok(Some(run(7, 8))));
    assert_eq!(run_of_items(&[], "ann"), Ok(None));
    let gap = [hidden(1, 2), record(4, EventKind::Message, "")];
    assert_eq!(run_of_items(&gap, "ann"), Err(BadRun::NotDense(Seq(2))));
    for bad in [vec![hidden(5, 4)], vec![hidden(0, 4)], vec![hidden(1, u64::MAX)], vec![Item { item: None }]] {
        assert!(run_of_items(&bad, "ann").is_err(), "{bad:?}");
    }
}
