//! Every RocksDB option with its reason, in one table per instance (docs/storage.md, "RocksDB").
//! Must never relax what the recovery of an acknowledged entry leans on.

use std::path::Path;

use rocksdb::{
    BlockBasedIndexType, BlockBasedOptions, Cache, DBCompressionType, DBRecoveryMode, LogLevel, Options, ReadOptions,
    WriteOptions,
};
use rustix::fs::{Mode, OFlags};

use crate::db::KeyRange;

/// Of the state instance; reads of history come from here.
const BLOCK_CACHE_BYTES: usize = 64 << 20;
/// Of the log instance; only a lagging follower or a restart reads from disk.
const LOG_BLOCK_CACHE_BYTES: usize = 8 << 20;

/// Of the state instance, before compression.
const DATA_BLOCK_BYTES: usize = 8 << 10;
/// A piece of an index or filter.
const INDEX_BLOCK_BYTES: usize = 4 << 10;

/// Files of the log instance, a memtable each, before they are merged.
const LOG_FILES: i32 = 12;

/// What a flush or a merge writes at once. The log's fsyncs wait behind one write on the disk, a millisecond per MiB or
/// much more (docs/performance.md).
const WRITE_BYTES: u64 = 256 << 10;

/// Made and removed again, to see what the file system can do.
const PROBE_FILE: &str = ".direct-io";
/// Any device's block.
const PROBE_BYTES: usize = 4096;

fn both() -> Options {
    let mut options = Options::default();
    // A bad block stops the instance at once instead of answering "not found".
    options.set_paranoid_checks(true);
    // RocksDB's own LOG files: errors only, few and small, so that they never fill a disk.
    options.set_log_level(LogLevel::Warn);
    options.set_keep_log_file_num(4);
    options.set_max_log_file_size(4 << 20);
    // Two instances share one machine with everything else.
    options.set_max_background_jobs(2);
    // 20,000 descriptors a process is the hard limit on small machines; sockets come first.
    options.set_max_open_files(512);
    options.set_writable_file_max_buffer_size(WRITE_BYTES);
    options
}

/// Lets flushes and merges write past the page cache, if the file system that has `dir` can do that. What they write is
/// read late or never; with one busy conversation, copying it into fresh pages of the cache took a quarter of a broker's
/// CPU, and writing those back held up the log's fsyncs (docs/performance.md).
pub(crate) fn past_the_page_cache(options: &mut Options, dir: &Path) {
    options.set_use_direct_io_for_flush_and_compaction(takes_direct_io(dir));
}

fn takes_direct_io(dir: &Path) -> bool {
    let path = dir.join(PROBE_FILE);
    let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::DIRECT | OFlags::CLOEXEC;
    let opened = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR);
    // Some take the flag and refuse the write.
    let written = opened.is_ok_and(|file| {
        let block = vec![0; 2 * PROBE_BYTES];
        let start = block.as_ptr().align_offset(PROBE_BYTES);
        let aligned = block.get(start..start.saturating_add(PROBE_BYTES));
        aligned.is_some_and(|block| rustix::io::write(&file, block) == Ok(PROBE_BYTES))
    });
    // Where it could not be opened it may have been made all the same.
    let _ = std::fs::remove_file(&path);
    written
}

/// The log instance: entries, votes, truncations, purges; fsynced by the WAL thread.
pub(crate) fn log(create: bool) -> Options {
    let mut options = both();
    options.create_if_missing(create);
    // A torn last record is what a power cut leaves; anything else is damage. Where RocksDB cannot tell the two apart (a
    // flipped length in the last block), `framing` and the side file do.
    options.set_wal_recovery_mode(DBRecoveryMode::TolerateCorruptedTailRecords);
    // Recycled files would hold old records behind the tail; the recovery mode above forbids them.
    options.set_recycle_log_file_num(0);
    // A WAL file that went missing or shrank is found at open.
    options.set_track_and_verify_wals_in_manifest(true);
    // Entries are purged soon: most die in the memtable or in level 0.
    options.set_write_buffer_size(32 << 20);
    options.set_max_write_buffer_number(4);
    options.set_max_total_wal_size(256 << 20);
    // Purges run a checkpoint behind, so a file dies some files after it was written: merging early copies the living.
    options.set_level_zero_file_num_compaction_trigger(LOG_FILES);
    options.set_level_zero_slowdown_writes_trigger(3 * LOG_FILES);
    options.set_level_zero_stop_writes_trigger(4 * LOG_FILES);
    // Written once, read rarely: compressing would cost more than it saves.
    options.set_compression_type(DBCompressionType::None);
    options.set_block_based_table_factory(&table(LOG_BLOCK_CACHE_BYTES));
    options
}

/// The state instance: rows and blocks, written at checkpoints, made durable by explicit flushes.
pub(crate) fn state(create: bool) -> Options {
    let mut options = both();
    options.create_if_missing(create);
    // One family today. Without WAL, a second one would be torn from it by a memtable flush of one alone.
    options.set_atomic_flush(true);
    // A broker may hold 256 MiB of undurable log; a checkpoint should not wait for a memtable.
    options.set_write_buffer_size(64 << 20);
    options.set_max_write_buffer_number(4);
    // What is new is soon written again, and so is the first level below it, with each merge: what lies deeper is
    // compressed, once.
    options.set_compression_per_level(&[DBCompressionType::None, DBCompressionType::None, DBCompressionType::Lz4]);
    let mut table = table(BLOCK_CACHE_BYTES);
    // Most loads ask for rows that do not exist yet: a device's first send, a new participant.
    table.set_bloom_filter(10.0, false);
    table.set_whole_key_filtering(true);
    // In pieces, of which a read needs one each: whole, a 64 MiB table's index and filter are about 2 MiB, which one
    // shard of the cache cannot keep, and two thirds of a history read went into unpacking them again and again.
    table.set_index_type(BlockBasedIndexType::TwoLevelIndexSearch);
    table.set_partition_filters(true);
    table.set_metadata_block_size(INDEX_BLOCK_BYTES);
    table.set_pin_top_level_index_and_filter(true);
    // A page of history lies side by side in a few of them; a row that is loaded alone costs one.
    table.set_block_size(DATA_BLOCK_BYTES);
    options.set_block_based_table_factory(&table);
    options
}

fn table(cache_bytes: usize) -> BlockBasedOptions {
    let mut table = BlockBasedOptions::default();
    table.set_block_cache(&Cache::new_lru_cache(cache_bytes));
    // Indexes and filters are counted in the bound instead of growing beside it.
    table.set_cache_index_and_filter_blocks(true);
    table.set_pin_l0_filter_and_index_blocks_in_cache(true);
    table
}

/// Every batch of the WAL thread is one fsync.
pub(crate) fn synced() -> WriteOptions {
    let mut options = WriteOptions::default();
    options.set_sync(true);
    options
}

/// Checkpoints have no WAL: a flush makes them durable, the log makes them repeatable.
pub(crate) fn without_wal() -> WriteOptions {
    let mut options = WriteOptions::default();
    options.disable_wal(true);
    options
}

/// A read of a key range.
pub(crate) fn range(range: KeyRange) -> ReadOptions {
    let mut options = ReadOptions::default();
    options.set_iterate_lower_bound(range.from);
    if let Some(end) = range.end {
        options.set_iterate_upper_bound(end);
    }
    options.set_verify_checksums(true);
    options.fill_cache(!range.once);
    options
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looking_for_direct_io_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        takes_direct_io(dir.path());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(!takes_direct_io(&dir.path().join("absent")));
    }
}
