//! Those who hold leases: each has one granted, keeps it alive for a while at whoever seems to lead, and then revokes it or
//! lets it go. What they were promised is written down, and judged by crate `check`.
//!
//! What it does not do: put keys on them. That a lease takes its keys along is one change of the keyspace, and judged there.

use std::collections::BTreeMap;

use check::lease::Lease;
use kvstore_core::Error;
use kvstore_core::types::LeaseId;

/// Leases below are the workload's.
pub const FIRST: i64 = 1_000;
/// How long after its end a lease may linger once all is well, in milliseconds.
const PATIENCE_MS: u64 = 30_000;

/// One keep-alive on its way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Kept {
    pub id: LeaseId,
    pub called_ms: u64,
}

/// A keeper's next thing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Beat {
    /// Ask for a new lease.
    Grant,
    /// Wait for the answer to that.
    Wait,
    Keep(LeaseId),
}

#[derive(Debug, Default)]
pub struct Keepers {
    leases: BTreeMap<LeaseId, Lease>,
    /// What each keeper holds, and for how many keep-alives still.
    held: BTreeMap<u64, (LeaseId, u64)>,
    drawn: i64,
}

impl Keepers {
    /// A new lease for this keeper, to be granted.
    pub fn draw(&mut self, keeper: u64, ttl_s: i64, beats: u64) -> LeaseId {
        self.drawn += 1;
        let id = LeaseId(FIRST + self.drawn);
        let ttl = ttl_s as u64 * 1_000;
        self.leases.insert(id, Lease { id: id.0, ttl, promised: Vec::new(), revoked: None, gone: None });
        self.held.insert(keeper, (id, beats));
        id
    }

    /// What this keeper does next. The last time it lets go.
    pub fn beat(&mut self, keeper: u64) -> Beat {
        let Some((id, left)) = self.held.get_mut(&keeper) else { return Beat::Grant };
        let id = *id;
        match left.checked_sub(1) {
            Some(fewer) => *left = fewer,
            None => {
                self.held.remove(&keeper);
                return Beat::Grant;
            }
        }
        let lease = &self.leases[&id];
        match (lease.gone, lease.promised.is_empty()) {
            (Some(_), _) => Beat::Grant,
            // Whoever was not answered does not know that there is one to be kept.
            (None, true) => Beat::Wait,
            (None, false) => Beat::Keep(id),
        }
    }

    /// It lives from the moment it was asked for, at least.
    pub fn promised(&mut self, id: LeaseId, called_ms: u64) {
        if let Some(lease) = self.leases.get_mut(&id) {
            lease.promised.push(called_ms);
        }
    }

    pub fn kept(&mut self, kept: Kept, answer: &Result<i64, Error>, now_ms: u64) {
        match answer {
            Ok(0) => self.gone(kept.id, now_ms),
            Ok(_) => self.promised(kept.id, kept.called_ms),
            Err(_) => {}
        }
    }

    pub fn revoked(&mut self, id: LeaseId, now_ms: u64) {
        if let Some(lease) = self.leases.get_mut(&id) {
            lease.revoked.get_or_insert(now_ms);
        }
    }

    /// The first that is heard of its end counts.
    pub fn gone(&mut self, id: LeaseId, now_ms: u64) {
        if let Some(lease) = self.leases.get_mut(&id) {
            lease.gone.get_or_insert(now_ms);
        }
    }

    /// A lease that was never answered promises nothing, and one that nobody heard of cannot be told to be there.
    pub fn judge(&self, now_ms: u64) -> Result<(), String> {
        let leases: Vec<Lease> = self.leases.values().cloned().collect();
        check::lease::judge(&leases, now_ms, PATIENCE_MS)
    }

    pub fn promises(&self) -> usize {
        self.leases.values().map(|lease| lease.promised.len()).sum()
    }

    pub fn ended(&self) -> usize {
        self.leases.values().filter(|lease| lease.gone.is_some() && lease.revoked.is_none()).count()
    }
}
