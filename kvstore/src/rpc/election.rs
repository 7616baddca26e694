//! The Election service: a queue of keys like a lock's, whose oldest leads and whose value is what it proclaims (contract
//! 2.12).
//!
//! What it does not do: keep a lease alive. A candidate that fails while it waits keeps its place, as in etcd; one whose client
//! has gone gives it up.

use std::collections::VecDeque;
use std::pin::Pin;

use bytes::Bytes;
use futures_util::{Stream, stream};
use keelson_proto::etcdserverpb::request_op::Request as Op;
use keelson_proto::etcdserverpb::{DeleteRangeRequest, ResponseHeader};
use keelson_proto::mvccpb::KeyValue;
use keelson_proto::mvccpb::event::EventType;
use keelson_proto::v3electionpb::election_server::Election;
use keelson_proto::v3electionpb::{
    CampaignRequest, CampaignResponse, LeaderKey, LeaderRequest, LeaderResponse, ProclaimRequest, ProclaimResponse,
    ResignRequest, ResignResponse,
};
use kvstore_core::Error;
use tonic::{Request, Response, Status};

use super::leader::{LeaderGuard, LeaderMonitor};
use super::recipe::{self, Recipe, Watched, found, revision};
use super::status::{recipe_status, status};

const NO_LEADER: Error = Error::Other("election: no leader");
const NOT_LEADER: Error = Error::Other("election: not leader");
const NO_LEADER_FIELD: Error = Error::Other("\"leader\" field must be provided");

#[derive(Clone)]
pub(super) struct ElectionService {
    recipe: Recipe,
    monitor: LeaderMonitor,
}

impl ElectionService {
    pub(super) fn new(recipe: Recipe, monitor: LeaderMonitor) -> ElectionService {
        ElectionService { recipe, monitor }
    }

    async fn campaign(&self, request: CampaignRequest) -> Result<CampaignResponse, Error> {
        let CampaignRequest { name, lease, value } = request;
        let lease = self.recipe.session(lease).await?;
        let prefix = recipe::prefix_of(&name);
        let key = recipe::key_of(&prefix, lease);
        let success = vec![recipe::put(&key, value.clone(), lease)];
        let failure = vec![Op::RequestRange(recipe::get(&key))];
        let response = self.recipe.if_created_at(&key, 0, success, failure).await?;
        let mut candidacy = Candidacy { recipe: &self.recipe, key: key.clone(), rev: 0, stands: true };
        if response.succeeded {
            candidacy.rev = revision(response.header.as_ref());
        } else if let Some(before) = found(&response, 0) {
            candidacy.rev = before.create_revision;
            if before.value != value
                && let Err(error) = self.proclaim_as(&key, candidacy.rev, lease, value).await
            {
                let _ = resign(&self.recipe, &key, candidacy.rev).await;
                candidacy.stands = false;
                return Err(error);
            }
        }
        let waited = self.recipe.wait_deletes(&prefix, candidacy.rev - 1).await;
        candidacy.stands = false;
        waited?;
        let leader = LeaderKey { name, key, rev: candidacy.rev, lease };
        Ok(CampaignResponse { header: response.header, leader: Some(leader) })
    }

    async fn proclaim(&self, request: ProclaimRequest) -> Result<ProclaimResponse, Error> {
        let leader = request.leader.ok_or(NO_LEADER_FIELD)?;
        let lease = self.recipe.session(leader.lease).await?;
        let header = self.proclaim_as(&leader.key, leader.rev, lease, request.value).await?;
        Ok(ProclaimResponse { header })
    }

    async fn proclaim_as(
        &self,
        key: &Bytes,
        rev: i64,
        lease: i64,
        value: Bytes,
    ) -> Result<Option<ResponseHeader>, Error> {
        let put = recipe::put(key, value, lease);
        let response = self.recipe.if_created_at(key, rev, vec![put], Vec::new()).await?;
        if response.succeeded { Ok(response.header) } else { Err(NOT_LEADER) }
    }

    async fn leader(&self, request: LeaderRequest) -> Result<LeaderResponse, Error> {
        let prefix = recipe::prefix_of(&request.name);
        let response = self.recipe.get(recipe::oldest_of(&prefix)).await?;
        let kv = response.kvs.into_iter().next().ok_or(NO_LEADER)?;
        Ok(LeaderResponse { header: response.header, kv: Some(kv) })
    }

    async fn resign(&self, request: ResignRequest) -> Result<ResignResponse, Error> {
        let leader = request.leader.ok_or(NO_LEADER_FIELD)?;
        self.recipe.session(leader.lease).await?;
        let header = resign(&self.recipe, &leader.key, leader.rev).await?;
        Ok(ResignResponse { header })
    }
}

/// Deletes the key if it is still that of this campaign.
async fn resign(recipe: &Recipe, key: &Bytes, rev: i64) -> Result<Option<ResponseHeader>, Error> {
    let delete = Op::RequestDeleteRange(DeleteRangeRequest { key: key.clone(), ..Default::default() });
    Ok(recipe.if_created_at(key, rev, vec![delete], Vec::new()).await?.header)
}

/// A candidate's place, given up when its request is dropped: the client has gone, or its deadline has passed.
struct Candidacy<'a> {
    recipe: &'a Recipe,
    key: Bytes,
    rev: i64,
    stands: bool,
}

impl Drop for Candidacy<'_> {
    fn drop(&mut self) {
        if self.stands {
            let (recipe, key, rev) = (self.recipe.clone(), self.key.clone(), self.rev);
            self.recipe.afterwards("a candidacy", async move { resign(&recipe, &key, rev).await.map(drop) });
        }
    }
}

#[tonic::async_trait]
impl Election for ElectionService {
    async fn campaign(&self, request: Request<CampaignRequest>) -> Result<Response<CampaignResponse>, Status> {
        self.campaign(request.into_inner()).await.map(Response::new).map_err(|e| recipe_status(&e))
    }

    async fn proclaim(&self, request: Request<ProclaimRequest>) -> Result<Response<ProclaimResponse>, Status> {
        self.proclaim(request.into_inner()).await.map(Response::new).map_err(|e| recipe_status(&e))
    }

    async fn leader(&self, request: Request<LeaderRequest>) -> Result<Response<LeaderResponse>, Status> {
        self.leader(request.into_inner()).await.map(Response::new).map_err(|e| recipe_status(&e))
    }

    type ObserveStream = Pin<Box<dyn Stream<Item = Result<LeaderResponse, Status>> + Send>>;

    async fn observe(&self, request: Request<LeaderRequest>) -> Result<Response<Self::ObserveStream>, Status> {
        let metadata = request.metadata().as_ref();
        let leader = self.monitor.admit(self.recipe.inbox(), metadata).map_err(|e| status(&e))?;
        let prefix = recipe::prefix_of(&request.get_ref().name);
        let observer = Observer { recipe: self.recipe.clone(), prefix, watched: None, seen: VecDeque::new() };
        let responses = stream::unfold(Some((observer, leader)), |open| async move {
            let (mut observer, mut leader): (Observer, LeaderGuard) = open?;
            let next = tokio::select! {
                next = observer.next() => next,
                () = leader.lost() => Err(Error::NoLeader),
            };
            match next {
                Ok(response) => Some((Ok(response), Some((observer, leader)))),
                Err(error @ (Error::Stopped | Error::NoLeader)) => Some((Err(status(&error)), None)),
                // etcd's observer ends without a word when a read or a watch of its own fails.
                Err(error) => {
                    tracing::debug!(%error, "an observer of an election ends");
                    None
                }
            }
        });
        Ok(Response::new(Box::pin(responses)))
    }

    async fn resign(&self, request: Request<ResignRequest>) -> Result<Response<ResignResponse>, Status> {
        self.resign(request.into_inner()).await.map(Response::new).map_err(|e| recipe_status(&e))
    }
}

/// Who leads, and what each leader proclaims, as it changes.
struct Observer {
    recipe: Recipe,
    prefix: Bytes,
    /// The leader's key; `None`: it is not known who leads.
    watched: Option<Watched>,
    seen: VecDeque<LeaderResponse>,
}

impl Observer {
    async fn next(&mut self) -> Result<LeaderResponse, Error> {
        loop {
            if let Some(response) = self.seen.pop_front() {
                return Ok(response);
            }
            let Some(watched) = &mut self.watched else {
                let (header, kv) = self.find().await?;
                self.watched = Some(self.recipe.watch(kv.key.clone(), Bytes::new(), header.revision + 1));
                return Ok(LeaderResponse { header: Some(header), kv: Some(kv) });
            };
            let events = watched.next().await?;
            for event in events.events {
                if event.r#type() == EventType::Delete {
                    self.watched = None;
                    break;
                }
                self.seen.push_back(LeaderResponse { header: Some(events.header), kv: event.kv });
            }
        }
    }

    /// The present leader, or the first to come.
    async fn find(&self) -> Result<(ResponseHeader, KeyValue), Error> {
        let response = self.recipe.get(recipe::oldest_of(&self.prefix)).await?;
        let header = response.header.unwrap_or_default();
        if let Some(kv) = response.kvs.into_iter().next() {
            return Ok((header, kv));
        }
        let mut watched = self.recipe.watch(self.prefix.clone(), recipe::end_of(&self.prefix), header.revision);
        loop {
            let seen = watched.next().await?;
            let put = seen.events.into_iter().find(|event| event.r#type() == EventType::Put);
            if let Some(kv) = put.and_then(|event| event.kv) {
                // Several revisions may have come together: the header is that of this one.
                return Ok((ResponseHeader { revision: kv.mod_revision, ..seen.header }, kv));
            }
        }
    }
}
