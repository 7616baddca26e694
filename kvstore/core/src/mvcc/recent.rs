//! The records of keys that were written a moment ago, so that the next write of one need not read it.
//!
//! A table of pairs of slots, found by a hash of the key: no list, no clock, and two keys that meet in a pair cost a
//! read and nothing worse, so that nobody can gain by choosing keys. It is bounded in bytes: a hand goes round and
//! empties slots until there is room. It holds only what stands in `key`, so whether a record is found here changes
//! nothing but the time it takes: 0.4 µs instead of 3 (storage-measurements 4.3).

use bytes::Bytes;

use super::record;

/// What a record costs here beside its bytes.
const OVERHEAD: usize = 64;

/// One pair of slots for so many bytes.
const BYTES_PER_PAIR: usize = 1024;

#[derive(Clone, Default, Debug)]
struct Slot {
    hash: u64,
    /// Empty: none.
    record: Bytes,
}

#[derive(Debug)]
pub(crate) struct Recent {
    /// In each pair the younger record comes first.
    pairs: Vec<[Slot; 2]>,
    bytes: usize,
    max_bytes: usize,
    hand: usize,
}

impl Recent {
    pub(crate) fn new(max_bytes: usize) -> Self {
        let pairs = (max_bytes / BYTES_PER_PAIR).next_power_of_two();
        Recent { pairs: vec![Default::default(); pairs], bytes: 0, max_bytes, hand: 0 }
    }

    fn pair(&self, hash: u64) -> usize {
        (hash >> 32) as usize & (self.pairs.len() - 1)
    }

    pub(crate) fn get(&self, key: &[u8]) -> Option<&Bytes> {
        let hash = hash(key);
        self.pairs[self.pair(hash)].iter().find(|slot| slot.holds(hash, key)).map(|slot| &slot.record)
    }

    pub(crate) fn insert(&mut self, key: &[u8], record: Bytes) {
        let cost = record.len() + OVERHEAD;
        if cost > self.max_bytes {
            self.remove(key);
            return;
        }
        let hash = hash(key);
        let at = self.pair(hash);
        let pair = &mut self.pairs[at];
        if !pair[0].holds(hash, key) {
            pair.swap(0, 1); // the older one, or the same key's, makes room
        }
        self.bytes = self.bytes + cost - pair[0].cost();
        pair[0] = Slot { hash, record };
        while self.bytes > self.max_bytes {
            self.sweep(at);
        }
    }

    pub(crate) fn remove(&mut self, key: &[u8]) {
        let hash = hash(key);
        let at = self.pair(hash);
        for slot in &mut self.pairs[at] {
            if slot.holds(hash, key) {
                self.bytes -= slot.cost();
                *slot = Slot::default();
            }
        }
    }

    /// Empties the pair under the hand; of the pair `spared`, only the older slot.
    fn sweep(&mut self, spared: usize) {
        self.hand = (self.hand + 1) & (self.pairs.len() - 1);
        for slot in &mut self.pairs[self.hand][usize::from(self.hand == spared)..] {
            self.bytes -= slot.cost();
            *slot = Slot::default();
        }
    }
}

impl Slot {
    fn cost(&self) -> usize {
        if self.record.is_empty() { 0 } else { self.record.len() + OVERHEAD }
    }

    fn holds(&self, hash: u64, key: &[u8]) -> bool {
        self.hash == hash && !self.record.is_empty() && record::key(&self.record) == Some(key)
    }
}

/// Fast and even enough; the same everywhere, so that a run can be repeated.
fn hash(key: &[u8]) -> u64 {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut hash = key.len() as u64;
    let (words, rest) = key.as_chunks::<8>();
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    for word in words.iter().chain([&last]) {
        hash = (hash ^ u64::from_le_bytes(*word)).wrapping_mul(ODD);
        hash ^= hash >> 29;
    }
    hash.wrapping_mul(ODD)
}

#[cfg(test)]
mod tests {
    use super::super::record::{Header, Kv};
    use super::*;
    use crate::types::Revision;

    fn record(key: &[u8], version: i64) -> Bytes {
        let header = Header { previous: Revision::default(), sub: 0, depth: 1, tombstone: false, superseded: 0 };
        header.encode(&Kv { key, version, value: &[0; 100], ..Kv::default() })
    }

    #[test]
    fn it_holds_the_newest_record_or_none_and_stays_in_its_bounds() {
        let mut recent = Recent::new(8 * 1024);
        for version in 1..200 {
            for n in 0..97u32 {
                let key = n.to_be_bytes();
                if n % 7 == 0 && version % 3 == 0 {
                    recent.remove(&key);
                    assert_eq!(recent.get(&key), None);
                    continue;
                }
                recent.insert(&key, record(&key, version));
                assert_eq!(recent.get(&key), Some(&record(&key, version)), "what was put last is there");
            }
            let held = (0..97u32).filter_map(|n| recent.get(&n.to_be_bytes()).map(|r| (n, r)));
            let mut bytes = 0;
            for (n, held) in held {
                let newest = if n % 7 == 0 { version - i64::from(version % 3 == 0) } else { version };
                assert_eq!(*held, record(&n.to_be_bytes(), newest), "never an older one");
                bytes += held.len() + OVERHEAD;
            }
            assert_eq!(bytes, recent.bytes);
            assert!(bytes <= 8 * 1024 && bytes > 2 * 1024);
        }
    }

    #[test]
    fn a_record_larger_than_all_of_it_replaces_the_old_one_with_nothing() {
        let mut recent = Recent::new(256);
        recent.insert(b"k", record(b"k", 1));
        assert!(recent.get(b"k").is_some());
        let large = Header { previous: Revision::default(), sub: 0, depth: 1, tombstone: false, superseded: 0 }
            .encode(&Kv { key: b"k", value: &[0; 500], ..Kv::default() });
        recent.insert(b"k", large);
        assert_eq!((recent.get(b"k"), recent.bytes), (None, 0));
    }
}
