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
use kvstore_core::store::{Outcome, quota};
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
    pub(super) fn new(heartbeat_ms: u64, election_timeout_ms: u64) -> LeaseConfig {
        LeaseConfig { min_ttl_s: lease::min_ttl_s(heartbeat_ms, election_timeout_ms) }
    }

    /// The TTL that goes into the log; one that is too large is refused there, after what else may refuse it.
    fn ttl_s(self, asked: i64) -> i64 {
        asked.max(self.min_ttl_s)
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
        self.inbox.check_quota(quota::LEASE_COST).await?;
        request.ttl = self.config.ttl_s(request.ttl);
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
        let leader = self.monitor.admit(&self.inbox, request.metadata().as_ref()).map_err(|error| status(&error))?;
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
        let all = self.inbox.lease_list().await.map_err(|error| status(&error))?;
        let leases = all.into_iter().map(|id| LeaseStatus { id: id.0 }).collect();
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
        Err(error) => Err(status(&error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ttls_are_raised_at_the_door() {
        let config = LeaseConfig::new(100, 1000);
        assert_eq!([-5, 0, 2, 60].map(|asked| config.ttl_s(asked)), [2, 2, 2, 60]);
    }
}
