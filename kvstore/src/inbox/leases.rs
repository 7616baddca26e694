//! Keep-alive and time-to-live: questions for the leader's clock, wherever the leader is (trap 6).
//!
//! A member that leads answers from its raft thread; one that does not asks the leader, and looks for it again as long
//! as the caller's time lasts, as etcd does.

use std::time::{Duration, Instant};

use keelson_proto::etcdserverpb::LeaseTimeToLiveResponse;
use kvstore_core::types::{LeaseId, MemberId};
use kvstore_core::{Error, lease};
use tokio::sync::oneshot;

use super::Inbox;
use crate::clock;
use crate::driver::Input;

/// Between two looks for a leader.
const RETRY: Duration = Duration::from_millis(50);

impl Inbox {
    /// Renews a lease if this member leads; `NotLeader` otherwise.
    pub(crate) async fn keep_alive_here(&self, id: LeaseId) -> Result<i64, Error> {
        let (answer, ttl) = oneshot::channel();
        self.shared.driver.push(Input::KeepAlive { id, answer }).map_err(|_| Error::Stopped)?;
        ttl.await.unwrap_or(Err(Error::Stopped))
    }

    /// What this member's clock says of a lease if it leads; `NotLeader` otherwise.
    pub(crate) async fn time_to_live_here(&self, id: LeaseId, keys: bool) -> Result<LeaseTimeToLiveResponse, Error> {
        let (answer, remaining) = oneshot::channel();
        self.shared.driver.push(Input::Remaining { id, answer }).map_err(|_| Error::Stopped)?;
        let remaining = remaining.await.unwrap_or(Err(Error::Stopped))?;
        let mut response = LeaseTimeToLiveResponse { id: id.0, ttl: -1, ..LeaseTimeToLiveResponse::default() };
        if let Some(remaining) = remaining {
            (response.ttl, response.granted_ttl) = (remaining.remaining_s, remaining.granted_s);
            if keys {
                let published = self.published();
                response.keys = lease::keys(&published.view, id).map_err(|fatal| self.broken(&fatal))?;
            }
        }
        Ok(response)
    }

    /// The leader, if it is another member.
    fn other_leader(&self) -> Option<MemberId> {
        self.raft().leader.filter(|leader| *leader != self.shared.identity.member_id)
    }

    fn deadline(&self) -> Instant {
        clock::now() + self.shared.limits.request_timeout
    }
}

pub(super) async fn keep_alive(inbox: &Inbox, id: LeaseId) -> Result<i64, Error> {
    let deadline = inbox.deadline();
    loop {
        let answer = match inbox.other_leader() {
            Some(leader) => inbox.shared.peers().keep_alive(leader, id).await,
            None => inbox.keep_alive_here(id).await,
        };
        match answer {
            Err(Error::NotLeader) if clock::now() < deadline => tokio::time::sleep(RETRY).await,
            Err(Error::NotLeader) => return Err(Error::Timeout),
            answer => return answer,
        }
    }
}

pub(super) async fn time_to_live(inbox: &Inbox, id: LeaseId, keys: bool) -> Result<LeaseTimeToLiveResponse, Error> {
    let deadline = inbox.deadline();
    loop {
        let answer = match inbox.other_leader() {
            Some(leader) => inbox.shared.peers().time_to_live(leader, id, keys).await,
            None => inbox.time_to_live_here(id, keys).await,
        };
        match answer {
            Err(Error::NotLeader) if clock::now() < deadline => tokio::time::sleep(RETRY).await,
            Err(Error::NotLeader) => return Err(Error::Timeout),
            answer => return answer,
        }
    }
}
