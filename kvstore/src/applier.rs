//! The apply thread: the one writer of the state.
//!
//! ```text
//! committed entries (everything that waits) ─▶ Store::apply ─▶ one batch, written
//!     ─▶ publish view and facts ─▶ hub ─▶ outcomes to the raft thread
//! ```
//!
//! The order is a promise: who got an answer can read what it wrote, and a watcher is told of nothing that can't be read.
//! Between applies it deletes what compactions left, a slice at a time, and starts flushes; it never waits for one. How
//! far the disk has come is asked, and told to the raft thread, which may cut the log up to there and no further.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use kvstore_core::backend::{Backend, WriteBatch};
use kvstore_core::lease::LeaseChange;
use kvstore_core::mvcc::{EventKind, RevisionEvents};
use kvstore_core::replica::SnapshotTicket;
use kvstore_core::store::{Outcome, Store, StoreConfig};
use kvstore_core::types::{Entry, Index, RequestId, Term};
use kvstore_core::{Error, Fatal};

use crate::clock;
use crate::counts::Counts;
use crate::disk::{NewState, Rocks, View, dir_size};
use crate::driver::Input;
use crate::inbox::Shared;
use crate::mailbox::Receiver;

/// What the apply thread is asked.
pub(crate) enum Job {
    Committed(Vec<Entry>),
    /// Make this state the only one; what was handed out to be applied before has been.
    Install {
        ticket: SnapshotTicket,
        new: NewState,
    },
    /// Tell the raft thread all leases once something of `term`, which it leads, is applied: everything that was committed
    /// before it began is then in the table. Until then a lease that is not there may be in the log all the same.
    ReadLeases {
        term: Term,
    },
    /// Make everything durable; the thread ends.
    Stop,
}

/// What was applied, for the raft thread.
pub(crate) struct Done {
    pub(crate) index: Index,
    pub(crate) durable: Index,
    pub(crate) outcomes: Vec<(RequestId, Result<Outcome, Error>)>,
    pub(crate) leases: Vec<LeaseChange>,
    pub(crate) over_quota: bool,
}

/// Bounds of the apply thread.
#[derive(Clone, Debug)]
pub(crate) struct ApplierConfig {
    pub(crate) store: StoreConfig,
    /// Applied entries between two flushes (`--snapshot-count`).
    pub(crate) flush_entries: u64,
    /// No sooner than this after the previous flush was started: small files cost compactions.
    pub(crate) flush_interval: Duration,
    /// How often the disk is asked how far it is, while it is behind.
    pub(crate) poll_interval: Duration,
    /// Rows of history in one slice of a compaction.
    pub(crate) slice_rows: usize,
    /// Entries in one batch.
    pub(crate) batch_entries: usize,
    /// The same, in bytes of their data.
    pub(crate) batch_bytes: usize,
}

pub(crate) struct Applier {
    config: ApplierConfig,
    backend: Rocks,
    store: Store,
    view: View,
    shared: Arc<Shared>,
    applied: Index,
    durable: Index,
    flush: Flush,
    /// The term for whose leader the leases are to be read.
    lease_reader: Option<Term>,
}

struct Flush {
    /// Applied when the last one was started.
    at: Index,
    started: Instant,
    /// When the disk was last asked how far it is, and what was applied then.
    polled: Instant,
    polled_at: Index,
}

impl Flush {
    fn new(applied: Index) -> Flush {
        let now = clock::now();
        Flush { at: applied, started: now, polled: now, polled_at: applied }
    }
}

impl Applier {
    /// `store` was opened on `view`, which is the backend's newest.
    pub(crate) fn new(config: ApplierConfig, backend: Rocks, store: Store, view: View, shared: Arc<Shared>) -> Applier {
        let applied = store.facts().applied_index;
        let flush = Flush::new(applied);
        Applier { config, backend, store, view, shared, applied, durable: applied, flush, lease_reader: None }
    }

    pub(crate) fn run(mut self, jobs: &Receiver<Job>) -> Result<(), Fatal> {
        let mut batch = Vec::new();
        self.measure_disk();
        loop {
            jobs.take(&mut batch, self.next_deadline());
            let mut entries = Vec::new();
            for job in batch.drain(..) {
                match job {
                    Job::Committed(more) if entries.is_empty() => entries = more,
                    Job::Committed(more) => entries.extend(more),
                    Job::Install { ticket, new } => {
                        self.apply_all(&mut entries)?;
                        self.install(ticket, new)?;
                    }
                    Job::ReadLeases { term } => {
                        self.apply_all(&mut entries)?;
                        self.lease_reader = Some(term);
                        self.tell_leases();
                    }
                    Job::Stop => {
                        self.apply_all(&mut entries)?;
                        return self.backend.flush_and_wait();
                    }
                }
            }
            self.apply_all(&mut entries)?;
            self.compact()?;
            self.look_after_disk()?;
        }
    }

    /// When there is something to do though no job came.
    fn next_deadline(&self) -> Option<Instant> {
        if self.store.facts().compacting {
            return Some(clock::now());
        }
        self.wants_poll().then(|| self.flush.polled + self.config.poll_interval)
    }

    /// Whether the disk may have come further: our flush is under way, or RocksDB has had writes to flush by itself. An
    /// idle member asks nothing.
    fn wants_poll(&self) -> bool {
        self.durable < self.flush.at || (self.durable < self.applied && self.flush.polled_at < self.applied)
    }

    fn apply_all(&mut self, entries: &mut Vec<Entry>) -> Result<(), Fatal> {
        let mut rest = entries.as_slice();
        while !rest.is_empty() {
            let (batch, later) = rest.split_at(self.batch_len(rest));
            self.apply(batch)?;
            rest = later;
        }
        entries.clear();
        Ok(())
    }

    /// How many of the waiting entries go into one batch: bounded in number and in bytes, but always one.
    fn batch_len(&self, entries: &[Entry]) -> usize {
        let mut bytes = 0;
        let fits = |entry: &&Entry| {
            bytes += entry.data.len();
            bytes <= self.config.batch_bytes
        };
        entries.iter().take(self.config.batch_entries).take_while(fits).count().max(1)
    }

    fn apply(&mut self, entries: &[Entry]) -> Result<(), Fatal> {
        let mut batch = WriteBatch::new();
        let applied = self.store.apply(&self.view, entries, &mut batch)?;
        self.write(batch)?;
        self.applied = applied.index;
        let revision = self.store.facts().revision;
        let shared = &self.shared;
        count(&shared.counts, &applied.events);
        let (wakes, behind) = shared.hub.with(|hub| {
            let mut wakes = hub.publish(revision, applied.events);
            if let Some(compacted) = applied.compacted {
                wakes.extend(hub.compacted(compacted));
            }
            (wakes, hub.has_catch_up())
        });
        shared.raft.set_applied(applied.index);
        self.tell(Done {
            index: applied.index,
            durable: self.durable,
            outcomes: applied.outcomes,
            leases: applied.leases,
            over_quota: applied.over_quota,
        });
        self.tell_leases();
        self.shared.hub.wake(&wakes);
        if behind {
            self.shared.hub.nudge();
        }
        Ok(())
    }

    /// Writes, and publishes the view, the facts and the counts of after.
    fn write(&mut self, batch: WriteBatch) -> Result<(), Fatal> {
        self.backend.write(batch)?;
        self.view = self.backend.view();
        self.shared.published.set(self.store.publish(self.view.clone()));
        Ok(())
    }

    fn tell(&self, done: Done) {
        // A raft thread that has gone has drained its waiters: the member is stopping.
        let _ = self.shared.driver.push(Input::Applied(done));
    }

    fn tell_leases(&mut self) {
        let applied_term = self.store.facts().applied_term;
        if let Some(term) = self.lease_reader.take_if(|term| *term <= applied_term) {
            let _ = self.shared.driver.push(Input::LeaseTable { term, leases: self.store.leases() });
        }
    }

    fn compact(&mut self) -> Result<(), Fatal> {
        let mut batch = WriteBatch::new();
        if let Some(slice) = self.store.compact_slice(&self.view, self.config.slice_rows, &mut batch)? {
            self.write(batch)?;
            if slice.finished {
                tracing::info!(revision = slice.compacted, "finished scheduled compaction");
            }
        }
        Ok(())
    }

    fn look_after_disk(&mut self) -> Result<(), Fatal> {
        let now = clock::now();
        if self.applied.saturating_sub(self.flush.at) >= self.config.flush_entries
            && now.duration_since(self.flush.started) >= self.config.flush_interval
        {
            (self.flush.at, self.flush.started) = (self.applied, now);
            self.backend.start_flush()?;
        }
        if self.wants_poll() && now.duration_since(self.flush.polled) >= self.config.poll_interval {
            (self.flush.polled, self.flush.polled_at) = (now, self.applied);
            let durable = self.backend.durable_applied()?;
            if durable > self.durable {
                self.durable = durable;
                self.measure_disk();
                let (outcomes, leases) = (Vec::new(), Vec::new());
                self.tell(Done { index: self.applied, durable, outcomes, leases, over_quota: false });
            }
        }
        Ok(())
    }

    /// What the files take, for whoever asks. It changes with flushes and compactions only, so it is looked at then.
    fn measure_disk(&self) {
        match dir_size(self.backend.path()) {
            Ok(bytes) => self.shared.disk_size.store(bytes as i64, Ordering::Relaxed),
            Err(error) => tracing::warn!("the state's size can't be read: {error}"),
        }
    }

    /// The rename of the pointer, then everything that was derived from the old state anew, then the new view, then the
    /// watchers, who keep their cursors (trap 4).
    fn install(&mut self, ticket: SnapshotTicket, new: NewState) -> Result<(), Fatal> {
        self.backend.install(new)?;
        self.view = self.backend.view();
        self.store = Store::open(&self.view, self.config.store.clone())?;
        let facts = self.store.facts();
        self.applied = facts.applied_index;
        self.durable = facts.applied_index;
        self.flush = Flush::new(facts.applied_index);
        let (revision, compacted) = (facts.revision, facts.compacted);
        self.shared.published.set(self.store.publish(self.view.clone()));
        let wakes = self.shared.hub.with(|hub| hub.installed(revision, compacted));
        self.shared.raft.set_applied(self.applied);
        let _ = self.shared.driver.push(Input::Installed { ticket, index: self.applied });
        self.shared.hub.wake(&wakes);
        self.shared.hub.nudge();
        self.measure_disk();
        tracing::info!(index = self.applied, revision, "applied snapshot");
        Ok(())
    }
}

/// A put and a delete for each key that changed.
fn count(counts: &Counts, events: &[RevisionEvents]) {
    let all = || events.iter().flat_map(|revision| &revision.events);
    let puts = all().filter(|event| event.kind == EventKind::Put).count() as u64;
    counts.puts.add(puts);
    counts.deletes.add(all().count() as u64 - puts);
}
