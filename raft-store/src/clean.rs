//! Rows that the disk has as well, as many as there is room for. What leaves is chosen by SIEVE (Zhang et al., NSDI 2024):
//! what is used stays, and thousands of rows that are used once do not drive it out. Must never be asked for a row that a
//! newer layer has: it may hold an older one.

use std::{cell::Cell, hash::BuildHasher};

use foldhash::fast::FixedState;
use hashbrown::HashTable;
use slab::Slab;
use stentor_engine::{key::RowKey, rows::Row};

/// Slots, pointers and bookkeeping of one row, roughly.
pub(crate) const ROW_OVERHEAD_BYTES: usize = 64;
/// Rows in use that are passed over at most while room is made once: with every row in use the hand would go all round.
const STEPS: usize = 1_024;
/// A slot's place. So many rows of one shard are half a terabyte; more are not kept.
type At = u32;
/// No slot.
const NONE: At = At::MAX;

/// What a row's place costs in memory, and what is in it besides.
fn cost(key: &RowKey, row: Option<&Row>) -> usize {
    ROW_OVERHEAD_BYTES + key.as_bytes().len() + row.map_or(size_of::<Row>(), Row::memory_bytes)
}

struct Slot {
    key: RowKey,
    /// `None` while a newer layer has the row: it keeps its place, since it was used. `Some(None)` is known not to exist.
    row: Option<Option<Row>>,
    /// Used since the hand last passed.
    used: Cell<bool>,
    newer: At,
    older: At,
}

/// The rows. Nothing is iterated in the order of the table.
pub(crate) struct Clean {
    table: HashTable<At>,
    slots: Slab<Slot>,
    hasher: FixedState,
    newest: At,
    oldest: At,
    hand: At,
    bytes: usize,
}

impl Default for Clean {
    fn default() -> Self {
        Self {
            table: HashTable::new(),
            slots: Slab::new(),
            hasher: FixedState::default(),
            newest: NONE,
            oldest: NONE,
            hand: NONE,
            bytes: 0,
        }
    }
}

impl Clean {
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    fn slot(&self, at: At) -> Option<&Slot> {
        self.slots.get(at as usize)
    }

    fn find(&self, key: &RowKey) -> Option<At> {
        let hash = self.hasher.hash_one(key);
        self.table.find(hash, |&at| self.slot(at).is_some_and(|slot| slot.key == *key)).copied()
    }

    /// The row, which counts as used; `None` when it is not here.
    pub(crate) fn get(&self, key: &RowKey) -> Option<Option<&Row>> {
        let slot = self.slot(self.find(key)?)?;
        slot.used.set(true);
        slot.row.as_ref().map(Option::as_ref)
    }

    /// Adds or replaces a row.
    pub(crate) fn insert(&mut self, key: RowKey, mut row: Option<Row>) {
        if let Some(row) = &mut row {
            row.shrink();
        }
        self.bytes += cost(&key, row.as_ref());
        if let Some(slot) = self.find(&key).and_then(|at| self.slots.get_mut(at as usize)) {
            let before = slot.row.replace(row).flatten();
            self.bytes = self.bytes.saturating_sub(cost(&slot.key, before.as_ref()));
            return;
        }
        if self.slots.len() >= NONE as usize {
            self.leave(self.oldest);
        }
        let hash = self.hasher.hash_one(&key);
        let slot = Slot { key, row: Some(row), used: Cell::new(false), newer: NONE, older: self.newest };
        let at = self.slots.insert(slot) as At;
        match self.slots.get_mut(self.newest as usize) {
            Some(newest) => newest.newer = at,
            None => self.oldest = at,
        }
        self.newest = at;
        let Self { table, slots, hasher, .. } = self;
        let hash_of = |&at: &At| slots.get(at as usize).map_or(0, |slot: &Slot| hasher.hash_one(&slot.key));
        table.insert_unique(hash, at, hash_of);
    }

    /// Hands the row on to a newer layer. Its place waits for it.
    pub(crate) fn take(&mut self, key: &RowKey) -> Option<Option<Row>> {
        let at = self.find(key)?;
        let slot = self.slots.get_mut(at as usize)?;
        slot.used.set(true);
        let row = slot.row.take()?;
        self.bytes = (self.bytes + cost(&slot.key, None)).saturating_sub(cost(&slot.key, row.as_ref()));
        Some(row)
    }

    /// Lets go of the row and its place.
    pub(crate) fn forget(&mut self, key: &RowKey) {
        if let Some(at) = self.find(key) {
            self.leave(at);
        }
    }

    fn leave(&mut self, at: At) {
        if self.hand == at {
            self.hand = self.slot(at).map_or(NONE, |slot| slot.newer);
        }
        self.remove(at);
    }

    /// Lets go of rows over the budget.
    pub(crate) fn trim(&mut self, budget: usize) {
        let mut passes = STEPS;
        while self.bytes > budget {
            let at = if self.hand == NONE { self.oldest } else { self.hand };
            let Some(slot) = self.slots.get(at as usize) else { return };
            self.hand = slot.newer;
            // Also a place whose row was not written back for a whole round.
            if !slot.used.replace(false) || passes == 0 {
                self.remove(at);
            } else {
                passes -= 1;
            }
        }
    }

    fn remove(&mut self, at: At) {
        let Some(Slot { key, row, newer, older, .. }) = self.slots.try_remove(at as usize) else { return };
        self.bytes = self.bytes.saturating_sub(cost(&key, row.flatten().as_ref()));
        match self.slots.get_mut(newer as usize) {
            Some(slot) => slot.older = older,
            None => self.newest = older,
        }
        match self.slots.get_mut(older as usize) {
            Some(slot) => slot.newer = newer,
            None => self.oldest = newer,
        }
        if let Ok(entry) = self.table.find_entry(self.hasher.hash_one(&key), |&found| found == at) {
            entry.remove();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use stentor_engine::key::Entity;
    use stentor_proto::internal::SendStateRow;

    use super::*;

    fn key(n: u32) -> RowKey {
        Entity::conversation("a", "c").participant(&format!("user-{n:06}"))
    }

    fn row(last: u64) -> Option<Row> {
        (last > 0).then(|| SendStateRow { last, ..SendStateRow::default() }.into())
    }

    #[test]
    fn what_is_used_stays_and_one_pass_of_others_does_not_drive_it_out() {
        let mut clean = Clean::default();
        let budget = 100 * cost(&key(0), row(1).as_ref());
        (0..50).for_each(|n| clean.insert(key(n), row(1)));
        for n in 50..5_000 {
            clean.insert(key(n), row(1));
            clean.trim(budget);
            (0..50).for_each(|used| assert!(clean.get(&key(used)).is_some(), "{used} left when {n} came"));
        }
    }

    #[test]
    fn a_row_that_comes_to_rest_gives_back_spare_room() {
        let mut clean = Clean::default();
        let mut results = Vec::with_capacity(64);
        results.push(stentor_proto::internal::SendResult::default());
        clean.insert(key(1), Some(SendStateRow { results, ..SendStateRow::default() }.into()));
        let Some(Some(Row::SendState(row))) = clean.get(&key(1)) else { panic!("it was put there") };
        assert_eq!((row.results.len(), row.results.capacity()), (1, 1));
    }

    #[derive(Debug, Clone)]
    enum Act {
        Get(u32),
        Insert(u32, u64),
        Take(u32),
        Forget(u32),
        Trim(usize),
    }

    fn act() -> impl Strategy<Value = Act> {
        prop_oneof![
            (0..40u32).prop_map(Act::Get),
            (0..40u32, 0..3u64).prop_map(|(n, last)| Act::Insert(n, last)),
            (0..40u32).prop_map(Act::Take),
            (0..40u32).prop_map(Act::Forget),
            (0..4_000usize).prop_map(Act::Trim),
        ]
    }

    proptest! {
        #[test]
        fn it_says_what_it_was_told_last_or_nothing(acts in prop::collection::vec(act(), 0..400)) {
            let (mut clean, mut told) = (Clean::default(), BTreeMap::new());
            for act in acts {
                match act {
                    Act::Get(n) => {
                        let said = clean.get(&key(n)).map(Option::<&Row>::cloned);
                        prop_assert!(said.is_none() || said.as_ref() == told.get(&n));
                    }
                    Act::Insert(n, last) => {
                        clean.insert(key(n), row(last));
                        told.insert(n, row(last));
                        prop_assert_eq!(clean.get(&key(n)).map(Option::<&Row>::cloned), Some(row(last)));
                    }
                    Act::Take(n) => {
                        let said = clean.take(&key(n));
                        prop_assert!(said.is_none() || said.as_ref() == told.get(&n));
                        told.remove(&n);
                        prop_assert!(clean.get(&key(n)).is_none());
                    }
                    Act::Forget(n) => {
                        clean.forget(&key(n));
                        told.remove(&n);
                        prop_assert!(clean.get(&key(n)).is_none());
                    }
                    Act::Trim(budget) => {
                        clean.trim(budget);
                        prop_assert!(clean.bytes() <= budget);
                    }
                }
                let places = clean.slots.iter().map(|(_, slot)| cost(&slot.key, slot.row.as_ref().and_then(Option::as_ref)));
                prop_assert_eq!(places.sum::<usize>(), clean.bytes());
                prop_assert_eq!(clean.slots.len(), clean.table.len());
            }
        }
    }
}
