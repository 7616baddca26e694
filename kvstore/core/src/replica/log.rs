//! Raft's view of the log. raft-rs asks for terms and entries in the middle of a step and cannot wait, while the log is
//! on disk in another thread's hands. So memory holds:
//! - where every term begins in the whole log, so that `term` is always answered at once;
//! - a tail of entries: all that are not applied yet (a campaign reads those and may not be told to wait), and below
//!   them as many as fit into a budget of bytes, because peers mostly want what is new.
//!
//! An append that needs older entries is told `LogTemporarilyUnavailable`; the wish is handed out as a fetch, and what
//! it brought is laid under the log while Raft is called back.
//!
//! What it does not do: write. What it shows to Raft as stored may still be on its way to the disk; Raft knows that from
//! `on_persist_ready` alone.

use std::cell::RefCell;
use std::collections::VecDeque;

use raft::storage::RaftState;
use raft::{GetEntriesContext, Storage, StorageError};

use super::wire::{self, RawConfState, RawEntry, RawHardState, RawSnapshot};
use super::{Fetch, Position};
use crate::types::{Index, Term};

/// Calls of Raft that wait for one fetch; a wish beyond it is dropped, and Raft wishes again at the next heartbeat.
const WAITING_PER_FETCH: usize = 8;

/// What an entry costs beside its data, about (raft-rs counts the same).
const ENTRY_OVERHEAD: usize = 12;

pub(super) struct Log {
    start: Position,
    /// (first index of the run, its term) for everything above `start`, ascending in both.
    terms: VecDeque<(Index, Term)>,
    /// Contiguous up to the last index.
    tail: VecDeque<RawEntry>,
    tail_bytes: usize,
    tail_limit: usize,
    last: Index,
    applied: Position,
    hard_state: RawHardState,
    conf_state: RawConfState,
    /// What a fetch brought, while Raft is called back for it.
    fetched: Vec<RawEntry>,
    wishes: RefCell<Wishes>,
}

#[derive(Default)]
struct Wishes {
    next_id: u64,
    made: Vec<Wish>,
    /// Not handed out yet.
    fresh: Vec<Fetch>,
}

struct Wish {
    id: u64,
    from: Index,
    waiting: Vec<GetEntriesContext>,
}

/// The parts of a log at start, checked by whoever calls.
pub(super) struct Parts {
    pub(super) start: Position,
    pub(super) terms: Vec<(Index, Term)>,
    pub(super) tail: Vec<RawEntry>,
    pub(super) applied: Position,
    pub(super) hard_state: RawHardState,
    pub(super) conf_state: RawConfState,
}

impl Log {
    pub(super) fn new(parts: Parts, tail_limit: usize) -> Log {
        let last = parts.tail.last().map_or(parts.start.index, |entry| entry.index);
        let mut log = Log {
            start: parts.start,
            terms: VecDeque::new(),
            tail: VecDeque::new(),
            tail_bytes: 0,
            tail_limit,
            last,
            applied: parts.applied,
            hard_state: parts.hard_state,
            conf_state: parts.conf_state,
            fetched: Vec::new(),
            wishes: RefCell::new(Wishes::default()),
        };
        for (index, term) in parts.terms {
            log.note_term(index, term);
        }
        for entry in parts.tail {
            log.push(entry);
        }
        log.evict();
        log
    }

    pub(super) fn start(&self) -> Position {
        self.start
    }

    pub(super) fn last_index(&self) -> Index {
        self.last
    }

    /// The position of `index`, where the log knows it.
    pub(super) fn position(&self, index: Index) -> Option<Position> {
        self.term_of(index).map(|term| Position { index, term })
    }

    /// Appends, replacing everything from the first of them on. Says whether anything was replaced.
    pub(super) fn append(&mut self, entries: &[RawEntry]) -> bool {
        let Some(first) = entries.first() else { return false };
        let replaces = first.index <= self.last;
        if replaces {
            self.truncate(first.index);
        }
        for entry in entries {
            self.last = entry.index;
            self.push(entry.clone());
        }
        replaces
    }

    /// The log begins anew behind `at`, which a snapshot has put in place.
    pub(super) fn reset(&mut self, at: Position) {
        self.start = at;
        self.last = at.index;
        self.terms.clear();
        self.tail.clear();
        self.tail_bytes = 0;
    }

    /// The first entry that memory holds; the one after the last if it holds none.
    pub(super) fn tail_first(&self) -> Index {
        self.tail.front().map_or(self.last + 1, |entry| entry.index)
    }

    /// Raft asks for it once, when it starts.
    pub(super) fn set_hard_state(&mut self, hard_state: RawHardState) {
        self.hard_state = hard_state;
    }

    pub(super) fn set_conf_state(&mut self, conf_state: RawConfState) {
        self.conf_state = conf_state;
    }

    pub(super) fn set_applied(&mut self, index: Index) {
        if let Some(at) = self.position(index) {
            self.applied = at;
            self.evict();
        }
    }

    /// Forgets everything up to and including `index`.
    pub(super) fn cut(&mut self, index: Index) -> Option<Position> {
        let at = self.position(index)?;
        while self.terms.get(1).is_some_and(|(next, _)| *next <= index + 1) {
            self.terms.pop_front();
        }
        if let Some(front) = self.terms.front_mut() {
            front.0 = front.0.max(index + 1);
        }
        if index >= self.last {
            self.terms.clear();
        }
        while self.tail.front().is_some_and(|entry| entry.index <= index) {
            self.pop_front();
        }
        self.start = at;
        Some(at)
    }

    /// Wishes that were not handed out yet.
    pub(super) fn take_fetches(&mut self) -> Vec<Fetch> {
        std::mem::take(&mut self.wishes.get_mut().fresh)
    }

    /// Lays what a fetch brought under the log and says whom to call back; `None`: nobody wished for that.
    pub(super) fn fetched(&mut self, id: u64, entries: Vec<RawEntry>) -> Option<(Index, Vec<GetEntriesContext>)> {
        let wishes = self.wishes.get_mut();
        let at = wishes.made.iter().position(|wish| wish.id == id)?;
        let wish = wishes.made.swap_remove(at);
        self.fetched = entries;
        Some((wish.from, wish.waiting))
    }

    /// The call back is over.
    pub(super) fn drop_fetched(&mut self) {
        self.fetched = Vec::new();
    }

    fn push(&mut self, entry: RawEntry) {
        self.note_term(entry.index, entry.term);
        self.tail_bytes += entry.data.len() + ENTRY_OVERHEAD;
        self.tail.push_back(entry);
    }

    fn note_term(&mut self, index: Index, term: Term) {
        if self.terms.back().is_none_or(|(_, last)| *last != term) {
            self.terms.push_back((index, term));
        }
    }

    fn pop_front(&mut self) {
        if let Some(entry) = self.tail.pop_front() {
            self.tail_bytes -= entry.data.len() + ENTRY_OVERHEAD;
        }
    }

    fn truncate(&mut self, from: Index) {
        while self.tail.back().is_some_and(|entry| entry.index >= from) {
            if let Some(entry) = self.tail.pop_back() {
                self.tail_bytes -= entry.data.len() + ENTRY_OVERHEAD;
            }
        }
        while self.terms.back().is_some_and(|(first, _)| *first >= from) {
            self.terms.pop_back();
        }
        self.last = from - 1;
    }

    /// Applied entries leave the tail, oldest first, until it fits.
    fn evict(&mut self) {
        while self.tail_bytes > self.tail_limit
            && self.tail.front().is_some_and(|entry| entry.index <= self.applied.index)
        {
            self.pop_front();
        }
    }

    fn term_of(&self, index: Index) -> Option<Term> {
        if index == self.start.index {
            return Some(self.start.term);
        }
        if index < self.start.index || index > self.last {
            return None;
        }
        let run = self.terms.partition_point(|(first, _)| *first <= index);
        self.terms.get(run.checked_sub(1)?).map(|(_, term)| *term)
    }

    fn wish(&self, from: Index, to: Index, max_bytes: u64, context: GetEntriesContext) {
        let mut wishes = self.wishes.borrow_mut();
        if let Some(wish) = wishes.made.iter_mut().find(|wish| wish.from == from) {
            if wish.waiting.len() < WAITING_PER_FETCH {
                wish.waiting.push(context);
            }
            return;
        }
        wishes.next_id += 1;
        let id = wishes.next_id;
        wishes.made.push(Wish { id, from, waiting: vec![context] });
        wishes.fresh.push(Fetch { id, from, to, max_bytes });
    }
}

/// A prefix of `entries` of at most `max_bytes`, but at least one.
fn limited<'a>(entries: impl Iterator<Item = &'a RawEntry>, max_bytes: u64) -> Vec<RawEntry> {
    let mut bytes = 0u64;
    let mut taken = Vec::new();
    for entry in entries {
        bytes = bytes.saturating_add((entry.data.len() + ENTRY_OVERHEAD) as u64);
        if !taken.is_empty() && bytes > max_bytes {
            break;
        }
        taken.push(entry.clone());
    }
    taken
}

impl Storage for Log {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(RaftState::new(self.hard_state.clone(), self.conf_state.clone()))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        context: GetEntriesContext,
    ) -> raft::Result<Vec<RawEntry>> {
        let max_bytes = max_size.into().unwrap_or(u64::MAX);
        if low <= self.start.index {
            return Err(StorageError::Compacted.into());
        }
        let wanted = usize::try_from(high.saturating_sub(low)).unwrap_or(usize::MAX);
        let tail_first = self.tail_first();
        if low >= tail_first {
            let skip = usize::try_from(low - tail_first).unwrap_or(usize::MAX);
            return Ok(limited(self.tail.iter().skip(skip).take(wanted), max_bytes));
        }
        let under = self.fetched.iter().skip_while(|entry| entry.index < low).take(wanted);
        if self.fetched.first().is_some_and(|first| first.index <= low) && under.clone().next().is_some() {
            return Ok(limited(under, max_bytes));
        }
        if !context.can_async() {
            return Err(StorageError::Unavailable.into());
        }
        self.wish(low, high.min(tail_first), max_bytes, context);
        Err(StorageError::LogTemporarilyUnavailable.into())
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        match self.term_of(index) {
            Some(term) => Ok(term),
            None if index < self.start.index => Err(StorageError::Compacted.into()),
            None => Err(StorageError::Unavailable.into()),
        }
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.start.index + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last)
    }

    /// Only says what a checkpoint taken now would hold at least; the shell takes it and fills in what it does hold.
    fn snapshot(&self, request_index: u64, _to: u64) -> raft::Result<RawSnapshot> {
        if self.applied.index == 0 || self.applied.index < request_index {
            return Err(StorageError::SnapshotTemporarilyUnavailable.into());
        }
        Ok(wire::snapshot(self.applied, &self.conf_state))
    }
}
