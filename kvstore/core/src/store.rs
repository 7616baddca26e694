//! The state machine: committed entries in, one batch and its consequences out.
//!
//! [`Store`] owns no database. It keeps a few numbers and small tables as values (revision, compacted revision, leases,
//! members, alarms, the quota's sums), rebuilt from a view at open, and [`Store::apply`] turns entries into rows of a
//! [`WriteBatch`] that also says how far it has come: data, revision, applied index and term can never disagree on disk.
//! What a member answers is a pure function of the replicated state; an entry that is refused still advances the applied
//! index.
//!
//! What it does not do: it writes nothing itself, proposes nothing (it says when an alarm should be: see
//! [`Applied::over_quota`]), and knows no clock.

mod alarm;
mod apply;
pub mod members;
pub mod quota;
#[cfg(test)]
mod tests;
pub mod view;

use std::sync::Arc;

use bytes::Bytes;
use keelson_proto::etcdserverpb::{
    AlarmMember, AlarmResponse, CompactionResponse, DeleteRangeResponse, LeaseCheckpointResponse, LeaseGrantResponse,
    LeaseRevokeResponse, PutResponse, RangeResponse, TxnResponse,
};
use keelson_proto::membershippb::Member;

use crate::backend::{Overlay, ReadView, WriteBatch};
use crate::lease::{LeaseChange, LeaseState, Leases};
use crate::mvcc::count::index::Tally;
use crate::mvcc::recent::Recent;
use crate::mvcc::write::Numbers;
use crate::mvcc::{Bounds, KeyCounts, Moment, RevisionEvents, compact};
use crate::types::{ClusterId, Entry, Index, MemberId, RequestId, Term};
use crate::{Error, Fatal, keys};

use alarm::Alarms;
use members::Members;

pub use members::ConfState;

/// What this member was told that concerns applying. Nothing here may change what is *written*: members may differ.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    pub member_id: MemberId,
    /// `--quota-backend-bytes`: 0 is 2 GiB, negative is no quota.
    pub quota_backend_bytes: i64,
    /// Bound of the cache of recent records, in bytes of keys and values.
    pub record_cache_bytes: usize,
}

/// A first member of a new cluster.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Founder {
    pub id: MemberId,
    pub name: String,
    pub peer_urls: Vec<String>,
}

/// What readers may know beside the rows. Published together with the view of the same moment.
#[derive(Clone, PartialEq, Debug)]
pub struct Facts {
    pub revision: i64,
    /// -1: never compacted.
    pub compacted: i64,
    /// Rows below `compacted` are still being deleted here.
    pub compacting: bool,
    pub applied_index: Index,
    pub applied_term: Term,
    /// By id.
    pub members: Arc<Vec<Member>>,
    pub removed: Arc<Vec<MemberId>>,
    pub cluster_version: Option<String>,
    /// By member, then kind.
    pub alarms: Arc<Vec<AlarmMember>>,
    /// Logical bytes of keys, values, history and leases: what the quota counts, `dbSizeInUse`.
    pub size_in_use: i64,
    /// What `quota_backend_bytes` means: the limit in bytes, 0 for none.
    pub quota: i64,
    pub lease_count: usize,
}

impl Facts {
    pub fn bounds(&self) -> Bounds {
        Bounds { revision: self.revision, compacted: self.compacted }
    }
}

/// One moment: rows, facts and counts that belong together.
#[derive(Clone, Debug)]
pub struct Published<V> {
    pub view: V,
    pub facts: Facts,
    /// How many keys the view has, where.
    pub keys: KeyCounts,
}

impl<V> Published<V> {
    /// For reading.
    pub fn moment(&self) -> Moment<'_, V> {
        Moment { read: &self.view, bounds: self.facts.bounds(), keys: &self.keys }
    }
}

/// The consequences of some entries, for whoever publishes them. The batch must be written first.
#[derive(Clone, PartialEq, Default, Debug)]
pub struct Applied {
    pub index: Index,
    pub term: Term,
    /// One for each entry that had a request, in log order.
    pub outcomes: Vec<(RequestId, Result<Outcome, Error>)>,
    /// In revision order.
    pub events: Vec<RevisionEvents>,
    pub leases: Vec<LeaseChange>,
    /// The compacted revision rose to this.
    pub compacted: Option<i64>,
    pub conf_changes: Vec<ConfChanged>,
    pub alarms_changed: bool,
    pub members_changed: bool,
    /// A write went over this member's quota (it was applied, and answered NoSpace) while no NOSPACE alarm stood: the
    /// member must propose `AlarmRequest{ACTIVATE, own id, NOSPACE}`, once is enough, again if that proposal got lost.
    pub over_quota: bool,
}

/// A change of membership that was in the log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ConfChanged {
    pub index: Index,
    pub term: Term,
    pub data: Bytes,
}

/// What a request is answered. Headers hold `revision` only; ids and term are the edge's to fill (contract 2.5).
#[derive(Clone, PartialEq, Debug)]
pub enum Outcome {
    Range(RangeResponse),
    Put(PutResponse),
    DeleteRange(DeleteRangeResponse),
    Txn(TxnResponse),
    Compaction(CompactionResponse),
    LeaseGrant(LeaseGrantResponse),
    LeaseRevoke(LeaseRevokeResponse),
    LeaseCheckpoint(LeaseCheckpointResponse),
    Alarm(AlarmResponse),
    MemberAttributes,
    ClusterVersion,
}

/// A slice of a compaction's deletion that is in the batch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SliceDone {
    /// The revision being compacted to.
    pub compacted: i64,
    /// Rows of history that were looked at.
    pub rows: usize,
    /// Nothing is left to delete up to `compacted`.
    pub finished: bool,
}

/// The state machine.
#[derive(Debug)]
pub struct Store {
    applied: keys::Applied,
    numbers: Numbers,
    recent: Recent,
    tally: Tally,
    leases: Leases,
    members: Members,
    alarms: Alarms,
    quota: Option<i64>,
}

impl Store {
    /// Rebuilds the values from the rows. An empty database is a store at index 0 that only a snapshot can bring
    /// further (trap 2); rows of a later format version are refused.
    pub fn open<V: ReadView>(view: &V, config: StoreConfig) -> Result<Store, Fatal> {
        let numbers = if view::check_format(view)? { view::read_numbers(view)? } else { Numbers::EMPTY };
        Ok(Store {
            applied: view::applied(view)?,
            numbers,
            recent: Recent::new(config.record_cache_bytes),
            tally: Tally::open(view, numbers.revision)?,
            leases: Leases::open(view)?,
            members: Members::open(view)?,
            alarms: Alarms::open(view)?,
            quota: quota::limit(config.quota_backend_bytes),
        })
    }

    /// Applies committed entries, in log order, into `batch`; `view` is everything written before. The caller writes the
    /// batch, whole, before it calls again or publishes anything of the result. After a `Fatal` the store must not be
    /// used again. Entries that the state holds already are passed over; a gap is fatal.
    pub fn apply<V: ReadView>(
        &mut self,
        view: &V,
        entries: &[Entry],
        batch: &mut WriteBatch,
    ) -> Result<Applied, Fatal> {
        let mut applied = Applied::default();
        let before = (self.applied, self.numbers);
        for entry in entries {
            if entry.index <= self.applied.index {
                continue;
            }
            if entry.index != self.applied.index + 1 {
                let (at, got) = (self.applied.index, entry.index);
                return Err(Fatal::Invariant(format!("entry {got} was to be applied after entry {at}")));
            }
            self.apply_entry(view, entry, batch, &mut applied)?;
            self.applied = keys::Applied { index: entry.index, term: entry.term };
        }
        if self.numbers != before.1 {
            view::write_numbers(&self.numbers, batch);
        }
        if self.applied != before.0 {
            view::write_applied(self.applied, batch);
        }
        self.tally.settle(&Overlay { view, batch })?;
        (applied.index, applied.term) = (self.applied.index, self.applied.term);
        Ok(applied)
    }

    /// A bounded slice of the deletion that a compaction left to do, into a batch of its own: at most `max_rows` rows of
    /// history are looked at. `None`: nothing is left to do.
    pub fn compact_slice<V: ReadView>(
        &mut self,
        view: &V,
        max_rows: usize,
        batch: &mut WriteBatch,
    ) -> Result<Option<SliceDone>, Fatal> {
        let Some(cursor) = self.numbers.cursor else {
            return Ok(None);
        };
        let compacted = self.numbers.compacted;
        let slice = compact::slice(view, compacted, cursor, max_rows, batch, &mut self.recent, &mut self.tally)?;
        self.tally.settle(&Overlay { view, batch })?;
        self.numbers.cursor = slice.cursor;
        view::write_numbers(&self.numbers, batch);
        Ok(Some(SliceDone { compacted, rows: slice.rows, finished: slice.cursor.is_none() }))
    }

    /// All leases, by id, as far as applied.
    pub fn leases(&self) -> Vec<LeaseState> {
        self.leases.list()
    }

    fn size_in_use(&self) -> i64 {
        self.numbers.in_use() as i64 + self.leases.len() as i64 * quota::LEASE_COST
    }

    /// Everything readers need of this moment; `view` shows all that was applied, and nothing else. Cheap.
    pub fn publish<V>(&self, view: V) -> Published<V> {
        Published { view, facts: self.facts(), keys: self.tally.counts().clone() }
    }

    /// What readers may know now. Cheap.
    pub fn facts(&self) -> Facts {
        Facts {
            revision: self.numbers.revision,
            compacted: self.numbers.compacted,
            compacting: self.numbers.cursor.is_some(),
            applied_index: self.applied.index,
            applied_term: self.applied.term,
            members: self.members.list(),
            removed: self.members.removed(),
            cluster_version: self.members.version(),
            alarms: self.alarms.list(),
            size_in_use: self.size_in_use(),
            quota: self.quota.unwrap_or(0),
            lease_count: self.leases.len(),
        }
    }

    /// The rows that found a new member's state before any entry: index 1, term 1, equal on all founders (trap 2).
    pub fn bootstrap(founders: &[Founder], cluster_id: ClusterId) -> WriteBatch {
        members::bootstrap(founders, cluster_id)
    }
}
