//! Every target on mutated valid input, without a fuzzer: `cargo test` here, with any toolchain. The same bytes in
//! every run; `STENTOR_FUZZ_RUNS` says how many inputs per target (20,000 unless told).

use bytes::{BufMut, BytesMut};
use stentor_engine::{
    apply::{Context, LEVEL, apply_command},
    command,
    effect::{Applied, Outcome},
    rows::MemoryRows,
};
use stentor_fuzz::*;
use stentor_proto::{
    Message,
    bundle::Builder,
    frame::{ClientFrame, ServerFrame},
    ids::{AppId, ApplyLevel, ConversationId, DeviceId, StampMs, UserId},
    internal, v1,
};

/// xorshift64*, so that a failure repeats.
struct Draw(u64);

impl Draw {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }
}

fn mutate(draw: &mut Draw, bytes: &mut Vec<u8>, other: &[u8]) {
    for _ in 0..draw.below(4) + 1 {
        let at = draw.below(bytes.len());
        match draw.below(7) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << draw.below(8),
            1 if !bytes.is_empty() => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][draw.below(5)],
            2 => bytes.truncate(at),
            3 => bytes.insert(at, draw.next() as u8),
            4 => bytes.extend_from_slice(&other[draw.below(other.len())..]),
            5 if bytes.len() >= 4 => {
                let at = draw.below(bytes.len() - 3);
                bytes[at..at + 4].copy_from_slice(&(draw.next() as u32 >> draw.below(32)).to_le_bytes());
            }
            _ => bytes.extend((0..draw.below(40)).map(|_| draw.next() as u8)),
        }
    }
}

fn run(seed: u64, target: fn(&[u8]), seeds: &[Vec<u8>]) {
    let runs = std::env::var("STENTOR_FUZZ_RUNS").ok().and_then(|n| n.parse().ok()).unwrap_or(20_000);
    let mut draw = Draw(seed);
    seeds.iter().for_each(|seed| target(seed));
    for _ in 0..runs {
        let mut bytes = seeds[draw.below(seeds.len())].clone();
        let other = seeds[draw.below(seeds.len())].clone();
        mutate(&mut draw, &mut bytes, &other);
        target(&bytes);
    }
}

fn cut_by(step: u8, frames: impl FnOnce(&mut BytesMut)) -> Vec<u8> {
    let mut out = BytesMut::from(&[step][..]);
    frames(&mut out);
    out.to_vec()
}

#[test]
fn client_frames_are_answered() {
    let send = v1::Send { conversation: "general".into(), send_no: 1, body: "hi".into(), ..Default::default() };
    let cursor = v1::Cursor { conversation: "general".into(), seq: 9 };
    let resume = v1::Resume { delivered: vec![cursor.clone(); 40], ..Default::default() };
    let history = v1::request::Call::History(v1::HistoryRequest { limit: 50, ..Default::default() });
    let frames = [
        ClientFrame::from(v1::Hello { min_version: 1, max_version: 1, token: "t.t.t".into(), ..Default::default() }),
        resume.into(),
        send.into(),
        v1::MoveCursors { delivered: vec![cursor], ..Default::default() }.into(),
        v1::Request { id: 3, call: Some(history) }.into(),
    ];
    let whole = |step| cut_by(step, |out| frames.iter().for_each(|frame| frame.encode(out)));
    run(1, client_frames, &[whole(1), whole(7), whole(255), cut_by(9, |out| frames[2].encode(out))]);
}

#[test]
fn server_frames_are_answered() {
    let frames = [
        ServerFrame::from(v1::Welcome::default()),
        v1::Sent { seq: 4, stamp_ms: 5, ..Default::default() }.into(),
        v1::Events { conversation: "general".into(), ..Default::default() }.into(),
        v1::Fatal::default().into(),
        v1::Response { id: 1, ..Default::default() }.into(),
    ];
    let whole = |step| cut_by(step, |out| frames.iter().for_each(|frame| frame.encode(out)));
    run(2, server_frames, &[whole(1), whole(255), cut_by(9, |out| frames[2].encode(out))]);
}

#[test]
fn event_records_are_answered() {
    let header = v1::EventHeader { seq: 7, sender: "ann".into(), stamp_ms: 9, ..Default::default() };
    let mut record = Vec::new();
    stentor_proto::record::encode(&header, b"hello", 7, crc32fast::hash(b"hello"), &mut record);
    let encoded = header.encode_to_vec();
    let parts = [&[encoded.len() as u8][..], &encoded, b"hello"].concat();
    run(3, event_record, &[record, parts]);
}

#[test]
fn bundles_are_answered() {
    let mut builder = Builder::new();
    commands().iter().for_each(|command| builder.push(command));
    run(
        4,
        bundle,
        &[
            builder.finish(ApplyLevel(1), StampMs(5)).to_vec(),
            Builder::new().finish(ApplyLevel(1), StampMs(0)).to_vec(),
        ],
    );
}

#[test]
fn rows_are_answered() {
    let result = internal::SendResult { send_no: 1, seq: 2, ..Default::default() };
    let stay = internal::Stay { from: 1, to: 0 };
    let row = |kind: u8, message: Vec<u8>| [vec![kind], message].concat();
    let seeds = [
        row(0x01, internal::ConversationRow::default().encode_to_vec()),
        row(0x02, internal::ParticipantRow { stays: vec![stay; 3], ..Default::default() }.encode_to_vec()),
        row(0x03, internal::SendStateRow { last: 3, results: vec![result; 3], ..Default::default() }.encode_to_vec()),
        row(0x22, internal::DeviceRow { nonce: "0123456789abcdef".into(), ..Default::default() }.encode_to_vec()),
        row(0x44, internal::PlacementRow { shards: vec![Default::default(); 3], version: 1 }.encode_to_vec()),
        row(0x61, internal::AppliedRow { membership: Some(Default::default()), ..Default::default() }.encode_to_vec()),
    ];
    run(5, row_target, &seeds);
}

fn row_target(data: &[u8]) {
    row(data);
}

#[test]
fn log_entries_are_answered() {
    let config = internal::MembershipConfig { voters: vec![1 << 32 | 1, 2 << 32 | 1, 3 << 32 | 1] };
    let membership = internal::Membership { nodes: config.voters.clone(), configs: vec![config] };
    let entry = |kind: u8, payload: Vec<u8>| {
        let mut out = 5u64.to_le_bytes().to_vec();
        out.put_u8(kind);
        out.extend(payload);
        out
    };
    run(6, log_entry, &[entry(0, Vec::new()), entry(1, vec![1; 40]), entry(2, membership.encode_to_vec())]);
}

#[test]
fn the_commands_to_start_from_are_good_ones() {
    let (mut state, context) = (MemoryRows::default(), Context { stamp: StampMs(1), level: LEVEL });
    // Those of a conversation; of the others some may be refused by what this version has.
    for command in commands().into_iter().take(6) {
        let mut applied = Applied::default();
        apply_command(&mut state, &context, &command.into(), &mut BytesMut::new(), &mut applied).unwrap();
        assert!(!matches!(applied.outcomes[0], Outcome::Refused { .. }), "{:?}", applied.outcomes);
    }
}

#[test]
fn commands_are_answered() {
    let all = commands();
    let script = all.iter().flat_map(|command| [vec![command.len() as u8], command.clone()].concat()).collect();
    let first = [vec![all[0].len() as u8], all[0].clone()].concat();
    run(7, command_target, &[script, first]);
}

fn command_target(data: &[u8]) {
    stentor_fuzz::command(data);
}

/// Commands of every kind, in an order in which they make sense.
fn commands() -> Vec<Vec<u8>> {
    let (app, conversation) = (AppId::new("a").unwrap(), ConversationId::new("c").unwrap());
    let (ann, bob) = (UserId::new("ann").unwrap(), UserId::new("bob").unwrap());
    let device = DeviceId::new("d").unwrap();
    let actor = || command::actor(&ann, Some(&device), false);
    let create =
        internal::Create { actor: Some(actor()), kind: 2, participants: vec!["bob".into()], ..Default::default() };
    let send = |send_no| internal::Send {
        actor: Some(actor()),
        send_no,
        kind: v1::EventKind::Message as i32,
        body: "hi".into(),
        ..Default::default()
    };
    let key = internal::SigningKey { kid: "k".into(), algorithm: "EdDSA".into(), ..Default::default() };
    [
        command::create(&app, &conversation, create),
        command::send(&app, &conversation, send(1)),
        command::send(&app, &conversation, send(2)),
        command::change_role(&app, &conversation, actor(), &bob, v1::Role::Owner),
        command::remove(&app, &conversation, actor(), &bob),
        command::add(&app, &conversation, actor(), &bob, v1::Role::Writer),
        command::expire(&app, &conversation, 1),
        command::open_session(&app, &ann, &device, b"0123456789abcdef"),
        command::remove_device(&app, &ann, &device, &[]),
        command::put_cluster("cluster", 16),
        command::put_app(&app, vec![key]),
        command::put_broker(Default::default()),
        command::put_placement(vec![Default::default()], 0),
        command::mark_initialized(1),
        command::join_broker(Default::default()),
    ]
    .iter()
    .map(|command| command.encode_to_vec())
    .collect()
}
