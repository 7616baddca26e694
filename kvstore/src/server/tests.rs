//! Whole members in this process, spoken to through their inboxes.

use std::net::TcpListener;
use std::time::Duration;

use bytes::Bytes;
use keelson_proto::etcdserverpb::{InternalRaftRequest, LeaseGrantRequest, PutRequest, RangeRequest};
use kvstore_core::mvcc;
use kvstore_core::store::Outcome;
use kvstore_core::types::LeaseId;

use super::*;
use crate::config::{ClusterState, Founder, LogFormat};
use crate::testing::TempDir;

const HEARTBEAT_MS: u64 = 20;
const ELECTION_MS: u64 = 200;

/// A member's configuration with its peer port already bound, so that no two tests meet.
fn config(dir: &TempDir, name: &str, peer: &TcpListener, founders: &[Founder]) -> Config {
    let url = url_of(peer);
    Config {
        name: name.into(),
        data_dir: dir.path().join(name),
        listen_client_urls: Vec::new(),
        advertise_client_urls: vec![Url { host: "127.0.0.1".into(), port: 2379 }],
        listen_peer_urls: vec![url.clone()],
        advertise_peer_urls: vec![url],
        listen_metrics_urls: Vec::new(),
        founders: founders.to_vec(),
        cluster_state: ClusterState::New,
        cluster_token: "test".into(),
        snapshot_count: 50,
        heartbeat_interval_ms: HEARTBEAT_MS,
        election_timeout_ms: ELECTION_MS,
        quota_backend_bytes: 2 << 30,
        max_request_bytes: 1_572_864,
        max_txn_ops: 128,
        watch_progress_notify_interval: Duration::from_secs(600),
        log_level: tracing::Level::INFO,
        log_format: LogFormat::Console,
    }
}

fn url_of(listener: &TcpListener) -> Url {
    Url { host: "127.0.0.1".into(), port: listener.local_addr().unwrap().port() }
}

fn listener() -> TcpListener {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    listener
}

fn open(config: &Config) -> Disk {
    let dir = MemberDir::lock(&config.data_dir, |owner| identity::may_open(config, owner)).unwrap();
    match dir.open(StateOptions::default()).unwrap() {
        Opened::Member(disk) => *disk,
        Opened::Fresh(fresh) => {
            let cluster = identity::found(config).unwrap();
            fresh.found(cluster.owner, Store::bootstrap(&cluster.founders, cluster.id)).unwrap()
        }
    }
}

fn put_request(key: &str, value: &str) -> InternalRaftRequest {
    let put = PutRequest {
        key: Bytes::copy_from_slice(key.as_bytes()),
        value: Bytes::copy_from_slice(value.as_bytes()),
        ..PutRequest::default()
    };
    InternalRaftRequest { put: Some(put), ..InternalRaftRequest::default() }
}

/// Puts, and returns the revision. Tries again while there is no leader to be had.
async fn put(inbox: &Inbox, key: &str, value: &str) -> i64 {
    loop {
        match inbox.propose(put_request(key, value)).await {
            Ok(Outcome::Put(response)) => return response.header.unwrap().revision,
            Ok(other) => panic!("{other:?}"),
            Err(_) => tokio::task::yield_now().await,
        }
    }
}

/// A linearizable read of one key's value.
async fn get(inbox: &Inbox, key: &str) -> Option<Vec<u8>> {
    while inbox.read_index().await.is_err() {}
    let published = inbox.published();
    let request = RangeRequest { key: Bytes::copy_from_slice(key.as_bytes()), ..RangeRequest::default() };
    let ranged = mvcc::range(&published.view, published.facts.bounds(), &request).unwrap();
    (ranged.len > 0).then(|| ranged.kvs.to_vec())
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn contains(value: Option<Vec<u8>>, part: &str) -> bool {
    value.is_some_and(|bytes| bytes.windows(part.len()).any(|window| window == part.as_bytes()))
}

#[test]
fn one_member_serves_and_finds_everything_again_after_a_restart() {
    let dir = TempDir::new("one-member");
    let peer = listener();
    let founders = [Founder { name: "m1".into(), peer_urls: vec![url_of(&peer).to_string()] }];
    let config = config(&dir, "m1", &peer, &founders);
    let runtime = runtime();

    let mut member = Member::start(&config, vec![peer], open(&config)).unwrap();
    let first = runtime.block_on(async {
        monitor::publish(&member.inbox, &config).await;
        let first = put(&member.inbox, "a", "one").await;
        for n in 0..200 {
            put(&member.inbox, &format!("k{n}"), "value").await;
        }
        assert!(contains(get(&member.inbox, "a").await, "one"));
        first
    });
    member.stop_machines();
    assert_eq!(runtime.block_on(member.inbox.read_index()), Err(kvstore_core::Error::Stopped));
    drop(member);

    let mut member = Member::start(&config, vec![listener()], open(&config)).unwrap();
    runtime.block_on(async {
        monitor::publish(&member.inbox, &config).await;
        member.wait_applied().await;
        assert!(contains(get(&member.inbox, "a").await, "one"));
        assert!(contains(get(&member.inbox, "k199").await, "value"));
        assert_eq!(put(&member.inbox, "b", "two").await, first + 201);
        let members = &member.inbox.published().facts.members;
        assert_eq!(members[0].member_attributes.as_ref().unwrap().name, "m1");
    });
    member.stop_machines();
}
