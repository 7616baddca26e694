//! What a running member tells the cluster of itself, and what a leader makes of it.

use std::time::Duration;

use keelson_proto::etcdserverpb::InternalRaftRequest;
use keelson_proto::membershippb::{Attributes, ClusterMemberAttrSetRequest, ClusterVersionSetRequest};
use kvstore_core::Error;

use crate::config::{Config, Url};
use crate::inbox::Inbox;
use crate::peer::Peers;

/// The version of etcd's API that every member of this version serves.
const CLUSTER_VERSION: &str = "3.7.0";
const RETRY: Duration = Duration::from_millis(200);

/// Publishes this member's name and client URLs through the log, until it succeeds. When it returns, this member has
/// applied everything that was committed before it started.
pub(super) async fn publish(inbox: &Inbox, config: &Config) {
    let attributes = Attributes {
        name: config.name.clone(),
        client_urls: config.advertise_client_urls.iter().map(Url::to_string).collect(),
    };
    let member_id = inbox.identity().member_id;
    let request = ClusterMemberAttrSetRequest { member_id: member_id.0, member_attributes: Some(attributes) };
    loop {
        let request =
            InternalRaftRequest { cluster_member_attr_set: Some(request.clone()), ..InternalRaftRequest::default() };
        match inbox.propose(request).await {
            Ok(_) => break,
            Err(Error::Stopped) => return std::future::pending().await,
            Err(error) => {
                tracing::warn!("failed to publish local member to cluster through raft: {error}");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
    tracing::info!(local_member_id = %member_id, "published local member to cluster through raft");
}

/// As the leader: sets the cluster's version once every member has been reached. Never returns.
pub(super) async fn keep_version(inbox: &Inbox, peers: Peers) {
    loop {
        let decided = inbox.published().facts.cluster_version.is_some();
        if !decided && inbox.raft().is_leader && peers.all_active() {
            let request = InternalRaftRequest {
                cluster_version_set: Some(ClusterVersionSetRequest { ver: CLUSTER_VERSION.into() }),
                ..InternalRaftRequest::default()
            };
            match inbox.propose(request).await {
                Ok(_) => tracing::info!("set the initial cluster version to {CLUSTER_VERSION}"),
                Err(error) => tracing::warn!("failed to set the cluster version: {error}"),
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}
