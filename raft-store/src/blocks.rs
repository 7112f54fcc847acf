//! The block: how the events of one conversation lie on disk (docs/storage.md, "Blocks"): those since the last cut,
//! split at 32 KiB. Must never hold a gap: a reader counts on n records being n seqs.
//!
//! ```text
//! u8 format = 1 │ u32 LE CRC32(key ‖ all that follows) │ u64 LE first seq │ u32 LE n │ n × u32 LE end │ records
//! ```

use std::borrow::Borrow;

use bytes::Bytes;
use stentor_engine::rows::row_crc;

/// The only format so far.
pub(crate) const FORMAT: u8 = 1;
/// A block closes before it would grow beyond this, unless it would be empty.
pub(crate) const MAX_BLOCK_BYTES: usize = 32 * 1024;

const PREFIX_BYTES: usize = 17;

/// Event records of one conversation, dense, in memory.
#[derive(Debug, Clone, Default)]
pub(crate) struct EventRun {
    first: u64,
    ends: Vec<u32>,
    bytes: Vec<u8>,
}

impl EventRun {
    /// A run that begins with `first`.
    pub(crate) fn new(first: u64) -> Self {
        Self { first, ..Self::default() }
    }

    /// The seq of its first record.
    pub(crate) fn first(&self) -> u64 {
        self.first
    }

    /// The seq after its last record.
    pub(crate) fn next(&self) -> u64 {
        self.first + self.ends.len() as u64
    }

    /// Bytes of its records.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Adds the record of [`Self::next`].
    pub(crate) fn push(&mut self, record: &[u8]) {
        self.bytes.extend_from_slice(record);
        self.ends.push(self.bytes.len() as u32);
    }

    /// Adds a run that begins where this one ends.
    pub(crate) fn extend(&mut self, other: &Self) {
        for seq in other.first..other.next() {
            if let Some(record) = other.record(seq) {
                self.push(record);
            }
        }
    }

    /// The record of a seq.
    pub(crate) fn record(&self, seq: u64) -> Option<&[u8]> {
        let at = usize::try_from(seq.checked_sub(self.first)?).ok()?;
        let end = *self.ends.get(at)? as usize;
        let start = if at == 0 { 0 } else { self.ends[at - 1] as usize };
        self.bytes.get(start..end)
    }

    /// How many records, from `seq` on, make the next block.
    fn block_len(&self, seq: u64) -> usize {
        let mut bytes = PREFIX_BYTES;
        let mut count = 0;
        while let Some(record) = self.record(seq + count as u64) {
            bytes += 4 + record.len();
            if count > 0 && bytes > MAX_BLOCK_BYTES {
                break;
            }
            count += 1;
        }
        count
    }

    /// Its blocks: first seq and value, for keys made by `key`.
    pub(crate) fn blocks<K: Borrow<[u8]>>(&self, key: impl Fn(u64) -> K, mut put: impl FnMut(K, &[u8])) {
        let mut seq = self.first;
        let mut value = Vec::with_capacity(self.bytes.len().min(MAX_BLOCK_BYTES) + 64);
        loop {
            let count = self.block_len(seq);
            if count == 0 {
                return;
            }
            let key = key(seq);
            value.clear();
            value.extend_from_slice(&[FORMAT, 0, 0, 0, 0]);
            value.extend_from_slice(&seq.to_le_bytes());
            value.extend_from_slice(&(count as u32).to_le_bytes());
            let records = (seq..seq + count as u64).filter_map(|seq| self.record(seq));
            let mut end = 0u32;
            for record in records.clone() {
                end += record.len() as u32;
                value.extend_from_slice(&end.to_le_bytes());
            }
            records.for_each(|record| value.extend_from_slice(record));
            let crc = row_crc(key.borrow(), &value[5..]);
            value[1..5].copy_from_slice(&crc.to_le_bytes());
            put(key, &value);
            seq += count as u64;
        }
    }
}

/// A block whose format, checksum and offsets were checked.
#[derive(Debug, Clone)]
pub(crate) struct Block {
    first: u64,
    count: u32,
    value: Bytes,
}

impl Block {
    /// Checks everything but the records themselves, which carry checksums of their own.
    pub(crate) fn parse(key: &[u8], value: &[u8]) -> Result<Self, String> {
        let bad = |what: &str| format!("block {}: {what}", key.escape_ascii());
        if value.len() < PREFIX_BYTES {
            return Err(bad("is cut short"));
        }
        if value[0] != FORMAT {
            return Err(bad(&format!("has the unknown format {}", value[0])));
        }
        let crc = u32::from_le_bytes([value[1], value[2], value[3], value[4]]);
        if crc != row_crc(key, &value[5..]) {
            return Err(bad("its checksum does not match"));
        }
        let mut first = [0; 8];
        first.copy_from_slice(&value[5..13]);
        let count = u32::from_le_bytes([value[13], value[14], value[15], value[16]]);
        let block = Self { first: u64::from_le_bytes(first), count, value: Bytes::copy_from_slice(value) };
        block.check().map_err(bad)?;
        Ok(block)
    }

    fn check(&self) -> Result<(), &'static str> {
        let records = self.records_at().filter(|&at| at <= self.value.len()).ok_or("has more offsets than bytes")?;
        let mut last = 0;
        for at in 0..self.count as usize {
            let end = self.end(at);
            if end < last {
                return Err("has offsets that go back");
            }
            last = end;
        }
        if self.count == 0 || records + last as usize != self.value.len() {
            return Err("has a wrong length");
        }
        self.first.checked_add(u64::from(self.count)).map(drop).ok_or("has a first seq beyond all")
    }

    fn records_at(&self) -> Option<usize> {
        (self.count as usize).checked_mul(4)?.checked_add(PREFIX_BYTES)
    }

    fn end(&self, at: usize) -> u32 {
        let at = PREFIX_BYTES + 4 * at;
        let v = &self.value;
        u32::from_le_bytes([v[at], v[at + 1], v[at + 2], v[at + 3]])
    }

    /// The seq of its first record.
    pub(crate) fn first(&self) -> u64 {
        self.first
    }

    /// The seq after its last record.
    pub(crate) fn next(&self) -> u64 {
        self.first + u64::from(self.count)
    }

    /// The record of a seq; shares the block's memory.
    pub(crate) fn record(&self, seq: u64) -> Option<Bytes> {
        let at = usize::try_from(seq.checked_sub(self.first)?).ok().filter(|&at| at < self.count as usize)?;
        let records = self.records_at()?;
        let start = if at == 0 { 0 } else { self.end(at - 1) as usize };
        Some(self.value.slice(records + start..records + self.end(at) as usize))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn blocks_of(run: &EventRun) -> Vec<(Vec<u8>, Vec<u8>)> {
        let mut out = Vec::new();
        run.blocks(|seq| seq.to_be_bytes().to_vec(), |key, value| out.push((key, value.to_vec())));
        out
    }

    proptest! {
        #[test]
        fn runs_come_back_from_blocks(first in 1u64..1 << 40, lens in prop::collection::vec(0usize..40_000, 1..20)) {
            let mut run = EventRun::new(first);
            for (i, len) in lens.iter().enumerate() {
                run.push(&vec![i as u8; *len]);
            }
            let mut seq = first;
            for (key, value) in blocks_of(&run) {
                let block = Block::parse(&key, &value).unwrap();
                prop_assert_eq!(block.first(), seq);
                prop_assert!(value.len() <= MAX_BLOCK_BYTES || block.next() == block.first() + 1);
                while seq < block.next() {
                    prop_assert_eq!(&block.record(seq).unwrap()[..], run.record(seq).unwrap());
                    seq += 1;
                }
            }
            prop_assert_eq!(seq, run.next());
        }

        #[test]
        fn any_bytes_are_answered_without_a_panic(bytes: Vec<u8>) {
            let _ = Block::parse(b"key", &bytes);
        }

        #[test]
        fn any_bytes_behind_a_right_checksum_do_not_panic(rest in prop::collection::vec(any::<u8>(), 12..80)) {
            let mut value = vec![FORMAT];
            value.extend_from_slice(&row_crc(b"key", &rest).to_le_bytes());
            value.extend_from_slice(&rest);
            if let Ok(block) = Block::parse(b"key", &value) {
                prop_assert!(block.record(block.first()).is_some());
            }
        }
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let mut run = EventRun::new(5);
        run.push(b"one");
        run.push(b"two");
        let (key, value) = blocks_of(&run).remove(0);
        for bit in 0..value.len() * 8 {
            let mut bytes = value.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Block::parse(&key, &bytes).is_err(), "bit {bit}");
        }
        assert!(Block::parse(b"other", &value).is_err());
    }
}
