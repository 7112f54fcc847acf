//! Devices that send through a network which loses, repeats and reorders commands and answers. What they sent must
//! stand in the conversation once each, in their order, whatever happened on the way.

use proptest::prelude::*;
use stentor_engine::{command, effect::Outcome, key::Entity};
use stentor_proto::{
    ids::{AppId, ConversationId, UserId, key_crc},
    internal::{Actor, Command, Create, Send},
    reason::Reason,
    record,
    v1::ConversationKind,
};

use crate::{Replica, bundle};

const WINDOW: u64 = 4;

/// A device with `total` messages to send; the plainest go-back-N there is.
struct Device {
    name: String,
    total: u64,
    answers: Vec<Option<Outcome>>,
}

impl Device {
    fn done_no(&self) -> u64 {
        self.answers.iter().take_while(|a| a.is_some()).count() as u64
    }

    fn open(&self) -> impl Iterator<Item = u64> + '_ {
        let done = self.done_no();
        (done + 1..=self.total.min(done + WINDOW)).filter(|n| self.answers[*n as usize - 1].is_none())
    }

    fn command(&self, send_no: u64) -> Command {
        // Every third one is empty: refused for good, and its number consumed like any other.
        let body = if send_no.is_multiple_of(3) { String::new() } else { format!("{} {send_no}", self.name) };
        let actor = Actor { user: "ann".into(), device: self.name.clone().into(), admin: false };
        let send = Send { actor: Some(actor), send_no, done_no: self.done_no(), body: body.into(), ..Send::default() };
        command::send(&app(), &conversation(), send)
    }

    fn answered(&mut self, send_no: u64, outcome: Outcome) {
        let final_answer = !matches!(&outcome, Outcome::Refused { reason, .. } if reason.retryable());
        let answer = &mut self.answers[send_no as usize - 1];
        match answer {
            None if final_answer => *answer = Some(outcome),
            Some(first) if final_answer => assert_same(first, &outcome),
            _ => {}
        }
    }
}

/// A late copy may only be told the same again, or that it is too late to ask.
fn assert_same(first: &Outcome, again: &Outcome) {
    match (first, again) {
        (_, Outcome::Refused { reason: Reason::DedupWindowPassed, .. }) => {}
        (Outcome::Accepted { seq, stamp, .. }, Outcome::Accepted { seq: seq2, stamp: stamp2, .. }) => {
            assert_eq!((seq, stamp), (seq2, stamp2));
        }
        (Outcome::Refused { reason, .. }, Outcome::Refused { reason: again, .. }) => assert_eq!(reason, again),
        other => panic!("two answers to one send: {other:?}"),
    }
}

fn app() -> AppId {
    AppId::new("app").unwrap()
}

fn conversation() -> ConversationId {
    ConversationId::new("general").unwrap()
}

#[derive(Debug, Clone)]
enum Fate {
    Send(prop::sample::Index, prop::sample::Index),
    Arrive(prop::sample::Index, bool, bool),
    Lose(prop::sample::Index),
    Crash,
}

fn fate() -> impl Strategy<Value = Fate> {
    let index = any::<prop::sample::Index>;
    prop_oneof![
        6 => (index(), index()).prop_map(|(device, which)| Fate::Send(device, which)),
        6 => (index(), any::<bool>(), any::<bool>()).prop_map(|(i, again, told)| Fate::Arrive(i, again, told)),
        1 => index().prop_map(Fate::Lose),
        1 => Just(Fate::Crash),
    ]
}

struct World {
    replica: Replica,
    checkpoint: (Replica, Vec<bytes::Bytes>),
    devices: Vec<Device>,
    network: Vec<(usize, u64, Command)>,
}

impl World {
    fn new(total: u64) -> Self {
        let create = Create {
            actor: Some(command::actor(&UserId::new("ann").unwrap(), None, false)),
            kind: ConversationKind::Group as i32,
            ..Create::default()
        };
        let mut replica = Replica::default();
        replica.apply(&bundle(&[command::create(&app(), &conversation(), create)], 1));
        let device = |name: &str| Device { name: name.into(), total, answers: vec![None; total as usize] };
        let devices = vec![device("phone"), device("laptop")];
        Self { checkpoint: (replica.clone(), vec![]), replica, devices, network: vec![] }
    }

    fn arrive(&mut self, device: usize, send_no: u64, command: &Command, told: bool) {
        let bundle = bundle(std::slice::from_ref(command), 5);
        let mut out = self.replica.apply(&bundle);
        self.checkpoint.1.push(bundle);
        if told {
            self.devices[device].answered(send_no, out.outcomes.remove(0));
        }
    }

    fn step(&mut self, fate: &Fate) {
        match fate {
            Fate::Send(device, which) => {
                let device = device.index(self.devices.len());
                let open: Vec<_> = self.devices[device].open().collect();
                if !open.is_empty() {
                    let send_no = open[which.index(open.len())];
                    self.network.push((device, send_no, self.devices[device].command(send_no)));
                }
            }
            Fate::Arrive(which, again, told) if !self.network.is_empty() => {
                let at = which.index(self.network.len());
                let (device, send_no, command) = self.network[at].clone();
                if !again {
                    self.network.swap_remove(at);
                }
                self.arrive(device, send_no, &command, *told);
            }
            Fate::Lose(which) if !self.network.is_empty() => {
                self.network.swap_remove(which.index(self.network.len()));
            }
            Fate::Crash => {
                let (mut replica, log) = std::mem::take(&mut self.checkpoint);
                log.iter().for_each(|bundle| drop(replica.apply(bundle)));
                assert_eq!(replica, self.replica);
                self.checkpoint = (replica, vec![]);
            }
            _ => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn what_devices_send_stands_once_and_in_order(fates in prop::collection::vec(fate(), 0..250), total in 1u64..25) {
        let mut world = World::new(total);
        fates.iter().for_each(|fate| world.step(fate));
        // The network heals: each device sends what is unanswered until nothing is.
        for device in 0..world.devices.len() {
            loop {
                let first_open = world.devices[device].open().next();
                let Some(send_no) = first_open else { break };
                let command = world.devices[device].command(send_no);
                let before = world.devices[device].done_no();
                world.arrive(device, send_no, &command, true);
                prop_assert!(world.devices[device].done_no() > before, "the first open send gets its answer at once");
            }
        }
        let entity = Entity::conversation("app", "general");
        let crc = key_crc(b"app", b"general");
        for device in &world.devices {
            let full = (1..=total).filter(|n| !n.is_multiple_of(3));
            let sent: Vec<_> = full.map(|n| format!("{} {n}", device.name)).collect();
            let events = world.replica.rows.events.iter().filter(|((e, _), _)| *e == entity);
            let events = events.map(|(_, r)| record::decode(&r.clone().into(), crc).unwrap());
            let stands: Vec<_> = events
                .filter(|event| event.header.device == device.name)
                .map(|event| String::from_utf8(event.body.to_vec()).unwrap())
                .collect();
            prop_assert_eq!(stands, sent);
        }
    }
}
