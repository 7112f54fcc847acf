//! A look at the framing of RocksDB's WAL and MANIFEST files before RocksDB reads them: one flipped bit in a record's
//! type byte makes its reader spin for ever instead of reporting damage. Must never judge what RocksDB can judge.
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
        if let Some(at) = foreign_record(&file, file.metadata()?.len())? {
            return Ok(Err(format!("{} has a record of a foreign type at byte {at}", path.display())));
        }
    }
    Ok(Ok(()))
}

/// Where the first record of a type that we never write begins. Stops at what a power cut leaves: zeros, or an end.
fn foreign_record(file: &File, len: u64) -> io::Result<Option<u64>> {
    let mut at = 0;
    while at + HEADER_BYTES <= len {
        let left = BLOCK_BYTES - at % BLOCK_BYTES;
        if left < HEADER_BYTES {
            at += left;
            continue;
        }
        let mut header = [0; HEADER_BYTES as usize];
        file.read_exact_at(&mut header, at)?;
        if header == [0; HEADER_BYTES as usize] {
            return Ok(None);
        }
        if !TYPES.contains(&header[6]) {
            return Ok(Some(at));
        }
        at += HEADER_BYTES + u64::from(u16::from_le_bytes([header[4], header[5]]));
    }
    Ok(None)
}
