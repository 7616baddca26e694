//! The newest revisions, so that who lags a little need not read history.
//!
//! What it does not do: it knows no watcher but the one it is asked about, and delivers nothing.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;

use super::WatchLimits;
use super::catch_up::Interest;
use super::encode::Encoded;

#[derive(Default, Debug)]
pub(super) struct Recent {
    revisions: VecDeque<Arc<Encoded>>,
    bytes: usize,
    /// Everything above this revision, up to the hub's, is here.
    after: i64,
}

impl Recent {
    pub(super) fn new(after: i64) -> Recent {
        Recent { after, ..Recent::default() }
    }

    pub(super) fn push(&mut self, revision: Arc<Encoded>, limits: &WatchLimits) {
        self.bytes += revision.bytes;
        self.revisions.push_back(revision);
        while self.revisions.len() > limits.recent_revisions || self.bytes > limits.recent_bytes {
            let Some(oldest) = self.revisions.pop_front() else { break };
            self.bytes -= oldest.bytes;
            self.after = oldest.revision;
        }
    }

    pub(super) fn covers(&self, cursor: i64) -> bool {
        cursor > self.after
    }

    pub(super) fn from(&self, cursor: i64) -> impl Iterator<Item = &Arc<Encoded>> {
        let at = self.revisions.partition_point(|revision| revision.revision < cursor);
        self.revisions.range(at..)
    }

    /// What a watcher gets of what is here, from `cursor` on: revisions with their events, in order.
    pub(super) fn pick(&self, cursor: i64, interest: &Interest, compacted: i64) -> Vec<(i64, Vec<Bytes>)> {
        let mut found = Vec::new();
        for revision in self.from(cursor) {
            let wanted = revision.events.iter().filter(|event| interest.span.contains(event.key()));
            let picked = wanted.filter_map(|event| interest.pick(revision.revision, event, compacted));
            let events: Vec<Bytes> = picked.cloned().collect();
            if !events.is_empty() {
                found.push((revision.revision, events));
            }
        }
        found
    }
}
