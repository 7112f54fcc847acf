//! A shard's rows in memory: the dirty set over the frozen one over clean rows; all heads stay. Only clean rows leave.
//! Must never answer "does not exist" for a row that the disk may have.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use foldhash::fast::FixedState;
use stentor_engine::{
    key::{Entity, Kind, RowKey},
    rows::{NotLoaded, Row, Rows},
};
use stentor_proto::ids::Seq;

use crate::{
    blocks::EventRun,
    clean::{Clean, ROW_OVERHEAD_BYTES},
};

/// A fixed hasher: nothing iterates where order matters, and keys come from checked commands.
pub(crate) type Map<K, V> = hashbrown::HashMap<K, V, FixedState>;

/// What changed between two cuts.
#[derive(Default)]
pub(crate) struct Layer {
    /// Rows; `None` is a removed one.
    pub(crate) rows: Map<RowKey, Option<Row>>,
    /// The keys that scans may ask for, in order; heads and send states are never scanned.
    pub(crate) order: BTreeSet<RowKey>,
    /// Events by conversation.
    pub(crate) events: Map<Entity, EventRun>,
    /// Roughly what all of it costs in memory.
    pub(crate) bytes: usize,
}

fn scanned(key: &RowKey) -> bool {
    !matches!(key.kind(), Some(Kind::Conversation | Kind::SendState))
}

/// Whether a row that was written will be read soon. What a membership change or a creation leaves behind is read when the
/// next one concerns the same, or when it expires: it would only drive out what every send reads.
fn asked_for_again(key: &RowKey) -> bool {
    !matches!(key.kind(), Some(Kind::ClientKey | Kind::ClientOrder | Kind::Outbox | Kind::UserConversation))
}

impl Layer {
    fn insert(&mut self, key: RowKey, row: Option<Row>) {
        let key_bytes = key.as_bytes().len() + ROW_OVERHEAD_BYTES;
        self.bytes += key_bytes + row.as_ref().map_or(0, Row::memory_bytes);
        if scanned(&key) && !self.order.contains(&key) {
            self.order.insert(key.clone());
        }
        if let Some(before) = self.rows.insert(key, row) {
            let bytes = key_bytes + before.as_ref().map_or(0, Row::memory_bytes);
            self.bytes = self.bytes.saturating_sub(bytes);
        }
    }

    /// Puts an older layer under this one.
    fn settle_on(&mut self, mut below: Self) {
        std::mem::swap(self, &mut below);
        let above = below;
        for (key, row) in above.rows {
            self.insert(key, row);
        }
        for (entity, run) in above.events {
            self.bytes += run.bytes();
            match self.events.get_mut(&entity) {
                Some(below) => below.extend(&run),
                None => {
                    self.events.insert(entity, run);
                }
            }
        }
    }
}

/// How far [`Cache::drain`] got.
pub(crate) enum Drained {
    /// More rows are left.
    Some,
    /// No row is left; what remains is to be dropped outside of the lock.
    All(Arc<Layer>),
    /// There is nothing frozen, or somebody still writes it.
    Nothing,
}

/// A shard's rows in memory.
pub(crate) struct Cache {
    heads: Map<RowKey, Row>,
    dirty: Layer,
    frozen: Option<Arc<Layer>>,
    clean: Clean,
    /// Bytes that the clean rows of one shard may take; shrinks as shards open.
    budget: Arc<AtomicUsize>,
    /// A command waits for rows that are being loaded, or were: none leaves until it has them all.
    waited_for: bool,
    /// Counts what could make a row that is being loaded stale.
    generation: u64,
    /// Events appended since the last [`Self::take_appended`].
    appended: u64,
    /// A write that broke the contract of [`Rows`]: the replica must stop.
    broken: Option<String>,
}

impl Cache {
    pub(crate) fn new(budget: Arc<AtomicUsize>) -> Self {
        Self {
            heads: Map::default(),
            dirty: Layer::default(),
            frozen: None,
            clean: Clean::default(),
            budget,
            waited_for: false,
            generation: 0,
            appended: 0,
            broken: None,
        }
    }

    /// A head from disk, before anything is applied.
    pub(crate) fn add_head(&mut self, key: RowKey, row: Row) {
        self.heads.insert(key, row);
    }

    pub(crate) fn broken(&self) -> Option<&str> {
        self.broken.as_deref()
    }

    /// How many events were appended since the last call.
    pub(crate) fn take_appended(&mut self) -> u64 {
        std::mem::take(&mut self.appended)
    }

    pub(crate) fn dirty(&self) -> &Layer {
        &self.dirty
    }

    pub(crate) fn frozen(&self) -> Option<&Arc<Layer>> {
        self.frozen.as_ref()
    }

    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    pub(crate) fn clean_bytes(&self) -> usize {
        self.clean.bytes()
    }

    /// Bytes that only a checkpoint can free.
    pub(crate) fn undurable_bytes(&self) -> usize {
        self.dirty.bytes + self.frozen.as_ref().map_or(0, |frozen| frozen.bytes)
    }

    /// The row as memory knows it; `None` when only the disk can tell.
    pub(crate) fn peek(&self, key: &RowKey) -> Option<Option<&Row>> {
        if let Some(row) = self.dirty.rows.get(key) {
            return Some(row.as_ref());
        }
        if let Some(row) = self.frozen.as_ref().and_then(|frozen| frozen.rows.get(key)) {
            return Some(row.as_ref());
        }
        if key.kind() == Some(Kind::Conversation) {
            // All heads are resident: what is not here does not exist.
            return Some(self.heads.get(key));
        }
        self.clean.get(key)
    }

    /// Runs of events in memory, older first.
    pub(crate) fn runs<'a>(&'a self, entity: &Entity) -> impl Iterator<Item = &'a EventRun> + use<'a> {
        let frozen = self.frozen.as_ref().and_then(|frozen| frozen.events.get(entity));
        frozen.into_iter().chain(self.dirty.events.get(entity))
    }

    /// A row that was read from disk while the generation was `generation`; refused when that read may be stale.
    pub(crate) fn loaded(&mut self, key: RowKey, row: Option<Row>, generation: u64) -> bool {
        if generation != self.generation {
            return false;
        }
        if self.peek(&key).is_none() {
            self.clean.insert(key, row);
        }
        true
    }

    /// Whether a command waits for rows.
    pub(crate) fn wait(&mut self, waits: bool) {
        self.waited_for = waits;
    }

    /// Lets go of clean rows over the bound. Not while a command waits for rows: it needs all of them at once.
    pub(crate) fn trim(&mut self) {
        if !self.waited_for {
            self.clean.trim(self.budget.load(Relaxed));
        }
    }

    /// The cut: what is dirty now is frozen, and a fresh set begins. `None` while an earlier cut is being written.
    pub(crate) fn freeze(&mut self) -> Option<Arc<Layer>> {
        if self.frozen.is_some() {
            return None;
        }
        let frozen = Arc::new(std::mem::take(&mut self.dirty));
        self.frozen = Some(frozen.clone());
        Some(frozen)
    }

    /// The cut was given up: what it froze is dirty again.
    pub(crate) fn thaw(&mut self) {
        if let Some(frozen) = self.frozen.take() {
            match Arc::try_unwrap(frozen) {
                Ok(below) => self.dirty.settle_on(below),
                Err(_) => self.broken = Some("a cut was given up while it was being written".into()),
            }
        }
    }

    /// The frozen rows are on disk: from now on a load can find newer bytes than one that has begun.
    pub(crate) fn written(&mut self) {
        self.generation += 1;
    }

    /// Moves up to `count` written rows into the cache.
    pub(crate) fn drain(&mut self, count: usize) -> Drained {
        let Some(frozen) = &mut self.frozen else { return Drained::Nothing };
        let Some(layer) = Arc::get_mut(frozen) else { return Drained::Nothing };
        let mut moved = 0;
        for (key, row) in layer.rows.extract_if(|_, _| true).take(count) {
            moved += 1;
            if key.kind() == Some(Kind::Conversation) {
                match row {
                    Some(row) => self.heads.insert(key, row),
                    None => self.heads.remove(&key),
                };
            } else if asked_for_again(&key) {
                self.clean.insert(key, row);
            } else {
                self.clean.forget(&key);
            }
        }
        self.trim();
        match self.frozen.take_if(|_| moved < count) {
            Some(rest) => Drained::All(rest),
            None => Drained::Some,
        }
    }

    /// Forgets everything: a snapshot takes its place.
    pub(crate) fn clear(&mut self) {
        let generation = self.generation + 1;
        *self = Self { generation, ..Self::new(self.budget.clone()) };
    }

    /// Takes over the heads of a cache that was loaded beside this one.
    pub(crate) fn adopt(&mut self, loaded: Self) {
        self.heads = loaded.heads;
    }

    fn make_dirty(&mut self, key: &RowKey) {
        let frozen = self.frozen.as_ref().and_then(|frozen| frozen.rows.get(key)).cloned();
        let row = match frozen {
            Some(row) => row,
            None if key.kind() == Some(Kind::Conversation) => self.heads.get(key).cloned(),
            None => self.clean.take(key).flatten(),
        };
        if row.is_some() {
            self.dirty.insert(key.clone(), row);
        }
    }
}

impl Rows for Cache {
    fn get(&mut self, key: &RowKey) -> Result<Option<&Row>, NotLoaded> {
        self.peek(key).ok_or_else(|| NotLoaded(key.clone()))
    }

    fn get_mut(&mut self, key: &RowKey) -> Option<&mut Row> {
        if !self.dirty.rows.contains_key(key) {
            self.make_dirty(key);
        }
        self.dirty.rows.get_mut(key)?.as_mut()
    }

    fn put(&mut self, key: RowKey, row: Row) {
        self.dirty.insert(key, Some(row));
    }

    fn remove(&mut self, key: &RowKey) {
        self.dirty.insert(key.clone(), None);
    }

    fn append_event(&mut self, conversation: &Entity, seq: Seq, record: &[u8]) {
        self.dirty.bytes += record.len() + size_of::<u32>();
        self.appended += 1;
        if let Some(run) = self.dirty.events.get_mut(conversation) {
            if run.next() != seq.0 {
                let what = format!("event {seq} of {conversation:?} does not follow {}", run.next() - 1);
                self.broken.get_or_insert(what);
                return;
            }
            run.push(record);
            return;
        }
        self.dirty.bytes += ROW_OVERHEAD_BYTES + conversation.as_bytes().len();
        let mut run = EventRun::new(seq.0);
        run.push(record);
        self.dirty.events.insert(conversation.clone(), run);
    }
}

#[cfg(test)]
mod tests {
    use stentor_proto::internal::{ClientOrderRow, SendStateRow};

    use super::*;

    fn keys(count: usize) -> Vec<RowKey> {
        let conversation = Entity::conversation("a", "c");
        (0..count).map(|n| conversation.send_state("ann", &format!("device-{n}"))).collect()
    }

    #[test]
    fn rows_that_a_command_waits_for_stay_until_it_has_them_all() {
        let mut cache = Cache::new(Arc::new(AtomicUsize::new(0)));
        cache.wait(true);
        let wanted = keys(100);
        for key in &wanted {
            assert!(cache.loaded(key.clone(), None, cache.generation()));
            cache.trim();
        }
        assert!(wanted.iter().all(|key| cache.peek(key) == Some(None)));
        cache.wait(false);
        cache.trim();
        assert!(wanted.iter().all(|key| cache.peek(key).is_none()));
    }

    #[test]
    fn after_a_checkpoint_only_rows_that_are_asked_for_again_are_kept() {
        let mut cache = Cache::new(Arc::new(AtomicUsize::new(1 << 20)));
        let kept = keys(1).remove(0);
        let left = Entity::conversation("a", "c").key(Kind::ClientOrder, &[&[1], b"u", &1u64.to_be_bytes()]);
        // Known not to exist before: that must not be believed afterwards.
        assert!(cache.loaded(left.clone(), None, cache.generation()));
        cache.put(kept.clone(), SendStateRow { last: 1, ..SendStateRow::default() }.into());
        cache.put(left.clone(), ClientOrderRow::default().into());
        drop(cache.freeze());
        cache.written();
        assert!(matches!(cache.drain(10), Drained::All(_)));
        assert!(cache.peek(&kept).is_some_and(|row| row.is_some()));
        assert_eq!(cache.peek(&left), None, "only the disk can tell");
    }
}
