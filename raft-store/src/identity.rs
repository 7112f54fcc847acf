//! The identity file: which cluster, broker and incarnation a data directory is, and its format.
//! Must never be replaced by another identity, and never be found half written.
//!
//! ```text
//! "STENTOR\0" │ u32 LE format │ u32 LE CRC32(all that follows) │ u8 known │ u32 LE broker │ u32 LE incarnation │
//! cluster id
//! ```

use std::{io, path::Path};

use stentor_engine::limits;
use stentor_proto::ids::{BrokerId, Incarnation};

use crate::{disk::Disk, store::Identity};

/// The format of data directories that this build writes, and the newest that it knows.
pub(crate) const FORMAT: u32 = 1;
const MAGIC: &[u8; 8] = b"STENTOR\0";
const NAME: &str = "identity";

/// What the file says.
pub(crate) enum Found {
    /// No file: a new directory.
    New,
    /// A directory of this format.
    Known(Option<Identity>),
    /// A newer version's.
    Newer(u32),
    /// Not what was written.
    Damaged(&'static str),
}

/// Reads it.
pub(crate) fn read(disk: &Disk, dir: &Path) -> io::Result<Found> {
    match disk.read(&dir.join(NAME)) {
        Ok(bytes) => Ok(decode(&bytes).unwrap_or(Found::Damaged("the identity file is damaged"))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Found::New),
        Err(error) => Err(error),
    }
}

/// Writes it whole and durably.
pub(crate) fn write(disk: &Disk, dir: &Path, identity: Option<&Identity>) -> io::Result<()> {
    if identity.is_some_and(|i| i.cluster_id.len() > limits::CLUSTER_ID_BYTES) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the cluster id is too long"));
    }
    let under_way = dir.join("identity.tmp");
    let mut file = disk.create(&under_way)?;
    file.write_all(&encode(identity))?;
    file.sync_all()?;
    disk.rename(&under_way, &dir.join(NAME))?;
    disk.sync_dir(dir)
}

fn encode(identity: Option<&Identity>) -> Vec<u8> {
    let mut rest = vec![u8::from(identity.is_some())];
    rest.extend_from_slice(&identity.map_or(0, |i| i.broker.0).to_le_bytes());
    rest.extend_from_slice(&identity.map_or(0, |i| i.incarnation.0).to_le_bytes());
    rest.extend_from_slice(identity.map_or("", |i| i.cluster_id.as_str()).as_bytes());
    let mut out = MAGIC.to_vec();
    out.extend_from_slice(&FORMAT.to_le_bytes());
    out.extend_from_slice(&crc32fast::hash(&rest).to_le_bytes());
    out.extend_from_slice(&rest);
    out
}

fn decode(bytes: &[u8]) -> Option<Found> {
    let rest = bytes.strip_prefix(MAGIC)?;
    let (format, rest) = rest.split_first_chunk::<4>()?;
    let format = u32::from_le_bytes(*format);
    if format > FORMAT {
        return Some(Found::Newer(format));
    }
    let (crc, rest) = rest.split_first_chunk::<4>()?;
    if format != FORMAT || u32::from_le_bytes(*crc) != crc32fast::hash(rest) {
        return None;
    }
    let (&known, rest) = rest.split_first()?;
    let (broker, rest) = rest.split_first_chunk::<4>()?;
    let (incarnation, rest) = rest.split_first_chunk::<4>()?;
    let identity = Identity {
        cluster_id: String::from_utf8(rest.to_vec()).ok()?,
        broker: BrokerId(u32::from_le_bytes(*broker)),
        incarnation: Incarnation(u32::from_le_bytes(*incarnation)),
    };
    Some(Found::Known((known == 1).then_some(identity)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_is_found() {
        let identity = Identity { cluster_id: "c1".into(), broker: BrokerId(2), incarnation: Incarnation(3) };
        let good = encode(Some(&identity));
        assert!(matches!(decode(&good), Some(Found::Known(Some(found))) if found == identity));
        for bit in 0..good.len() * 8 {
            let mut bytes = good.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(matches!(decode(&bytes), None | Some(Found::Newer(_))), "bit {bit}");
        }
    }
}
