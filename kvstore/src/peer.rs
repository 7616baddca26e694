//! How members reach each other: one link a peer, on a runtime of their own.
//!
//! The raft thread puts messages into a link's queue and forgets them; the link's task batches what waits into one long
//! gRPC stream. Nothing here ever waits for a peer: a full queue drops, a dead connection drops what it had, and Raft,
//! which is told, repeats what matters. Snapshots and forwarded questions travel beside the stream.
//!
//! The peers have a thread to themselves, so that a busy client edge delays no heartbeat.
//!
//! What it does not do: look into a message, or send one twice (a forwarded proposal must not be: trap 7).

mod client;
mod server;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use keelson_proto::etcdserverpb::{LeaseKeepAliveRequest, LeaseTimeToLiveRequest, LeaseTimeToLiveResponse};
use keelson_proto::membershippb::Member;
use keelson_proto::peer::peer_client::PeerClient;
use keelson_proto::peer::{ForwardRequest, forward_request, forward_response};
use kvstore_core::Error;
use kvstore_core::replica::{Outgoing, SnapshotBuild};
use kvstore_core::types::{ClusterId, LeaseId, MemberId, Timestamp};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::transport::Channel;

use crate::clock::Clock;
use crate::driver::Input;
use crate::inbox::Published;
use crate::mailbox::Mailbox;

pub(crate) use server::{PeerService, serve};

/// What members say to each other has this version; a peer of another major one is refused.
pub(crate) const PROTOCOL_VERSION: u32 = 1;

/// The largest message that a member reads from another.
const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// Flow control: a batch and the largest message fit, so that nothing waits for a window.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;

/// Bounds of a link's queue: what lies beyond is dropped.
const QUEUE_MESSAGES: usize = 8_192;
const QUEUE_BYTES: usize = 64 << 20;

/// Who speaks, in every message.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ids {
    pub(crate) cluster: ClusterId,
    pub(crate) member: MemberId,
}

/// All links; cheap to clone.
#[derive(Clone)]
pub(crate) struct Peers(Arc<Shared>);

struct Shared {
    ids: Ids,
    links: BTreeMap<MemberId, Arc<Link>>,
    driver: Mailbox<Input>,
    runtime: Handle,
}

impl Peers {
    /// A link to each of `members` but this one; their tasks run on `runtime` until `stop`.
    pub(crate) fn connect(
        ids: Ids,
        members: &[Member],
        driver: Mailbox<Input>,
        clock: Clock,
        runtime: Handle,
        stop: &CancellationToken,
    ) -> Peers {
        let others = members.iter().filter(|member| member.id != ids.member.0);
        let links: BTreeMap<_, _> = others
            .map(|member| {
                let urls = member.raft_attributes.as_ref().map(|raft| raft.peer_urls.clone()).unwrap_or_default();
                let id = MemberId(member.id);
                (id, Arc::new(Link::new(id, urls, clock)))
            })
            .collect();
        for link in links.values() {
            runtime.spawn(client::run(Arc::clone(link), ids, driver.clone(), stop.clone()));
        }
        Peers(Arc::new(Shared { ids, links, driver, runtime }))
    }

    /// Queues messages; drops those that find no room, and tells Raft.
    pub(crate) fn send(&self, messages: Vec<Outgoing>) {
        for message in messages {
            let Some(link) = self.0.links.get(&message.to) else { continue };
            if !link.push(message.message) {
                let _ = self.0.driver.push(Input::Unreachable(message.to));
            }
        }
    }

    /// Streams the published state to a peer. However it ends, Raft is told.
    pub(crate) fn send_snapshot(&self, build: SnapshotBuild, published: Arc<Published>) {
        let outcome = client::Transfer::begin(build.to, self.0.driver.clone());
        let Some(link) = self.0.links.get(&build.to) else { return };
        self.0.runtime.spawn(client::send_snapshot(Arc::clone(link), self.0.ids, build, published, outcome));
    }

    /// Since when a peer has been connected.
    pub(crate) fn active_since(&self, peer: MemberId) -> Option<Timestamp> {
        self.0.links.get(&peer).and_then(|link| link.active_since())
    }

    /// Since when so many peers have been connected that they are a majority together with this member.
    pub(crate) fn quorum_since(&self) -> Option<Timestamp> {
        let mut since: Vec<Timestamp> = self.0.links.values().filter_map(|link| link.active_since()).collect();
        since.sort_unstable();
        // Of n + 1 members, (n + 1) / 2 others are needed.
        match self.0.links.len().div_ceil(2) {
            0 => Some(Timestamp(0)),
            needed => since.get(needed - 1).copied(),
        }
    }

    /// How many peers are connected.
    pub(crate) fn active(&self) -> usize {
        self.0.links.values().filter(|link| link.active_since().is_some()).count()
    }

    pub(crate) fn all_active(&self) -> bool {
        self.0.links.values().all(|link| link.active_since().is_some())
    }

    /// The peer that has been connected for the longest time.
    pub(crate) fn longest_active(&self) -> Option<MemberId> {
        let active = self.0.links.values().filter_map(|link| Some((link.active_since()?, link.id)));
        active.min().map(|(_, id)| id)
    }

    pub(crate) async fn keep_alive(&self, leader: MemberId, id: LeaseId) -> Result<i64, Error> {
        let request = forward_request::Request::LeaseKeepAlive(LeaseKeepAliveRequest { id: id.0 });
        match self.forward(leader, request).await? {
            forward_response::Response::LeaseKeepAlive(response) => Ok(response.ttl),
            forward_response::Response::LeaseTimeToLive(_) => Err(Error::NotCapable),
        }
    }

    pub(crate) async fn time_to_live(
        &self,
        leader: MemberId,
        id: LeaseId,
        keys: bool,
    ) -> Result<LeaseTimeToLiveResponse, Error> {
        let request = forward_request::Request::LeaseTimeToLive(LeaseTimeToLiveRequest { id: id.0, keys });
        match self.forward(leader, request).await? {
            forward_response::Response::LeaseTimeToLive(response) => Ok(response),
            forward_response::Response::LeaseKeepAlive(_) => Err(Error::NotCapable),
        }
    }

    async fn forward(
        &self,
        to: MemberId,
        request: forward_request::Request,
    ) -> Result<forward_response::Response, Error> {
        let client = self.0.links.get(&to).and_then(|link| link.client());
        let mut client = client.ok_or(Error::NotLeader)?;
        let (cluster_id, from) = (self.0.ids.cluster.0, self.0.ids.member.0);
        let request = ForwardRequest { cluster_id, from, to: to.0, request: Some(request) };
        let response = client.forward(request).await.map_err(|status| read_error(&status))?;
        response.into_inner().response.ok_or(Error::NotCapable)
    }
}

/// One peer, and what is on its way there.
struct Link {
    id: MemberId,
    urls: Vec<String>,
    clock: Clock,
    queue: Mutex<Queue>,
    filled: Notify,
    /// Milliseconds of the clock, plus 1; 0: not connected.
    active_since: AtomicU64,
    client: Mutex<Option<PeerClient<Channel>>>,
}

#[derive(Default)]
struct Queue {
    messages: Vec<Bytes>,
    bytes: usize,
}

impl Link {
    fn new(id: MemberId, urls: Vec<String>, clock: Clock) -> Link {
        Link {
            id,
            urls,
            clock,
            queue: Mutex::default(),
            filled: Notify::new(),
            active_since: AtomicU64::new(0),
            client: Mutex::new(None),
        }
    }

    /// `false`: there was no room.
    fn push(&self, message: Bytes) -> bool {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.messages.len() >= QUEUE_MESSAGES || queue.bytes + message.len() > QUEUE_BYTES {
            return false;
        }
        queue.bytes += message.len();
        queue.messages.push(message);
        let first = queue.messages.len() == 1;
        drop(queue);
        if first {
            self.filled.notify_one();
        }
        true
    }

    fn take(&self) -> Vec<Bytes> {
        let queue = std::mem::take(&mut *self.queue.lock().unwrap_or_else(PoisonError::into_inner));
        queue.messages
    }

    fn active_since(&self) -> Option<Timestamp> {
        self.active_since.load(Ordering::Acquire).checked_sub(1).map(Timestamp)
    }

    fn client(&self) -> Option<PeerClient<Channel>> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn connected(&self, client: PeerClient<Channel>) {
        *self.client.lock().unwrap_or_else(PoisonError::into_inner) = Some(client);
        self.active_since.store(self.clock.now().0 + 1, Ordering::Release);
    }

    fn disconnected(&self) {
        self.active_since.store(0, Ordering::Release);
        *self.client.lock().unwrap_or_else(PoisonError::into_inner) = None;
        drop(self.take());
    }
}

/// An answer that is an error, between members: the text alone, which names it.
fn write_error(error: &Error) -> Status {
    Status::unavailable(error.to_string())
}

fn read_error(status: &Status) -> Error {
    let known = Error::ALL.iter().find(|(_, error)| error.to_string() == status.message());
    // What the network did is no error of the leader's: the caller may look for it again.
    known.map_or(Error::NotLeader, |(_, error)| error.clone())
}
