//! The Cluster service: who the members are. Changing them is a later issue, and refused by name until then.

use std::sync::Arc;

use keelson_proto::etcdserverpb::cluster_server::Cluster;
use keelson_proto::etcdserverpb::{
    Member, MemberAddRequest, MemberAddResponse, MemberListRequest, MemberListResponse, MemberPromoteRequest,
    MemberPromoteResponse, MemberRemoveRequest, MemberRemoveResponse, MemberUpdateRequest, MemberUpdateResponse,
    ResponseHeader,
};
use keelson_proto::membershippb;
use tonic::{Request, Response, Status};

use super::status::status;
use super::{Context, header, later};

#[derive(Clone)]
pub(crate) struct ClusterService(pub(crate) Arc<Context>);

impl ClusterService {
    /// Cluster answers carry no revision (contract 2.5).
    fn header(&self) -> ResponseHeader {
        header(&self.0.inbox, 0)
    }
}

/// A member as the API shows it.
fn member(record: &membershippb::Member) -> Member {
    let (raft, attributes) = (record.raft_attributes.clone(), record.member_attributes.clone());
    let (raft, attributes) = (raft.unwrap_or_default(), attributes.unwrap_or_default());
    Member {
        id: record.id,
        name: attributes.name,
        peer_urls: raft.peer_urls,
        client_urls: attributes.client_urls,
        is_learner: raft.is_learner,
    }
}

#[tonic::async_trait]
impl Cluster for ClusterService {
    async fn member_list(&self, request: Request<MemberListRequest>) -> Result<Response<MemberListResponse>, Status> {
        if request.into_inner().linearizable {
            self.0.inbox.read_index().await.map_err(|e| status(&e))?;
        }
        let mut members: Vec<Member> = self.0.inbox.published().facts.members.iter().map(member).collect();
        members.sort_by_key(|m| m.id);
        Ok(Response::new(MemberListResponse { header: Some(self.header()), members }))
    }

    async fn member_add(&self, _: Request<MemberAddRequest>) -> Result<Response<MemberAddResponse>, Status> {
        later("adding a member")
    }

    async fn member_remove(&self, _: Request<MemberRemoveRequest>) -> Result<Response<MemberRemoveResponse>, Status> {
        later("removing a member")
    }

    async fn member_update(&self, _: Request<MemberUpdateRequest>) -> Result<Response<MemberUpdateResponse>, Status> {
        later("changing a member")
    }

    async fn member_promote(
        &self,
        _: Request<MemberPromoteRequest>,
    ) -> Result<Response<MemberPromoteResponse>, Status> {
        later("promoting a member")
    }
}
