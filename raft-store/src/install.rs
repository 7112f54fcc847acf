//! Installing a snapshot (design, "Installing a snapshot"): a manifest makes it repeatable from any point on.
//! Must never leave a state that says "applied up to X" over rows that are not those of X.

use std::{
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering::Relaxed},
};

use stentor_engine::{
    key::RowKey,
    limits,
    rows::{Row, row_crc},
};
use stentor_proto::{
    Message,
    ids::{Incarnation, ShardId},
    internal::AppliedRow,
};

use crate::{
    db::{Db, DbError},
    disk::Disk,
    shard::{self, ShardCore, ShardState},
    snapshot::{SnapshotReceiver, SnapshotRows, Source, Staged, rows_of},
    store::{Parts, StoreError},
    types::SnapshotMeta,
    wal::Op,
};

const FORMAT: u8 = 1;
const MANIFEST: &str = "manifest";

/// What is being installed: `u8 format │ u32 CRC32 │ u32 shard │ u32 incarnation │ u16 first slot │ u16 end slot │
/// u64 bytes │ u32 CRC32 of the rows │ u64 rows │ AppliedRow`, integers little-endian.
#[derive(Debug, Clone, PartialEq)]
struct Manifest {
    shard: ShardId,
    incarnation: Incarnation,
    slots: Range<u16>,
    bytes: u64,
    crc: u32,
    row_count: u64,
    applied: AppliedRow,
}

impl Manifest {
    fn encode(&self) -> Vec<u8> {
        let mut out = vec![FORMAT, 0, 0, 0, 0];
        out.extend_from_slice(&self.shard.0.to_le_bytes());
        out.extend_from_slice(&self.incarnation.0.to_le_bytes());
        out.extend_from_slice(&self.slots.start.to_le_bytes());
        out.extend_from_slice(&self.slots.end.to_le_bytes());
        out.extend_from_slice(&self.bytes.to_le_bytes());
        out.extend_from_slice(&self.crc.to_le_bytes());
        out.extend_from_slice(&self.row_count.to_le_bytes());
        out.extend_from_slice(&self.applied.encode_to_vec());
        let crc = row_crc(MANIFEST.as_bytes(), &out[5..]);
        out[1..5].copy_from_slice(&crc.to_le_bytes());
        out
    }

    fn decode(bytes: &[u8]) -> Result<Self, String> {
        let bad = || "an install manifest is damaged".to_string();
        let (&format, rest) = bytes.split_first().ok_or_else(bad)?;
        let (crc, rest) = rest.split_first_chunk::<4>().ok_or_else(bad)?;
        if format != FORMAT || u32::from_le_bytes(*crc) != row_crc(MANIFEST.as_bytes(), rest) {
            return Err(bad());
        }
        let (shard, rest) = rest.split_first_chunk::<4>().ok_or_else(bad)?;
        let (incarnation, rest) = rest.split_first_chunk::<4>().ok_or_else(bad)?;
        let (first, rest) = rest.split_first_chunk::<2>().ok_or_else(bad)?;
        let (end, rest) = rest.split_first_chunk::<2>().ok_or_else(bad)?;
        let (bytes, rest) = rest.split_first_chunk::<8>().ok_or_else(bad)?;
        let (rows_crc, rest) = rest.split_first_chunk::<4>().ok_or_else(bad)?;
        let (row_count, rest) = rest.split_first_chunk::<8>().ok_or_else(bad)?;
        Ok(Self {
            shard: ShardId(u32::from_le_bytes(*shard)),
            incarnation: Incarnation(u32::from_le_bytes(*incarnation)),
            slots: u16::from_le_bytes(*first)..u16::from_le_bytes(*end),
            bytes: u64::from_le_bytes(*bytes),
            crc: u32::from_le_bytes(*rows_crc),
            row_count: u64::from_le_bytes(*row_count),
            applied: AppliedRow::decode(rest).map_err(|_| bad())?,
        })
    }
}

/// Where arriving rows are staged.
pub(crate) fn rows_path(dir: &Path, shard: ShardId) -> PathBuf {
    dir.join(format!("{shard}.rows"))
}

fn manifest_path(dir: &Path, shard: ShardId) -> PathBuf {
    dir.join(format!("{shard}.{MANIFEST}"))
}

/// Replaces the shard's state by a snapshot. Refused before the manifest is written, nothing has changed; after it, a
/// failure stops the broker and the next start finishes the work.
pub(crate) async fn install(
    core: &Arc<ShardCore>,
    parts: &Parts,
    meta: &SnapshotMeta,
    snapshot: SnapshotRows,
) -> Result<(), StoreError> {
    parts.check()?;
    let (shard, applied) = (core.shard, snapshot.applied().clone());
    let damaged = |what: String| StoreError::Damaged { shard, what };
    if snapshot.meta().map_err(|e| damaged(e.to_string()))?.last_log_id != meta.last_log_id {
        return Err(damaged("a snapshot is not the one that it was announced as".into()));
    }
    let staged = stage(core, parts, snapshot).await?;
    let closed = core.gate.clone().write_owned().await;
    quiesce(core, parts).await?;
    // Truncations and votes that were queued before must not come after.
    core.log.send_and_wait(|done| Op::Barrier { done }).await?;
    let manifest = Manifest {
        shard,
        incarnation: parts.incarnation(),
        slots: core.slots.clone(),
        bytes: staged.bytes,
        crc: staged.crc,
        row_count: staged.row_count,
        applied,
    };
    let (work, target) = (parts.clone(), core.clone());
    let replaced = parts.disk.exec().run(move || {
        // Moved in here: even a caller that gives up must not let readers in half-way, nor another snapshot.
        let _held = (closed, staged.claim);
        write_manifest(&work.disk, &work.install_dir, &manifest)?;
        replace(&work.state_db, &work.disk, &work.install_dir, &manifest)?;
        finish(&work.disk, &work.install_dir, shard)?;
        reload(&target, &work)
    });
    let result = replaced.await.map_err(|_| StoreError::Closed)?;
    core.installing.store(false, Relaxed);
    core.thawed.notify_waiters();
    result.map_err(|error| parts.refused(shard, "installing a snapshot", error))
}

async fn stage(core: &ShardCore, parts: &Parts, mut snapshot: SnapshotRows) -> Result<Staged, StoreError> {
    if let Source::Staged(staged) = snapshot.source {
        return Ok(staged);
    }
    let shard = core.shard;
    let damaged = |what: String| StoreError::Damaged { shard, what };
    let path = rows_path(&parts.install_dir, shard);
    let applied = snapshot.applied().clone();
    let claim = core.staging.clone().lock_owned().await;
    let mut receiver = SnapshotReceiver::create(core, parts, &path, applied, claim)?;
    while let Some(chunk) = snapshot.next_chunk().await.map_err(|e| damaged(e.to_string()))? {
        receiver.push(chunk).await?;
    }
    match receiver.finish().await?.source {
        Source::Staged(staged) => Ok(staged),
        Source::Stored { .. } => Err(damaged("a received snapshot is not staged".into())),
    }
}

/// Waits until no cut is being written, and lets none begin.
async fn quiesce(core: &ShardCore, parts: &Parts) -> Result<(), StoreError> {
    core.installing.store(true, Relaxed);
    loop {
        // Registered before looking, so that no wake-up falls between.
        let thawed = core.thawed.notified();
        parts.check()?;
        if core.state.lock().cache.frozen().is_none() {
            return Ok(());
        }
        thawed.await;
    }
}

fn write_manifest(disk: &Disk, dir: &Path, manifest: &Manifest) -> io::Result<()> {
    let (path, under_way) = (manifest_path(dir, manifest.shard), dir.join(format!("{}.tmp", manifest.shard)));
    let mut file = disk.create(&under_way)?;
    file.write_all(&manifest.encode())?;
    file.sync_all()?;
    // Under its own name it is always whole.
    disk.rename(&under_way, &path)?;
    disk.sync_dir(dir)
}

/// From the wipe on; repeatable. The applied row goes first and comes last.
fn replace(db: &Db, disk: &Disk, dir: &Path, manifest: &Manifest) -> Result<(), DbError> {
    let key = RowKey::applied(manifest.shard);
    let mut unsaid = db.batch();
    unsaid.delete(key.as_bytes());
    db.write(unsaid)?;
    db.flush_now()?;
    let mut wipe = db.batch();
    let (from, end) = shard::key_range(&manifest.slots);
    wipe.delete_range(from, end);
    db.write(wipe)?;
    copy_rows(db, disk, dir, manifest)?;
    db.flush_now()?;
    let mut said = db.batch();
    said.put(key.as_bytes(), Row::from(manifest.applied.clone()).encode(&key));
    db.write(said)?;
    db.flush_now()
}

fn copy_rows(db: &Db, disk: &Disk, dir: &Path, manifest: &Manifest) -> Result<(), DbError> {
    let mut file = disk.open_file(&rows_path(dir, manifest.shard))?;
    let (mut crc, mut rows) = (crc32fast::Hasher::new(), 0);
    let mut left = manifest.bytes;
    let mut buffer = Vec::new();
    while left > 0 || !buffer.is_empty() {
        let had = buffer.len();
        let more = usize::try_from(left).unwrap_or(usize::MAX).min(limits::SNAPSHOT_MAX_CHUNK_BYTES);
        buffer.resize(had + more, 0);
        file.read_exact(&mut buffer[had..])?;
        crc.update(&buffer[had..]);
        left -= more as u64;
        let mut batch = db.batch();
        let mut used = 0;
        for row in rows_of(&buffer) {
            match row {
                Ok((key, value)) => {
                    batch.put(key, value);
                    used += 8 + key.len() + value.len();
                    rows += 1;
                }
                // The rest of this row is still in the file.
                Err(_) => break,
            }
        }
        if used == 0 {
            return Err(DbError::Corrupt("staged rows are damaged".into()));
        }
        db.write(batch)?;
        buffer.drain(..used);
    }
    if crc.finalize() != manifest.crc || rows != manifest.row_count {
        return Err(DbError::Corrupt("staged rows are not those of their manifest".into()));
    }
    Ok(())
}

fn finish(disk: &Disk, dir: &Path, shard: ShardId) -> io::Result<()> {
    disk.remove_file(&manifest_path(dir, shard))?;
    disk.sync_dir(dir)?;
    // A file without a manifest means nothing; the next snapshot overwrites it.
    match disk.remove_file(&rows_path(dir, shard)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

fn reload(core: &ShardCore, parts: &Parts) -> Result<(), DbError> {
    let loaded = ShardState::load(core.shard, &core.slots, &parts.state_db, parts.clean_budget.clone())?;
    let applied = loaded.progress.applied;
    let mut state = core.state.lock();
    state.cache.clear();
    state.cache.adopt(loaded.cache);
    state.progress = loaded.progress;
    core.log_cut();
    core.log_durable();
    core.dirty_since_ms.store(0, Relaxed);
    core.asked_ms.store(0, Relaxed);
    core.count_rows(&state);
    drop(state);
    core.log.applied_to(applied.map_or(0, |id| id.index));
    core.applied.send_replace(applied);
    core.durable.send_replace(applied);
    Ok(())
}

/// Finishes what a crash has cut off, before anybody reads: called by `open`.
pub(crate) fn resume(db: &Db, disk: &Disk, dir: &Path, incarnation: Incarnation) -> Result<(), DbError> {
    disk.create_dir_all(dir)?;
    for path in disk.list(dir)? {
        if path.extension().is_none_or(|extension| extension != MANIFEST) {
            continue;
        }
        let manifest = Manifest::decode(&disk.read(&path)?).map_err(DbError::Corrupt)?;
        let applied = shard::applied_row(db, manifest.shard)?;
        let there = applied.is_some_and(|row| {
            row.applied_any && (row.term, row.index) >= (manifest.applied.term, manifest.applied.index)
        });
        if !there && manifest.incarnation == incarnation {
            tracing::warn!(shard = %manifest.shard, "a snapshot install was cut off; once more");
            replace(db, disk, dir, &manifest)?;
        }
        finish(disk, dir, manifest.shard)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_of_a_manifest_is_found() {
        let manifest = Manifest {
            shard: ShardId(3),
            incarnation: Incarnation(1),
            slots: 5..9,
            bytes: 10,
            crc: 11,
            row_count: 12,
            applied: AppliedRow { term: 2, index: 7, applied_any: true, ..Default::default() },
        };
        let good = manifest.encode();
        assert_eq!(Manifest::decode(&good), Ok(manifest));
        for bit in 0..good.len() * 8 {
            let mut bytes = good.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Manifest::decode(&bytes).is_err(), "bit {bit}");
        }
    }
}
