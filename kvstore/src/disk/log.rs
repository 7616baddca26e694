//! Raft's log on disk: a RocksDB database of its own with one family, whose WAL is the only one there is.
//!
//! | key | value |
//! |---|---|
//! | `0` `hard state` | Raft's hard state, opaque |
//! | `0` `start` | index and term just before the first entry, 8 bytes each |
//! | `1` index, 8 bytes | term, 8 bytes, then the entry, opaque |
//!
//! Everything that waits is written as one batch, then the WAL is synced outside RocksDB's write queue
//! (storage-measurements 4.4). The recovery mode is chosen: a record that a crash cut short is dropped, it was never
//! acknowledged; damage anywhere else is refused, because forgetting acknowledged entries can lose them on a whole
//! cluster (trap 3).
//!
//! What it does not do: it decides neither what may be cut nor what an entry means.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use kvstore_core::Fatal;
use kvstore_core::replica::{Fetch, LogEntry, LogWrite, Position};
use kvstore_core::types::{Index, Term};
use rocksdb::{DB, DBCompressionType, DBRawIterator, DBRecoveryMode, Options, ReadOptions, WriteBatch};

use super::disk_error;

const HARD_STATE: &[u8] = b"\0hard state";
const START: &[u8] = b"\0start";
const ENTRY: u8 = 1;
const AFTER_ENTRIES: &[u8] = &[2];

/// What the log holds at a start.
#[derive(Clone, Debug, Default)]
pub struct Recovered {
    /// Just before the first entry; (0, 0) in a new log.
    pub start: Position,
    /// Where each term begins in the part that `entries` leaves out.
    pub terms: Vec<(Index, Term)>,
    pub hard_state: Option<Bytes>,
    /// The log's end: everything above what was asked for, and below it as much as the bound allows.
    pub entries: Vec<LogEntry>,
}

/// The log's database. Clones share it: one thread writes, others may read.
#[derive(Clone)]
pub struct Log {
    db: Arc<DB>,
    path: Arc<PathBuf>,
}

fn options() -> Options {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.set_wal_recovery_mode(DBRecoveryMode::TolerateCorruptedTailRecords);
    options.set_compression_type(DBCompressionType::None);
    options.set_write_buffer_size(32 << 20);
    options.set_max_write_buffer_number(4);
    options.set_max_background_jobs(2);
    options.set_bytes_per_sync(1 << 20);
    options.set_wal_bytes_per_sync(0);
    options.set_keep_log_file_num(2);
    options.set_max_log_file_size(4 << 20);
    options
}

fn entry_key(index: Index) -> [u8; 9] {
    let mut key = [ENTRY; 9];
    key[1..].copy_from_slice(&index.to_be_bytes());
    key
}

fn encode_position(at: Position) -> [u8; 16] {
    let mut value = [0; 16];
    value[..8].copy_from_slice(&at.index.to_be_bytes());
    value[8..].copy_from_slice(&at.term.to_be_bytes());
    value
}

fn be64(bytes: &[u8]) -> Option<u64> {
    bytes.get(..8).and_then(|b| b.try_into().ok()).map(u64::from_be_bytes)
}

fn decode_position(value: &[u8]) -> Option<Position> {
    Some(Position { index: be64(value)?, term: be64(value.get(8..)?)? })
}

fn decode_entry(key: &[u8], value: &[u8]) -> Option<LogEntry> {
    let (index, term) = (be64(key.get(1..)?)?, be64(value)?);
    Some(LogEntry { index, term, bytes: Bytes::copy_from_slice(&value[8..]) })
}

fn damaged(message: impl Into<String>) -> Fatal {
    Fatal::Damaged { table: "raft", message: message.into() }
}

impl Log {
    /// Opens the log, or makes an empty one at (0, 0).
    pub(super) fn open(path: &Path) -> Result<Log, Fatal> {
        let db = DB::open(&options(), path).map_err(disk_error(path))?;
        Ok(Log { db: Arc::new(db), path: Arc::new(path.to_owned()) })
    }

    fn error(&self, error: rocksdb::Error) -> Fatal {
        disk_error(&self.path)(error)
    }

    /// Whether nothing was ever written to it.
    pub(super) fn is_empty(&self) -> Result<bool, Fatal> {
        let mut rows = self.db.raw_iterator();
        rows.seek_to_first();
        let empty = !rows.valid();
        rows.status().map_err(|e| self.error(e))?;
        Ok(empty)
    }

    /// Writes everything that waits as one batch, and syncs it once if any of it must be.
    pub fn write(&mut self, writes: &[LogWrite]) -> Result<(), Fatal> {
        let mut batch = WriteBatch::default();
        for write in writes {
            add(write, &mut batch);
        }
        if !batch.is_empty() {
            self.db.write(batch).map_err(|e| self.error(e))?;
        }
        // Not a synced write: that would hold RocksDB's write queue through its fsync.
        if writes.iter().any(|write| write.must_sync) { self.sync() } else { Ok(()) }
    }

    pub fn sync(&self) -> Result<(), Fatal> {
        self.db.flush_wal(true).map_err(|e| self.error(e))
    }

    /// What a [`Fetch`] asks for: whole entries from `from` on, at least one unless the log was cut meanwhile.
    pub fn fetch(&self, fetch: &Fetch) -> Result<Vec<LogEntry>, Fatal> {
        let mut entries = Vec::new();
        let mut bytes = 0;
        let mut rows = self.entries(fetch.from, fetch.to);
        while let Some((key, value)) = rows.item() {
            bytes += value.len() as u64;
            if !entries.is_empty() && bytes > fetch.max_bytes {
                break;
            }
            entries.push(decode_entry(key, value).ok_or_else(|| damaged("an entry without index or term"))?);
            rows.next();
        }
        rows.status().map_err(|e| self.error(e))?;
        Ok(entries)
    }

    fn entries(&self, from: Index, to: Index) -> DBRawIterator<'_> {
        let mut options = ReadOptions::default();
        options.set_iterate_lower_bound(entry_key(from));
        options.set_iterate_upper_bound(if to == Index::MAX { AFTER_ENTRIES.to_vec() } else { entry_key(to).to_vec() });
        let mut rows = self.db.raw_iterator_opt(options);
        rows.seek_to_first();
        rows
    }

    /// Reads the whole log and keeps its end: everything above `applied`, and below it no more than `tail_bytes`, but
    /// the last entry always.
    pub fn recover(&self, applied: Index, tail_bytes: usize) -> Result<Recovered, Fatal> {
        let hard_state = self.db.get(HARD_STATE).map_err(|e| self.error(e))?.map(Bytes::from);
        let start = match self.db.get(START).map_err(|e| self.error(e))? {
            Some(value) => decode_position(&value).ok_or_else(|| damaged("the start is not two integers"))?,
            None => Position::default(),
        };
        let mut terms: Vec<(Index, Term)> = Vec::new();
        let mut tail = VecDeque::new();
        let mut bytes = 0;
        let mut rows = self.entries(0, Index::MAX);
        while let Some((key, value)) = rows.item() {
            let entry = decode_entry(key, value).ok_or_else(|| damaged("an entry without index or term"))?;
            bytes += entry.bytes.len();
            tail.push_back(entry);
            while bytes > tail_bytes
                && tail.len() > 1
                && tail.front().is_some_and(|first: &LogEntry| first.index <= applied)
            {
                let Some(left_out) = tail.pop_front() else { break };
                bytes -= left_out.bytes.len();
                if terms.last().is_none_or(|(_, term)| *term != left_out.term) {
                    terms.push((left_out.index, left_out.term));
                }
            }
            rows.next();
        }
        rows.status().map_err(|e| self.error(e))?;
        Ok(Recovered { start, terms, hard_state, entries: tail.into() })
    }
}

fn add(write: &LogWrite, batch: &mut WriteBatch) {
    if let Some(start) = write.reset {
        batch.delete_range(entry_key(0).as_slice(), AFTER_ENTRIES);
        batch.put(START, encode_position(start));
    }
    if let Some(from) = write.truncate_from {
        batch.delete_range(entry_key(from).as_slice(), AFTER_ENTRIES);
    }
    for entry in &write.entries {
        let mut value = Vec::with_capacity(8 + entry.bytes.len());
        value.extend_from_slice(&entry.term.to_be_bytes());
        value.extend_from_slice(&entry.bytes);
        batch.put(entry_key(entry.index), value);
    }
    if let Some(hard_state) = &write.hard_state {
        batch.put(HARD_STATE, hard_state);
    }
    if let Some(cut) = write.cut_to {
        batch.delete_range(entry_key(0), entry_key(cut.index + 1));
        batch.put(START, encode_position(cut));
    }
}
