//! The state database in memory, for tests and the simulator: it keeps the promises of the real one, and no others.
//!
//! Rows stand in blocks that are shared by all views and copied when written, so that a view costs one pointer a table
//! and a write copies one block. What is written is visible at once and lost by [`MemoryBackend::crash`], unless a flush
//! that began after it was *completed*: nothing completes by itself, so that a schedule decides when.
//!
//! What it does not do: it keeps nothing on disk, counts no bytes and never fails.

use std::collections::{BTreeMap, VecDeque};
use std::ops::{Bound, RangeBounds};
use std::sync::Arc;

use bytes::Bytes;

use super::{Backend, Direction, Install, Installed, Range, ReadView, Table, Visit, WriteBatch, is_empty_range};
use crate::types::Index;
use crate::{Fatal, keys};

/// Rows in a block before it is split.
const BLOCK_ROWS: usize = 64;

type Row = (Bytes, Bytes);

/// One table: blocks of rows, each under a lower bound of its keys. The first block's bound is the empty key.
#[derive(Clone, Debug)]
struct Rows {
    blocks: Arc<BTreeMap<Bytes, Arc<Vec<Row>>>>,
}

impl Default for Rows {
    fn default() -> Self {
        Rows { blocks: Arc::new(BTreeMap::from([(Bytes::new(), Arc::default())])) }
    }
}

impl Rows {
    fn block_of(&self, key: &[u8]) -> (&Bytes, &Arc<Vec<Row>>) {
        self.blocks
            .range::<[u8], _>((Bound::Unbounded, Bound::Included(key)))
            .next_back()
            .expect("the first block's bound is the empty key")
    }

    fn get(&self, key: &[u8]) -> Option<Bytes> {
        let (_, rows) = self.block_of(key);
        let at = rows.binary_search_by(|(k, _)| k.as_ref().cmp(key)).ok()?;
        Some(rows[at].1.clone())
    }

    fn set(&mut self, key: Bytes, value: Option<Bytes>) {
        let bound = self.block_of(&key).0.clone();
        let blocks = Arc::make_mut(&mut self.blocks);
        let rows = Arc::make_mut(blocks.get_mut(&bound).expect("found just now"));
        match (rows.binary_search_by(|(k, _)| k.cmp(&key)), value) {
            (Ok(at), Some(value)) => rows[at].1 = value,
            (Ok(at), None) => {
                rows.remove(at);
                if rows.is_empty() && !bound.is_empty() {
                    blocks.remove(&bound);
                }
            }
            (Err(at), Some(value)) => {
                rows.insert(at, (key, value));
                if rows.len() > BLOCK_ROWS {
                    let upper = rows.split_off(BLOCK_ROWS / 2);
                    blocks.insert(upper[0].0.clone(), Arc::new(upper));
                }
            }
            (Err(_), None) => {}
        }
    }

    fn scan(&self, range: Range<'_>, direction: Direction, visit: &mut Visit<'_>) {
        if is_empty_range(&range) {
            return;
        }
        let first = match range.0 {
            Bound::Included(key) | Bound::Excluded(key) => self.block_of(key).0.clone(),
            Bound::Unbounded => Bytes::new(),
        };
        let inside = |key: &[u8]| RangeBounds::<[u8]>::contains(&range, key);
        let blocks = self.blocks.range::<[u8], _>((Bound::Included(first.as_ref()), range.1));
        match direction {
            Direction::Forward => {
                let rows = blocks.flat_map(|(_, rows)| rows.iter());
                each(rows.filter(|(k, _)| inside(k)), visit);
            }
            Direction::Backward => {
                let rows = blocks.rev().flat_map(|(_, rows)| rows.iter().rev());
                each(rows.filter(|(k, _)| inside(k)), visit);
            }
        }
    }
}

fn each<'a>(rows: impl Iterator<Item = &'a Row>, visit: &mut Visit<'_>) {
    for (key, value) in rows {
        if visit(key, value).is_break() {
            return;
        }
    }
}

/// All tables at one moment.
#[derive(Clone, Default, Debug)]
pub struct MemoryView {
    tables: [Rows; Table::ALL.len()],
}

impl MemoryView {
    /// Every row of a table, for comparing whole states.
    pub fn rows(&self, table: Table) -> Vec<(Bytes, Bytes)> {
        self.tables[table as usize].blocks.values().flat_map(|rows| rows.iter().cloned()).collect()
    }

    fn write(&mut self, batch: WriteBatch) {
        for (table, rows) in batch.into_tables() {
            for (key, value) in rows {
                self.tables[table as usize].set(key, value);
            }
        }
    }

    fn applied(&self) -> Result<Option<keys::Applied>, Fatal> {
        self.tables[Table::Meta as usize].get(keys::META_APPLIED).map(|row| keys::decode_applied(&row)).transpose()
    }
}

impl ReadView for MemoryView {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, Fatal> {
        Ok(self.tables[table as usize].get(key))
    }

    fn scan(&self, table: Table, range: Range<'_>, direction: Direction, visit: &mut Visit<'_>) -> Result<(), Fatal> {
        self.tables[table as usize].scan(range, direction, visit);
        Ok(())
    }
}

/// The database: what is written, what flushes have begun with, and what a crash would leave.
#[derive(Clone, Default, Debug)]
pub struct MemoryBackend {
    state: MemoryView,
    flushing: VecDeque<MemoryView>,
    durable: MemoryView,
}

impl MemoryBackend {
    pub fn new() -> Self {
        Self::default()
    }

    /// Completes the oldest flush that has begun; false if there is none.
    pub fn complete_flush(&mut self) -> bool {
        match self.flushing.pop_front() {
            Some(state) => {
                self.durable = state;
                true
            }
            None => false,
        }
    }

    /// What a crash leaves: the state of the last completed flush.
    pub fn crash(&mut self) {
        self.flushing.clear();
        self.state = self.durable.clone();
    }
}

impl Backend for MemoryBackend {
    type View = MemoryView;
    type Install = MemoryInstall;

    fn view(&self) -> MemoryView {
        self.state.clone()
    }

    fn write(&mut self, batch: WriteBatch) -> Result<(), Fatal> {
        self.state.write(batch);
        Ok(())
    }

    fn start_flush(&mut self) -> Result<(), Fatal> {
        self.flushing.push_back(self.state.clone());
        Ok(())
    }

    fn durable_applied(&self) -> Result<Index, Fatal> {
        Ok(self.durable.applied()?.map_or(0, |applied| applied.index))
    }

    fn begin_install(&mut self) -> Result<MemoryInstall, Fatal> {
        Ok(MemoryInstall::default())
    }

    fn install(&mut self, new: MemoryInstall) -> Result<(), Fatal> {
        self.flushing.clear();
        self.durable = new.state.clone();
        self.state = new.state;
        Ok(())
    }
}

/// A new state under construction.
#[derive(Default, Debug)]
pub struct MemoryInstall {
    state: MemoryView,
}

impl Install for MemoryInstall {
    fn put(&mut self, table: Table, key: &[u8], value: &[u8]) -> Result<(), Fatal> {
        let value = Bytes::copy_from_slice(value);
        self.state.tables[table as usize].set(Bytes::copy_from_slice(key), Some(value));
        Ok(())
    }

    fn finish(&mut self) -> Result<Installed, Fatal> {
        let applied = self.state.applied()?.ok_or_else(|| Fatal::Damaged {
            table: Table::Meta.name(),
            message: "the snapshot has no applied index".into(),
        })?;
        Ok(Installed { index: applied.index, term: applied.term })
    }
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::super::{Overlay, Read};
    use super::*;

    const TABLE: Table = Table::Key;

    type Rows = Vec<(Bytes, Bytes)>;

    fn scanned<R: Read>(read: &R, range: Range<'_>, direction: Direction, max: usize) -> Rows {
        let mut found = Vec::new();
        read.scan(TABLE, range, direction, &mut |k, v| {
            found.push((Bytes::copy_from_slice(k), Bytes::copy_from_slice(v)));
            if found.len() >= max { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .unwrap();
        found
    }

    /// What a plain map would show.
    fn expected(map: &BTreeMap<Bytes, Bytes>, range: Range<'_>, direction: Direction, max: usize) -> Rows {
        let inside = map.iter().filter(|(k, _)| RangeBounds::<[u8]>::contains(&range, k.as_ref()));
        let mut rows: Rows = inside.map(|(k, v)| (k.clone(), v.clone())).collect();
        if direction == Direction::Backward {
            rows.reverse();
        }
        rows.truncate(max);
        rows
    }

    fn key(n: u16) -> Bytes {
        Bytes::copy_from_slice(&n.to_be_bytes())
    }

    fn batch_of(writes: &[(u16, Option<u8>)], map: &mut BTreeMap<Bytes, Bytes>) -> WriteBatch {
        let mut batch = WriteBatch::new();
        for (n, value) in writes {
            match value {
                Some(value) => {
                    batch.put(TABLE, key(*n), vec![*value]);
                    map.insert(key(*n), vec![*value].into());
                }
                None => {
                    batch.delete(TABLE, key(*n));
                    map.remove(&key(*n));
                }
            }
        }
        batch
    }

    fn bound() -> impl Strategy<Value = Bound<u16>> {
        prop_oneof![
            (0..300u16).prop_map(Bound::Included),
            (0..300u16).prop_map(Bound::Excluded),
            Just(Bound::Unbounded)
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

        /// A backend is a map; a batch laid over a view shows what will be there; an old view never changes.
        #[test]
        fn it_is_a_map_under_every_bound(
            first in vec((0..300u16, prop::option::weighted(0.8, any::<u8>())), 0..400),
            second in vec((0..300u16, prop::option::weighted(0.5, any::<u8>())), 0..60),
            bounds in (bound(), bound()),
            max in 1..40usize,
        ) {
            let mut map = BTreeMap::new();
            let mut backend = MemoryBackend::new();
            backend.write(batch_of(&first, &mut map)).unwrap();
            let before = map.clone();
            let view = backend.view();
            let batch = batch_of(&second, &mut map);
            let keys = (bounds.0.map(key), bounds.1.map(key));
            let range = (keys.0.as_ref().map(Bytes::as_ref), keys.1.as_ref().map(Bytes::as_ref));
            let overlay = Overlay { view: &view, batch: &batch };
            for direction in [Direction::Forward, Direction::Backward] {
                for max in [max, usize::MAX] {
                    prop_assert_eq!(scanned(&overlay, range, direction, max), expected(&map, range, direction, max));
                }
            }
            for n in (0..300).map(key) {
                prop_assert_eq!(Read::get(&overlay, TABLE, &n).unwrap(), map.get(&n).cloned());
            }
            backend.write(batch.clone()).unwrap();
            for direction in [Direction::Forward, Direction::Backward] {
                let written = scanned(&backend.view(), range, direction, max);
                prop_assert_eq!(written, expected(&map, range, direction, max));
                prop_assert_eq!(scanned(&view, range, direction, max), expected(&before, range, direction, max));
            }
        }
    }

    fn one_row(n: u16) -> WriteBatch {
        batch_of(&[(n, Some(1))], &mut BTreeMap::new())
    }

    #[test]
    fn a_crash_leaves_the_last_completed_flush() {
        let mut backend = MemoryBackend::new();
        backend.write(one_row(1)).unwrap();
        backend.start_flush().unwrap();
        backend.write(one_row(2)).unwrap();
        backend.start_flush().unwrap();
        backend.write(one_row(3)).unwrap();
        assert!(backend.complete_flush());
        backend.crash();
        assert_eq!(backend.view().rows(TABLE).len(), 1, "the second flush had not completed");
        assert!(!backend.complete_flush(), "and never will");
    }

    #[test]
    fn an_install_replaces_everything_at_once_and_a_dropped_one_nothing() {
        let mut backend = MemoryBackend::new();
        backend.write(one_row(1)).unwrap();
        let view = backend.view();
        let mut dropped = backend.begin_install().unwrap();
        dropped.put(TABLE, b"x", b"1").unwrap();
        assert!(dropped.finish().is_err(), "a state without an applied index is none");
        drop(dropped);
        let mut new = backend.begin_install().unwrap();
        let applied = keys::Applied { index: 9, term: 2 };
        new.put(Table::Meta, keys::META_APPLIED, &keys::encode_applied(applied)).unwrap();
        assert_eq!(new.finish().unwrap(), Installed { index: 9, term: 2 });
        assert_eq!(backend.durable_applied().unwrap(), 0);
        backend.install(new).unwrap();
        backend.crash();
        assert_eq!(backend.durable_applied().unwrap(), 9, "an install is durable");
        assert_eq!((backend.view().rows(TABLE).len(), view.rows(TABLE).len()), (0, 1), "old views stay readable");
    }
}
