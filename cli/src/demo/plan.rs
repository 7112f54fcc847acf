//! Turns transcripts into a plan: which users on which devices take part in which conversation, who sends which line
//! from where, and which devices are away for which stretch. Deterministic: the same files give the same plan.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Range,
};

use stentor_proto::{
    Bytes,
    ids::{ConversationId, UserId},
};
use twox_hash::XxHash3_64;

use super::parse::{Skipped, Transcript};
use crate::failure::Failure;

/// One user in this many has a second device.
const SECOND_DEVICE_ONE_IN: u64 = 5;
/// One device in this many is away for a stretch of a conversation.
const AWAY_ONE_IN: u64 = 6;
/// Being away for fewer lines than this would be over before the connection is closed.
const MIN_AWAY_LINES: usize = 150;

/// Everything that the demo will do.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// One per file, in the order of their names.
    pub(crate) conversations: Vec<Conversation>,
    /// All users, in byte order.
    pub(crate) users: Vec<UserId>,
    /// All devices.
    pub(crate) devices: Vec<Device>,
    /// What is not sent.
    pub(crate) skipped: Skipped,
}

/// A file.
#[derive(Debug)]
pub(crate) struct Conversation {
    /// From the file's name.
    pub(crate) id: ConversationId,
    /// Indices of the users who speak in it; the first line's is the first.
    pub(crate) users: Vec<usize>,
    /// Indices of their devices.
    pub(crate) devices: Vec<usize>,
    /// What is sent, in the file's order.
    pub(crate) lines: Vec<PlannedLine>,
    /// Who is away when.
    pub(crate) absences: Vec<Absence>,
}

/// A line and the device that sends it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PlannedLine {
    /// Index of the sending device.
    pub(crate) device: usize,
    /// An action rather than a message.
    pub(crate) action: bool,
    /// The body, as it stands in the file.
    pub(crate) text: Bytes,
}

/// A device of a user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Device {
    /// Index of its user.
    pub(crate) user: usize,
    /// Its id.
    pub(crate) name: &'static str,
    /// Indices of its conversations.
    pub(crate) conversations: Vec<usize>,
}

/// A device is disconnected while these lines are sent, none of them by its user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Absence {
    /// Index of the device.
    pub(crate) device: usize,
    /// Indices of the lines.
    pub(crate) lines: Range<usize>,
}

/// Makes the plan. Transcripts come with the id that their file's name gives.
pub(crate) fn plan(files: Vec<(ConversationId, Transcript)>) -> Result<Plan, Failure> {
    let mut plan = Plan { users: users(&files)?, ..Plan::default() };
    let index: HashMap<String, usize> =
        plan.users.iter().enumerate().map(|(n, user)| (user.as_str().to_owned(), n)).collect();
    let first_device = give_devices(&mut plan);
    for (number, (id, transcript)) in files.into_iter().enumerate() {
        plan.skipped += transcript.skipped;
        let mut conversation =
            Conversation { id, users: Vec::new(), devices: Vec::new(), lines: Vec::new(), absences: Vec::new() };
        let mut seen = BTreeSet::new();
        for line in transcript.lines {
            let user = index[&line.name];
            if seen.insert(user) {
                conversation.users.push(user);
            }
            conversation.lines.push(PlannedLine { device: first_device[user], action: line.action, text: line.text });
        }
        for &user in &conversation.users {
            let devices = first_device[user]..first_device.get(user + 1).copied().unwrap_or(plan.devices.len());
            for device in devices {
                plan.devices[device].conversations.push(number);
                conversation.devices.push(device);
            }
        }
        plan.conversations.push(conversation);
    }
    give_absences(&mut plan);
    Ok(plan)
}

fn users(files: &[(ConversationId, Transcript)]) -> Result<Vec<UserId>, Failure> {
    let mut users = BTreeMap::new();
    for (id, transcript) in files {
        for line in &transcript.lines {
            if !users.contains_key(line.name.as_str()) {
                let user = UserId::new(&line.name)
                    .map_err(|bad| Failure::misuse(format_args!("{id}: the name {:?}: {bad}", line.name)))?;
                users.insert(line.name.as_str(), user);
            }
        }
    }
    Ok(users.into_values().collect())
}

/// Returns the index of every user's first device; his others follow it.
fn give_devices(plan: &mut Plan) -> Vec<usize> {
    let mut first = Vec::with_capacity(plan.users.len());
    for (user, id) in plan.users.iter().enumerate() {
        first.push(plan.devices.len());
        plan.devices.push(Device { user, name: "phone", conversations: Vec::new() });
        if hash(&[id.as_str(), "devices"]).is_multiple_of(SECOND_DEVICE_ONE_IN) {
            plan.devices.push(Device { user, name: "laptop", conversations: Vec::new() });
        }
    }
    first
}

/// A device that sends may be away only where its user is silent, and only if it takes part in one conversation:
/// otherwise two conversations could wait for each other's device to come back.
fn give_absences(plan: &mut Plan) {
    for conversation in &mut plan.conversations {
        for &device in &conversation.devices {
            let planned = &plan.devices[device];
            let sends = planned.name == "phone";
            let user = plan.users[planned.user].as_str();
            let chosen = hash(&[conversation.id.as_str(), user, planned.name]).is_multiple_of(AWAY_ONE_IN);
            if !chosen || (sends && planned.conversations.len() > 1) {
                continue;
            }
            let lines = if sends {
                longest_silence(&conversation.lines, device)
            } else {
                conversation.lines.len() / 4..conversation.lines.len() * 3 / 4
            };
            if lines.len() >= MIN_AWAY_LINES {
                conversation.absences.push(Absence { device, lines });
            }
        }
    }
}

/// The longest stretch of lines in which a device sends none.
fn longest_silence(lines: &[PlannedLine], device: usize) -> Range<usize> {
    let mut best = 0..0;
    let mut from = 0;
    let own = lines.iter().enumerate().filter(|(_, line)| line.device == device).map(|(n, _)| n);
    for until in own.chain([lines.len()]) {
        if until - from > best.len() {
            best = from..until;
        }
        from = until + 1;
    }
    best
}

fn hash(parts: &[&str]) -> u64 {
    XxHash3_64::oneshot(parts.join("\0").as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::parse::parse;

    fn id(text: &str) -> ConversationId {
        ConversationId::new(text).unwrap()
    }

    fn sample() -> Plan {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/sample");
        let names = ["2005-06-27_12", "2008-07-14_18", "2016-12-19_20"];
        let read = |name: &&str| (id(name), parse(&std::fs::read(format!("{folder}/{name}.txt")).unwrap().into()));
        plan(names.iter().map(read).collect()).unwrap()
    }

    #[test]
    fn every_line_of_the_sample_is_planned_once_in_order() {
        let plan = sample();
        assert_eq!(plan.conversations.iter().map(|c| c.lines.len()).collect::<Vec<_>>(), [1017, 1467, 1184]);
        assert_eq!(plan.skipped, Skipped { empty: 3, system: 329, unreadable: 0 });
        for conversation in &plan.conversations {
            let speakers: BTreeSet<usize> = conversation.lines.iter().map(|l| plan.devices[l.device].user).collect();
            assert_eq!(speakers, conversation.users.iter().copied().collect());
        }
    }

    #[test]
    fn some_users_have_two_devices_and_some_devices_are_away() {
        let plan = sample();
        let second = plan.devices.iter().filter(|d| d.name == "laptop").count();
        assert!(second * 4 > plan.users.len() / 2 && second < plan.users.len() / 2, "{second}");
        let absences: usize = plan.conversations.iter().map(|c| c.absences.len()).sum();
        assert!(absences > 20, "{absences}");
    }

    #[test]
    fn nobody_speaks_while_his_sending_device_is_away() {
        let plan = sample();
        for conversation in &plan.conversations {
            for absence in &conversation.absences {
                assert!(conversation.lines[absence.lines.clone()].iter().all(|l| l.device != absence.device));
            }
        }
    }

    #[test]
    fn the_longest_silence_may_be_at_either_end() {
        let line = |device| PlannedLine { device, action: false, text: Bytes::new() };
        let lines = |devices: &[usize]| devices.iter().copied().map(line).collect::<Vec<_>>();
        assert_eq!(longest_silence(&lines(&[0, 0, 1, 0, 1]), 1), 0..2);
        assert_eq!(longest_silence(&lines(&[1, 0, 1, 0, 0]), 1), 3..5);
        assert_eq!(longest_silence(&lines(&[1, 0, 0, 1]), 1), 1..3);
        assert_eq!(longest_silence(&lines(&[1, 1]), 1), 0..0);
    }

    #[test]
    fn a_name_that_cannot_be_a_user_is_refused() {
        let transcript = parse(&Bytes::from_static(b"[12:00] <a/b> hi"));
        assert!(matches!(plan(vec![(id("c"), transcript)]), Err(Failure::Misuse(_))));
    }
}
