//! The side file: how far the log instance was fsynced (docs/storage.md, "Synced position"). Written after each fsync
//! and not fsynced itself, so it can only lag: a log that recovers below it has lost what was acknowledged.
//! Must never be written before the fsync that it speaks of.

use std::{io, path::Path};

use crate::disk::{Disk, DiskFile};

/// `u8 format │ u64 LE position │ u32 LE CRC32 of both`.
const SLOT_BYTES: usize = 13;
/// Two sectors, so that a torn write can hurt only the slot that is being written.
const SLOT_AT: [u64; 2] = [0, 512];
const FORMAT: u8 = 1;

/// The open side file.
pub(crate) struct SyncedFile {
    file: DiskFile,
}

impl SyncedFile {
    /// Opens or makes it.
    pub(crate) fn open(disk: &Disk, path: &Path) -> io::Result<Self> {
        Ok(Self { file: disk.open_or_create(path)? })
    }

    /// The highest position in a good slot; an error text when both slots were written and neither is good.
    pub(crate) fn read(&self) -> io::Result<Result<u64, String>> {
        let slots = [self.slot(SLOT_AT[0])?, self.slot(SLOT_AT[1])?];
        Ok(match slots {
            [Slot::Damaged, Slot::Damaged] => Err("both slots of the synced position are damaged".into()),
            _ => Ok(slots
                .iter()
                .map(|slot| if let Slot::Good(position) = slot { *position } else { 0 })
                .max()
                .unwrap_or(0)),
        })
    }

    fn slot(&self, at: u64) -> io::Result<Slot> {
        let mut bytes = [0; SLOT_BYTES];
        let mut len = 0;
        while len < SLOT_BYTES {
            match self.file.read_at(&mut bytes[len..], at + len as u64)? {
                0 => break,
                n => len += n,
            }
        }
        // Never written, or lost with the power: the file is not fsynced.
        if bytes == [0; SLOT_BYTES] {
            return Ok(Slot::Empty);
        }
        let mut position = [0; 8];
        position.copy_from_slice(&bytes[1..9]);
        let good = len == SLOT_BYTES && bytes == encode(u64::from_le_bytes(position));
        Ok(if good { Slot::Good(u64::from_le_bytes(position)) } else { Slot::Damaged })
    }

    /// Notes a position that has just been fsynced.
    pub(crate) fn write(&self, position: u64) -> io::Result<()> {
        self.file.write_all_at(&encode(position), SLOT_AT[(position % 2) as usize])
    }
}

enum Slot {
    Empty,
    Damaged,
    Good(u64),
}

fn encode(position: u64) -> [u8; SLOT_BYTES] {
    let mut bytes = [0; SLOT_BYTES];
    bytes[0] = FORMAT;
    bytes[1..9].copy_from_slice(&position.to_le_bytes());
    let crc = crc32fast::hash(&bytes[..9]);
    bytes[9..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flip_in_the_newest_slot_falls_back_to_the_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("synced");
        let file = SyncedFile::open(&Disk::Real, &path).unwrap();
        assert_eq!(file.read().unwrap(), Ok(0));
        file.write(6).unwrap();
        file.write(7).unwrap();
        assert_eq!(file.read().unwrap(), Ok(7));
        let good = std::fs::read(&path).unwrap();
        for bit in 0..SLOT_BYTES * 8 {
            let mut bytes = good.clone();
            bytes[512 + bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&path, &bytes).unwrap();
            assert_eq!(SyncedFile::open(&Disk::Real, &path).unwrap().read().unwrap(), Ok(6), "bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&path, &bytes).unwrap();
            assert!(SyncedFile::open(&Disk::Real, &path).unwrap().read().unwrap().is_err(), "bit {bit}");
        }
    }
}
