//! Compact, and its deletion in slices.
//!
//! A compaction takes effect at once: the compacted revision rises, and the quota gets back what the running sums of two
//! records say. The rows go later, a bounded slice at a time between applies: `rev` is read forward, and each record up
//! to the compacted revision R names what it superseded. That goes, with its mark in `old`; a tombstone below R goes
//! itself. A tombstone exactly *at* R stays (a hash and a watcher at R need it), so the next run begins at R, inclusive
//! (trap 9). Where a run stands is written with each slice: a restart goes on there, and a row deleted twice does no harm.
//!
//! What it does not do: it decides no pace. How many rows a slice may look at, and when, is the caller's.

use std::ops::{Bound, ControlFlow};

use bytes::Bytes;

use super::count::index::Tally;
use super::recent::Recent;
use super::record::{Header, Kv, MARK_EVERY};
use super::write::Numbers;
use crate::backend::{Direction, Read, ReadView, Table, WriteBatch};
use crate::types::Revision;
use crate::{Error, Fatal, keys};

const LAST_SUB: i64 = u32::MAX as i64;

/// Whether a compaction to `revision` is possible.
pub(crate) fn check(numbers: &Numbers, revision: i64) -> Result<(), Error> {
    if revision <= numbers.compacted {
        return Err(Error::Compacted);
    }
    if revision > numbers.revision {
        return Err(Error::FutureRevision);
    }
    Ok(())
}

/// Raises the compacted revision and says where the deletion begins.
pub(crate) fn schedule<R: Read>(read: &R, numbers: &mut Numbers, revision: i64) -> Result<(), Fatal> {
    let restart = Revision::new(numbers.compacted.max(0), 0);
    numbers.freed = superseded_at(read, revision)?.max(numbers.freed);
    numbers.cursor = Some(numbers.cursor.map_or(restart, |cursor| cursor.min(restart)));
    numbers.compacted = revision;
    Ok(())
}

/// The running sum of the last record up to a revision.
fn superseded_at<R: Read>(read: &R, revision: i64) -> Result<u64, Fatal> {
    let last = keys::rev(Revision::new(revision, LAST_SUB));
    let mut found = Ok(0);
    let range = (Bound::Unbounded, Bound::Included(last.as_ref()));
    read.scan(Table::Rev, range, Direction::Backward, &mut |_, record| {
        found = Header::decode(record).map(|(header, _)| header.superseded);
        ControlFlow::Break(())
    })?;
    found
}

/// What a slice came to.
pub(crate) struct Slice {
    /// Rows of history that were looked at.
    pub(crate) rows: usize,
    /// Where the next slice begins; `None`: there is none.
    pub(crate) cursor: Option<Revision>,
}

/// Deletes what the records from `cursor` on say, looking at no more than `max_rows` of them.
pub(crate) fn slice<V: ReadView>(
    view: &V,
    compacted: i64,
    cursor: Revision,
    max_rows: usize,
    batch: &mut WriteBatch,
    recent: &mut Recent,
    tally: &mut Tally,
) -> Result<Slice, Fatal> {
    let mut slice = Slice { rows: 0, cursor: None };
    let mut failed = None;
    let first = keys::rev(cursor);
    let last = keys::rev(Revision::new(compacted.max(0), LAST_SUB));
    let range = (Bound::Included(first.as_ref()), Bound::Included(last.as_ref()));
    ReadView::scan(view, Table::Rev, range, Direction::Forward, &mut |key, record| {
        let mut step = || -> Result<ControlFlow<()>, Fatal> {
            let revision = keys::decode_rev(key)?;
            if slice.rows >= max_rows.max(1) {
                slice.cursor = Some(revision);
                return Ok(ControlFlow::Break(()));
            }
            slice.rows += 1;
            delete_dead(view, compacted, revision, record, batch, recent, tally)?;
            Ok(ControlFlow::Continue(()))
        };
        step().unwrap_or_else(|error| {
            failed = Some(error);
            ControlFlow::Break(())
        })
    })?;
    failed.map_or(Ok(slice), Err)
}

/// Deletes what one record of history makes superfluous.
fn delete_dead<V: ReadView>(
    view: &V,
    compacted: i64,
    revision: Revision,
    record: &[u8],
    batch: &mut WriteBatch,
    recent: &mut Recent,
    tally: &mut Tally,
) -> Result<(), Fatal> {
    let (header, kv) = Header::decode(record)?;
    let Kv { key, create_revision, .. } = Kv::decode(kv)?;
    // A key that returned in the revision that deleted it: the record before is a tombstone, and at R it stays.
    let over_last_tombstone = header.previous.main >= compacted && create_revision == revision.main;
    if header.previous.main != 0 && !over_last_tombstone {
        delete_record(key, header.previous, header.depth - 1, batch);
    }
    if !header.tombstone || revision.main >= compacted {
        return Ok(());
    }
    delete_record(key, revision, header.depth, batch);
    if let Some(newest) = view.get(Table::Key, key)? {
        let (header, kv) = Header::decode(&newest)?;
        if Revision::new(Kv::decode(kv)?.mod_revision, header.sub) == revision {
            batch.delete(Table::Key, Bytes::copy_from_slice(key));
            recent.remove(key);
            tally.forgotten(key)?;
        }
    }
    Ok(())
}

fn delete_record(key: &[u8], revision: Revision, depth: u64, batch: &mut WriteBatch) {
    batch.delete(Table::Rev, Bytes::copy_from_slice(&keys::rev(revision)));
    if depth.is_multiple_of(MARK_EVERY) {
        batch.delete(Table::Old, keys::old(key, revision.main));
    }
}
