//! The keyspace at a revision: reading it, changing it, forgetting its past.
//!
//! Every change is one *record*: a small header and the `mvccpb.KeyValue` bytes as the wire wants them
//! (`record`). `key` holds the newest record of each key, `rev` every record in revision order, and each record
//! points at the one it superseded. So a range of the present is one scan that copies bytes ([`range`]), the past is
//! a pointer away ([`history`]), and compaction reads `rev` forward and deletes what the records point at (`compact`).
//!
//! | module | story |
//! |---|---|
//! | `record` | the layout of a record, and a `KeyValue` read in place |
//! | `span` | what a request's key and range end mean |
//! | `versions` | which version of a key was the newest at a revision |
//! | [`range`] | Range: every option, the present and the past |
//! | [`chunks`] | RangeStream: a Range in chunks, each read for itself |
//! | [`count`] | how many keys, without their bytes: the counted index |
//! | `write` | Put and DeleteRange on a batch; the events they make |
//! | `recent` | a cache of newest records in front of them |
//! | [`txn`] | compares, pre-checks and execution of Txn |
//! | `compact` | Compact and its deletion in slices |
//! | [`history`] | events of past revisions, for watchers that catch up |
//! | [`check`] | what is refused before it is proposed |
//!
//! What it does not do: it proposes nothing, waits for nothing, and knows no member.

pub mod check;
pub mod chunks;
pub(crate) mod compact;
pub(crate) mod count;
pub mod history;
pub mod range;
pub(crate) mod recent;
mod record;
pub(crate) mod span;
pub mod txn;
mod versions;
pub(crate) mod write;

use bytes::Bytes;

use crate::{Error, Fatal};

pub use count::index::KeyCounts;
pub use range::{range, rows};

/// What is readable at a moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bounds {
    /// The current revision.
    pub revision: i64,
    /// Below this revision nothing can be read; the revision itself can. -1: never compacted.
    pub compacted: i64,
}

/// What a read needs of a moment: rows, what is readable of them, and how many there are. All three belong together.
pub struct Moment<'a, R> {
    pub read: &'a R,
    pub bounds: Bounds,
    pub keys: &'a KeyCounts,
}

impl<R> Clone for Moment<'_, R> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<R> Copy for Moment<'_, R> {}

/// What a Range found.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Ranged {
    /// The key-value pairs framed as `repeated KeyValue kvs = 2` of a `RangeResponse`: tag, length, `KeyValue` bytes.
    pub kvs: Bytes,
    /// How many pairs `kvs` holds.
    pub len: usize,
    /// The limit cut some off.
    pub more: bool,
    /// Keys in the range, whatever limit and filters say.
    pub count: i64,
}

/// Why a read gave nothing.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error(transparent)]
    Answer(#[from] Error),
    #[error(transparent)]
    Fatal(#[from] Fatal),
}

/// All changes of one revision, in the order of their subs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RevisionEvents {
    pub revision: i64,
    pub events: Vec<Event>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EventKind {
    Put,
    Delete,
}

/// One change of one key.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Event {
    pub key: Bytes,
    pub kind: EventKind,
    /// The put made the key (its create revision is its mod revision).
    pub create: bool,
    /// The encoded `KeyValue` of the event: complete for a put, key and mod revision for a delete.
    pub kv: Bytes,
    /// The encoded `KeyValue` before the change. `None` for a create, and if mod − 1 is compacted (trap 5).
    pub prev: Option<Bytes>,
}

/// What a row of `rev` counts for in the quota.
#[cfg(test)]
pub(crate) fn logical_size(row: &[u8]) -> Result<u64, Fatal> {
    Ok(record::size(record::newest(row)?.1.len()))
}

/// How deep in its chain the record of a row is.
#[cfg(test)]
pub(crate) fn depth(row: &[u8]) -> Result<u64, Fatal> {
    Ok(record::Header::decode(row)?.0.depth)
}
