//! Rows of which nothing is in memory when a command begins. Checks the contract between `apply` and its store on the
//! way: reads before writes, and no change in place of what was not read.

use std::collections::BTreeSet;

use bytes::{Bytes, BytesMut};
use stentor_engine::{
    apply::{self, ApplyError, Context},
    effect::Applied,
    key::{Entity, RowKey},
    rows::{MemoryRows, NotLoaded, Row, Rows},
};
use stentor_proto::ids::Seq;

#[derive(Default)]
pub(crate) struct Flaky {
    pub(crate) all: MemoryRows,
    loaded: BTreeSet<RowKey>,
    read: BTreeSet<RowKey>,
    wrote: bool,
}

impl Rows for Flaky {
    fn get(&mut self, key: &RowKey) -> Result<Option<&Row>, NotLoaded> {
        assert!(!self.wrote, "{key:?} is read after the first write");
        if !self.loaded.contains(key) {
            return Err(NotLoaded(key.clone()));
        }
        self.read.insert(key.clone());
        self.all.get(key)
    }

    fn get_mut(&mut self, key: &RowKey) -> Option<&mut Row> {
        assert!(self.read.contains(key), "{key:?} is changed in place and was not read");
        self.wrote = true;
        self.all.get_mut(key)
    }

    fn put(&mut self, key: RowKey, row: Row) {
        self.wrote = true;
        self.all.put(key, row);
    }

    fn remove(&mut self, key: &RowKey) {
        self.wrote = true;
        self.all.remove(key);
    }

    fn append_event(&mut self, conversation: &Entity, seq: Seq, record: &[u8]) {
        self.wrote = true;
        let before = Seq(seq.0 - 1);
        assert!(before.0 == 0 || self.all.events.contains_key(&(conversation.clone(), before)), "events are dense");
        assert!(!self.all.events.contains_key(&(conversation.clone(), seq)), "no seq is given twice");
        self.all.append_event(conversation, seq, record);
    }
}

impl Flaky {
    /// Applies a command as a store does: loads what the hint names, if it listens, then what is missing, one by one,
    /// and tries again each time. Returns how often.
    pub(crate) fn apply(&mut self, ctx: &Context, command: &Bytes, listen: bool, out: &mut Applied) -> usize {
        self.loaded.clear();
        let hinted = &mut self.loaded;
        apply::prefetch(command, &mut |key| {
            if listen {
                hinted.insert(key);
            }
        });
        let mut records = BytesMut::new();
        let mut missed = 0;
        loop {
            (self.wrote, self.read) = (false, BTreeSet::new());
            let (before, out_before) = (self.all.clone(), out.clone());
            match apply::apply_command(self, ctx, command, &mut records, out) {
                Ok(()) => return missed,
                Err(ApplyError::NotLoaded(NotLoaded(key))) => {
                    assert!(self.all == before && *out == out_before && records.is_empty(), "nothing has changed");
                    assert!(self.loaded.insert(key.clone()), "{key:?} was loaded already");
                    missed += 1;
                }
                Err(error) => panic!("{error}"),
            }
        }
    }
}
