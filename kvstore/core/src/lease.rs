//! Leases as the cluster agreed on them: the replicated table, which knows no time.
//!
//! A grant is a row `lease → leasepb.Lease`; each key of a lease is a row `(lease, key) → nothing`, written in the same
//! batch as the key itself, so that neither a restart nor `TimeToLive` scans the keyspace. When a lease ends is the
//! leader's business (`lease/expiry.rs`); that it ended is a `LeaseRevoke` in the log.

pub mod expiry;
pub mod keepalive;

use bytes::Bytes;
use keelson_proto::leasepb;

use crate::Fatal;
use crate::backend::Read;
use crate::types::LeaseId;

/// etcd's largest TTL, in seconds.
pub const MAX_TTL_S: i64 = 9_000_000_000;

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

/// A lease as it stands in the table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LeaseState {
    pub id: LeaseId,
    pub ttl_s: i64,
    /// What a checkpoint said was left; 0: the whole TTL.
    pub remaining_ttl_s: i64,
}

impl From<&leasepb::Lease> for LeaseState {
    fn from(lease: &leasepb::Lease) -> Self {
        LeaseState { id: LeaseId(lease.id), ttl_s: lease.ttl, remaining_ttl_s: lease.remaining_ttl }
    }
}

/// The lease, if it is granted.
pub fn find<R: Read>(read: &R, id: LeaseId) -> Result<Option<LeaseState>, Fatal> {
    let _ = (read, id);
    Ok(None)
}

/// The keys attached to a lease, in key order.
pub fn keys<R: Read>(read: &R, id: LeaseId) -> Result<Vec<Bytes>, Fatal> {
    let _ = (read, id);
    Ok(Vec::new())
}

/// All leases, by id.
pub fn all<R: Read>(read: &R) -> Result<Vec<LeaseState>, Fatal> {
    let _ = read;
    Ok(Vec::new())
}
