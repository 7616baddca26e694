//! How the edge talks to the machines: one cheap, cloneable handle.
//!
//! Proposals and reads go to the raft thread as values and come back through oneshots; what everybody may read (the
//! published view with its facts, the watch hub, Raft's position) is shared here and nowhere else. Calls and
//! answers of an edge runtime travel in batches through its [`Edge`]: waking another thread costs a system call and a
//! switch of threads each time, and a thousand that go together cost one.
//!
//! What it does not do: it validates no request and makes no response; that is `rpc/*`.

mod edge;
mod hub;
mod leases;
mod shared;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use keelson_proto::etcdserverpb::alarm_request::AlarmAction;
use keelson_proto::etcdserverpb::{AlarmMember, AlarmRequest, AlarmType, InternalRaftRequest, LeaseTimeToLiveResponse};
use kvstore_core::store::{self, Outcome, quota};
use kvstore_core::types::{ClusterId, Index, LeaseId, MemberId, Term};
use kvstore_core::{Error, Fatal, lease};
use prost::Message;

use crate::counts::Counts;
use crate::disk;
use crate::driver::Input;

pub use edge::Edge;
pub(crate) use edge::{Answers, Room, Waiter};
pub use hub::{Hub, WatchStream};
pub(crate) use shared::{PublishedCell, RaftCell, RequestIds, Shared};

/// One moment of the store: a view of the database and the facts of the same moment.
pub type Published = store::Published<disk::View>;

/// Who this member is. Names and URLs are those it was started with; what the cluster knows is in `Facts::members`.
#[derive(Clone, Debug)]
pub struct Identity {
    pub cluster_id: ClusterId,
    pub member_id: MemberId,
    pub name: String,
    pub peer_urls: Vec<String>,
    pub client_urls: Vec<String>,
}

/// Where Raft stands, as far as this member knows.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct RaftStatus {
    pub leader: Option<MemberId>,
    pub term: Term,
    pub is_leader: bool,
    pub committed: Index,
    pub applied: Index,
}

/// Bounds at the door, in etcd's numbers.
#[derive(Clone, Copy, Debug)]
pub struct InboxLimits {
    /// Of one encoded request (`--max-request-bytes`).
    pub max_request_bytes: usize,
    /// How far the commit may run ahead of the apply before proposals are refused. etcd's bound.
    pub max_commit_to_apply_gap: u64,
    /// Bytes of proposals that may wait for their outcomes. Ours alone, beyond etcd's: the commit itself may be what does
    /// not come, for want of a disk or of a quorum.
    pub max_waiting_bytes: usize,
    /// How long a question for the leader may take: 5 s and two election timeouts.
    pub request_timeout: Duration,
}

/// The edge's handle to the machines.
#[derive(Clone)]
pub struct Inbox {
    shared: Arc<Shared>,
    edge: Arc<Edge>,
}

impl Inbox {
    pub(crate) fn new(shared: Arc<Shared>, edge: Arc<Edge>) -> Inbox {
        edge.attach(&shared.driver);
        Inbox { shared, edge }
    }

    /// The same inbox for another edge runtime, whose [`Edge::run`] must be running there.
    pub fn for_edge(&self, edge: Arc<Edge>) -> Inbox {
        Inbox::new(Arc::clone(&self.shared), edge)
    }

    /// Hands a request to Raft and waits until it was applied here, or until nobody can tell any more. It is proposed
    /// once: an error that says "timed out" leaves open whether it happened (trap 7).
    pub async fn propose(&self, mut request: InternalRaftRequest) -> Result<Outcome, Error> {
        let raft = &self.shared.raft;
        if raft.committed() > raft.applied().saturating_add(self.shared.limits.max_commit_to_apply_gap) {
            return Err(Error::TooManyRequests);
        }
        let id = self.shared.ids.next();
        request.header.get_or_insert_default().id = id.0;
        if request.encoded_len() > self.shared.limits.max_request_bytes {
            return Err(Error::RequestTooLarge);
        }
        let data = Bytes::from(request.encode_to_vec());
        let room = self.room(data.len()).ok_or(Error::TooManyRequests)?;
        let (waiter, outcome) = Waiter::outcome(&self.edge, room);
        self.edge.call(Input::Propose { id, data, waiter }).map_err(|_| Error::Stopped)?;
        outcome.await.unwrap_or(Err(Error::Stopped))
    }

    /// Room for a proposal of so many bytes, until its outcome is there.
    pub(crate) fn room(&self, bytes: usize) -> Option<Room> {
        Room::take(&self.shared.waiting_bytes, bytes, self.shared.limits.max_waiting_bytes)
    }

    /// Returns once this member has applied everything that the cluster had committed when this was called.
    pub async fn read_index(&self) -> Result<(), Error> {
        let (waiter, done) = Waiter::read(&self.edge);
        self.edge.call(Input::Read { waiter }).map_err(|_| Error::Stopped)?;
        done.await.unwrap_or(Err(Error::Stopped))
    }

    /// The newest moment that may be read.
    pub fn published(&self) -> Arc<Published> {
        self.shared.published.get()
    }

    pub fn hub(&self) -> &Hub {
        &self.shared.hub
    }

    /// A new watch stream, woken on this inbox's runtime.
    pub fn watch(&self) -> WatchStream {
        WatchStream::open(&self.shared, &self.edge)
    }

    /// Renews a lease at the leader, wherever that is; its TTL in seconds, or 0 if there is no such lease.
    pub async fn lease_keep_alive(&self, id: LeaseId) -> Result<i64, Error> {
        leases::keep_alive(self, id).await
    }

    /// What the leader knows of a lease. The header is left empty.
    pub async fn lease_time_to_live(&self, id: LeaseId, keys: bool) -> Result<LeaseTimeToLiveResponse, Error> {
        leases::time_to_live(self, id, keys).await
    }

    /// All leases that this member knows: those that end first coming first where it leads, by id elsewhere.
    pub async fn lease_list(&self) -> Result<Vec<LeaseId>, Error> {
        leases::list(self).await
    }

    /// Refuses what does not fit this member's quota any more, before anything else is looked at, and sees to it that
    /// the alarm stands (contract 2.9). What costs nothing always fits.
    pub async fn check_quota(&self, cost: i64) -> Result<(), Error> {
        let fits = {
            let facts = &self.published().facts;
            quota::fits((facts.quota != 0).then_some(facts.quota), facts.size_in_use, cost)
        };
        if fits {
            return Ok(());
        }
        Box::pin(self.raise_no_space()).await;
        Err(Error::NoSpace)
    }

    /// Refused it is, whether or not the others could be told.
    async fn raise_no_space(&self) {
        let own = AlarmMember { member_id: self.shared.identity.member_id.0, alarm: AlarmType::Nospace.into() };
        if self.published().facts.alarms.contains(&own) {
            return;
        }
        let alarm = AlarmRequest { action: AlarmAction::Activate.into(), member_id: own.member_id, alarm: own.alarm };
        let request = InternalRaftRequest { alarm: Some(alarm), ..InternalRaftRequest::default() };
        if let Err(error) = self.propose(request).await {
            tracing::warn!("failed to raise the NOSPACE alarm: {error}");
        }
    }

    pub fn raft(&self) -> RaftStatus {
        self.shared.raft.get()
    }

    pub fn identity(&self) -> &Identity {
        &self.shared.identity
    }

    /// A number that no other call of this method on any member has returned or will: positive, 63 bits, for leases.
    pub fn next_id(&self) -> i64 {
        loop {
            if let Some(id) = lease::drawn(self.shared.ids.next()) {
                return id.0;
            }
        }
    }

    /// A disk that can't be read ends this member; its caller is told that it stopped.
    pub(crate) fn broken(&self, fatal: &Fatal) -> Error {
        tracing::error!("reading the state failed: {fatal}");
        Error::Stopped
    }

    /// What the member's threads have counted.
    pub fn counts(&self) -> &Counts {
        &self.shared.counts
    }

    /// Bytes that the state takes on disk (`dbSize`).
    pub fn disk_size(&self) -> i64 {
        self.shared.disk_size.load(Ordering::Relaxed)
    }
}
