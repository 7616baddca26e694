//! One member's disks: a log that loses what was not synced, and the state database, whose memory twin loses what was not
//! flushed. Writes to the log are kept in order, so a crash keeps a prefix of them, as a write-ahead log does.
//!
//! It also holds the replica to its word: a write that would leave a hole in the log is a bug, found here.
//!
//! What it does not do: rot. A damaged disk is refused at start, which unit tests show.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use kvstore_core::Fatal;
use kvstore_core::backend::Backend;
use kvstore_core::backend::memory::MemoryBackend;
use kvstore_core::replica::{Boot, LogEntry, LogWrite, Position};
use kvstore_core::store::view;
use kvstore_core::types::{Index, Term};

use crate::rng::Rng;

#[derive(Clone, Debug)]
pub struct Disk {
    pub log: LogDisk,
    pub state: MemoryBackend,
    /// What the pointer file says: where the state was founded or installed.
    pub installed: Option<Position>,
}

#[derive(Clone, Debug, Default)]
pub struct LogDisk {
    pub image: LogImage,
    pub queue: VecDeque<LogWrite>,
    /// So many of the queue are being synced.
    pub syncing: usize,
}

/// What a crash leaves for certain.
#[derive(Clone, Debug, Default)]
pub struct LogImage {
    hard_state: Option<Bytes>,
    start: Position,
    entries: BTreeMap<Index, LogEntry>,
}

impl LogImage {
    /// The error tells which rule of [`LogWrite`] was broken.
    pub fn write(&mut self, write: &LogWrite) -> Result<(), String> {
        if let Some(at) = write.reset {
            self.start = at;
            self.entries.clear();
        }
        if let Some(from) = write.truncate_from {
            if write.entries.first().is_none_or(|first| first.index != from) {
                return Err(format!("truncated from {from} without an entry there"));
            }
            self.entries.split_off(&from);
        }
        for entry in &write.entries {
            if entry.index != self.last() + 1 {
                return Err(format!("entry {} was written after entry {}", entry.index, self.last()));
            }
            self.entries.insert(entry.index, entry.clone());
        }
        if let Some(hard_state) = &write.hard_state {
            self.hard_state = Some(hard_state.clone());
        }
        if let Some(at) = write.cut_to {
            if at.index < self.start.index || at.index > self.last() {
                return Err(format!("cut to {} outside {}..={}", at.index, self.start.index, self.last()));
            }
            self.start = at;
            self.entries = self.entries.split_off(&(at.index + 1));
        }
        Ok(())
    }

    pub fn last(&self) -> Index {
        self.entries.last_key_value().map_or(self.start.index, |(index, _)| *index)
    }

    /// A prefix of `from..to`, as a bounded read would give it.
    pub fn read(&self, from: Index, to: Index, max_bytes: u64) -> Vec<LogEntry> {
        let mut bytes = 0;
        let mut found: Vec<LogEntry> = Vec::new();
        for (index, entry) in self.entries.range(from..to) {
            bytes += entry.bytes.len() as u64;
            if *index != from + found.len() as u64 || (!found.is_empty() && bytes > max_bytes) {
                break;
            }
            found.push(entry.clone());
        }
        found
    }
}

impl Disk {
    /// The power goes: of the writes on their way to the log a prefix has arrived, of the state what was flushed.
    pub fn crash(&mut self, rng: &mut Rng) -> Result<(), String> {
        let arrived = rng.below(self.log.queue.len() as u64 + 1);
        for _ in 0..arrived {
            if let Some(write) = self.log.queue.pop_front() {
                self.log.image.write(&write)?;
            }
        }
        self.log.queue.clear();
        self.log.syncing = 0;
        self.state.crash();
        Ok(())
    }

    /// What a start finds. Only about `tail` applied entries are read, and always the last; of those before them only the
    /// terms.
    pub fn boot(&self, nonce: u64, tail: u64) -> Result<Boot, Fatal> {
        let state = self.state.view();
        let applied = view::applied(&state)?;
        let image = &self.log.image;
        let first = (applied.index + 1).saturating_sub(tail).min(image.last());
        let mut terms: Vec<(Index, Term)> = Vec::new();
        for entry in image.entries.range(..first).map(|(_, entry)| entry) {
            if terms.last().is_none_or(|(_, term)| *term != entry.term) {
                terms.push((entry.index, entry.term));
            }
        }
        Ok(Boot {
            nonce,
            hard_state: image.hard_state.clone(),
            log_start: image.start,
            terms,
            entries: image.entries.range(first..).map(|(_, entry)| entry.clone()).collect(),
            applied: Position { index: applied.index, term: applied.term },
            installed: self.installed,
            conf_state: view::conf_state_bytes(&state)?.unwrap_or_default(),
        })
    }
}
