//! What the threads publish for everybody, and the numbers of requests.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use kvstore_core::replica::Leadership;
use kvstore_core::types::{Index, MemberId, RequestId};

use super::{Hub, Identity, InboxLimits, Published, RaftStatus};
use crate::counts::Counts;
use crate::driver::Input;
use crate::mailbox::Mailbox;
use crate::peer::Peers;

/// Everything behind an [`super::Inbox`].
pub(crate) struct Shared {
    pub(crate) identity: Identity,
    pub(crate) limits: InboxLimits,
    pub(crate) driver: Mailbox<Input>,
    pub(crate) published: PublishedCell,
    pub(crate) hub: Hub,
    pub(crate) raft: RaftCell,
    pub(crate) ids: RequestIds,
    /// Of all proposals without an outcome.
    pub(crate) waiting_bytes: Arc<AtomicUsize>,
    pub(crate) disk_size: AtomicI64,
    pub(crate) counts: Arc<Counts>,
    /// Set once, before anything is served.
    pub(crate) peers: OnceLock<Peers>,
}

impl Shared {
    pub(crate) fn peers(&self) -> &Peers {
        self.peers.get().expect("set before the edge is served")
    }
}

/// The newest published moment: a short lock around a pointer.
pub(crate) struct PublishedCell(Mutex<Arc<Published>>);

impl PublishedCell {
    pub(crate) fn new(published: Published) -> Self {
        PublishedCell(Mutex::new(Arc::new(published)))
    }

    pub(crate) fn get(&self) -> Arc<Published> {
        Arc::clone(&self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn set(&self, published: Published) {
        let mut newest = Arc::new(published);
        std::mem::swap(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner), &mut newest);
        // The old view, if this was its last holder, is released here and not under the lock.
        drop(newest);
    }
}

/// Raft's position. Each number is true on its own; together they may straddle a change.
#[derive(Default)]
pub(crate) struct RaftCell {
    leader: AtomicU64,
    term: AtomicU64,
    is_leader: AtomicBool,
    committed: AtomicU64,
    applied: AtomicU64,
    first: AtomicU64,
}

impl RaftCell {
    /// The first entry that the log still has.
    #[cfg(test)]
    pub(crate) fn first_index(&self) -> Index {
        self.first.load(Ordering::Acquire)
    }

    pub(crate) fn committed(&self) -> Index {
        self.committed.load(Ordering::Acquire)
    }

    pub(crate) fn applied(&self) -> Index {
        self.applied.load(Ordering::Acquire)
    }

    pub(crate) fn set_applied(&self, applied: Index) {
        self.applied.store(applied, Ordering::Release);
    }

    pub(crate) fn set_position(&self, known: Leadership, committed: Index, first: Index) {
        self.leader.store(known.leader.map_or(0, |id| id.0), Ordering::Release);
        self.term.store(known.term, Ordering::Release);
        self.is_leader.store(known.is_leader, Ordering::Release);
        self.committed.store(committed, Ordering::Release);
        self.first.store(first, Ordering::Release);
    }

    pub(crate) fn get(&self) -> RaftStatus {
        let leader = self.leader.load(Ordering::Acquire);
        RaftStatus {
            leader: (leader != 0).then_some(MemberId(leader)),
            term: self.term.load(Ordering::Acquire),
            is_leader: self.is_leader.load(Ordering::Acquire),
            committed: self.committed(),
            applied: self.applied(),
        }
    }
}

/// Numbers requests: 16 bits of the member, then a counter that begins at a random place at each boot. An old proposal
/// that commits after a restart therefore answers nobody (trap 7), whatever the clock did meanwhile.
pub(crate) struct RequestIds {
    member: u64,
    next: AtomicU64,
}

const COUNTER_BITS: u32 = 48;

impl RequestIds {
    pub(crate) fn new(member: MemberId) -> Self {
        // The standard library seeds its hashers from the operating system's random numbers.
        let boot_nonce = RandomState::new().build_hasher().finish();
        RequestIds { member: member.0 << COUNTER_BITS, next: AtomicU64::new(boot_nonce) }
    }

    /// Never 0.
    pub(crate) fn next(&self) -> RequestId {
        loop {
            let counter = self.next.fetch_add(1, Ordering::Relaxed) & ((1 << COUNTER_BITS) - 1);
            let id = self.member | counter;
            if id != 0 {
                return RequestId(id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_ids_of_two_boots_do_not_meet() {
        let member = MemberId(0x1234_5678_9abc_def0);
        let (first, second) = (RequestIds::new(member), RequestIds::new(member));
        let ids: std::collections::HashSet<_> = (0..10_000).map(|_| first.next()).collect();
        assert_eq!(ids.len(), 10_000);
        assert!((0..10_000).all(|_| !ids.contains(&second.next())));
        assert!(ids.iter().all(|id| id.0 >> COUNTER_BITS == 0xdef0));
    }
}
