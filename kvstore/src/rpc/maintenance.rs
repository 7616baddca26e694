//! The Maintenance service: Status and Alarm. Snapshots, hashes, defragmentation and downgrades are later issues, and
//! refused by name until then.

use std::sync::Arc;

use keelson_proto::etcdserverpb::alarm_request::AlarmAction;
use keelson_proto::etcdserverpb::maintenance_server::Maintenance;
use keelson_proto::etcdserverpb::{
    AlarmRequest, AlarmResponse, AlarmType, DefragmentRequest, DefragmentResponse, DowngradeInfo, DowngradeRequest,
    DowngradeResponse, HashKvRequest, HashKvResponse, HashRequest, HashResponse, InternalRaftRequest,
    MoveLeaderRequest, MoveLeaderResponse, SnapshotRequest, SnapshotResponse, StatusRequest, StatusResponse,
};
use kvstore_core::Error;
use kvstore_core::store::Outcome;
use tonic::{Request, Response, Status};

use super::status::status;
use super::{Context, complete, header, later, unexpected};
use crate::ETCD_VERSION;

/// Response metadata that carries Keelson's own version beside etcd's in the message.
const KEELSON_VERSION_KEY: &str = "keelson-version";

#[derive(Clone)]
pub(crate) struct MaintenanceService(pub(crate) Arc<Context>);

/// The storage version that tools see: etcd's of the API's minor version.
pub(crate) const STORAGE_VERSION: &str = "3.7.0";

/// Which member raised what, in etcd's words.
fn alarm_text(member_id: u64, alarm: i32) -> String {
    let kind = AlarmType::try_from(alarm).map_or("UNKNOWN", |kind| kind.as_str_name());
    format!("memberID:{member_id} alarm:{kind}")
}

#[tonic::async_trait]
impl Maintenance for MaintenanceService {
    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let inbox = &self.0.inbox;
        let (raft, published) = (inbox.raft(), inbox.published());
        let facts = &published.facts;
        let mut errors = Vec::new();
        if raft.leader.is_none() {
            errors.push(Error::NoLeader.to_string());
        }
        errors.extend(facts.alarms.iter().map(|a| alarm_text(a.member_id, a.alarm)));
        let mut response = Response::new(StatusResponse {
            header: Some(header(inbox, facts.revision)),
            version: ETCD_VERSION.to_owned(),
            // What was written a moment ago is in no file yet, and tools subtract one from the other.
            db_size: inbox.disk_size().max(facts.size_in_use),
            leader: raft.leader.map_or(0, |id| id.0),
            raft_index: raft.committed,
            raft_term: raft.term,
            raft_applied_index: raft.applied,
            errors,
            db_size_in_use: facts.size_in_use,
            is_learner: false,
            storage_version: STORAGE_VERSION.to_owned(),
            db_size_quota: facts.quota,
            downgrade_info: Some(DowngradeInfo::default()),
        });
        response
            .metadata_mut()
            .insert(KEELSON_VERSION_KEY, tonic::metadata::MetadataValue::from_static(env!("CARGO_PKG_VERSION")));
        Ok(response)
    }

    async fn alarm(&self, request: Request<AlarmRequest>) -> Result<Response<AlarmResponse>, Status> {
        let request = request.into_inner();
        let inbox = &self.0.inbox;
        if request.action == AlarmAction::Get as i32 {
            inbox.read_index().await.map_err(|e| status(&e))?;
            let published = inbox.published();
            let all = request.alarm == AlarmType::None as i32;
            let alarms = published.facts.alarms.iter().filter(|a| all || a.alarm == request.alarm).cloned().collect();
            let header = Some(header(inbox, published.facts.revision));
            return Ok(Response::new(AlarmResponse { header, alarms }));
        }
        let proposal = InternalRaftRequest { alarm: Some(request), ..Default::default() };
        match Box::pin(inbox.propose(proposal)).await.map_err(|e| status(&e))? {
            Outcome::Alarm(mut response) => {
                complete(inbox, &mut response.header);
                Ok(Response::new(response))
            }
            _ => Err(unexpected()),
        }
    }

    async fn defragment(&self, _: Request<DefragmentRequest>) -> Result<Response<DefragmentResponse>, Status> {
        later("Defragment")
    }

    async fn hash(&self, _: Request<HashRequest>) -> Result<Response<HashResponse>, Status> {
        later("Hash")
    }

    async fn hash_kv(&self, _: Request<HashKvRequest>) -> Result<Response<HashKvResponse>, Status> {
        later("HashKV")
    }

    type SnapshotStream = tokio_stream::Empty<Result<SnapshotResponse, Status>>;

    async fn snapshot(&self, _: Request<SnapshotRequest>) -> Result<Response<Self::SnapshotStream>, Status> {
        later("Snapshot")
    }

    async fn move_leader(&self, _: Request<MoveLeaderRequest>) -> Result<Response<MoveLeaderResponse>, Status> {
        later("MoveLeader")
    }

    async fn downgrade(&self, _: Request<DowngradeRequest>) -> Result<Response<DowngradeResponse>, Status> {
        later("Downgrade")
    }
}
