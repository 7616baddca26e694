//! The Lease service. Grants and revokes go through Raft; keep-alive and time-to-live are questions for the leader's clock,
//! which the inbox finds; the list is this member's own.
//!
//! What is settled before a grant enters the log: its id, and a TTL of at least [`LeaseConfig::min_ttl_s`]; so every member
//! grants alike.
//!
//! What it does not do: know time ([`kvstore_core::lease::expiry`] does), or check permissions (a later room).

use std::pin::Pin;

use futures_util::{Stream, stream};
use keelson_proto::etcdserverpb::lease_server::Lease;
use keelson_proto::etcdserverpb::{
    InternalRaftRequest, LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveRequest, LeaseKeepAliveResponse,
    LeaseLeasesRequest, LeaseLeasesResponse, LeaseRevokeRequest, LeaseRevokeResponse, LeaseStatus,
    LeaseTimeToLiveRequest, LeaseTimeToLiveResponse, ResponseHeader,
};
use kvstore_core::store::Outcome;
use kvstore_core::types::LeaseId;
use kvstore_core::{Error, lease};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::leader::{LeaderGuard, LeaderMonitor};
use crate::Inbox;
use crate::rpc::{header, status};

#[derive(Clone, Copy, Debug)]
pub(super) struct LeaseConfig {
    /// Shorter TTLs are raised to this, seconds.
    pub(super) min_ttl_s: i64,
}

impl LeaseConfig {
    /// One and a half election timeouts, in whole ticks and then in whole seconds, rounded as etcd rounds (contract 2.8).
    pub(super) fn new(heartbeat_ms: u64, election_timeout_ms: u64) -> LeaseConfig {
        let heartbeat_ms = heartbeat_ms.max(1);
        let ticks = 3 * (election_timeout_ms / heartbeat_ms) / 2;
        LeaseConfig { min_ttl_s: i64::try_from((ticks * heartbeat_ms).div_ceil(1000)).unwrap_or(i64::MAX) }
    }

    /// The TTL that goes into the log.
    fn ttl_s(self, asked: i64) -> Result<i64, Error> {
        if asked > lease::MAX_TTL_S { Err(Error::LeaseTtlTooLarge) } else { Ok(asked.max(self.min_ttl_s)) }
    }
}

/// `etcdserverpb.Lease`.
#[derive(Clone)]
pub(super) struct LeaseService {
    inbox: Inbox,
    monitor: LeaderMonitor,
    config: LeaseConfig,
    /// Ends every stream.
    shutdown: CancellationToken,
}

impl LeaseService {
    pub(super) fn new(inbox: Inbox, monitor: LeaderMonitor, config: LeaseConfig, shutdown: CancellationToken) -> Self {
        LeaseService { inbox, monitor, config, shutdown }
    }

    /// A header of this moment, or of what was applied.
    fn header(&self, applied: Option<&ResponseHeader>) -> Option<ResponseHeader> {
        let revision = applied.map_or(0, |header| header.revision);
        Some(header(&self.inbox, if revision == 0 { self.inbox.published().facts.revision } else { revision }))
    }

    async fn grant(&self, mut request: LeaseGrantRequest) -> Result<LeaseGrantResponse, Error> {
        request.ttl = self.config.ttl_s(request.ttl)?;
        if request.id == 0 {
            request.id = self.inbox.next_id();
        }
        let request = InternalRaftRequest { lease_grant: Some(request), ..InternalRaftRequest::default() };
        match self.inbox.propose(request).await? {
            Outcome::LeaseGrant(mut response) => {
                response.header = self.header(response.header.as_ref());
                Ok(response)
            }
            _ => Err(Error::Other("etcdserver: outcome of another kind")),
        }
    }

    async fn revoke(&self, request: LeaseRevokeRequest) -> Result<LeaseRevokeResponse, Error> {
        let request = InternalRaftRequest { lease_revoke: Some(request), ..InternalRaftRequest::default() };
        match self.inbox.propose(request).await? {
            Outcome::LeaseRevoke(mut response) => {
                response.header = self.header(response.header.as_ref());
                Ok(response)
            }
            _ => Err(Error::Other("etcdserver: outcome of another kind")),
        }
    }

    async fn time_to_live(&self, request: LeaseTimeToLiveRequest) -> Result<LeaseTimeToLiveResponse, Error> {
        let mut response = self.inbox.lease_time_to_live(LeaseId(request.id), request.keys).await?;
        response.header = self.header(None);
        Ok(response)
    }
}

#[tonic::async_trait]
impl Lease for LeaseService {
    async fn lease_grant(&self, request: Request<LeaseGrantRequest>) -> Result<Response<LeaseGrantResponse>, Status> {
        self.grant(request.into_inner()).await.map(Response::new).map_err(|error| status(&error))
    }

    async fn lease_revoke(
        &self,
        request: Request<LeaseRevokeRequest>,
    ) -> Result<Response<LeaseRevokeResponse>, Status> {
        self.revoke(request.into_inner()).await.map(Response::new).map_err(|error| status(&error))
    }

    type LeaseKeepAliveStream = Pin<Box<dyn Stream<Item = Result<LeaseKeepAliveResponse, Status>> + Send>>;

    async fn lease_keep_alive(
        &self,
        request: Request<Streaming<LeaseKeepAliveRequest>>,
    ) -> Result<Response<Self::LeaseKeepAliveStream>, Status> {
        let leader = self.monitor.admit(&self.inbox, request.metadata()).map_err(|error| status(&error))?;
        let open = KeepAliveLoop { service: self.clone(), leader, requests: request.into_inner() };
        let responses = stream::unfold(Some(open), |open| async move {
            let mut open = open?;
            match open.next().await {
                Ok(None) => None,
                Ok(Some(response)) => Some((Ok(response), Some(open))),
                Err(last) => Some((Err(last), None)),
            }
        });
        Ok(Response::new(Box::pin(responses)))
    }

    async fn lease_time_to_live(
        &self,
        request: Request<LeaseTimeToLiveRequest>,
    ) -> Result<Response<LeaseTimeToLiveResponse>, Status> {
        self.time_to_live(request.into_inner()).await.map(Response::new).map_err(|error| status(&error))
    }

    async fn lease_leases(&self, _: Request<LeaseLeasesRequest>) -> Result<Response<LeaseLeasesResponse>, Status> {
        let published = self.inbox.published();
        let all = lease::all(&published.view).map_err(|fatal| {
            tracing::error!(%fatal, "the lease table can't be read");
            status(&Error::Stopped)
        })?;
        let leases = all.into_iter().map(|lease| LeaseStatus { id: lease.id.0 }).collect();
        Ok(Response::new(LeaseLeasesResponse { header: self.header(None), leases }))
    }
}

/// One keep-alive stream: requests are answered one by one, in order.
struct KeepAliveLoop {
    service: LeaseService,
    leader: LeaderGuard,
    requests: Streaming<LeaseKeepAliveRequest>,
}

impl KeepAliveLoop {
    /// The next answer; `None` after the client has closed its side.
    async fn next(&mut self) -> Result<Option<LeaseKeepAliveResponse>, Status> {
        tokio::select! {
            answer = keep_alive(&self.service, &mut self.requests) => answer,
            () = self.leader.lost() => Err(status(&Error::NoLeader)),
            () = self.service.shutdown.cancelled() => Err(status(&Error::Stopped)),
        }
    }
}

async fn keep_alive(
    service: &LeaseService,
    requests: &mut Streaming<LeaseKeepAliveRequest>,
) -> Result<Option<LeaseKeepAliveResponse>, Status> {
    let Some(LeaseKeepAliveRequest { id }) = requests.message().await? else { return Ok(None) };
    // Before the renewal: a client must not see a keep-alive succeed at a revision at which the lease was gone already.
    let header = service.header(None);
    match service.inbox.lease_keep_alive(LeaseId(id)).await {
        Ok(ttl) => Ok(Some(LeaseKeepAliveResponse { header, id, ttl })),
        Err(error) => Err(status(&keep_alive_error(error))),
    }
}

/// Whoever could not reach a leader's clock in time is told that there is none (contract 2.8).
fn keep_alive_error(error: Error) -> Error {
    match error {
        Error::NotLeader | Error::Timeout | Error::TimeoutDueToLeaderFail | Error::TimeoutDueToConnectionLost => {
            Error::NoLeader
        }
        error => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shortest_ttl_is_one_and_a_half_election_timeouts() {
        assert_eq!(LeaseConfig::new(100, 1000).min_ttl_s, 2);
        assert_eq!(LeaseConfig::new(500, 5000).min_ttl_s, 8);
        assert_eq!(LeaseConfig::new(100, 2000).min_ttl_s, 3);
        assert_eq!(LeaseConfig::new(10, 100).min_ttl_s, 1);
    }

    #[test]
    fn ttls_are_raised_and_refused_at_the_door() {
        let config = LeaseConfig::new(100, 1000);
        assert_eq!(config.ttl_s(0), Ok(2));
        assert_eq!(config.ttl_s(-5), Ok(2));
        assert_eq!(config.ttl_s(2), Ok(2));
        assert_eq!(config.ttl_s(60), Ok(60));
        assert_eq!(config.ttl_s(9_000_000_000), Ok(9_000_000_000));
        assert_eq!(config.ttl_s(9_000_000_001), Err(Error::LeaseTtlTooLarge));
    }
}
