//! One function per decoder of bytes that come from a network or a disk: each takes any bytes and must return. It may
//! not panic, loop or allocate beyond the decoder's limits; what it accepts must survive being encoded again.

use std::{env, fs, io};

use bytes::{BufMut, Bytes, BytesMut};
use stentor_engine::{
    apply::{Context, LEVEL, apply_command},
    command,
    effect::Applied,
    key::{Entity, Kind},
    rows::{self, MemoryRows, Row},
};
use stentor_proto::{
    Message,
    bundle::{Builder, Bundle},
    frame::{self, ClientFrame, ServerFrame},
    ids::{ShardId, StampMs},
    internal::Command,
    record,
};
use stentor_raft_store::wire;

/// Small, so that limits are reached.
const MAX_FRAME_BYTES: usize = 4 * 1024;

/// Runs `target` on each file that the command line names: a finding, replayed with any toolchain.
pub fn replay(target: fn(&[u8])) -> io::Result<()> {
    for path in env::args_os().skip(1) {
        target(&fs::read(&path)?);
        println!("{}: done", path.display());
    }
    Ok(())
}

/// What a gateway reads from a device, however the network cut it. The first byte says how.
pub fn client_frames(data: &[u8]) {
    each_frame(data, |kind, message| {
        let Ok(Some(frame)) = ClientFrame::decode(kind, message) else { return };
        let (kind, message) = encoded(|out| frame.encode(out));
        assert_eq!(ClientFrame::decode(kind, message), Ok(Some(frame)));
    });
}

/// What a device reads from a gateway.
pub fn server_frames(data: &[u8]) {
    each_frame(data, |kind, message| {
        let Ok(Some(frame)) = ServerFrame::decode(kind, message) else { return };
        let (kind, message) = encoded(|out| frame.encode(out));
        assert_eq!(ServerFrame::decode(kind, message), Ok(Some(frame)));
    });
}

fn each_frame(data: &[u8], mut visit: impl FnMut(u8, Bytes)) {
    let Some((&step, data)) = data.split_first() else { return };
    let mut buffer = BytesMut::new();
    for chunk in data.chunks(usize::from(step).max(1)) {
        buffer.put_slice(chunk);
        loop {
            match frame::split(&mut buffer, MAX_FRAME_BYTES) {
                Ok(Some((kind, message))) => {
                    assert!(message.len() < frame::limit(kind, MAX_FRAME_BYTES));
                    visit(kind, message);
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
}

fn encoded(encode: impl FnOnce(&mut BytesMut)) -> (u8, Bytes) {
    let mut out = BytesMut::new();
    encode(&mut out);
    let frame = frame::split(&mut out, frame::MAX_RESUME_BYTES).expect("our own frame").expect("a whole one");
    assert!(out.is_empty());
    frame
}

/// An event record: the bytes as they are, and again as header and body with checksums that fit.
pub fn event_record(data: &[u8]) {
    let whole = Bytes::copy_from_slice(data);
    let _ = (record::decode(&whole, 0), record::header(data), record::len(data));
    let Some((&cut, rest)) = data.split_first() else { return };
    let (header, body) = rest.split_at(usize::from(cut).min(rest.len()));
    let mut sealed = BytesMut::new();
    sealed.put_u32_le(header.len() as u32);
    sealed.put_u32_le(body.len() as u32);
    sealed.put_u32_le(crc32fast::hash(header));
    sealed.put_u32_le(7);
    sealed.put_u32_le(crc32fast::hash(body));
    sealed.put_slice(header);
    sealed.put_slice(body);
    let Ok(event) = record::decode(&sealed.freeze(), 7) else { return };
    assert_eq!(event.body, body);
    let mut again = Vec::new();
    record::encode(&event.header, &event.body, 7, crc32fast::hash(body), &mut again);
    assert_eq!(record::decode(&again.into(), 7), Ok(event));
}

/// A bundle, and every command in it.
pub fn bundle(data: &[u8]) {
    let Ok(bundle) = Bundle::parse(Bytes::copy_from_slice(data)) else { return };
    let mut builder = Builder::new();
    for bytes in bundle.commands() {
        builder.push(&bytes);
        let _ = Command::decode(bytes);
    }
    assert_eq!(builder.finish(bundle.level, bundle.stamp), data);
}

/// A row: the bytes as they are under some key, and again with format and checksum that fit.
pub fn row(data: &[u8]) {
    let Some((&kind, rest)) = data.split_first() else { return };
    let (key, value) = rest.split_at(rest.len() / 2);
    let _ = Row::decode(key, value);
    let Some(kind) = Kind::from_byte(kind) else { return };
    let key = Entity::conversation("app", "general").key(kind, &[b"\x03ann", b"phone"]);
    let mut sealed = vec![rows::FORMAT];
    sealed.extend_from_slice(&rows::row_crc(key.as_bytes(), rest).to_le_bytes());
    sealed.extend_from_slice(rest);
    let Ok(row) = Row::decode(key.as_bytes(), &sealed) else { return };
    assert_eq!(Row::decode(key.as_bytes(), &row.encode(&key)), Ok(row));
}

/// A log entry: the bytes as they are, and again with format and checksum that fit.
pub fn log_entry(data: &[u8]) {
    const PLACE: (ShardId, u64) = (ShardId(3), 9);
    let _ = wire::decode_entry(PLACE.0, PLACE.1, &Bytes::copy_from_slice(data));
    let mut crc = crc32fast::Hasher::new();
    crc.update(&PLACE.0.0.to_be_bytes());
    crc.update(&PLACE.1.to_be_bytes());
    crc.update(data);
    let mut sealed = BytesMut::new();
    sealed.put_u8(wire::ENTRY_FORMAT);
    sealed.put_u32_le(crc.finalize());
    sealed.put_slice(data);
    let Ok(entry) = wire::decode_entry(PLACE.0, PLACE.1, &sealed.freeze()) else { return };
    let mut again = Vec::new();
    wire::encode_entry(PLACE.0, &entry, &mut again);
    assert_eq!(wire::decode_entry(PLACE.0, PLACE.1, &again.into()), Ok(entry));
}

/// Commands with right checksums and any content, applied one after the other to one state: what a broker that checks
/// less than it should would propose. Each comes with a `u8` of its length.
pub fn command(mut data: &[u8]) {
    let mut state = MemoryRows::default();
    let context = Context { stamp: StampMs(1), level: LEVEL };
    while let Some((&len, rest)) = data.split_first() {
        let (bytes, rest) = rest.split_at(usize::from(len).min(rest.len()));
        data = rest;
        let Ok(command) = Command::decode(bytes) else { continue };
        let Some(op) = command.op else { continue };
        let command = command::wrap(command.app, command.target, op);
        let _ = (command::check(&command), command::target_shard_slot(&command), command::send_no(&command));
        let mut applied = Applied::default();
        let result =
            apply_command(&mut state, &context, &command::encode(&command), &mut BytesMut::new(), &mut applied);
        assert!(result.is_err() || applied.outcomes.len() == 1);
    }
}
