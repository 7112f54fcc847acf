//! I5: a cursor never passes an event that was not delivered, and never moves back by itself. Must never take the answer
//! to a move for all that is kept: a move to behind changes nothing and is answered all the same.

use std::collections::BTreeMap;

use super::rising::Rising;
use crate::oracle::{Case, CursorSeen, Device, History, Moment, Violations};

pub(super) fn check(case: &Case<'_>, out: &mut Violations) {
    delivered(case.history, out);
    read(case.history, out);
}

type Points = Vec<(Moment, u64)>;

/// By whom and in which conversation.
type By<'h, K> = BTreeMap<(K, &'h str), Points>;

fn rising<K: Ord>(by: By<'_, K>) -> BTreeMap<(K, &str), Rising> {
    by.into_iter().map(|(key, points)| (key, points.into_iter().collect())).collect()
}

fn before<K: Ord + Copy>(of: &BTreeMap<(K, &str), Rising>, key: &(K, &str), moment: Moment) -> u64 {
    of.get(&(key.0, key.1)).map_or(0, |rising| rising.before(moment))
}

/// A device's own cursor: not beyond what it asked for, nor beyond what came to it, nor back.
fn delivered(history: &History, out: &mut Violations) {
    let (mut asked, mut came, mut told) = (By::<&Device>::new(), By::<&Device>::new(), By::<&Device>::new());
    for moved in &history.moves {
        asked.entry((&moved.by, &*moved.conversation)).or_default().push((moved.at, moved.delivered));
    }
    for stream in &history.streams {
        let points = came.entry((&stream.by, &*stream.conversation)).or_default();
        points.extend(stream.items.iter().map(|(at, item)| (*at, item.span().1)));
    }
    for seen in &history.seen {
        told.entry((&seen.by, &*seen.conversation)).or_default().push((seen.at, seen.delivered));
    }
    let (asked, came, told) = (rising(asked), rising(came), rising(told));
    for seen in history.seen.iter().filter(|seen| seen.delivered > 0) {
        let key = (&seen.by, &*seen.conversation);
        let (asked, came) = (before(&asked, &key, seen.at), before(&came, &key, seen.at));
        if seen.delivered > asked.min(came) {
            out.add(key.1, || {
                format!("{}'s cursor is at {}; {came} was delivered and {asked} confirmed", seen.by, seen.delivered)
            });
        }
        back(seen, seen.delivered, before(&told, &key, seen.asked), out);
    }
}

/// A user's cursor, which all his devices share: not beyond what one of them asked for, nor back.
fn read(history: &History, out: &mut Violations) {
    let (mut asked, mut told) = (By::<&str>::new(), By::<&str>::new());
    for moved in &history.moves {
        asked.entry((&*moved.by.user, &*moved.conversation)).or_default().push((moved.at, moved.read));
    }
    for seen in &history.seen {
        told.entry((&*seen.by.user, &*seen.conversation)).or_default().push((seen.at, seen.read));
    }
    let (asked, told) = (rising(asked), rising(told));
    for seen in history.seen.iter().filter(|seen| seen.read > 0) {
        let key = (&*seen.by.user, &*seen.conversation);
        let asked = before(&asked, &key, seen.at);
        if seen.read > asked {
            out.add(key.1, || format!("{}'s read cursor is at {}; {asked} was asked for", seen.by.user, seen.read));
        }
        back(seen, seen.read, before(&told, &key, seen.asked), out);
    }
}

fn back(seen: &CursorSeen, now: u64, earlier: u64, out: &mut Violations) {
    if !seen.moved && now < earlier {
        out.add(&seen.conversation, || format!("{} was told that its cursor is at {earlier}, then {now}", seen.by));
    }
}
