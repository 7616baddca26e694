//! One bounded slice of history for some unsynced watchers: made under the hub's lock, read outside it, finished under it.
//!
//! The slice never reaches beyond the revision the hub had when it was made, however far ahead the view is (trap 5): what
//! comes later reaches the watcher from the hub. Many watchers share one read.
//!
//! What this module does not do: it moves no cursor; [`WatchHub::finish`](super::WatchHub::finish) does, where it can see what
//! has happened to the watcher meanwhile.

use std::cell::RefCell;
use std::sync::Arc;

use bytes::Bytes;

use super::encode::{Encoded, EncodedEvent};
use super::ranges::{Ranges, Span, WatcherKey};
use crate::Fatal;
use crate::backend::Read;
use crate::mvcc::{Bounds, EventKind, RevisionEvents, history};

/// Rows of history read at a time.
const ROWS: usize = 32;

/// What one watcher wants to see.
#[derive(Clone, Debug)]
pub(super) struct Interest {
    pub(super) span: Span,
    pub(super) no_put: bool,
    pub(super) no_delete: bool,
    pub(super) prev_kv: bool,
}

impl Interest {
    /// The bytes for this watcher of an event of `revision`, unless it filters the event away. The key is known to match. What
    /// was before is left out if and only if its revision is compacted, even where it is still at hand (trap 5).
    pub(super) fn pick<'a>(&self, revision: i64, event: &'a EncodedEvent, compacted: i64) -> Option<&'a Bytes> {
        let filtered = match event.kind() {
            EventKind::Put => self.no_put,
            EventKind::Delete => self.no_delete,
        };
        (!filtered).then(|| event.bytes(self.prev_kv && revision > compacted))
    }
}

/// See the module.
#[derive(Debug)]
pub struct CatchUp {
    pub(super) from: i64,
    pub(super) to: i64,
    pub(super) max_rows: usize,
    pub(super) max_bytes: usize,
    pub(super) source: Source,
    pub(super) wants: Vec<Want>,
    /// Everything below this revision has been looked at for everyone who wanted it.
    pub(super) next: i64,
    /// What the view that was read had compacted: cursors below it are lost.
    pub(super) compacted: i64,
}

#[derive(Debug)]
pub(super) enum Source {
    /// The hub still remembered the revisions.
    Recent(Vec<Arc<Encoded>>),
    History,
}

#[derive(Debug)]
pub(super) struct Want {
    pub(super) watcher: WatcherKey,
    pub(super) cursor: i64,
    pub(super) interest: Interest,
    /// Revisions with what this watcher gets of them, in order.
    pub(super) found: Vec<(i64, Vec<Bytes>)>,
}

impl CatchUp {
    /// The revisions that the slice is about: from the first, up to the hub's at the time.
    pub fn revisions(&self) -> std::ops::RangeInclusive<i64> {
        self.from..=self.to
    }

    /// How many watchers share it.
    pub fn watchers(&self) -> usize {
        self.wants.len()
    }

    /// Reads the slice. `read` and `bounds` are of one moment, published no earlier than the hub's revision.
    pub fn read<R: Read>(&mut self, read: &R, bounds: Bounds) -> Result<(), Fatal> {
        self.read_with(bounds, |from, to, max_rows, wanted, want_prev| {
            history::events(read, bounds, from, to, max_rows, wanted, want_prev)
        })
    }

    /// The same, with another source of history: like [`history::events`], it is given the first and last revision, the
    /// bound in rows, who wants a key and whether previous values matter, and says from where to go on. It is asked for a
    /// few rows at a time, because a row may be large and only rows can be bounded there.
    pub fn read_with<H>(&mut self, bounds: Bounds, mut history: H) -> Result<(), Fatal>
    where
        H: FnMut(i64, i64, usize, &dyn Fn(&[u8]) -> bool, bool) -> Result<(Vec<RevisionEvents>, i64), Fatal>,
    {
        let mut index = Ranges::default();
        for (at, want) in self.wants.iter().enumerate() {
            index.insert(&want.interest.span, at as WatcherKey);
        }
        if let Source::Recent(revisions) = &self.source {
            let revisions = revisions.clone();
            revisions.iter().for_each(|revision| self.sort_out(&index, revision));
            return Ok(());
        }
        self.compacted = bounds.compacted;
        self.next = self.from.max(bounds.compacted);
        let to = self.to.min(bounds.revision);
        let found = RefCell::new(Vec::new());
        let wanted = |key: &[u8]| {
            let mut found = found.borrow_mut();
            found.clear();
            index.find(key, &mut found);
            !found.is_empty()
        };
        let want_prev = self.wants.iter().any(|want| want.interest.prev_kv);
        let (mut rows, mut bytes) = (0, 0);
        while self.next <= to && rows < self.max_rows && bytes < self.max_bytes {
            let step = ROWS.min(self.max_rows - rows);
            let (revisions, next) = history(self.next, to, step, &wanted, want_prev)?;
            debug_assert!(next > self.next, "history goes on");
            self.next = next;
            rows += step;
            for revision in revisions {
                let revision = Encoded::new(revision);
                bytes += revision.bytes;
                self.sort_out(&index, &revision);
            }
        }
        Ok(())
    }

    fn sort_out(&mut self, index: &Ranges, revision: &Encoded) {
        let mut found = Vec::new();
        for event in &revision.events {
            found.clear();
            index.find(event.key(), &mut found);
            for at in &found {
                let want = &mut self.wants[*at as usize];
                if revision.revision < want.cursor {
                    continue;
                }
                let Some(bytes) = want.interest.pick(revision.revision, event, self.compacted) else { continue };
                match want.found.last_mut() {
                    Some((last, events)) if *last == revision.revision => events.push(bytes.clone()),
                    _ => want.found.push((revision.revision, vec![bytes.clone()])),
                }
            }
        }
    }
}
