//! How many keys a range has, without their bytes: exact, and nearly free.
//!
//! *Now*: whole blocks of the counted index ([`index`]) are summed, and the two blocks at the ends are scanned through
//! the view of the same moment. *At an older revision* R: the count of now, less the keys that were created since, plus
//! those that were deleted. They are remembered for a while ([`gains`]); before that, `rev` has a row for each, and none
//! of them can have been compacted. If more happened since than the range has keys, its keys are looked at instead.
//!
//! What it does not do: it refuses no revision and it changes nothing.

mod gains;
pub(crate) mod index;

use std::ops::{Bound, ControlFlow};

use super::Moment;
use super::record::{Header, Kv};
use super::span::Span;
use super::versions::{self, Want};
use crate::backend::{Direction, Read, Table, is_empty_range};
use crate::types::Revision;
use crate::{Fatal, keys};

/// Rows of history that are read for a count in the past however few keys the range has: about 0.3 ms. In this crate's
/// tests both ways are taken.
const LEAST_ROWS: u64 = if cfg!(test) { 20 } else { 1_000 };

/// Remembered creates and deletes that cost as much as one row.
const GAINS_A_ROW: u64 = 16;

/// The keys of `span` that existed at `at`.
pub(crate) fn count<R: Read>(moment: Moment<'_, R>, at: i64, span: Span<'_>) -> Result<i64, Fatal> {
    let now = now(moment, span)?;
    let bounds = moment.bounds;
    if at >= bounds.revision {
        return Ok(now as i64);
    }
    let max_rows = now.max(LEAST_ROWS);
    if let Some(gains) = moment.keys.gains.since(at)
        && gains.len() as u64 / GAINS_A_ROW <= max_rows
    {
        let gained: i64 = gains.filter(|gain| span.contains(&gain.key)).map(|gain| gain.gain).sum();
        return Ok(now as i64 - gained);
    }
    // Every revision has a row at least.
    if bounds.revision.abs_diff(at) <= max_rows
        && let Some(gained) = gained_since(moment, at, span, max_rows)?
    {
        return Ok(now as i64 - gained);
    }
    Ok(scan(moment, at, span)? as i64)
}

/// The keys of `span` that exist at the moment.
fn now<R: Read>(moment: Moment<'_, R>, span: Span<'_>) -> Result<u64, Fatal> {
    let (start, end) = match span {
        Span::Point(_) => return scan(moment, moment.bounds.revision, span),
        Span::Keys(start, end) => (start, Some(end)),
        Span::From(start) => (start, None),
    };
    if is_empty_range(&span.bounds()) {
        return Ok(0);
    }
    let index = moment.keys;
    let first = index.place(start);
    let last = end.map(|end| index.place(end));
    if last == Some(first) {
        return if index.live(first) == 0 { Ok(0) } else { scan(moment, moment.bounds.revision, span) };
    }
    let edge = |place, start, end| {
        if index.live(place) == 0 {
            return Ok(0);
        }
        let span = match end {
            Some(end) => Span::Keys(start, end),
            None => Span::From(start),
        };
        scan(moment, moment.bounds.revision, span)
    };
    let next = index.next(first);
    let mut count = if index.start(first) >= start {
        index.live(first)
    } else {
        edge(first, start, next.map(|next| index.start(next)))?
    };
    if let Some(next) = next {
        count += index.sum(next, last);
    }
    if let Some(last) = last {
        count += edge(last, index.start(last), end)?;
    }
    Ok(count)
}

/// Rows that reading `shown` keys of `span` and counting the rest may look at, about; reads none.
pub(crate) fn rows<R>(moment: Moment<'_, R>, at: i64, span: Span<'_>, shown: u64) -> u64 {
    let around = match span {
        Span::Point(_) => return 1,
        Span::Keys(start, end) if start < end => moment.keys.rows_around(start, Some(end)),
        Span::Keys(..) => return 0,
        Span::From(start) => moment.keys.rows_around(start, None),
    };
    // Only the blocks at the ends are scanned to count.
    let present = around.min(shown.saturating_add(u64::from(index::MAX_ROWS)));
    if at >= moment.bounds.revision {
        return present;
    }
    // A key that has changed since costs a read of its own, and what came and went corrects the count.
    let since = moment.bounds.revision.abs_diff(at);
    let corrected = match moment.keys.gains.since(at) {
        Some(gains) => gains.len() as u64 / GAINS_A_ROW,
        None => since.min(around.max(LEAST_ROWS)),
    };
    present.saturating_add(since.min(present)).saturating_add(corrected)
}

/// How many more keys `span` has now than it had at `at`, or `None` if more than `max_rows` changes tell.
fn gained_since<R: Read>(moment: Moment<'_, R>, at: i64, span: Span<'_>, max_rows: u64) -> Result<Option<i64>, Fatal> {
    let mut gained = 0;
    let mut rows = 0;
    let mut failed = None;
    let first = keys::rev(Revision::new(at + 1, 0));
    let last = keys::rev(Revision::new(moment.bounds.revision, i64::from(u32::MAX)));
    let range = (Bound::Included(first.as_ref()), Bound::Included(last.as_ref()));
    moment.read.scan(Table::Rev, range, Direction::Forward, &mut |_, row| {
        rows += 1;
        match gain(row, span) {
            Ok(gain) => gained += gain,
            Err(error) => failed = Some(error),
        }
        if failed.is_some() || rows > max_rows { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    match failed {
        Some(error) => Err(error),
        None => Ok((rows <= max_rows).then_some(gained)),
    }
}

/// What one change did to the number of keys in `span`.
fn gain(row: &[u8], span: Span<'_>) -> Result<i64, Fatal> {
    let (header, kv) = Header::decode(row)?;
    let kv = Kv::decode(kv)?;
    Ok(match (span.contains(kv.key), header.tombstone) {
        (false, _) => 0,
        (true, true) => -1,
        (true, false) => i64::from(kv.version == 1),
    })
}

/// The keys of `span` that existed at `at`, one by one.
fn scan<R: Read>(moment: Moment<'_, R>, at: i64, span: Span<'_>) -> Result<u64, Fatal> {
    let mut count = 0;
    versions::each(moment.read, moment.bounds, at, span, Want::Existence, &mut |_| {
        count += 1;
        Want::Existence
    })?;
    Ok(count)
}
