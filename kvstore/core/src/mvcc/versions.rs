//! Which version of a key was the newest at a revision.
//!
//! `key` holds the newest of all. For an older one: the record it points at, which pages of a list and watchers want most;
//! else the nearest mark in `old` above the revision, and from there at most four pointers. A record that is gone
//! was a tombstone below the compacted revision: nobody can read below it, and from there on the key was absent.
//!
//! What it does not do: it refuses no revision; who asks knows that it can be read.

use std::ops::{Bound, ControlFlow};

use bytes::Bytes;

use super::Bounds;
use super::record::{self, Header, Kv};
use super::span::Span;
use crate::backend::{Direction, Read, Table};
use crate::types::Revision;
use crate::{Fatal, keys};

/// Where the newest version at a revision is.
pub(crate) enum Version {
    /// It is the record that was shown.
    Shown,
    /// It is this record.
    Older(Bytes),
    /// The key did not exist.
    Absent,
}

/// What a visitor wants of the next key.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Want {
    /// The `KeyValue` bytes.
    Bytes,
    /// Only that the key exists.
    Existence,
    /// Nothing more.
    Nothing,
}

/// The version of a key at `at`, given its newest record. `bounds` are of the same moment as `read`.
pub(crate) fn version_at<R: Read>(read: &R, bounds: Bounds, at: i64, record: &[u8]) -> Result<Version, Fatal> {
    let (header, kv) = Header::decode(record)?;
    let kv = Kv::decode(kv)?;
    if kv.mod_revision <= at {
        return Ok(if header.tombstone { Version::Absent } else { Version::Shown });
    }
    let mut revision = header.previous;
    if revision.main > at
        && let Some(mark) = nearest_mark(read, kv.key, at)?
    {
        revision = mark;
    }
    while revision.main != 0 {
        let Some(record) = read.get(Table::Rev, &keys::rev(revision))? else {
            if revision.main < bounds.compacted {
                return Ok(Version::Absent);
            }
            return Err(Fatal::Damaged { table: "rev", message: format!("{revision:?} is pointed at and missing") });
        };
        let (header, _) = Header::decode(&record)?;
        if revision.main <= at {
            return Ok(if header.tombstone { Version::Absent } else { Version::Older(record) });
        }
        revision = header.previous;
    }
    Ok(Version::Absent)
}

/// The oldest marked record of `key` above revision `at`.
fn nearest_mark<R: Read>(read: &R, key: &[u8], at: i64) -> Result<Option<Revision>, Fatal> {
    let (first, end) = keys::old_above(key, at);
    let mut found = Ok(None);
    let range = (Bound::Included(first.as_ref()), Bound::Excluded(end.as_ref()));
    read.scan(Table::Old, range, Direction::Backward, &mut |key, value| {
        found = keys::decode_old(key, value).map(Some);
        ControlFlow::Break(())
    })?;
    found
}

/// Whether the key existed at `at`, given its newest record; mostly without a read.
fn exists_at<R: Read>(read: &R, bounds: Bounds, at: i64, record: &[u8]) -> Result<bool, Fatal> {
    let (header, kv) = Header::decode(record)?;
    let kv = Kv::decode(kv)?;
    if kv.mod_revision <= at {
        return Ok(!header.tombstone);
    }
    if !header.tombstone && kv.create_revision <= at {
        return Ok(true); // one generation reaches from its creation to now
    }
    Ok(!matches!(version_at(read, bounds, at, record)?, Version::Absent))
}

/// Shows every key of `span` that existed at `at`, in key order. `visit` gets the `KeyValue` bytes, or nothing if it
/// wanted to know only that there is a key, and says what it wants of the next.
pub(crate) fn each<R: Read>(
    read: &R,
    bounds: Bounds,
    at: i64,
    span: Span<'_>,
    mut want: Want,
    visit: &mut dyn FnMut(&[u8]) -> Want,
) -> Result<(), Fatal> {
    let mut failed = None;
    read.scan(Table::Key, span.bounds(), Direction::Forward, &mut |_, record| {
        want = show(read, bounds, at, want, record, visit).unwrap_or_else(|error| {
            failed = Some(error);
            Want::Nothing
        });
        if want == Want::Nothing { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    failed.map_or(Ok(()), Err)
}

/// Shows one key, given its newest record, if it existed at `at`.
fn show<R: Read>(
    read: &R,
    bounds: Bounds,
    at: i64,
    want: Want,
    record: &[u8],
    visit: &mut dyn FnMut(&[u8]) -> Want,
) -> Result<Want, Fatal> {
    if at >= bounds.revision {
        let (tombstone, kv) = record::newest(record)?;
        return Ok(if tombstone { want } else { visit(kv) });
    }
    if want == Want::Existence {
        return Ok(if exists_at(read, bounds, at, record)? { visit(&[]) } else { want });
    }
    match version_at(read, bounds, at, record)? {
        Version::Shown => Ok(visit(record::newest(record)?.1)),
        Version::Older(found) => Ok(visit(record::newest(&found)?.1)),
        Version::Absent => Ok(want),
    }
}
