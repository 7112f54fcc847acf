//! A look at the framing of RocksDB's WAL and MANIFEST files before RocksDB reads them, for the flipped bits that its
//! reader does not report: one in a record's type makes it spin for ever, one in the length of a late record passes for
//! a torn tail. Must never judge what RocksDB can judge.
//!
//! ```text
//! blocks of 32 KiB, each: records `u32 crc │ u16 LE length │ u8 type │ payload`; fewer than 7 bytes left are padding
//! ```

use std::{fs, fs::File, io, os::unix::fs::FileExt, path::Path};

const BLOCK_BYTES: u64 = 32 * 1024;
const HEADER_BYTES: u64 = 7;
/// Full, first, middle, last. The others belong to recycled or compressed files, which our options rule out.
const TYPES: std::ops::RangeInclusive<u8> = 1..=4;

/// What is wrong with the files of an instance, if RocksDB could not be trusted to say it.
pub(crate) fn check(dir: &Path) -> io::Result<Result<(), String>> {
    let files = match fs::read_dir(dir) {
        Ok(files) => files,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Ok(())),
        Err(error) => return Err(error),
    };
    for file in files {
        let path = file?.path();
        let manifest = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"MANIFEST-"));
        if !manifest && path.extension().is_none_or(|extension| extension != "log") {
            continue;
        }
        let file = File::open(&path)?;
        if let Some(found) = look_through(&file, file.metadata()?.len())? {
            return Ok(Err(format!("{} {found}", path.display())));
        }
    }
    Ok(Ok(()))
}

/// The first record of a type that we never write, or of a length that was another one. Stops at what a power cut
/// leaves: zeros (behind a piece of a checksum, perhaps), or an end.
fn look_through(file: &File, len: u64) -> io::Result<Option<String>> {
    let mut at = 0;
    while at + HEADER_BYTES <= len {
        let left = BLOCK_BYTES - at % BLOCK_BYTES;
        if left < HEADER_BYTES {
            at += left;
            continue;
        }
        let mut header = [0; HEADER_BYTES as usize];
        file.read_exact_at(&mut header, at)?;
        if header[4..] == [0; 3] {
            return Ok(None);
        }
        if !TYPES.contains(&header[6]) {
            return Ok(Some(format!("has a record of a foreign type at byte {at}")));
        }
        let end = at + HEADER_BYTES + u64::from(u16::from_le_bytes([header[4], header[5]]));
        if end > len {
            let flipped = length_was_another(file, at, &header, left.min(len - at))?;
            return Ok(flipped.then(|| format!("has a flipped bit in the length of the record at byte {at}")));
        }
        at = end;
    }
    Ok(None)
}

/// Whether a record that seems to end behind the end of its file is whole under a length of which one bit differs. What
/// a crash leaves of a record has not all the bytes that its checksum was made of, under no length.
///
/// `room` is what the file has of the record's block, from the header on.
fn length_was_another(file: &File, at: u64, header: &[u8; 7], room: u64) -> io::Result<bool> {
    let mut rest = vec![0; (room - HEADER_BYTES) as usize];
    file.read_exact_at(&mut rest, at + HEADER_BYTES)?;
    let [c0, c1, c2, c3, l0, l1, kind] = *header;
    let (crc, length) = (u32::from_le_bytes([c0, c1, c2, c3]), u16::from_le_bytes([l0, l1]));
    let lengths = (0..u16::BITS).map(|bit| usize::from(length ^ 1 << bit));
    Ok(lengths.filter_map(|length| rest.get(..length)).any(|payload| record_crc(kind, payload) == crc))
}

/// The checksum of a record: CRC-32C (RFC 3720, appendix B.4) over type and payload, masked as RocksDB masks it
/// (`util/crc32c.h`). Slow, and used for one record of a file at most.
fn record_crc(kind: u8, payload: &[u8]) -> u32 {
    const CASTAGNOLI_REFLECTED: u32 = 0x82f6_3b78;
    const MASK_DELTA: u32 = 0xa282_ead8;
    let crc = [kind].iter().chain(payload).fold(u32::MAX, |crc, &byte| {
        (0..u8::BITS)
            .fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (CASTAGNOLI_REFLECTED & (crc & 1).wrapping_neg()))
    });
    (!crc).rotate_right(15).wrapping_add(MASK_DELTA)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn record(kind: u8, payload: &[u8]) -> Vec<u8> {
        let length = (payload.len() as u16).to_le_bytes();
        [&record_crc(kind, payload).to_le_bytes()[..], &length, &[kind], payload].concat()
    }

    fn look(bytes: &[u8]) -> Option<String> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        look_through(&file, bytes.len() as u64).unwrap()
    }

    #[test]
    fn the_checksum_is_the_one_of_the_field() {
        // RFC 3720, appendix B.4: 32 bytes of zeros give 0x8a9136aa.
        let masked = 0x8a91_36aa_u32.rotate_right(15).wrapping_add(0xa282_ead8);
        assert_eq!(record_crc(0, &[0; 31]), masked);
    }

    #[test]
    fn every_length_with_a_flipped_bit_that_ends_behind_the_file_is_found() {
        let whole = [record(1, &[7; 100]), record(1, &[8; 1_000]), record(1, &[9; 50])].concat();
        assert_eq!(look(&whole), None);
        for (at, length) in [(0, 100_u16), (107, 1_000), (1_114, 50)] {
            for bit in (0..16).filter(|bit| at + 7 + usize::from(length ^ 1 << bit) > whole.len()) {
                let mut bad = whole.clone();
                bad[at + 4 + bit / 8] ^= 1 << (bit % 8);
                assert!(look(&bad).is_some_and(|found| found.contains("length")), "bit {bit} of the record at {at}");
            }
        }
    }

    #[test]
    fn a_late_length_in_a_later_block_is_looked_at_too() {
        let first = record(1, &[1; BLOCK_BYTES as usize - 2 * HEADER_BYTES as usize - 103]);
        // Padding of 3 bytes behind a record of 100; then a record in two pieces, the second in a block of its own.
        let padded = [first, record(1, &[2; 93 + 7]), vec![0; 3]].concat();
        assert_eq!(padded.len() as u64, BLOCK_BYTES);
        let pieces = [record(2, &[3; BLOCK_BYTES as usize - HEADER_BYTES as usize]), record(4, &[4; 40])].concat();
        let whole = [padded, pieces, record(1, &[5; 9])].concat();
        assert_eq!(look(&whole), None);
        for (at, length) in [(whole.len() - 16 - 47, 40_u16), (whole.len() - 16, 9)] {
            for bit in (0..16).filter(|bit| at + 7 + usize::from(length ^ 1 << bit) > whole.len()) {
                let mut bad = whole.clone();
                bad[at + 4 + bit / 8] ^= 1 << (bit % 8);
                assert!(look(&bad).is_some_and(|found| found.contains("length")), "bit {bit} of the record at {at}");
            }
        }
    }

    #[test]
    fn what_a_crash_leaves_of_a_record_is_no_damage() {
        let whole = [record(1, &[7; 100]), record(1, &[8; 1_000])].concat();
        for len in 107..whole.len() {
            assert_eq!(look(&whole[..len]), None, "{len} bytes");
        }
        for len in [107, 109, 600] {
            let mut zeros = whole[..len].to_vec();
            zeros.resize(1_000, 0);
            assert_eq!(look(&zeros), None, "{len} bytes, then zeros");
        }
    }
}
