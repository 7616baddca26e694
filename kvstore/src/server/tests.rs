//! Whole members in this process, spoken to through their inboxes.

use std::net::TcpListener;
use std::pin::Pin;
use std::sync::mpsc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use keelson_proto::etcdserverpb::{InternalRaftRequest, LeaseGrantRequest, PutRequest, RangeRequest};
use kvstore_core::store::Outcome;
use kvstore_core::types::LeaseId;
use kvstore_core::{Error, mvcc};

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
        initial_election_tick_advance: true,
        quota_backend_bytes: 2 << 30,
        max_request_bytes: 1_572_864,
        max_txn_ops: 128,
        watch_progress_notify_interval: Duration::from_secs(600),
        auto_compaction: None,
        lease_checkpoint_interval: None,
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
    let ranged = mvcc::range(published.moment(), &request).unwrap();
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
    member.stop();
    assert_eq!(runtime.block_on(member.inbox.read_index()), Err(Error::Stopped));
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
    member.stop();
}

/// Polls a proposal once: it is on its way then, or refused.
fn begin(proposal: &mut Pin<Box<impl Future<Output = Result<Outcome, Error>>>>) -> Option<Result<Outcome, Error>> {
    proposal.as_mut().now_or_never()
}

#[test]
fn proposals_are_refused_while_the_commit_runs_ahead_of_the_apply() {
    let dir = TempDir::new("back-pressure");
    let peer = listener();
    let founders = [Founder { name: "m1".into(), peer_urls: vec![url_of(&peer).to_string()] }];
    let config = config(&dir, "m1", &peer, &founders);
    let runtime = runtime();
    let mut member = Member::start(&config, vec![peer], open(&config)).unwrap();
    let inbox = member.inbox.clone();
    runtime.block_on(async {
        monitor::publish(&inbox, &config).await;
        put(&inbox, "a", "one").await;
    });

    // The applier publishes to the hub before it says what it has applied: whoever holds the hub holds the applier.
    let ((holds, held), (release, released)) = (mpsc::channel(), mpsc::channel::<()>());
    let holder = std::thread::spawn({
        let inbox = inbox.clone();
        move || inbox.hub().with(|_| (holds.send(()).unwrap(), released.recv().unwrap()))
    });
    held.recv().unwrap();
    let mut waiting = Vec::new();
    let propose = |n: usize| {
        let (inbox, request) = (inbox.clone(), put_request(&format!("k{n}"), "value"));
        Box::pin(async move { inbox.propose(request).await })
    };
    let gap = || inbox.raft().committed.saturating_sub(inbox.raft().applied);
    for n in 0..5_001 {
        let mut proposal = propose(n);
        assert_eq!(begin(&mut proposal), None, "refused at a gap of {}", gap());
        waiting.push(proposal);
    }
    while gap() <= 5_000 {
        std::thread::yield_now();
    }
    assert_eq!(begin(&mut propose(0)), Some(Err(Error::TooManyRequests)));

    release.send(()).unwrap();
    holder.join().unwrap();
    runtime.block_on(async {
        for proposal in waiting {
            // On a machine that is slow enough their time is up; then nobody knows.
            let outcome = proposal.await;
            assert!(matches!(outcome, Ok(Outcome::Put(_)) | Err(Error::Timeout)), "{outcome:?}");
        }
        put(&inbox, "b", "two").await;
        assert!(contains(get(&inbox, "b").await, "two"));
    });

    // Ours beyond etcd's: bytes that wait, wherever they are stuck.
    let room = inbox.room((512 << 20) - 1_024).unwrap();
    assert_eq!(begin(&mut propose(0)), Some(Err(Error::TooManyRequests)));
    drop(room);
    assert_eq!(begin(&mut propose(0)), None);
    member.stop();
}

/// Three members on ports of their own.
struct Three {
    runtime: tokio::runtime::Runtime,
    configs: Vec<Config>,
    members: Vec<Option<Member>>,
}

impl Three {
    fn start(dir: &TempDir) -> Three {
        Three::start_with(dir, |_| {})
    }

    fn start_with(dir: &TempDir, change: impl Fn(&mut Config)) -> Three {
        let peers: Vec<TcpListener> = (0..3).map(|_| listener()).collect();
        let founders: Vec<Founder> =
            (0..3).map(|n| Founder { name: format!("m{n}"), peer_urls: vec![url_of(&peers[n]).to_string()] }).collect();
        let mut configs: Vec<Config> =
            peers.iter().enumerate().map(|(n, peer)| config(dir, &format!("m{n}"), peer, &founders)).collect();
        configs.iter_mut().for_each(change);
        let members = peers
            .into_iter()
            .zip(&configs)
            .map(|(peer, config)| Some(Member::start(config, vec![peer], open(config)).unwrap()))
            .collect();
        Three { runtime: runtime(), configs, members }
    }

    fn inbox(&self, n: usize) -> &Inbox {
        &self.members[n].as_ref().unwrap().inbox
    }

    fn stop(&mut self, n: usize) {
        self.members[n].take().unwrap().stop();
    }

    fn restart(&mut self, n: usize) {
        let config = &self.configs[n];
        let url = &config.listen_peer_urls[0];
        // The port is free again as soon as its last owner's thread has gone.
        let peer = loop {
            match TcpListener::bind((url.host.as_str(), url.port)) {
                Ok(peer) => break peer,
                Err(_) => std::thread::yield_now(),
            }
        };
        peer.set_nonblocking(true).unwrap();
        self.members[n] = Some(Member::start(config, vec![peer], open(config)).unwrap());
    }

    fn leader(&self) -> usize {
        loop {
            let mut running = (0..3).filter(|n| self.members[*n].is_some());
            if let Some(leader) = running.find(|n| self.inbox(*n).raft().is_leader) {
                return leader;
            }
            std::thread::yield_now();
        }
    }
}

#[test]
fn three_members_agree_elect_again_and_catch_up() {
    let dir = TempDir::new("three");
    let mut three = Three::start(&dir);
    let leader = three.leader();
    let (one, other) = ((leader + 1) % 3, (leader + 2) % 3);
    three.runtime.block_on(async {
        put(three.inbox(one), "through", "a follower").await;
        assert!(contains(get(three.inbox(other), "through").await, "a follower"));
        // A lease granted through one follower, kept alive through the other, by the leader's clock.
        let grant = LeaseGrantRequest { id: 77, ttl: 60 };
        let request = InternalRaftRequest { lease_grant: Some(grant), ..InternalRaftRequest::default() };
        assert!(matches!(three.inbox(one).propose(request).await, Ok(Outcome::LeaseGrant(_))));
        assert_eq!(three.inbox(other).lease_keep_alive(LeaseId(77)).await, Ok(60));
        assert_eq!(three.inbox(other).lease_keep_alive(LeaseId(78)).await, Ok(0));
        let left = three.inbox(one).lease_time_to_live(LeaseId(77), true).await.unwrap();
        assert!(left.granted_ttl == 60 && left.ttl >= 58, "{left:?}");
    });
    three.stop(leader);
    let second = three.leader();
    assert_ne!(second, leader);
    three.runtime.block_on(async {
        put(three.inbox(one), "after", "the leader").await;
        assert!(contains(get(three.inbox(other), "after").await, "the leader"));
    });
    three.restart(leader);
    three.runtime.block_on(async {
        assert!(contains(get(three.inbox(leader), "after").await, "the leader"));
        put(three.inbox(leader), "again", "three").await;
    });
    (0..3).for_each(|n| three.stop(n));
}

#[test]
fn a_member_that_lags_too_far_is_sent_a_snapshot() {
    let dir = TempDir::new("snapshot");
    let mut three = Three::start(&dir);
    let away = (three.leader() + 1) % 3;
    three.runtime.block_on(async {
        put(three.inbox(away), "before", "it left").await;
    });
    three.stop(away);
    let leader = three.leader();
    // Until the log no longer reaches back to where the member left.
    let inbox = three.inbox(leader).clone();
    let left = inbox.raft().committed;
    let raft = &three.members[leader].as_ref().unwrap().shared.raft;
    let mut batch = 0;
    three.runtime.block_on(async {
        while raft.first_index() <= left {
            batch += 1;
            let puts = (0..100).map(|n| {
                let inbox = inbox.clone();
                async move { put(&inbox, &format!("k{batch}-{n}"), &"v".repeat(50)).await }
            });
            futures_util::future::join_all(puts).await;
        }
    });
    let revision = inbox.published().facts.revision;
    three.restart(away);
    three.runtime.block_on(async {
        assert!(contains(get(three.inbox(away), "k1-99").await, "v"));
        assert!(contains(get(three.inbox(away), "before").await, "it left"));
        assert_eq!(three.inbox(away).published().facts.revision, revision);
        put(three.inbox(away), "after", "the snapshot").await;
    });
    (0..3).for_each(|n| three.stop(n));
    let disk = open(&three.configs[away]);
    assert!(disk.state.installed().index > 5_000, "it caught up without a snapshot: {:?}", disk.state.installed());
}

#[test]
fn what_is_left_of_a_lease_outlives_its_leader() {
    let dir = TempDir::new("checkpoints");
    let mut three = Three::start_with(&dir, |config| {
        config.lease_checkpoint_interval = Some(Duration::from_secs(1));
    });
    let leader = three.leader();
    let (one, other) = ((leader + 1) % 3, (leader + 2) % 3);
    let id = LeaseId(7);
    let checkpointed = |inbox: &Inbox| {
        let left = kvstore_core::lease::find(&inbox.published().view, id).unwrap();
        left.map_or(0, |lease| lease.remaining_ttl_s)
    };
    three.runtime.block_on(async {
        let grant = LeaseGrantRequest { id: id.0, ttl: 600 };
        let request = InternalRaftRequest { lease_grant: Some(grant), ..InternalRaftRequest::default() };
        three.inbox(one).propose(request).await.unwrap();
        // What is left reaches every member's table.
        while !(1..=598).contains(&checkpointed(three.inbox(other))) {
            tokio::task::yield_now().await;
        }
    });
    three.stop(leader);
    three.leader();
    three.runtime.block_on(async {
        // The next leader goes on from there (an election timeout is 200 ms), and a keep-alive takes it back for good.
        let left = three.inbox(one).lease_time_to_live(id, false).await.unwrap();
        assert!(left.granted_ttl == 600 && (1..=599).contains(&left.ttl), "{left:?}");
        assert_eq!(three.inbox(other).lease_keep_alive(id).await, Ok(600));
        assert!((599..=600).contains(&three.inbox(one).lease_time_to_live(id, false).await.unwrap().ttl));
    });
    (0..3).filter(|n| *n != leader).for_each(|n| three.stop(n));
}

#[test]
fn a_member_compacts_by_itself() {
    let dir = TempDir::new("compacts");
    let mut three = Three::start(&dir);
    let leader = three.leader();
    let follower = (leader + 1) % 3;
    let compacted = |n: usize| three.inbox(n).published().facts.compacted;
    let member = |n: usize| three.members[n].as_ref().unwrap();
    three.runtime.block_on(async {
        for n in 0..50 {
            put(three.inbox(leader), "k", &n.to_string()).await;
        }
        let retention = Some(kvstore_core::compactor::Retention::Time { ms: 500 });
        let work = async {
            while compacted(follower) < 50 || member(follower).inbox.published().facts.compacting {
                tokio::task::yield_now().await;
            }
        };
        // A follower never asks for it; the leader does, half a second after.
        tokio::select! {
            () = compaction::run(&member(follower).inbox, retention, member(follower).clock) => {}
            () = compaction::run(&member(leader).inbox, retention, member(leader).clock) => {}
            () = work => {}
        }
        assert_eq!(compacted(follower), 51);
        assert!(contains(get(three.inbox(follower), "k").await, "49"));
    });
    (0..3).for_each(|n| three.stop(n));
}
