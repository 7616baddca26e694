//! Who a member is: ids as etcd computes them, and whose directory it may open (contract 2.10).

use std::hash::{BuildHasher, Hasher, RandomState};

use kvstore_core::store::Founder;
use kvstore_core::types::{ClusterId, MemberId};
use sha1::{Digest, Sha1};

use crate::config::{ClusterState, Config, Url};
use crate::disk::Owner;

/// A cluster that is to be founded, and this member of it.
pub(super) struct Cluster {
    pub(super) id: ClusterId,
    pub(super) founders: Vec<Founder>,
    pub(super) owner: Owner,
}

/// The first members as `--initial-cluster` has them; the same on each of them.
pub(super) fn found(config: &Config) -> Result<Cluster, String> {
    if config.cluster_state == ClusterState::Existing {
        return Err(
            "--initial-cluster-state=existing: joining a running cluster is not supported yet by this version".into()
        );
    }
    let mut founders: Vec<Founder> = config
        .founders
        .iter()
        .map(|founder| Founder {
            id: member_id(&founder.peer_urls, &config.cluster_token),
            name: founder.name.clone(),
            peer_urls: founder.peer_urls.clone(),
        })
        .collect();
    founders.sort_by_key(|founder| founder.id);
    let id = cluster_id(&founders);
    let own = founders.iter().find(|founder| founder.name == config.name);
    let own =
        own.ok_or_else(|| format!("couldn't find local name {:?} in the initial cluster configuration", config.name))?;
    let owner = Owner { cluster_id: id, member_id: own.id, name: own.name.clone(), peer_urls: own.peer_urls.clone() };
    Ok(Cluster { id, founders, owner })
}

/// First 8 bytes of SHA-1 over the sorted peer URLs and the cluster's token.
fn member_id(peer_urls: &[String], token: &str) -> MemberId {
    let mut urls: Vec<&str> = peer_urls.iter().map(String::as_str).collect();
    urls.sort_unstable();
    MemberId(first_eight(&[urls.concat().as_bytes(), token.as_bytes()].concat()))
}

/// First 8 bytes of SHA-1 over the members' ids, ascending.
fn cluster_id(founders: &[Founder]) -> ClusterId {
    let ids: Vec<u8> = founders.iter().flat_map(|founder| founder.id.0.to_be_bytes()).collect();
    ClusterId(first_eight(&ids))
}

fn first_eight(bytes: &[u8]) -> u64 {
    let digest = Sha1::digest(bytes);
    let (first, _) = digest.split_first_chunk::<8>().expect("a SHA-1 has 20 bytes");
    u64::from_be_bytes(*first)
}

/// A member may be renamed and may move, as with etcd, but a directory whose member had another name *and* other peer
/// URLs is another member's.
pub(super) fn may_open(config: &Config, owner: &Owner) -> Result<(), String> {
    let urls: Vec<String> = config.advertise_peer_urls.iter().map(Url::to_string).collect();
    if config.name != owner.name && !owner.peer_urls.iter().any(|url| urls.contains(url)) {
        return Err(format!(
            "this data directory belongs to member {} ({}, {}) of cluster {}, not to {} ({})",
            owner.name,
            owner.member_id,
            owner.peer_urls.join(","),
            owner.cluster_id,
            config.name,
            urls.join(",")
        ));
    }
    Ok(())
}

/// 64 bits that nobody can guess: the standard library seeds its hashers from the operating system.
pub(super) fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Seen on etcd: a single member with the default URL and token.
    #[test]
    fn ids_are_etcds() {
        let id = member_id(&["http://localhost:2380".into()], "etcd-cluster");
        assert_eq!(id.to_string(), "8e9e05c52164694d");
        let founders = [Founder { id, name: "default".into(), peer_urls: Vec::new() }];
        assert_eq!(cluster_id(&founders).to_string(), "cdf818194e3a8c32");
    }

    #[test]
    fn urls_are_sorted_before_they_are_hashed() {
        let (a, b) = ("http://10.0.0.1:2380".to_owned(), "http://10.0.0.2:2380".to_owned());
        assert_eq!(member_id(&[a.clone(), b.clone()], "t"), member_id(&[b, a], "t"));
    }
}
