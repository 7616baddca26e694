//! Put and DeleteRange on a batch, and the events they make.
//!
//! A [`Change`] is everything that one request writes: one main revision, a sub for each key it changes, the events
//! together. Each record is encoded once, and the rows of `key` and `rev`, the cache and the event all share its bytes.
//! A tombstone below the compacted revision counts as absent: whether it still stands depends on how far this member's
//! slices came, and no record may tell (trap 9).
//!
//! What it does not do: it refuses nothing. What a request may do was settled before the first write.

use std::ops::ControlFlow;

use bytes::{BufMut, Bytes, BytesMut};

use super::count::index::Tally;
use super::recent::Recent;
use super::record::{self, Header, Kv, MARK_EVERY};
use super::span::Span;
use super::{Bounds, Event, EventKind, Moment, RevisionEvents};
use crate::backend::{Direction, Overlay, Read, ReadView, Table, WriteBatch};
use crate::types::{LeaseId, Revision};
use crate::{Fatal, keys};

/// The keyspace's numbers, kept by the store and written with every batch that changes them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Numbers {
    /// The current revision. An empty store is at 1.
    pub(crate) revision: i64,
    /// -1: never compacted.
    pub(crate) compacted: i64,
    /// Bytes of all records ever written.
    pub(crate) written: u64,
    /// The running sum that the newest record carries.
    pub(crate) superseded: u64,
    /// Bytes of the tombstones of the current revision: superseded as of the next one.
    pub(crate) tombstones: u64,
    /// Bytes that compactions have given back.
    pub(crate) freed: u64,
    /// Where the deletion of the last compaction goes on, or `None` once it is done.
    pub(crate) cursor: Option<Revision>,
}

impl Numbers {
    pub(crate) const EMPTY: Numbers =
        Numbers { revision: 1, compacted: -1, written: 0, superseded: 0, tombstones: 0, freed: 0, cursor: None };

    pub(crate) fn bounds(&self) -> Bounds {
        Bounds { revision: self.revision, compacted: self.compacted }
    }

    /// Logical bytes of keys, values and the history that is still needed.
    pub(crate) fn in_use(&self) -> u64 {
        self.written.saturating_sub(self.freed)
    }
}

/// What one Put writes.
pub(crate) struct NewValue<'a> {
    pub(crate) key: &'a [u8],
    /// `None`: the value that the key has.
    pub(crate) value: Option<&'a [u8]>,
    /// `None`: the lease that the key has.
    pub(crate) lease: Option<i64>,
}

/// The writes of one request.
pub(crate) struct Change<'a, V> {
    view: &'a V,
    pub(crate) batch: &'a mut WriteBatch,
    numbers: &'a mut Numbers,
    recent: &'a mut Recent,
    tally: &'a mut Tally,
    events: Vec<Event>,
}

impl<'a, V: ReadView> Change<'a, V> {
    pub(crate) fn new(
        view: &'a V,
        batch: &'a mut WriteBatch,
        numbers: &'a mut Numbers,
        recent: &'a mut Recent,
        tally: &'a mut Tally,
    ) -> Self {
        Change { view, batch, numbers, recent, tally, events: Vec::new() }
    }

    /// Everything written so far, this request's own writes included.
    pub(crate) fn read(&self) -> Overlay<'_, V> {
        Overlay { view: self.view, batch: self.batch }
    }

    /// What can be read now: after the first change, the new revision.
    pub(crate) fn bounds(&self) -> Bounds {
        Bounds { revision: self.revision(), ..self.numbers.bounds() }
    }

    /// The moment after everything written so far; `read` is [`Change::read`].
    pub(crate) fn moment<'b>(&'b self, read: &'b Overlay<'b, V>) -> Moment<'b, Overlay<'b, V>> {
        Moment { read, bounds: self.bounds(), keys: self.tally.counts() }
    }

    /// The current revision as this request sees it.
    pub(crate) fn revision(&self) -> i64 {
        self.numbers.revision + i64::from(!self.events.is_empty())
    }

    /// The newest record of a key, tombstones included, from the cache or the tables.
    pub(crate) fn newest(&mut self, key: &[u8]) -> Result<Option<Bytes>, Fatal> {
        if let Some(record) = self.recent.get(key) {
            return Ok(Some(record.clone()));
        }
        let record = self.read().get(Table::Key, key)?;
        if let Some(record) = &record {
            self.recent.insert(key, record.clone());
        }
        Ok(record)
    }

    /// The newest `KeyValue` of a key that exists.
    pub(crate) fn live(&mut self, key: &[u8]) -> Result<Option<Bytes>, Fatal> {
        match self.newest(key)? {
            Some(record) if !record::newest(&record)?.0 => Ok(Some(record::kv_of(&record)?)),
            _ => Ok(None),
        }
    }

    /// Puts a key and returns the `KeyValue` it replaced.
    pub(crate) fn put(&mut self, new: NewValue<'_>) -> Result<Option<Bytes>, Fatal> {
        let main = self.numbers.revision + 1;
        let newest = self.newest(new.key)?;
        let replaced = Replaced::of(newest.as_ref(), self.numbers.compacted)?;
        let before = replaced.live;
        let kv = Kv {
            key: new.key,
            create_revision: before.map_or(main, |kv| kv.create_revision),
            mod_revision: main,
            version: before.map_or(0, |kv| kv.version) + 1,
            value: new.value.unwrap_or(before.map_or(&[], |kv| kv.value)),
            lease: new.lease.unwrap_or(before.map_or(0, |kv| kv.lease)),
        };
        self.attach(new.key, before.map_or(0, |kv| kv.lease), kv.lease);
        let prev = newest.as_ref().filter(|_| before.is_some()).map(record::kv_of).transpose()?;
        if before.is_none() {
            self.tally.created(main, new.key, newest.is_none())?;
        }
        let shown = prev.clone().and_then(|prev| self.before_request(new.key, replaced.revision, prev));
        self.write(&kv, false, &replaced, before.is_none(), shown)?;
        Ok(prev)
    }

    /// Deletes the keys of a span in key order and returns the `KeyValue`s that were deleted.
    pub(crate) fn delete_range(&mut self, span: Span<'_>) -> Result<Vec<Bytes>, Fatal> {
        let mut doomed = Vec::new();
        if let Span::Point(key) = span {
            doomed.extend(self.newest(key)?);
        } else {
            self.read().scan(Table::Key, span.bounds(), Direction::Forward, &mut |_, record| {
                doomed.push(Bytes::copy_from_slice(record));
                ControlFlow::Continue(())
            })?;
        }
        let mut deleted = Vec::new();
        for record in doomed {
            if !record::newest(&record)?.0 {
                deleted.push(self.delete(&record)?);
            }
        }
        Ok(deleted)
    }

    /// Deletes a key, given its newest record, and returns the `KeyValue` that was deleted.
    fn delete(&mut self, newest: &Bytes) -> Result<Bytes, Fatal> {
        let replaced = Replaced::of(Some(newest), self.numbers.compacted)?;
        let before = replaced.live.unwrap_or_default();
        let prev = record::kv_of(newest)?;
        let tombstone = Kv { key: before.key, mod_revision: self.numbers.revision + 1, ..Kv::default() };
        self.attach(before.key, before.lease, 0);
        self.tally.deleted(tombstone.mod_revision, before.key)?;
        let shown = self.before_request(before.key, replaced.revision, prev.clone());
        self.write(&tombstone, true, &replaced, false, shown)?;
        Ok(prev)
    }

    /// What watchers are shown as the previous `KeyValue` of a change that replaces `prev`, written at `replaced`: what
    /// stood there before the whole request, even if the request changes the key twice (`check.rs`).
    fn before_request(&self, key: &[u8], replaced: Revision, prev: Bytes) -> Option<Bytes> {
        if replaced.main <= self.numbers.revision {
            return Some(prev);
        }
        self.events.iter().find(|event| event.key == key).and_then(|event| event.prev.clone())
    }

    /// Moves a key from one lease to another.
    fn attach(&mut self, key: &[u8], from: i64, to: i64) {
        if from == to {
            return;
        }
        if from != 0 {
            self.batch.delete(Table::Lease, keys::lease_key(LeaseId(from), key));
        }
        if to != 0 {
            self.batch.put(Table::Lease, keys::lease_key(LeaseId(to), key), Bytes::new());
        }
    }

    /// Writes one record everywhere and notes its event.
    fn write(
        &mut self,
        kv: &Kv<'_>,
        tombstone: bool,
        replaced: &Replaced<'_>,
        create: bool,
        prev: Option<Bytes>,
    ) -> Result<(), Fatal> {
        let numbers = &mut *self.numbers;
        if self.events.is_empty() {
            numbers.superseded += std::mem::take(&mut numbers.tombstones);
        }
        let own = Revision::new(numbers.revision + 1, self.events.len() as i64);
        let size = record::size(kv.encoded_len());
        numbers.written += size;
        numbers.superseded += replaced.size;
        if tombstone {
            numbers.tombstones += size;
        }
        let header = Header {
            previous: replaced.revision,
            sub: own.sub,
            depth: replaced.depth + 1,
            tombstone,
            superseded: numbers.superseded,
        };
        let row = header.encode(kv);
        let key = key_of(&row)?;
        self.batch.put(Table::Rev, Bytes::copy_from_slice(&keys::rev(own)), row.clone());
        self.batch.put(Table::Key, key.clone(), row.clone());
        if header.depth.is_multiple_of(MARK_EVERY) {
            let mut sub = BytesMut::with_capacity(4);
            sub.put_u32(own.sub as u32);
            self.batch.put(Table::Old, keys::old(&key, own.main), sub);
        }
        let kind = if tombstone { EventKind::Delete } else { EventKind::Put };
        self.recent.insert(&key, row.clone());
        self.events.push(Event { key, kind, create, kv: record::kv_of(&row)?, prev });
        Ok(())
    }

    /// Ends the request: if it changed anything, the revision rises and its events come out.
    pub(crate) fn finish(self) -> Option<RevisionEvents> {
        if self.events.is_empty() {
            return None;
        }
        self.numbers.revision += 1;
        Some(RevisionEvents { revision: self.numbers.revision, events: self.events })
    }
}

/// The user key of a record, sharing its bytes.
fn key_of(record: &Bytes) -> Result<Bytes, Fatal> {
    let key = record::key(record).ok_or_else(|| Fatal::Invariant("a record without a key was written".into()))?;
    Ok(record.slice_ref(key))
}

/// What a new record stands on.
struct Replaced<'a> {
    /// Main 0: nothing.
    revision: Revision,
    depth: u64,
    /// What the running sum grows by.
    size: u64,
    live: Option<Kv<'a>>,
}

impl<'a> Replaced<'a> {
    fn of(newest: Option<&'a Bytes>, compacted: i64) -> Result<Replaced<'a>, Fatal> {
        let nothing = Replaced { revision: Revision::default(), depth: 0, size: 0, live: None };
        let Some(newest) = newest else {
            return Ok(nothing);
        };
        let (header, bytes) = Header::decode(newest)?;
        let kv = Kv::decode(bytes)?;
        let revision = Revision::new(kv.mod_revision, header.sub);
        if !header.tombstone {
            return Ok(Replaced { revision, depth: header.depth, size: record::size(bytes.len()), live: Some(kv) });
        }
        if kv.mod_revision < compacted {
            return Ok(nothing);
        }
        // The tombstone counts for itself, as of the revision after its own.
        Ok(Replaced { revision, depth: header.depth, size: 0, live: None })
    }
}
