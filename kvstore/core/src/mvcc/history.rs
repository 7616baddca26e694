//! Events of past revisions, read from `rev` in order, for watchers that catch up.
//!
//! What it does not do: it knows no watcher; it is told which keys are wanted and how many rows it may look at.

use std::ops::{Bound, ControlFlow};

use bytes::Bytes;

use super::record::{self, Header, Kv};
use super::{Bounds, Event, EventKind, RevisionEvents};
use crate::backend::{Direction, Read, Table};
use crate::types::Revision;
use crate::{Fatal, keys};

/// The events of revisions `from..=to` on keys that `filter` wants, and the revision to go on from. Reads at most
/// `max_rows` rows, but always whole revisions and at least one. `from` must not be below `bounds.compacted`; `to` is cut
/// to `bounds.revision`. A revision without a wanted event is left out. The previous value is read only if `want_prev`.
pub fn events<R: Read>(
    read: &R,
    bounds: Bounds,
    from: i64,
    to: i64,
    max_rows: usize,
    filter: &dyn Fn(&[u8]) -> bool,
    want_prev: bool,
) -> Result<(Vec<RevisionEvents>, i64), Fatal> {
    let to = to.min(bounds.revision);
    let mut found: Vec<RevisionEvents> = Vec::new();
    let mut rows = 0;
    let mut at = from;
    let mut next = to + 1;
    let mut step = |key: &[u8], row: &[u8]| -> Result<ControlFlow<()>, Fatal> {
        let revision = keys::decode_rev(key)?;
        if revision.main != at && rows >= max_rows {
            next = revision.main;
            return Ok(ControlFlow::Break(()));
        }
        at = revision.main;
        rows += 1;
        let (header, kv) = Header::decode(row)?;
        let fields = Kv::decode(kv)?;
        if !filter(fields.key) {
            return Ok(ControlFlow::Continue(()));
        }
        let event = event(read, bounds, at, &header, kv, want_prev)?;
        match found.last_mut() {
            Some(last) if last.revision == at => last.events.push(event),
            _ => found.push(RevisionEvents { revision: at, events: vec![event] }),
        }
        Ok(ControlFlow::Continue(()))
    };
    let mut failed = None;
    let first = keys::rev(Revision::new(from.max(0), 0));
    let last = keys::rev(Revision::new(to.max(0), i64::from(u32::MAX)));
    let range = (Bound::Included(first.as_ref()), Bound::Included(last.as_ref()));
    read.scan(Table::Rev, range, Direction::Forward, &mut |key, row| {
        step(key, row).unwrap_or_else(|error| {
            failed = Some(error);
            ControlFlow::Break(())
        })
    })?;
    match failed {
        Some(error) => Err(error),
        None => Ok((found, next.max(from))),
    }
}

/// One row of `rev` as an event.
fn event<R: Read>(
    read: &R,
    bounds: Bounds,
    revision: i64,
    header: &Header,
    kv: &[u8],
    want_prev: bool,
) -> Result<Event, Fatal> {
    let kv = Bytes::copy_from_slice(kv);
    let fields = Kv::decode(&kv)?;
    let create = !header.tombstone && fields.create_revision == fields.mod_revision;
    // Not by whether the row happens to be there still: members and moments would differ (trap 5).
    let readable = revision > bounds.compacted;
    let prev = if want_prev && readable && !create { before(read, revision, header.previous)? } else { None };
    Ok(Event {
        key: kv.slice_ref(fields.key),
        kind: if header.tombstone { EventKind::Delete } else { EventKind::Put },
        create,
        prev,
        kv,
    })
}

/// The `KeyValue` of a key before `revision`, given what its record there superseded. One revision may change a key twice
/// (`check.rs`), so that may be a record of the same revision: what watchers are shown is older.
fn before<R: Read>(read: &R, revision: i64, mut previous: Revision) -> Result<Option<Bytes>, Fatal> {
    while previous.main != 0 {
        let Some(row) = read.get(Table::Rev, &keys::rev(previous))? else {
            return Ok(None);
        };
        let (header, _) = Header::decode(&row)?;
        if previous.main < revision {
            return if header.tombstone { Ok(None) } else { Ok(Some(record::kv_of(&row)?)) };
        }
        previous = header.previous;
    }
    Ok(None)
}
