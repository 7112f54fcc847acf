//! The event record: the bytes of one event from the moment `apply` makes it, in blocks on disk, between nodes and on
//! the way to a device. It is encoded once and never re-encoded, so that unknown header fields survive every hop.
//!
//! ```text
//! offset 0  u32 LE  header_len        4  u32 LE  body_len
//!        8  u32 LE  CRC32(header)    12  u32 LE  CRC32(app ‖ 0 ‖ conversation)    16  u32 LE  CRC32(body)
//!       20  header (stentor.v1.EventHeader), then body
//! ```

use bytes::{Buf, BufMut, Bytes};
use prost::Message;
use thiserror::Error;

use crate::v1::EventHeader;

/// Bytes before the header.
pub const PREFIX_BYTES: usize = 20;
/// No header is longer: ids and a content type, all bounded.
pub const MAX_HEADER_BYTES: usize = 4 * 1024;
/// No body is longer, whatever the configured limit.
pub const MAX_BODY_BYTES: usize = 1024 * 1024;

/// Bytes that are no event record. Whoever stored or sent them is at fault; the reader's state has not moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum BadRecord {
    /// Fewer bytes than the record says it has.
    #[error("event record is cut short")]
    Truncated,
    /// A length beyond what any record may have.
    #[error("event record is longer than any may be")]
    TooLarge,
    /// Bytes changed since they entered the cluster.
    #[error("checksum of the event's {0} does not match")]
    Checksum(&'static str),
    /// The header is no protobuf.
    #[error("event header cannot be decoded")]
    Header,
}

/// A decoded record; the body and the header's texts share the record's memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Who, what, when.
    pub header: EventHeader,
    /// The content, as sent.
    pub body: Bytes,
}

/// Appends a record to `out`. `key_crc` and `body_crc` are those made where the command entered the cluster.
pub fn encode(header: &EventHeader, body: &[u8], key_crc: u32, body_crc: u32, out: &mut impl BufMut) {
    let mut head = [0u8; 512];
    let len = header.encoded_len();
    // Headers are small; only one with the longest ids leaves the stack.
    let spill;
    let head: &[u8] = if len <= head.len() {
        let mut cursor = &mut head[..];
        let _ = header.encode(&mut cursor);
        &head[..len]
    } else {
        spill = header.encode_to_vec();
        &spill
    };
    out.put_u32_le(head.len() as u32);
    out.put_u32_le(body.len() as u32);
    out.put_u32_le(crc32fast::hash(head));
    out.put_u32_le(key_crc);
    out.put_u32_le(body_crc);
    out.put_slice(head);
    out.put_slice(body);
}

/// The length of the record that starts `bytes`, bounds checked.
pub fn len(bytes: &[u8]) -> Result<usize, BadRecord> {
    if bytes.len() < PREFIX_BYTES {
        return Err(BadRecord::Truncated);
    }
    let mut at = bytes;
    let (header, body) = (at.get_u32_le() as usize, at.get_u32_le() as usize);
    if header > MAX_HEADER_BYTES || body > MAX_BODY_BYTES {
        return Err(BadRecord::TooLarge);
    }
    let total = PREFIX_BYTES + header + body;
    if bytes.len() < total { Err(BadRecord::Truncated) } else { Ok(total) }
}

/// Checks all three checksums without decoding.
pub fn verify(record: &[u8], key_crc: u32) -> Result<(), BadRecord> {
    if len(record)? != record.len() {
        return Err(BadRecord::Truncated);
    }
    let mut at = record;
    let header_len = at.get_u32_le() as usize;
    at.advance(4);
    let (header_crc, stored_key_crc, body_crc) = (at.get_u32_le(), at.get_u32_le(), at.get_u32_le());
    let (header, body) = at.split_at(header_len);
    if stored_key_crc != key_crc {
        return Err(BadRecord::Checksum("key"));
    }
    if crc32fast::hash(header) != header_crc {
        return Err(BadRecord::Checksum("header"));
    }
    if crc32fast::hash(body) != body_crc {
        return Err(BadRecord::Checksum("body"));
    }
    Ok(())
}

/// Decodes one whole record and checks all three checksums.
pub fn decode(record: &Bytes, key_crc: u32) -> Result<Event, BadRecord> {
    verify(record, key_crc)?;
    let header_len = record.as_ref().get_u32_le() as usize;
    let header = record.slice(PREFIX_BYTES..PREFIX_BYTES + header_len);
    let header = EventHeader::decode(header).map_err(|_| BadRecord::Header)?;
    Ok(Event { header, body: record.slice(PREFIX_BYTES + header_len..) })
}

/// Reads the header of a record whose bytes were verified already.
pub fn header(record: &[u8]) -> Result<EventHeader, BadRecord> {
    len(record)?;
    let mut at = record;
    let header_len = at.get_u32_le() as usize;
    EventHeader::decode(&record[PREFIX_BYTES..PREFIX_BYTES + header_len]).map_err(|_| BadRecord::Header)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ids::key_crc;

    fn sample(body: &[u8]) -> Bytes {
        let header = EventHeader { seq: 7, sender: Bytes::from_static(b"ann"), stamp_ms: 9, ..Default::default() };
        let mut out = Vec::new();
        encode(&header, body, key_crc(b"app", b"c"), crc32fast::hash(body), &mut out);
        out.into()
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let record = sample(b"hello");
        let crc = key_crc(b"app", b"c");
        assert_eq!(decode(&record, crc).unwrap().body, "hello");
        for bit in 0..record.len() * 8 {
            let mut bytes = record.to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&bytes.into(), crc).is_err(), "bit {bit}");
        }
        assert_eq!(decode(&record, key_crc(b"app", b"d")), Err(BadRecord::Checksum("key")));
    }

    proptest! {
        #[test]
        fn records_round_trip(seq: u64, sender: Vec<u8>, body: Vec<u8>) {
            let header = EventHeader { seq, sender: sender.into(), ..Default::default() };
            let mut out = Vec::new();
            encode(&header, &body, 5, crc32fast::hash(&body), &mut out);
            prop_assert_eq!(len(&out), Ok(out.len()));
            let event = decode(&out.into(), 5).unwrap();
            prop_assert_eq!(event.header, header);
            prop_assert_eq!(&event.body[..], &body[..]);
        }

        #[test]
        fn any_bytes_are_answered_without_a_panic(bytes: Vec<u8>) {
            let _ = decode(&bytes.clone().into(), 0);
            let _ = header(&bytes);
        }
    }
}
