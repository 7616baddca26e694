//! Keep-alive and time-to-live: questions for the leader's clock, wherever the leader is (trap 6).
//!
//! A member that leads answers from its raft thread; one that does not asks the leader, and looks for it again as long
//! as the caller's time lasts, as etcd does.
//!
//! What it does not do: grants and revokes, which are proposals like any other.

use std::time::{Duration, Instant};

use keelson_proto::etcdserverpb::LeaseTimeToLiveResponse;
use kvstore_core::types::{LeaseId, MemberId};
use kvstore_core::{Error, Fatal, lease};
use tokio::sync::oneshot;

use super::Inbox;
use crate::clock;
use crate::disk::View;
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
                response.keys = self.read(move |view| lease::keys(view, id)).await?;
            }
        }
        Ok(response)
    }

    /// Reads what may be long away from the runtimes that others wait for.
    async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&View) -> Result<T, Fatal> + Send + 'static,
    ) -> Result<T, Error> {
        let published = self.published();
        match tokio::task::spawn_blocking(move || read(&published.view)).await {
            Ok(done) => done.map_err(|fatal| self.broken(&fatal)),
            // The pool's thread panicked or the runtime is going away.
            Err(_) => Err(Error::Stopped),
        }
    }

    /// The error of a caller whose time is over: did nobody lead, or did the leader not answer?
    fn gave_up(&self) -> Error {
        if self.raft().leader.is_none() { Error::NoLeader } else { Error::Timeout }
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
            Some(leader) => ask(inbox.shared.peers().keep_alive(leader, id), deadline).await,
            None => Asked::here(inbox.keep_alive_here(id).await),
        };
        match answer {
            Asked::Answered(answer) => return answer,
            Asked::InVain if clock::now() >= deadline => return Err(inbox.gave_up()),
            Asked::InVain => tokio::time::sleep(RETRY).await,
        }
    }
}

pub(super) async fn time_to_live(inbox: &Inbox, id: LeaseId, keys: bool) -> Result<LeaseTimeToLiveResponse, Error> {
    let deadline = inbox.deadline();
    loop {
        let answer = match inbox.other_leader() {
            Some(leader) => ask(inbox.shared.peers().time_to_live(leader, id, keys), deadline).await,
            None => Asked::here(inbox.time_to_live_here(id, keys).await),
        };
        match answer {
            Asked::Answered(answer) => return answer,
            Asked::InVain if clock::now() >= deadline => return Err(inbox.gave_up()),
            Asked::InVain => tokio::time::sleep(RETRY).await,
        }
    }
}

/// All leases: by their ends on the member that leads, by id on any other, which knows no time.
pub(super) async fn list(inbox: &Inbox) -> Result<Vec<LeaseId>, Error> {
    let (answer, order) = oneshot::channel();
    inbox.shared.driver.push(Input::Leases { answer }).map_err(|_| Error::Stopped)?;
    match order.await.map_err(|_| Error::Stopped)? {
        Some(order) => Ok(order),
        None => inbox.read(|view| Ok(lease::all(view)?.into_iter().map(|lease| lease.id).collect())).await,
    }
}

/// What became of a question for the leader.
enum Asked<T> {
    Answered(Result<T, Error>),
    /// It was not the leader, or did not answer: look for it again.
    InVain,
}

impl<T> Asked<T> {
    fn here(answer: Result<T, Error>) -> Asked<T> {
        match answer {
            Err(Error::NotLeader) => Asked::InVain,
            answer => Asked::Answered(answer),
        }
    }
}

/// Whatever another member can't answer in time may be asked again, as in etcd.
async fn ask<T>(question: impl Future<Output = Result<T, Error>>, deadline: Instant) -> Asked<T> {
    match tokio::time::timeout_at(deadline.into(), question).await {
        Ok(Ok(answer)) => Asked::Answered(Ok(answer)),
        Ok(Err(_)) | Err(_) => Asked::InVain,
    }
}
