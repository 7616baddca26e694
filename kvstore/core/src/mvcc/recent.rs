//! The records of keys that were written a moment ago, so that the next write of one need not read it.
//!
//! Two maps that trade places when the young one is full: no list, no clock (storage-measurements 4.3). It holds only
//! what stands in `key`, so whether a record is found here changes nothing but the time it takes.

use std::collections::BTreeMap;
use std::mem;

use bytes::Bytes;

/// What a record costs here beside its bytes.
const OVERHEAD: usize = 96;

#[derive(Debug)]
pub(crate) struct Recent {
    young: BTreeMap<Bytes, Bytes>,
    old: BTreeMap<Bytes, Bytes>,
    young_bytes: usize,
    max_bytes: usize,
}

impl Recent {
    pub(crate) fn new(max_bytes: usize) -> Self {
        Recent { young: BTreeMap::new(), old: BTreeMap::new(), young_bytes: 0, max_bytes }
    }

    pub(crate) fn get(&self, key: &[u8]) -> Option<&Bytes> {
        self.young.get(key).or_else(|| self.old.get(key))
    }

    /// `key` should share the record's bytes, or it keeps alive what it was cut from.
    pub(crate) fn insert(&mut self, key: Bytes, record: Bytes) {
        self.young_bytes += record.len() + OVERHEAD;
        if let Some(replaced) = self.young.insert(key, record) {
            self.young_bytes -= replaced.len() + OVERHEAD;
        }
        if self.young_bytes > self.max_bytes / 2 {
            self.old = mem::take(&mut self.young);
            self.young_bytes = 0;
        }
    }

    pub(crate) fn remove(&mut self, key: &[u8]) {
        if let Some(removed) = self.young.remove(key) {
            self.young_bytes -= removed.len() + OVERHEAD;
        }
        self.old.remove(key);
    }
}
