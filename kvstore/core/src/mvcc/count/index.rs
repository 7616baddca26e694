//! The counted index: how many keys live in each stretch of the keyspace, in memory.
//!
//! The keyspace is cut into *blocks* of a few hundred rows of `key`; the index knows where each begins and how many of its
//! keys live. Blocks stand in *chunks*, shared between versions and copied when they change, so that a version is
//! published for the price of a pointer and a create or delete copies one chunk's counts (0.5 KB) at most once a version:
//!
//! ```text
//! version ─▶ [ (live, rows, ●), … ]              one entry a chunk
//!                          ╰─▶ bounds (shared until a split) · [ {live, rows}, {live, rows}, … ]
//! ```
//!
//! A block is split by its *rows*, tombstones included, so that the scan of a block at the end of a counted range stays
//! bounded however many deleted keys wait there for a compaction. A put over a living key changes nothing here.
//!
//! What it does not do: it reads no row to count (`count.rs` scans the two ends) and it is not stored: a scan of
//! `key` rebuilds it, so that it can never disagree with what a crash or a snapshot left (trap 9).

use std::ops::{Bound, ControlFlow};
use std::sync::Arc;

use super::gains::Gains;
use crate::Fatal;
use crate::backend::{Direction, Read, Table};
use crate::mvcc::record;

/// Rows of a block after a split or a build. In this crate's tests a few keys make many blocks.
const TARGET_ROWS: u32 = if cfg!(test) { 8 } else { 256 };
/// A block with more is split.
pub(super) const MAX_ROWS: u32 = 2 * TARGET_ROWS;
/// A block with fewer is merged with a neighbour, if both fit into [`TARGET_ROWS`].
const MIN_ROWS: u32 = TARGET_ROWS / 4;
/// Blocks of a chunk after a split or a build; twice as many are split.
const TARGET_BLOCKS: usize = if cfg!(test) { 8 } else { 64 };
/// A chunk with fewer blocks is merged with a neighbour, if both fit into [`TARGET_BLOCKS`].
const MIN_BLOCKS: usize = TARGET_BLOCKS / 4;

/// Where a block begins: at this key, inclusive.
type Start = Arc<[u8]>;

/// No key comes before this one, so that a count from it on needs no scan at its beginning.
const FIRST: &[u8] = &[0];

/// One version of the index: of the same moment as the view it is published with. Cheap to clone.
#[derive(Clone, Debug)]
pub struct KeyCounts {
    chunks: Arc<Vec<Entry>>,
    pub(super) gains: Gains,
}

#[derive(Clone, Debug)]
struct Entry {
    live: u64,
    rows: u64,
    chunk: Arc<Chunk>,
}

/// Neighbouring blocks; at least one.
#[derive(Clone, Debug)]
struct Chunk {
    starts: Arc<[Start]>,
    blocks: Vec<Block>,
}

#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
struct Block {
    live: u32,
    /// Living keys and tombstones.
    rows: u32,
}

/// Which block.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Place {
    chunk: usize,
    block: usize,
}

impl Entry {
    fn new(pieces: &[(Start, Block)]) -> Entry {
        Entry {
            live: pieces.iter().map(|(_, block)| u64::from(block.live)).sum(),
            rows: pieces.iter().map(|(_, block)| u64::from(block.rows)).sum(),
            chunk: Arc::new(Chunk {
                starts: pieces.iter().map(|(start, _)| Arc::clone(start)).collect(),
                blocks: pieces.iter().map(|(_, block)| *block).collect(),
            }),
        }
    }

    fn pieces(&self) -> impl Iterator<Item = (Start, Block)> {
        self.chunk.starts.iter().cloned().zip(self.chunk.blocks.iter().copied())
    }
}

impl KeyCounts {
    /// All keys that live.
    pub fn total(&self) -> u64 {
        self.chunks.iter().map(|entry| entry.live).sum()
    }

    /// Rows that the whole keyspace has: living keys and tombstones.
    pub fn rows(&self) -> u64 {
        self.chunks.iter().map(|entry| entry.rows).sum()
    }

    /// Rows of all blocks that a range touches: at least as many as the range has. Reads none of them.
    pub(super) fn rows_around(&self, start: &[u8], end: Option<&[u8]>) -> u64 {
        let (first, last) = (self.place(start), end.map(|end| self.place(end)));
        let of = |chunk: usize| &self.chunks[chunk].chunk.blocks[..];
        let sum = |blocks: &[Block]| blocks.iter().map(|block| u64::from(block.rows)).sum::<u64>();
        let last = last.unwrap_or_else(|| {
            let chunk = self.chunks.len() - 1;
            Place { chunk, block: of(chunk).len() - 1 }
        });
        if last < first {
            return 0;
        }
        if first.chunk == last.chunk {
            return sum(&of(first.chunk)[first.block..=last.block]);
        }
        let whole: u64 = self.chunks[first.chunk + 1..last.chunk].iter().map(|entry| entry.rows).sum();
        sum(&of(first.chunk)[first.block..]) + whole + sum(&of(last.chunk)[..=last.block])
    }

    /// The block that holds `key`, if any does.
    pub(super) fn place(&self, key: &[u8]) -> Place {
        let chunk = self.chunks.partition_point(|entry| *entry.chunk.starts[0] <= *key).saturating_sub(1);
        let block = self.chunks[chunk].chunk.starts.partition_point(|start| **start <= *key).saturating_sub(1);
        Place { chunk, block }
    }

    pub(super) fn start(&self, place: Place) -> &[u8] {
        &self.chunks[place.chunk].chunk.starts[place.block]
    }

    /// The block after this one.
    pub(super) fn next(&self, place: Place) -> Option<Place> {
        let Place { chunk, block } = place;
        if block + 1 < self.chunks[chunk].chunk.blocks.len() {
            return Some(Place { chunk, block: block + 1 });
        }
        (chunk + 1 < self.chunks.len()).then_some(Place { chunk: chunk + 1, block: 0 })
    }

    pub(super) fn live(&self, place: Place) -> u64 {
        u64::from(self.chunks[place.chunk].chunk.blocks[place.block].live)
    }

    /// Living keys of the blocks from `from` up to but without `to`; without a `to`, to the end.
    pub(super) fn sum(&self, from: Place, to: Option<Place>) -> u64 {
        let inside = |chunk: usize, first: usize, end: usize| -> u64 {
            self.chunks[chunk].chunk.blocks[first..end].iter().map(|block| u64::from(block.live)).sum()
        };
        let all = |chunk: usize| self.chunks[chunk].chunk.blocks.len();
        let to = to.unwrap_or(Place { chunk: self.chunks.len(), block: 0 });
        if from.chunk == to.chunk {
            return inside(from.chunk, from.block, to.block.max(from.block));
        }
        let whole: u64 = self.chunks[from.chunk + 1..to.chunk].iter().map(|entry| entry.live).sum();
        let last = if to.block > 0 { inside(to.chunk, 0, to.block) } else { 0 };
        inside(from.chunk, from.block, all(from.chunk)) + whole + last
    }
}

/// The writer's side: the newest version, changed with every create and delete.
#[derive(Debug)]
pub(crate) struct Tally {
    counts: KeyCounts,
    /// A key of each block that has become too large or too small.
    unsettled: Vec<Start>,
}

impl Tally {
    /// Counts what is there, at `revision`.
    pub(crate) fn open<R: Read>(read: &R, revision: i64) -> Result<Tally, Fatal> {
        let pieces = cut(read, (Bound::Unbounded, Bound::Unbounded), FIRST, TARGET_ROWS)?;
        let chunks = pieces.chunks(TARGET_BLOCKS).map(Entry::new).collect();
        let counts = KeyCounts { chunks: Arc::new(chunks), gains: Gains::new(revision) };
        Ok(Tally { counts, unsettled: Vec::new() })
    }

    /// The newest version: of the rows with everything that was noted so far.
    pub(crate) fn counts(&self) -> &KeyCounts {
        &self.counts
    }

    /// A key lives as of `revision` that did not; `new_row`: not even its tombstone stood.
    pub(crate) fn created(&mut self, revision: i64, key: &[u8], new_row: bool) -> Result<(), Fatal> {
        self.counts.gains.push(revision, key, 1);
        self.change(key, 1, i32::from(new_row))
    }

    /// A key that lived is a tombstone as of `revision`.
    pub(crate) fn deleted(&mut self, revision: i64, key: &[u8]) -> Result<(), Fatal> {
        self.counts.gains.push(revision, key, -1);
        self.change(key, -1, 0)
    }

    /// A tombstone has gone.
    pub(crate) fn forgotten(&mut self, key: &[u8]) -> Result<(), Fatal> {
        self.change(key, 0, -1)
    }

    fn change(&mut self, key: &[u8], live: i32, rows: i32) -> Result<(), Fatal> {
        let wrong = || Fatal::Invariant("the index counts fewer keys than there are".into());
        let Place { chunk, block } = self.counts.place(key);
        let entry = &mut Arc::make_mut(&mut self.counts.chunks)[chunk];
        entry.live = entry.live.checked_add_signed(live.into()).ok_or_else(wrong)?;
        entry.rows = entry.rows.checked_add_signed(rows.into()).ok_or_else(wrong)?;
        let block = &mut Arc::make_mut(&mut entry.chunk).blocks[block];
        block.live = block.live.checked_add_signed(live).ok_or_else(wrong)?;
        block.rows = block.rows.checked_add_signed(rows).ok_or_else(wrong)?;
        // Each bound is noted as it is crossed, so that a block is noted once however much a batch puts into it.
        let grown = rows > 0 && block.rows == MAX_ROWS + 1;
        let shrunk = rows < 0 && (block.rows == MIN_ROWS - 1 || block.rows == 0);
        if grown || shrunk {
            self.unsettled.push(key.into());
        }
        Ok(())
    }

    /// Splits and merges what has become too large or too small; `read` shows everything that was noted.
    pub(crate) fn settle<R: Read>(&mut self, read: &R) -> Result<(), Fatal> {
        for key in std::mem::take(&mut self.unsettled) {
            let place = self.counts.place(&key);
            let rows = self.block(place).rows;
            if rows > MAX_ROWS {
                self.split(read, place)?;
            } else if rows < MIN_ROWS {
                self.merge(place);
            }
        }
        Ok(())
    }

    fn block(&self, place: Place) -> Block {
        self.counts.chunks[place.chunk].chunk.blocks[place.block]
    }

    /// Cuts a block into even parts, whose keys are counted anew.
    fn split<R: Read>(&mut self, read: &R, place: Place) -> Result<(), Fatal> {
        let Block { live, rows } = self.block(place);
        let start = Arc::clone(&self.counts.chunks[place.chunk].chunk.starts[place.block]);
        let end = self.counts.next(place).map(|next| self.counts.start(next));
        let range = (Bound::Included(&*start), end.map_or(Bound::Unbounded, Bound::Excluded));
        let parts = cut(read, range, &start, rows.div_ceil(rows / TARGET_ROWS))?;
        if parts.iter().map(|(_, part)| part.live).sum::<u32>() != live {
            return Err(Fatal::Invariant(format!("a block of {live} keys holds another number of them")));
        }
        let mut pieces: Vec<_> = self.counts.chunks[place.chunk].pieces().collect();
        pieces.splice(place.block..=place.block, parts);
        self.replace(place.chunk, 1, &pieces);
        Ok(())
    }

    /// Joins a block to a neighbour in its chunk, and the chunk to a neighbour, where both together are still small.
    fn merge(&mut self, place: Place) {
        let mut pieces: Vec<_> = self.counts.chunks[place.chunk].pieces().collect();
        let fits = |left: usize| {
            let (left, right) = (pieces.get(left)?.1, pieces.get(left + 1)?.1);
            let (smaller, both) = (left.rows.min(right.rows), left.rows + right.rows);
            (smaller == 0 || both <= TARGET_ROWS).then_some(Block { live: left.live + right.live, rows: both })
        };
        let lefts = [place.block.checked_sub(1), Some(place.block)];
        if let Some((left, joined)) = lefts.into_iter().flatten().find_map(|left| Some((left, fits(left)?))) {
            pieces.remove(left + 1);
            pieces[left].1 = joined;
        }
        let neighbour = |at: usize| Some(self.counts.chunks.get(at)?.chunk.blocks.len());
        let joins = |at: usize| neighbour(at).is_some_and(|blocks| blocks + pieces.len() <= TARGET_BLOCKS);
        let small = pieces.len() < MIN_BLOCKS;
        if small && place.chunk > 0 && joins(place.chunk - 1) {
            let joined: Vec<_> = self.counts.chunks[place.chunk - 1].pieces().chain(pieces).collect();
            self.replace(place.chunk - 1, 2, &joined);
        } else if small && joins(place.chunk + 1) {
            pieces.extend(self.counts.chunks[place.chunk + 1].pieces());
            self.replace(place.chunk, 2, &pieces);
        } else {
            self.replace(place.chunk, 1, &pieces);
        }
    }

    /// Puts `pieces` in the place of `count` chunks, in as many chunks as they need.
    fn replace(&mut self, chunk: usize, count: usize, pieces: &[(Start, Block)]) {
        let size = if pieces.len() >= 2 * TARGET_BLOCKS { TARGET_BLOCKS } else { pieces.len() };
        let entries = pieces.chunks(size).map(Entry::new);
        Arc::make_mut(&mut self.counts.chunks).splice(chunk..chunk + count, entries);
    }
}

/// Cuts a range of `key` that begins at `start` into blocks of `size` rows; at least one.
fn cut<R: Read>(
    read: &R,
    range: (Bound<&[u8]>, Bound<&[u8]>),
    start: &[u8],
    size: u32,
) -> Result<Vec<(Start, Block)>, Fatal> {
    let mut blocks = vec![(Start::from(start), Block::default())];
    let mut failed = None;
    read.scan(Table::Key, range, Direction::Forward, &mut |key, row| {
        match record::newest(row) {
            Ok((tombstone, _)) => {
                if blocks.last().is_some_and(|(_, block)| block.rows >= size) {
                    blocks.push((key.into(), Block::default()));
                }
                let (_, block) = blocks.last_mut().expect("it was made with one");
                block.rows += 1;
                block.live += u32::from(!tombstone);
            }
            Err(error) => failed = Some(error),
        }
        if failed.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    failed.map_or(Ok(blocks), Err)
}

#[cfg(test)]
impl KeyCounts {
    /// Holds the index against one that is built anew, and every block and chunk against its bounds.
    pub(crate) fn check<R: Read>(&self, read: &R) {
        let rebuilt = Tally::open(read, 0).unwrap().counts;
        assert_eq!((self.total(), self.rows()), (rebuilt.total(), rebuilt.rows()), "keys, and rows");
        let mut starts = Vec::new();
        for entry in self.chunks.iter() {
            let Chunk { starts: of_chunk, blocks } = &*entry.chunk;
            assert_eq!(entry.live, blocks.iter().map(|block| u64::from(block.live)).sum::<u64>());
            assert_eq!(entry.rows, blocks.iter().map(|block| u64::from(block.rows)).sum::<u64>());
            assert!(of_chunk.len() == blocks.len() && (1..2 * TARGET_BLOCKS).contains(&blocks.len()));
            assert!(blocks.iter().all(|block| block.live <= block.rows && block.rows <= MAX_ROWS), "{blocks:?}");
            starts.extend(of_chunk.iter().cloned());
        }
        assert_eq!(&*starts[0], FIRST);
        assert!(starts.is_sorted_by(|left, right| left < right), "{starts:?}");
    }

    pub(crate) fn blocks(&self) -> usize {
        self.chunks.iter().map(|entry| entry.chunk.blocks.len()).sum()
    }
}
