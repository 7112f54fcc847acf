//! The bundle: what one Raft entry carries (docs/storage.md, "Bundles"). The log stores one value per bundle, never
//! per message. The commands inside stay encoded until `apply` slices them, so nothing is copied on the way.
//!
//! ```text
//! u8 format = 1 │ u32 LE apply_level │ u64 LE stamp_ms │ u32 LE count │ count × (u32 LE length │ Command)
//! ```

use bytes::{Buf, BufMut, Bytes, BytesMut};
use thiserror::Error;

use crate::ids::{ApplyLevel, StampMs};

/// The only format so far.
pub const FORMAT: u8 = 1;
/// Bytes before the first command.
pub const PREFIX_BYTES: usize = 17;
/// No bundle has more commands, so that one entry's answers and effects stay bounded.
pub const MAX_COMMANDS: u32 = 4_096;
/// No bundle has more bytes: one command that travels alone, at the largest body, with room for its header.
pub const MAX_BYTES: usize = 2 * 1024 * 1024;

/// Bytes that are no bundle. A replica that reads such an entry must stop: its log is damaged or too new for it.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum BadBundle {
    /// Fewer bytes than it says, or some left over.
    #[error("bundle has a wrong length")]
    Length,
    /// Written by a newer version.
    #[error("bundle has the unknown format {0}")]
    Format(u8),
    /// More commands than any bundle may have.
    #[error("bundle has {0} commands, more than any may have")]
    TooMany(u32),
}

/// Collects commands for one entry.
#[derive(Debug)]
pub struct Builder {
    bytes: BytesMut,
    count: u32,
}

impl Default for Builder {
    fn default() -> Self {
        Self::new()
    }
}

impl Builder {
    /// An empty bundle.
    pub fn new() -> Self {
        let mut bytes = BytesMut::with_capacity(8 * 1024);
        bytes.put_bytes(0, PREFIX_BYTES);
        Self { bytes, count: 0 }
    }

    /// Adds one encoded `Command`.
    pub fn push(&mut self, command: &[u8]) {
        self.bytes.put_u32_le(command.len() as u32);
        self.bytes.put_slice(command);
        self.count += 1;
    }

    /// How many commands it has.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// How many bytes it has.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Whether another command of this length still fits under the hard limits.
    pub fn fits(&self, command_bytes: usize) -> bool {
        self.count < MAX_COMMANDS && self.bytes.len() + 4 + command_bytes <= MAX_BYTES
    }

    /// Closes it with the entry's level and stamp.
    pub fn finish(mut self, level: ApplyLevel, stamp: StampMs) -> Bytes {
        let mut prefix = &mut self.bytes[..PREFIX_BYTES];
        prefix.put_u8(FORMAT);
        prefix.put_u32_le(level.0);
        prefix.put_u64_le(stamp.0);
        prefix.put_u32_le(self.count);
        self.bytes.freeze()
    }
}

/// A bundle whose frame has been checked.
#[derive(Debug, Clone)]
pub struct Bundle {
    /// The rules to follow.
    pub level: ApplyLevel,
    /// The entry's time.
    pub stamp: StampMs,
    count: u32,
    rest: Bytes,
}

impl Bundle {
    /// Checks the whole frame first, so that iterating cannot fail half-way.
    pub fn parse(mut bytes: Bytes) -> Result<Self, BadBundle> {
        if bytes.len() < PREFIX_BYTES || bytes.len() > MAX_BYTES {
            return Err(BadBundle::Length);
        }
        let format = bytes.get_u8();
        if format != FORMAT {
            return Err(BadBundle::Format(format));
        }
        let (level, stamp, count) = (ApplyLevel(bytes.get_u32_le()), StampMs(bytes.get_u64_le()), bytes.get_u32_le());
        if count > MAX_COMMANDS {
            return Err(BadBundle::TooMany(count));
        }
        let mut at = &bytes[..];
        for _ in 0..count {
            if at.len() < 4 {
                return Err(BadBundle::Length);
            }
            let len = at.get_u32_le() as usize;
            if at.len() < len {
                return Err(BadBundle::Length);
            }
            at.advance(len);
        }
        if at.has_remaining() {
            return Err(BadBundle::Length);
        }
        Ok(Self { level, stamp, count, rest: bytes })
    }

    /// How many commands it has.
    pub fn count(&self) -> usize {
        self.count as usize
    }

    /// The encoded commands in order; each shares the bundle's memory.
    pub fn commands(&self) -> impl Iterator<Item = Bytes> + use<> {
        let mut rest = self.rest.clone();
        (0..self.count).map(move |_| {
            let len = rest.get_u32_le() as usize;
            rest.split_to(len)
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn bundles_round_trip(level: u32, stamp: u64, commands: Vec<Vec<u8>>) {
            let mut builder = Builder::new();
            for command in &commands {
                builder.push(command);
            }
            let bundle = Bundle::parse(builder.finish(ApplyLevel(level), StampMs(stamp))).unwrap();
            prop_assert_eq!((bundle.level.0, bundle.stamp.0), (level, stamp));
            prop_assert_eq!(bundle.commands().map(|c| c.to_vec()).collect::<Vec<_>>(), commands);
        }

        #[test]
        fn any_bytes_are_answered_without_a_panic(bytes: Vec<u8>) {
            if let Ok(bundle) = Bundle::parse(bytes.into()) {
                let _ = bundle.commands().count();
            }
        }
    }

    #[test]
    fn a_cut_bundle_is_refused() {
        let mut builder = Builder::new();
        builder.push(b"one");
        builder.push(b"two");
        let whole = builder.finish(ApplyLevel(1), StampMs(2));
        for len in 0..whole.len() {
            assert!(Bundle::parse(whole.slice(..len)).is_err(), "{len}");
        }
    }
}
