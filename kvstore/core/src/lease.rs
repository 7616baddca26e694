//! Leases as the cluster agreed on them: the replicated table, which knows no time.
//!
//! A grant is a row `lease → leasepb.Lease`; each key of a lease is a row `(lease, key) → nothing`, written in the same
//! batch as the key itself (`mvcc/write.rs`), so that neither a restart nor `TimeToLive` scans the keyspace. When a
//! lease ends is the leader's business (`lease/expiry.rs`); that it ended is a `LeaseRevoke` in the log.
//!
//! What it does not do: it raises no TTL to a minimum and picks no id; the server did, before the log, by [`min_ttl_s`] and
//! [`drawn`].

use std::collections::BTreeMap;
use std::ops::{Bound, ControlFlow};

pub mod expiry;
pub mod keepalive;

use bytes::Bytes;
use keelson_proto::etcdserverpb::LeaseGrantRequest;
use keelson_proto::leasepb;
use prost::Message;

use crate::backend::{Direction, Read, Table, WriteBatch};
use crate::types::{LeaseId, RequestId};
use crate::{Error, Fatal, keys};

/// etcd's largest TTL, in seconds.
pub const MAX_TTL_S: i64 = 9_000_000_000;

/// The shortest TTL, in seconds: one and a half election timeouts, in whole ticks and then in whole seconds, rounded as
/// etcd rounds (contract 2.8). The server raises a TTL to it before the log, so that every member grants alike.
pub fn min_ttl_s(heartbeat_ms: u64, election_timeout_ms: u64) -> i64 {
    let heartbeat_ms = heartbeat_ms.max(1);
    let ticks = 3 * (election_timeout_ms / heartbeat_ms) / 2;
    i64::try_from((ticks * heartbeat_ms).div_ceil(1000)).unwrap_or(i64::MAX)
}

/// The lease that a request's number draws, if the client chose none: positive, 63 bits. `None`: draw again.
pub fn drawn(request: RequestId) -> Option<LeaseId> {
    let id = (request.0 & i64::MAX as u64) as i64;
    (id != 0).then_some(LeaseId(id))
}

/// What an applied entry did to a lease.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LeaseChange {
    Granted {
        id: LeaseId,
        ttl_s: i64,
    },
    Revoked {
        id: LeaseId,
    },
    /// `remaining_ttl_s` 0: the whole TTL again.
    Checkpointed {
        id: LeaseId,
        remaining_ttl_s: i64,
    },
}

impl LeaseChange {
    pub fn id(&self) -> LeaseId {
        match *self {
            LeaseChange::Granted { id, .. } | LeaseChange::Revoked { id } | LeaseChange::Checkpointed { id, .. } => id,
        }
    }
}

/// A lease as it stands in the table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LeaseState {
    pub id: LeaseId,
    pub ttl_s: i64,
    /// What a checkpoint said was left; 0: the whole TTL.
    pub remaining_ttl_s: i64,
}

/// The lease, if it is granted.
pub fn find<R: Read>(read: &R, id: LeaseId) -> Result<Option<LeaseState>, Fatal> {
    read.get(Table::Lease, &keys::lease(id))?.map(decode).transpose()
}

/// The keys attached to a lease, in key order.
pub fn keys<R: Read>(read: &R, id: LeaseId) -> Result<Vec<Bytes>, Fatal> {
    let mut found = Vec::new();
    let first = keys::lease_keys(id);
    let range = (Bound::Included(first.as_ref()), Bound::Unbounded);
    read.scan(Table::Lease, range, Direction::Forward, &mut |row, _| match keys::decode_lease_key(id, row) {
        Some(key) => {
            found.push(Bytes::copy_from_slice(key));
            ControlFlow::Continue(())
        }
        None => ControlFlow::Break(()),
    })?;
    Ok(found)
}

/// All leases, by id.
pub fn all<R: Read>(read: &R) -> Result<Vec<LeaseState>, Fatal> {
    let mut found = Vec::new();
    let mut failed = None;
    let range = (Bound::Included(keys::LEASES.0), Bound::Excluded(keys::LEASES.1));
    read.scan(Table::Lease, range, Direction::Forward, &mut |_, row| match decode(Bytes::copy_from_slice(row)) {
        Ok(lease) => {
            found.push(lease);
            ControlFlow::Continue(())
        }
        Err(error) => {
            failed = Some(error);
            ControlFlow::Break(())
        }
    })?;
    failed.map_or(Ok(found), Err)
}

fn decode(row: Bytes) -> Result<LeaseState, Fatal> {
    let lease = leasepb::Lease::decode(row)
        .map_err(|error| Fatal::Damaged { table: Table::Lease.name(), message: error.to_string() })?;
    Ok(LeaseState { id: LeaseId(lease.id), ttl_s: lease.ttl, remaining_ttl_s: lease.remaining_ttl })
}

/// The grants, as the store holds them beside the rows.
#[derive(Clone, Default, Debug)]
pub(crate) struct Leases {
    granted: BTreeMap<LeaseId, LeaseState>,
}

impl Leases {
    pub(crate) fn open<R: Read>(read: &R) -> Result<Leases, Fatal> {
        Ok(Leases { granted: all(read)?.into_iter().map(|lease| (lease.id, lease)).collect() })
    }

    pub(crate) fn len(&self) -> usize {
        self.granted.len()
    }

    pub(crate) fn exists(&self, id: LeaseId) -> bool {
        self.granted.contains_key(&id)
    }

    /// etcd's order of refusals.
    pub(crate) fn check_grant(&self, request: &LeaseGrantRequest) -> Result<(), Error> {
        if request.id == 0 {
            return Err(Error::LeaseNotFound);
        }
        if request.ttl > MAX_TTL_S {
            return Err(Error::LeaseTtlTooLarge);
        }
        if self.exists(LeaseId(request.id)) {
            return Err(Error::LeaseExists);
        }
        Ok(())
    }

    pub(crate) fn grant(&mut self, id: LeaseId, ttl_s: i64, batch: &mut WriteBatch) -> LeaseChange {
        self.set(LeaseState { id, ttl_s, remaining_ttl_s: 0 }, batch);
        LeaseChange::Granted { id, ttl_s }
    }

    /// Takes the grant away; its keys are deleted by the keyspace, which detaches them.
    pub(crate) fn revoke(&mut self, id: LeaseId, batch: &mut WriteBatch) -> LeaseChange {
        self.granted.remove(&id);
        batch.delete(Table::Lease, keys::lease(id));
        LeaseChange::Revoked { id }
    }

    /// `None`: the lease has gone since the leader looked, which is nobody's mistake.
    pub(crate) fn checkpoint(
        &mut self,
        id: LeaseId,
        remaining_ttl_s: i64,
        batch: &mut WriteBatch,
    ) -> Option<LeaseChange> {
        let lease = *self.granted.get(&id)?;
        self.set(LeaseState { remaining_ttl_s, ..lease }, batch);
        Some(LeaseChange::Checkpointed { id, remaining_ttl_s })
    }

    /// By id.
    pub(crate) fn list(&self) -> Vec<LeaseState> {
        self.granted.values().copied().collect()
    }

    fn set(&mut self, lease: LeaseState, batch: &mut WriteBatch) {
        let row = leasepb::Lease { id: lease.id.0, ttl: lease.ttl_s, remaining_ttl: lease.remaining_ttl_s };
        batch.put(Table::Lease, keys::lease(lease.id), row.encode_to_vec());
        self.granted.insert(lease.id, lease);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shortest_ttl_is_one_and_a_half_election_timeouts() {
        assert_eq!(min_ttl_s(100, 1000), 2);
        assert_eq!(min_ttl_s(500, 5000), 8);
        assert_eq!(min_ttl_s(100, 2000), 3);
        assert_eq!(min_ttl_s(10, 100), 1);
    }
}
