//! How a window of unanswered messages is spread over conversations and devices. Must never give a device more than its
//! connection lets it have under way, since what waits in the device is not load.

use crate::BenchError;

/// Unanswered sends that a connection carries.
pub(crate) const SENDS_PER_SESSION: usize = 256;
/// Conversations that one user may have, with room for others.
const CONVERSATIONS_PER_USER: usize = 90_000;

/// One task that sends: a device in one conversation, or in several in turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LanePlan {
    /// Which device sends.
    pub(crate) session: usize,
    /// Where, in turn. More than one only with a window of 1, so that answers come in the order of the sends.
    pub(crate) conversations: Vec<usize>,
    /// Unanswered at most.
    pub(crate) window: usize,
}

/// Who sends where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) sessions: usize,
    pub(crate) lanes: Vec<LanePlan>,
}

/// Spreads a window; at least `sessions` devices if there is work for them.
pub(crate) fn plan(conversations: usize, window: usize, sessions: usize) -> Result<Plan, BenchError> {
    if conversations == 0 || window == 0 {
        return Err(BenchError::Settings("at least one conversation and a window of at least 1 are needed".into()));
    }
    let lanes = if conversations >= window {
        in_turn(conversations, window)
    } else {
        side_by_side(conversations, window, sessions)
    };
    Ok(seat(lanes, sessions))
}

/// More conversations than the window: each lane goes round a part of them.
fn in_turn(conversations: usize, window: usize) -> Vec<LanePlan> {
    let of = |lane: usize| (lane..conversations).step_by(window).collect();
    (0..window).map(|lane| LanePlan { session: 0, conversations: of(lane), window: 1 }).collect()
}

/// Each conversation has its part of the window, and as many lanes as that needs or as devices want to send.
fn side_by_side(conversations: usize, window: usize, sessions: usize) -> Vec<LanePlan> {
    let mut lanes = Vec::new();
    let at_least = sessions.div_ceil(conversations);
    for conversation in 0..conversations {
        let share = window / conversations + usize::from(conversation < window % conversations);
        let parts = share.div_ceil(SENDS_PER_SESSION).max(at_least).min(share);
        for part in 0..parts {
            let window = share / parts + usize::from(part < share % parts);
            lanes.push(LanePlan { session: 0, conversations: vec![conversation], window });
        }
    }
    lanes
}

/// Gives every lane a device, none of which has more than it can carry, nor twice the same conversation.
fn seat(mut lanes: Vec<LanePlan>, at_least: usize) -> Plan {
    let (window, count): (usize, usize) = (lanes.iter().map(|l| l.window).sum(), lanes.len());
    let conversations: usize = lanes.iter().map(|l| l.conversations.len()).sum();
    let needed = window.div_ceil(SENDS_PER_SESSION).max(conversations.div_ceil(CONVERSATIONS_PER_USER));
    let mut sessions = needed.max(at_least).clamp(1, count);
    loop {
        let mut held = vec![0; sessions];
        lanes.iter_mut().enumerate().for_each(|(n, lane)| lane.session = n % sessions);
        lanes.iter().for_each(|lane| held[lane.session] += lane.window);
        let mut pairs: Vec<_> = lanes.iter().map(|l| (l.session, l.conversations.first())).collect();
        pairs.sort_unstable();
        let twice = pairs.windows(2).any(|pair| pair[0] == pair[1]);
        if sessions == count || !twice && held.iter().all(|&held| held <= SENDS_PER_SESSION) {
            return Plan { sessions, lanes };
        }
        sessions += 1;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn held(plan: &Plan, session: usize) -> usize {
        plan.lanes.iter().filter(|lane| lane.session == session).map(|lane| lane.window).sum()
    }

    #[test]
    fn the_whole_window_is_spread_and_no_device_has_too_much() {
        for (conversations, window, sessions) in [
            (1, 1, 1),
            (1, 64, 1),
            (1, 1_024, 4),
            (64, 1_024, 4),
            (64, 64, 1),
            (64, 10_000, 64),
            (1_000_000, 1_024, 12),
        ] {
            let plan = plan(conversations, window, 1).unwrap();
            assert_eq!(plan.lanes.iter().map(|lane| lane.window).sum::<usize>(), window, "{conversations} {window}");
            assert!((0..plan.sessions).all(|s| (1..=SENDS_PER_SESSION).contains(&held(&plan, s))), "{plan:?}");
            let served: BTreeSet<_> = plan.lanes.iter().flat_map(|lane| lane.conversations.clone()).collect();
            assert_eq!(served.len(), conversations);
            assert_eq!(plan.sessions, sessions, "{conversations} {window}");
        }
    }

    #[test]
    fn a_device_has_one_lane_in_a_conversation() {
        for (conversations, window) in [(1, 10_000), (3, 5_000), (64, 10_000), (7, 600)] {
            let plan = plan(conversations, window, 1).unwrap();
            let pairs: BTreeSet<_> = plan.lanes.iter().map(|lane| (lane.session, lane.conversations[0])).collect();
            assert_eq!(pairs.len(), plan.lanes.len(), "{conversations} {window}");
        }
    }

    #[test]
    fn more_devices_are_used_if_asked_for_and_there_is_work() {
        assert_eq!(plan(64, 64, 16).unwrap().sessions, 16);
        assert_eq!(plan(2, 2, 16).unwrap().sessions, 2);
        let many = plan(64, 1_024, 1_000).unwrap();
        assert_eq!((many.sessions, many.lanes.len(), many.lanes[0].window), (1_000, 1_024, 1));
        assert!(plan(0, 1, 1).is_err() && plan(1, 0, 1).is_err());
    }
}
