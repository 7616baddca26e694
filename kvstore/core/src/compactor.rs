//! Automatic compaction: which revision to compact to, and when, as etcd schedules it (contract 2.6.7).
//!
//! ```text
//! by time:      note the revision every tenth of min(period, 1 h) ──▶ after a period, and then every min(period, 1 h):
//!               compact to what was noted a period ago; if that failed, again after a tenth
//! by revisions: every 5 minutes, compact to the newest less what is to be kept
//! ```
//!
//! Every member runs one; only the leader's asks for anything, and the others note revisions all the same, so that a new
//! leader goes on where the old one was.
//!
//! What this module does not do: propose, or know whether anybody else compacts: a compaction to what is compacted already
//! counts as done.

use std::collections::VecDeque;

use crate::types::Timestamp;

const HOUR_MS: u64 = 3_600_000;
/// Looks at the clock in each compaction interval.
const LOOKS: u64 = 10;
const REVISION_INTERVAL_MS: u64 = 300_000;

/// What is to be kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Retention {
    Time { ms: u64 },
    Revisions { count: i64 },
}

/// See the module.
#[derive(Debug)]
pub struct Compactor {
    retention: Retention,
    /// When to look next.
    next: Timestamp,
    /// By time: the revisions noted, the oldest a period ago once there are enough of them.
    noted: VecDeque<i64>,
    /// By time: the last success, or the start, and how long to wait after it.
    since: Timestamp,
    wait_ms: u64,
    /// Compacted to by us.
    last: i64,
}

impl Compactor {
    /// `revision`: the newest at this moment.
    pub fn new(retention: Retention, now: Timestamp, revision: i64) -> Compactor {
        let mut compactor = Compactor {
            retention,
            next: now,
            noted: VecDeque::new(),
            since: now,
            wait_ms: match retention {
                Retention::Time { ms } => ms,
                Retention::Revisions { .. } => 0,
            },
            last: 0,
        };
        compactor.look_later(now, revision);
        compactor
    }

    /// When [`look`](Compactor::look) has to be called.
    pub fn next(&self) -> Timestamp {
        self.next
    }

    /// It is time: the revision to compact to, if any. Whoever gets one reports to [`done`](Compactor::done).
    pub fn look(&mut self, now: Timestamp, revision: i64, leads: bool) -> Option<i64> {
        let target = if leads { self.target(now, revision) } else { None };
        if target.is_none() {
            self.look_later(now, revision);
        }
        target
    }

    /// What became of a compaction: `compacted` if the store is compacted to `target`, by us or by somebody else.
    pub fn done(&mut self, now: Timestamp, revision: i64, target: i64, compacted: bool) {
        if compacted {
            (self.last, self.since) = (target, now);
        }
        self.look_later(now, revision);
    }

    /// Between two looks, which is also how soon a compaction that failed is tried again.
    pub fn interval_ms(&self) -> u64 {
        match self.retention {
            Retention::Time { ms } => (ms.min(HOUR_MS) / LOOKS).max(1),
            Retention::Revisions { .. } => REVISION_INTERVAL_MS,
        }
    }

    fn target(&mut self, now: Timestamp, revision: i64) -> Option<i64> {
        match self.retention {
            Retention::Time { ms } => {
                let target = *self.noted.front()?;
                if now.since_ms(self.since) < self.wait_ms || target == self.last {
                    return None;
                }
                // The first takes a whole period, however long; the others an hour at most.
                self.wait_ms = ms.min(HOUR_MS);
                Some(target)
            }
            Retention::Revisions { count } => {
                let target = revision.saturating_sub(count);
                (target > 0 && target != self.last).then_some(target)
            }
        }
    }

    fn look_later(&mut self, now: Timestamp, revision: i64) {
        let interval_ms = self.interval_ms();
        if let Retention::Time { ms } = self.retention {
            self.noted.push_back(revision);
            if self.noted.len() as u64 > ms / interval_ms + 1 {
                self.noted.pop_front();
            }
        }
        self.next = now.after_ms(interval_ms);
    }
}
