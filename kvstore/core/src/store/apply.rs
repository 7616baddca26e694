//! One committed entry: guards in etcd's order, then the request.
//!
//! etcd's appliers wrap each other: corrupt, then no space, then users and roles (a later room), then quota. Each guard is
//! a function of the replicated state, except the quota's limit, which each member has for itself: going over it never
//! changes what is written (`store/quota.rs`).
//!
//! What it does not do: it writes neither the applied index nor the numbers; `Store::apply` does, once a batch.

use bytes::Bytes;
use keelson_proto::etcdserverpb::{
    AlarmResponse, AlarmType, CompactionRequest, CompactionResponse, DeleteRangeRequest, InternalRaftRequest,
    LeaseCheckpointRequest, LeaseCheckpointResponse, LeaseGrantRequest, LeaseGrantResponse, LeaseRevokeRequest,
    LeaseRevokeResponse, PutRequest, TxnRequest,
};
use prost::Message;

use super::{Applied, ConfChanged, Outcome, Store, quota};
use crate::backend::{Overlay, ReadView, WriteBatch};
use crate::mvcc::span::Span;
use crate::mvcc::write::Change;
use crate::mvcc::{Moment, ReadError, compact, range, txn};
use crate::types::{Entry, EntryKind, LeaseId, RequestId};
use crate::{Error, Fatal, lease};

impl Store {
    pub(super) fn apply_entry<V: ReadView>(
        &mut self,
        view: &V,
        entry: &Entry,
        batch: &mut WriteBatch,
        applied: &mut Applied,
    ) -> Result<(), Fatal> {
        if entry.kind == EntryKind::ConfChange {
            applied.conf_changes.push(ConfChanged { index: entry.index, term: entry.term, data: entry.data.clone() });
            return Ok(());
        }
        if entry.data.is_empty() {
            return Ok(()); // a new leader's first entry
        }
        let request = InternalRaftRequest::decode(entry.data.clone()).map_err(|error| Fatal::Damaged {
            table: "log",
            message: format!("entry {} does not decode: {error}", entry.index),
        })?;
        let id = RequestId(request.header.as_ref().map_or(request.id, |header| header.id));
        let outcome = match (Step { store: self, view, batch, applied }).request(&request) {
            Ok(outcome) => Ok(outcome),
            Err(ReadError::Answer(error)) => Err(error),
            Err(ReadError::Fatal(fatal)) => return Err(fatal),
        };
        applied.outcomes.push((id, outcome));
        Ok(())
    }
}

/// One request on its way into the batch.
struct Step<'a, V> {
    store: &'a mut Store,
    view: &'a V,
    batch: &'a mut WriteBatch,
    applied: &'a mut Applied,
}

impl<V: ReadView> Step<'_, V> {
    fn request(&mut self, request: &InternalRaftRequest) -> Result<Outcome, ReadError> {
        if let Some(put) = &request.put {
            self.put(put)
        } else if let Some(txn) = &request.txn {
            self.txn(txn)
        } else if let Some(delete) = &request.delete_range {
            self.delete_range(delete)
        } else if let Some(range) = &request.range {
            self.not_corrupt()?;
            let read = Overlay { view: self.view, batch: self.batch };
            let bounds = self.store.numbers.bounds();
            let moment = Moment { read: &read, bounds, keys: self.store.tally.counts() };
            Ok(Outcome::Range(range::range(moment, range)?.into_response(bounds.revision)?))
        } else if let Some(compaction) = &request.compaction {
            self.compaction(compaction)
        } else if let Some(grant) = &request.lease_grant {
            self.lease_grant(grant)
        } else if let Some(revoke) = &request.lease_revoke {
            self.lease_revoke(revoke)
        } else if let Some(checkpoint) = &request.lease_checkpoint {
            self.lease_checkpoint(checkpoint)
        } else if let Some(alarm) = &request.alarm {
            let (alarms, changed) = self.store.alarms.apply(alarm, self.batch);
            self.applied.alarms_changed |= changed;
            Ok(Outcome::Alarm(AlarmResponse { header: self.header(), alarms }))
        } else if let Some(attributes) = &request.cluster_member_attr_set {
            self.store.members.set_attributes(attributes, self.batch)?;
            self.applied.members_changed = true;
            Ok(Outcome::MemberAttributes)
        } else if let Some(version) = &request.cluster_version_set {
            self.store.members.set_version(&version.ver, self.batch);
            self.applied.members_changed = true;
            Ok(Outcome::ClusterVersion)
        } else {
            // Users, roles and downgrades: no member of this version proposes them, and all answer alike.
            Err(Error::NotCapable.into())
        }
    }

    fn header(&self) -> Option<keelson_proto::etcdserverpb::ResponseHeader> {
        txn::header(self.store.numbers.revision)
    }

    fn not_corrupt(&self) -> Result<(), Error> {
        if self.store.alarms.stands(AlarmType::Corrupt) { Err(Error::Corrupt) } else { Ok(()) }
    }

    /// Refuses what costs space while an alarm stands; else says whether it still fits this member's quota.
    fn has_space(&self, cost: i64) -> Result<bool, Error> {
        if cost > 0 && self.store.alarms.stands(AlarmType::Nospace) {
            return Err(Error::NoSpace);
        }
        Ok(quota::fits(self.store.quota, self.store.size_in_use(), cost))
    }

    /// The write that goes over the quota is done, and answered with an error (contract 2.9).
    fn answer(&mut self, outcome: Outcome, fits: bool) -> Result<Outcome, ReadError> {
        if fits {
            return Ok(outcome);
        }
        self.applied.over_quota = true;
        Err(Error::NoSpace.into())
    }

    /// Runs `write` as one change of the keyspace: one revision, its events together.
    fn change<T>(
        &mut self,
        write: impl FnOnce(&mut Change<'_, V>, &lease::Leases) -> Result<T, ReadError>,
    ) -> Result<T, ReadError> {
        let store = &mut *self.store;
        let mut change = Change::new(self.view, self.batch, &mut store.numbers, &mut store.recent, &mut store.tally);
        let done = write(&mut change, &store.leases)?;
        self.applied.events.extend(change.finish());
        Ok(done)
    }

    fn put(&mut self, request: &PutRequest) -> Result<Outcome, ReadError> {
        self.not_corrupt()?;
        let fits = self.has_space(quota::put_cost(request))?;
        let response = self.change(|change, leases| {
            txn::check_put(change, request, &|id| leases.exists(LeaseId(id)))?;
            Ok(txn::put(change, request)?)
        })?;
        self.answer(Outcome::Put(response), fits)
    }

    fn txn(&mut self, request: &TxnRequest) -> Result<Outcome, ReadError> {
        self.not_corrupt()?;
        let fits = self.has_space(quota::txn_cost(request))?;
        let response = self.change(|change, leases| txn::apply(change, request, &|id| leases.exists(LeaseId(id))))?;
        self.answer(Outcome::Txn(response), fits)
    }

    fn delete_range(&mut self, request: &DeleteRangeRequest) -> Result<Outcome, ReadError> {
        self.not_corrupt()?;
        let response = self.change(|change, _| Ok(txn::delete_range(change, request)?))?;
        Ok(Outcome::DeleteRange(response))
    }

    fn compaction(&mut self, request: &CompactionRequest) -> Result<Outcome, ReadError> {
        self.not_corrupt()?;
        compact::check(&self.store.numbers, request.revision)?;
        let read = Overlay { view: self.view, batch: self.batch };
        compact::schedule(&read, &mut self.store.numbers, request.revision)?;
        self.applied.compacted = Some(request.revision);
        Ok(Outcome::Compaction(CompactionResponse { header: self.header() }))
    }

    fn lease_grant(&mut self, request: &LeaseGrantRequest) -> Result<Outcome, ReadError> {
        self.not_corrupt()?;
        let fits = self.has_space(quota::LEASE_COST)?;
        self.store.leases.check_grant(request)?;
        self.applied.leases.push(self.store.leases.grant(LeaseId(request.id), request.ttl, self.batch));
        let response = LeaseGrantResponse {
            header: self.header(),
            id: request.id,
            ttl: request.ttl,
            ..LeaseGrantResponse::default()
        };
        self.answer(Outcome::LeaseGrant(response), fits)
    }

    /// The keys go in key order, at one revision; a lease without keys raises none.
    fn lease_revoke(&mut self, request: &LeaseRevokeRequest) -> Result<Outcome, ReadError> {
        self.not_corrupt()?;
        let id = LeaseId(request.id);
        if !self.store.leases.exists(id) {
            return Err(Error::LeaseNotFound.into());
        }
        let attached: Vec<Bytes> = lease::keys(&Overlay { view: self.view, batch: self.batch }, id)?;
        self.change(|change, _| {
            for key in &attached {
                change.delete_range(Span::Point(key))?;
            }
            Ok(())
        })?;
        self.applied.leases.push(self.store.leases.revoke(id, self.batch));
        Ok(Outcome::LeaseRevoke(LeaseRevokeResponse { header: self.header() }))
    }

    /// As in etcd, an unknown lease is passed over, and no alarm refuses a checkpoint.
    fn lease_checkpoint(&mut self, request: &LeaseCheckpointRequest) -> Result<Outcome, ReadError> {
        for checkpoint in &request.checkpoints {
            let id = LeaseId(checkpoint.id);
            let change = self.store.leases.checkpoint(id, checkpoint.remaining_ttl, self.batch);
            self.applied.leases.extend(change);
        }
        Ok(Outcome::LeaseCheckpoint(LeaseCheckpointResponse { header: self.header() }))
    }
}
