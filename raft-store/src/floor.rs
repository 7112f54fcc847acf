//! The floor of everything durable: synced batches into a log instance with our own options, and nothing else
//! (docs/performance.md). Must never be used by a broker.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use rocksdb::DB;
use stentor_proto::ids::ShardId;

use crate::{
    db::{Db, DbError, Rocks},
    logkey, options,
};

/// What was written in the time that counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Floor {
    /// How long it took.
    pub elapsed: Duration,
    /// Values that are on the disk.
    pub entries: u64,
    /// How long each batch took, its fsync included.
    pub batches: Vec<Duration>,
}

/// Writes `batch` values of `value_bytes` each at a time into a new instance in `dir`, with one fsync each, for
/// `warm_up` and then for `measured`; blocks as long. The keys are those of 64 shards' log entries. The error is
/// RocksDB's own text.
pub fn write(
    dir: &Path,
    value_bytes: usize,
    batch: usize,
    (warm_up, measured): (Duration, Duration),
) -> Result<Floor, String> {
    let run = || -> Result<Floor, DbError> {
        let mut settings = options::log(true);
        options::past_the_page_cache(&mut settings, dir);
        let db = Db::Rocks(Rocks::new(DB::open(&settings, dir)?));
        let mut next = 0u64;
        let mut value = vec![0u8; value_bytes];
        let mut once = || -> Result<Duration, DbError> {
            let began = Instant::now();
            let mut entries = db.batch();
            for _ in 0..batch {
                // Values that differ, as messages do.
                value.iter_mut().zip(next.to_le_bytes()).for_each(|(byte, of)| *byte = of);
                entries.put(logkey::entry(shard(next), next / SHARDS), &value);
                next += 1;
            }
            db.write_synced_now(entries)?;
            Ok(began.elapsed())
        };
        let began = Instant::now();
        while began.elapsed() < warm_up {
            once()?;
        }
        let (began, mut batches) = (Instant::now(), Vec::new());
        while began.elapsed() < measured {
            batches.push(once()?);
        }
        Ok(Floor { elapsed: began.elapsed(), entries: (batches.len() * batch) as u64, batches })
    };
    run().map_err(|error| error.to_string())
}

const SHARDS: u64 = 64;

fn shard(n: u64) -> ShardId {
    ShardId((n % SHARDS) as u32 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let floor = write(dir.path(), 32, 128, (Duration::ZERO, Duration::from_millis(50))).unwrap();
        assert_eq!(floor.entries, floor.batches.len() as u64 * 128);
        assert!(floor.entries > 0);
        let db = DB::open(&options::log(false), dir.path()).unwrap();
        let kept = (0..floor.entries).filter(|n| {
            let key = logkey::entry(shard(*n), n / SHARDS);
            db.get(key).unwrap().is_some_and(|value| value.len() == 32 && value[..8] == n.to_le_bytes())
        });
        assert_eq!(kept.count() as u64, floor.entries);
    }

    #[test]
    fn a_directory_that_cannot_be_is_told() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(write(file.path(), 1, 1, (Duration::ZERO, Duration::ZERO)).is_err());
    }
}
