//! What the invariants are worth: random histories of a correct conversation pass all of them, and each kind of breach,
//! made by hand, is found by its own invariant and by no other.

use proptest::prelude::*;
use stentor_client::EventKind;

use super::story::{Story, message};
use crate::oracle::{Answer, Call, Device, Event, History, Interval, Item, Moment, Operation, Outcome, Start, judge};

fn ann() -> Device {
    Device::new("ann", "phone")
}

fn bob() -> Device {
    Device::new("bob", "desk")
}

fn bob2() -> Device {
    Device::new("bob", "phone")
}

/// Events 1 to 3 are the creation; what follows has something for every invariant.
fn correct() -> History {
    let mut s = Story::new(&ann(), &["bob", "cid"], false);
    s.subscribe(&ann(), Start::After(0));
    s.send(&ann(), "a1"); // 4
    s.send(&bob(), "b1"); // 5
    s.deliver(0);
    s.confirm(0, true);
    s.done(&bob(), Call::Read { linearizable: true, after: Some(0) });
    s.done(&bob(), Call::Read { linearizable: false, after: Some(2) });
    s.done(&ann(), Call::Remove("bob".into())); // 6
    s.send(&bob(), "b2"); // refused
    s.done(&ann(), Call::Add("bob".into())); // 7
    let lost = s.invoke(&bob(), message("b3", Some("k")));
    s.apply(lost); // 8
    s.done(&bob(), message("b3", Some("k")));
    s.subscribe(&bob(), Start::After(0));
    s.deliver(1);
    s.confirm(1, false);
    s.send(&ann(), "a2"); // 9
    s.send(&ann(), "a3"); // 10
    s.deliver(0);
    s.deliver(1);
    s.confirm(1, true);
    s.subscribe(&bob2(), Start::Head);
    s.send(&bob(), "b4"); // 11
    s.deliver(2);
    s.subscribe(&bob(), Start::After(5));
    s.deliver(3);
    s.end(&ann())
}

fn broken(change: impl FnOnce(&mut History)) -> Vec<&'static str> {
    let mut history = correct();
    change(&mut history);
    judge(&history).broken()
}

fn operation<'h>(history: &'h mut History, body: &str) -> &'h mut Operation {
    let is_it = |o: &&mut Operation| o.message().is_some_and(|m| m.body == body.as_bytes());
    history.operations.iter_mut().rfind(is_it).unwrap()
}

/// Everything that readers saw, to be changed alike.
fn everywhere(history: &mut History, mut change: impl FnMut(&mut Event)) {
    let read = history.operations.iter_mut().filter_map(|operation| match &mut operation.outcome {
        Outcome::Acknowledged(Answer::Page(page)) => Some(&mut page.items),
        _ => None,
    });
    let whole = history.finals.iter_mut().map(|last| &mut last.items);
    let items = read.chain(whole).flatten();
    let streamed = history.streams.iter_mut().flat_map(|stream| stream.items.iter_mut().map(|(_, item)| item));
    for item in items.chain(streamed) {
        if let Item::Event(event) = item {
            change(event);
        }
    }
}

fn acknowledge(operation: &mut Operation, new: u64) {
    let Outcome::Acknowledged(Answer::Event { seq, .. }) = &mut operation.outcome else { unreachable!() };
    *seq = new;
}

fn page(history: &mut History, linearizable_wanted: bool) -> &mut Operation {
    let is_it =
        |o: &&mut Operation| matches!(o.call, Call::Read { linearizable, .. } if linearizable == linearizable_wanted);
    history.operations.iter_mut().find(is_it).unwrap()
}

fn shorten(operation: &mut Operation, upto: u64) {
    let Outcome::Acknowledged(Answer::Page(page)) = &mut operation.outcome else { unreachable!() };
    page.items.retain(|item| item.span().1 <= upto);
    page.head = upto;
}

#[test]
fn the_story_itself_keeps_every_promise_and_much_is_judged() {
    let verdict = judge(&correct());
    assert_eq!(verdict.violations, []);
    let j = verdict.judged;
    assert_eq!((j.acknowledged, j.refused, j.unknown, j.events, j.streams), (11, 1, 1, 11, 4));
    assert!(j.deliveries > 20 && j.cursors > 5, "{j:?}");
}

#[test]
fn i1_an_acknowledged_event_that_is_gone_in_the_end() {
    // Nobody else saw the last one, so that only its sender's acknowledgement speaks of it.
    let lose_last = |history: &mut History| {
        let last = &mut history.finals[0];
        last.items.pop();
        last.head -= 1;
        history.streams.iter_mut().for_each(|s| s.items.retain(|(_, item)| item.span().1 != 11));
    };
    assert_eq!(broken(lose_last), ["I1"]);
}

#[test]
fn i1_another_event_in_the_place_of_the_acknowledged_one() {
    let swapped = |history: &mut History| {
        // The unknown attempt of another message is what all readers see there.
        let mut other = operation(history, "a3").clone();
        (other.by, other.call, other.outcome) = (Device::new("ann", "desk"), message("a4", None), Outcome::Unknown);
        everywhere(history, |event| {
            if event.seq == 10 {
                event.body = "a4".into();
            }
        });
        history.operations.push(other);
    };
    assert_eq!(broken(swapped), ["I1"]);
}

#[test]
fn i1_acknowledgements_that_nobody_looked_after() {
    assert_eq!(broken(|history| history.finals.clear()), ["I1"]);
}

#[test]
fn i2_a_gap_or_a_repeat_in_a_stream_a_page_or_the_end() {
    assert_eq!(broken(|h| drop(h.streams[0].items.remove(2))), ["I2"]);
    let twice = |h: &mut History| {
        let again = h.streams[0].items[2].clone();
        h.streams[0].items.insert(3, again);
    };
    assert_eq!(broken(twice), ["I2"]);
    let page_gap = |h: &mut History| {
        let Outcome::Acknowledged(Answer::Page(page)) = &mut page(h, true).outcome else { unreachable!() };
        page.items.remove(1);
    };
    assert_eq!(broken(page_gap), ["I2"]);
    let early_end = |h: &mut History| {
        let Outcome::Acknowledged(Answer::Page(page)) = &mut page(h, true).outcome else { unreachable!() };
        page.items.pop();
    };
    assert_eq!(broken(early_end), ["I2"]);
    // A message that is a gap in the end: its sender never had an answer, so nothing acknowledged is lost.
    let gap_at_the_end = |h: &mut History| {
        h.operations.retain(|o| o.message().is_none_or(|m| m.body != "b3"));
        h.finals[0].items.retain(|item| item.span().0 != 8);
        h.streams.iter_mut().for_each(|s| s.items.retain(|(_, item)| item.span().1 < 8));
        h.moves.clear();
        h.seen.clear();
    };
    assert_eq!(broken(gap_at_the_end), ["I2"]);
}

#[test]
fn i2_hidden_from_one_who_may_see_it() {
    let hide = |h: &mut History| {
        let stream = &mut h.streams[1].items;
        let at = stream.iter().position(|(_, item)| item.span() == (9, 9)).unwrap();
        stream[at].1 = Item::Hidden { from: 9, to: 9 };
    };
    assert_eq!(broken(hide), ["I2"]);
}

#[test]
fn i2_one_seq_given_to_two_messages() {
    let same = |h: &mut History| {
        // The second answer came while the first send was still under way, so that no order is contradicted.
        let answered = operation(h, "a3").interval;
        let first = operation(h, "a2");
        first.interval.answered = answered.answered;
        let invoked = first.interval.invoked;
        let event = Outcome::Acknowledged(Answer::Event { seq: 9, repeat: false });
        let mut other = operation(h, "a3").clone();
        (other.interval.invoked, other.outcome) = (invoked, event);
        (other.by, other.call) = (Device::new("cid", "desk"), Call::Add("dan".into()));
        h.operations.push(other);
    };
    let mut history = correct();
    same(&mut history);
    // What was acknowledged and is not what stands there is lost as well: there is no way to be one without the other.
    assert_eq!(judge(&history).broken(), ["I1", "I2"]);
}

#[test]
fn i3_two_attempts_under_one_key_become_two_events() {
    let twice = |h: &mut History| {
        // The retry is acknowledged as an event of its own, which stands at the end.
        h.operations.retain(|o| o.message().is_none_or(|m| m.body != "b4"));
        everywhere(h, |event| {
            if event.seq == 11 {
                event.client_id = "k".into();
                event.body = "b3".into();
            }
        });
    };
    assert_eq!(broken(twice), ["I3"]);
}

#[test]
fn i3_attempts_of_one_message_that_are_told_different_seqs() {
    let mut s = Story::new(&ann(), &[], false);
    let first = s.invoke(&ann(), message("x", Some("k")));
    let second = s.invoke(&ann(), message("x", Some("k")));
    s.send(&ann(), "y");
    s.apply(first);
    s.apply(second);
    s.answer(first);
    s.answer(second);
    let mut history = s.end(&ann());
    assert!(judge(&history).is_clean());
    acknowledge(&mut history.operations[second], 2);
    // It also points at what is not that message, and at a seq that is another's.
    let broken = judge(&history).broken();
    assert!(broken.contains(&"I3"), "{broken:?}");
}

#[test]
fn i4_other_bytes_another_order_or_an_invention() {
    let damaged = |h: &mut History| h.damaged.push((bob(), "c".into(), "a checksum".into()));
    assert_eq!(broken(damaged), ["I4"]);
    let other_bytes = |h: &mut History| {
        let Item::Event(event) = &mut h.streams[1].items.last_mut().unwrap().1 else { unreachable!() };
        event.body = "a2".into();
        event.stamp_ms += 1;
    };
    assert_eq!(broken(other_bytes), ["I4"]);
    let invented = |h: &mut History| {
        h.operations.retain(|o| o.message().is_none_or(|m| m.body != "b4"));
    };
    assert_eq!(broken(invented), ["I4"]);
}

#[test]
fn i5_a_cursor_beyond_what_came_or_was_confirmed_or_back() {
    let beyond = |h: &mut History| h.seen.iter_mut().filter(|s| s.delivered == 5).for_each(|s| s.delivered = 6);
    assert_eq!(broken(beyond), ["I5"]);
    // Confirmed, but it had not come.
    let eager = |h: &mut History| {
        h.moves[0].delivered = 6;
        h.seen.iter_mut().filter(|s| s.delivered == 5).for_each(|s| s.delivered = 6);
    };
    assert_eq!(broken(eager), ["I5"]);
    let back = |h: &mut History| {
        let last = h.seen.last_mut().unwrap();
        assert!(!last.moved && last.delivered > 8 && last.by == bob());
        last.delivered -= 1;
    };
    assert_eq!(broken(back), ["I5"]);
    let read_back = |h: &mut History| h.seen.last_mut().unwrap().read -= 1;
    assert_eq!(broken(read_back), ["I5"]);
    let read_beyond = |h: &mut History| h.seen.last_mut().unwrap().read += 1;
    assert_eq!(broken(read_beyond), ["I5"]);
}

#[test]
fn i6_a_read_without_the_readers_own_write() {
    assert_eq!(broken(|h| shorten(page(h, false), 4)), ["I6"]);
}

#[test]
fn i7_an_event_for_one_who_was_removed() {
    // The stretch between removal and return, shown instead of hidden: nothing but the adding itself lies in it.
    let mut s = Story::new(&ann(), &["bob"], false);
    s.subscribe(&bob(), Start::After(0));
    s.done(&ann(), Call::Remove("bob".into())); // 3
    s.send(&ann(), "secret"); // 4
    s.done(&ann(), Call::Add("bob".into())); // 5
    s.deliver(0);
    let mut history = s.end(&ann());
    assert!(judge(&history).is_clean());
    let Item::Event(secret) = history.finals[0].items[3].clone() else { unreachable!() };
    let hidden = history.streams[0].items.iter_mut().find(|(_, item)| item.span() == (4, 4)).unwrap();
    hidden.1 = Item::Event(secret);
    assert_eq!(judge(&history).broken(), ["I7"]);
}

#[test]
fn i7_what_came_before_a_user_was_added() {
    let mut s = Story::new(&ann(), &[], true);
    s.send(&ann(), "old");
    s.done(&ann(), Call::Add("bob".into()));
    s.subscribe(&bob(), Start::After(0));
    s.deliver(0);
    let mut history = s.end(&ann());
    assert!(judge(&history).is_clean(), "history is shown in full");
    history.operations[0].call = Call::Create { history_full: false };
    assert_eq!(judge(&history).broken(), ["I7"]);
}

#[test]
fn i9_a_linearizable_read_that_is_stale_or_ahead() {
    // By one who wrote nothing: for him only the order between clients counts.
    let mut s = Story::new(&ann(), &["bob"], false);
    s.send(&ann(), "a1"); // 3
    let read = s.done(&bob(), Call::Read { linearizable: true, after: Some(0) });
    let late = s.send(&ann(), "a2"); // 4
    let history = s.end(&ann());
    assert!(judge(&history).is_clean());
    let mut stale = history.clone();
    shorten(&mut stale.operations[read], 2);
    assert_eq!(judge(&stale).broken(), ["I9"]);
    let mut ahead = history.clone();
    let Outcome::Acknowledged(Answer::Page(page)) = &mut ahead.operations[read].outcome else { unreachable!() };
    page.items = history.finals[0].items[1..].to_vec();
    page.items.insert(0, Item::Hidden { from: 1, to: 1 });
    page.head = 4;
    assert_eq!(judge(&ahead).broken(), ["I9"]);
    // The same read is right while the send was under way.
    ahead.operations[late].interval.invoked = ahead.operations[read].interval.invoked;
    assert!(judge(&ahead).is_clean());
}

#[test]
fn i9_appends_that_contradict_the_order_in_which_clients_saw_them() {
    let mut s = Story::new(&ann(), &["bob"], false);
    let first = s.invoke(&ann(), message("a", None));
    let second = s.invoke(&bob(), message("b", None));
    s.apply(second);
    s.apply(first);
    s.answer(first);
    s.answer(second);
    let mut history = s.end(&ann());
    assert!(judge(&history).is_clean());
    // The one with the higher seq was answered before the other was invoked.
    let answered = history.operations[first].interval.answered.unwrap();
    history.operations[second].interval.invoked = Moment(answered.0 + 1);
    history.operations[second].interval.answered = Some(Moment(answered.0 + 2));
    assert_eq!(judge(&history).broken(), ["I9"]);
}

#[test]
fn i9_carried_out_for_one_who_was_removed_or_refused_to_one_who_was_not() {
    // An append at a place where its sender was no participant.
    let outsider = |h: &mut History| {
        operation(h, "a2").by = Device::new("eve", "desk");
        everywhere(h, |event| {
            if event.seq == 9 {
                event.sender = "eve".into();
            }
        });
    };
    assert_eq!(broken(outsider), ["I9"]);
    let refuse_at_the_end = |h: &mut History| {
        let like = operation(h, "b4").clone();
        h.operations.push(Operation {
            outcome: Outcome::Refused("NOT_A_PARTICIPANT".into()),
            call: message("b9", None),
            interval: Interval { invoked: Moment(1_000), answered: Some(Moment(1_001)) },
            ..like
        });
    };
    assert_eq!(broken(refuse_at_the_end), ["I9"]);
    let unknown_conversation = |h: &mut History| {
        refuse_at_the_end(h);
        h.operations.last_mut().unwrap().outcome = Outcome::Refused("UNKNOWN_CONVERSATION".into());
    };
    assert_eq!(broken(unknown_conversation), ["I9"]);
}

#[test]
fn i9_refusals_have_to_fit_together() {
    let mut s = Story::new(&ann(), &["bob"], false);
    let remove = s.invoke(&ann(), Call::Remove("bob".into()));
    let first = s.invoke(&bob(), message("b1", None));
    s.apply(remove); // 3
    s.apply(first);
    s.answer(first);
    let second = s.invoke(&ann(), Call::Add("bob".into()));
    let answered = s.moment();
    let again = s.invoke(&ann(), Call::Add("bob".into()));
    s.apply(again); // 4
    s.answer(remove);
    s.answer(again);
    let mut history = s.end(&ann());
    assert!(judge(&history).is_clean());
    // First bob was found out, then in, and nobody had asked to take him back: alone each is right, since his removal was
    // under way all the time.
    history.operations[second].outcome = Outcome::Refused("ALREADY_PARTICIPANT".into());
    history.operations[second].interval.answered = Some(answered);
    assert_eq!(judge(&history).broken(), ["I9"]);
    history.operations[first].outcome = Outcome::Unknown;
    assert!(judge(&history).is_clean());
}

#[test]
fn i9_what_was_refused_has_not_happened() {
    let refused = |h: &mut History| operation(h, "b4").outcome = Outcome::Refused("OVERLOADED".into());
    assert_eq!(broken(refused), ["I9"]);
}

#[test]
fn i10_two_sends_of_one_device_change_places() {
    let swap = |h: &mut History| {
        // Both were under way at once, so that nothing but the device's own order forbids it.
        let late = operation(h, "a3").interval.answered;
        operation(h, "a2").interval.answered = late;
        let early = operation(h, "a2").interval.invoked;
        operation(h, "a3").interval.invoked = Moment(early.0 + 1);
        acknowledge(operation(h, "a2"), 10);
        acknowledge(operation(h, "a3"), 9);
        everywhere(h, |event| match event.seq {
            9 => event.body = "a3".into(),
            10 => event.body = "a2".into(),
            _ => {}
        });
    };
    assert_eq!(broken(swap), ["I10"]);
    // Nor may a send without an answer overtake one that was sent before it.
    let unknown = |h: &mut History| {
        swap(h);
        operation(h, "a2").outcome = Outcome::Unknown;
        operation(h, "a3").outcome = Outcome::Unknown;
    };
    assert_eq!(broken(unknown), ["I10"]);
}

/// One step of a random run.
#[derive(Debug, Clone)]
enum Step {
    Invoke(u8, u8),
    Apply(u8),
    Answer(u8),
    Crash(u8),
    Subscribe(u8, u8),
    Deliver(u8),
    Confirm(u8, bool),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => (any::<u8>(), any::<u8>()).prop_map(|(d, c)| Step::Invoke(d, c)),
        8 => any::<u8>().prop_map(Step::Apply),
        6 => any::<u8>().prop_map(Step::Answer),
        1 => any::<u8>().prop_map(Step::Crash),
        2 => (any::<u8>(), any::<u8>()).prop_map(|(d, a)| Step::Subscribe(d, a)),
        4 => any::<u8>().prop_map(Step::Deliver),
        2 => (any::<u8>(), any::<bool>()).prop_map(|(s, b)| Step::Confirm(s, b)),
    ];
    prop::collection::vec(step, 1..200)
}

/// What is under way: (device, operation), in the order in which it was invoked.
type Open = Vec<(usize, usize)>;

fn run(steps: &[Step], history_full: bool) -> History {
    let devices = [ann(), bob(), bob2(), Device::new("cid", "desk")];
    let mut story = Story::new(&ann(), &["bob"], history_full);
    let (mut open, mut count) = (Open::new(), 0);
    for step in steps {
        match *step {
            Step::Invoke(device, what) => {
                let device = usize::from(device) % devices.len();
                count += 1;
                let call = call(what, count);
                open.push((device, story.invoke(&devices[device], call)));
            }
            // A device's operations take effect in the order in which it asked.
            Step::Apply(at) => {
                let oldest = |&(index, &(device, id)): &(usize, &(usize, usize))| {
                    !story.is_applied(id) && !open[..index].iter().any(|o| o.0 == device && !story.is_applied(o.1))
                };
                let ready: Vec<usize> = open.iter().enumerate().filter(oldest).map(|(_, open)| open.1).collect();
                if !ready.is_empty() {
                    story.apply(ready[usize::from(at) % ready.len()]);
                }
            }
            Step::Answer(at) => {
                let applied: Vec<usize> = (0..open.len()).filter(|i| story.is_applied(open[*i].1)).collect();
                if !applied.is_empty() {
                    story.answer(open.remove(applied[usize::from(at) % applied.len()]).1);
                }
            }
            Step::Crash(device) => open.retain(|(of, _)| *of != usize::from(device) % devices.len()),
            Step::Subscribe(device, after) => {
                let device = &devices[usize::from(device) % devices.len()];
                let start =
                    if after % 4 == 0 { Start::Head } else { Start::After(u64::from(after) % (story.head() + 1)) };
                // The head is taken when it is asked for: nothing may come in between here.
                let stream =
                    story.subscribe(device, if start == Start::Head { Start::After(story.head()) } else { start });
                story.deliver(stream);
            }
            Step::Deliver(at) if !story.history.streams.is_empty() => {
                story.deliver(usize::from(at) % story.history.streams.len());
            }
            Step::Confirm(at, read) if !story.history.streams.is_empty() => {
                story.confirm(usize::from(at) % story.history.streams.len(), read);
            }
            Step::Deliver(_) | Step::Confirm(..) => {}
        }
    }
    story.end(&ann())
}

fn call(what: u8, count: u32) -> Call {
    let user = ["bob", "cid"][usize::from(what / 16 % 2)];
    match what % 16 {
        0..=6 => message(&format!("m{count}"), None),
        // Few keys, so that many are attempts of one message.
        7 | 8 => message(&format!("k{}", what / 16 % 4), Some(&format!("k{}", what / 16 % 4))),
        9 => Call::Add(user.into()),
        10 => Call::Remove(user.into()),
        11 => Call::Read { linearizable: false, after: None },
        _ => Call::Read { linearizable: true, after: Some(u64::from(what / 16)) },
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn a_correct_run_breaks_nothing(steps in steps(), history_full: bool) {
        let verdict = judge(&run(&steps, history_full));
        prop_assert!(verdict.is_clean(), "{:#?}", verdict.violations);
    }

    /// Whatever the run was, an acknowledged event that is taken out of it afterwards is missed.
    #[test]
    fn a_loss_anywhere_is_found(steps in steps(), which: prop::sample::Index) {
        let mut history = run(&steps, false);
        let acknowledged: Vec<u64> = history.operations.iter().filter_map(|o| Some(o.event()?.0)).collect();
        let gone = acknowledged[which.index(acknowledged.len())];
        let kind = |item: &Item| matches!(item, Item::Event(e) if e.seq == gone && e.kind == EventKind::Created);
        prop_assume!(!history.finals[0].items.iter().any(kind));
        history.finals[0].items.retain(|item| item.span().0 != gone);
        let broken = judge(&history).broken();
        prop_assert!(broken.contains(&"I1") && broken.contains(&"I2"), "{broken:?}");
    }

    /// Whatever the run was, a linearizable read that lacks what had been acknowledged before is found.
    #[test]
    fn a_stale_read_anywhere_is_found(steps in steps(), which: prop::sample::Index) {
        let mut history = run(&steps, false);
        let reads: Vec<usize> = (0..history.operations.len()).filter(|&at| {
            let read = &history.operations[at];
            let known = history.operations.iter().filter(|o| o.answered().is_some_and(|m| m < read.interval.invoked));
            let known = known.filter_map(|o| Some(o.event()?.0)).max().unwrap_or(0);
            matches!(read.call, Call::Read { linearizable: true, .. }) && read.page().is_some_and(|p| p.head == known)
        }).collect();
        prop_assume!(!reads.is_empty());
        let read = &mut history.operations[reads[which.index(reads.len())]];
        let stale = read.page().map_or(0, |page| page.head - 1);
        shorten(read, stale);
        prop_assert!(judge(&history).broken().contains(&"I9"));
    }
}
