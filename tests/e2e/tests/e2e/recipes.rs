//! The Lock and Election services, which make queues of keys: who gets what when, and who is not stuck behind whom.

use std::time::Duration;

use bytes::Bytes;
use e2e::raw::{Raw, frame};
use e2e::rpc::{self, Rpc, prefix_end};
use e2e::{Cluster, Kind, PATIENCE, eventually};
use keelson_proto::etcdserverpb::range_request::{SortOrder, SortTarget};
use keelson_proto::etcdserverpb::{
    LeaseGrantRequest, LeaseLeasesRequest, LeaseRevokeRequest, LeaseTimeToLiveRequest, RangeRequest, ResponseHeader,
};
use keelson_proto::v3electionpb::{
    CampaignRequest, CampaignResponse, LeaderKey, LeaderRequest, LeaderResponse, ProclaimRequest, ResignRequest,
};
use keelson_proto::v3lockpb::{LockRequest, LockResponse, UnlockRequest};
use prost::Message;
use tokio::task::JoinHandle;
use tonic::{Code, Status, Streaming};

on_both!(
    locked_in_turn,
    locked_again,
    a_lease_of_its_own,
    lock_refusals,
    lock_by_few_operations,
    unlocked_by_another,
    lease_lost_while_waiting,
    nobody_waits_behind_a_client_that_left,
    nobody_waits_behind_a_deadline,
    campaigns_in_turn,
    proclaimed_again,
    election_refusals,
    observed,
    candidates_that_left,
    without_a_leader,
    across_a_leaders_death,
);

const NO_LEASE: &str = "etcdserver: requested lease not found";
const NO_KEY: &str = "etcdserver: key is not provided";

fn on_one(kind: Kind, body: impl AsyncFnOnce(Rpc)) {
    let Some(cluster) = Cluster::start(kind, 1) else { return };
    // A wait is longer than a call usually takes.
    rpc::run(async { body(Rpc::to(&cluster.members[0].client_url(), PATIENCE)).await });
}

#[track_caller]
fn refused<T: std::fmt::Debug>(answer: Result<T, Status>, code: Code, text: &str) {
    let status = answer.expect_err("a refusal");
    assert_eq!((status.code(), status.message()), (code, text));
}

async fn grant(rpc: &mut Rpc) -> i64 {
    rpc.lease.lease_grant(LeaseGrantRequest { ttl: 600, id: 0 }).await.unwrap().into_inner().id
}

async fn lock(rpc: &mut Rpc, name: &str, lease: i64) -> Result<LockResponse, Status> {
    let request = LockRequest { name: name.to_owned().into(), lease };
    Ok(rpc.lock.lock(request).await?.into_inner())
}

async fn unlock(rpc: &mut Rpc, key: &Bytes) -> Result<ResponseHeader, Status> {
    Ok(rpc.lock.unlock(UnlockRequest { key: key.clone() }).await?.into_inner().header.unwrap())
}

fn key(name: &str, lease: i64) -> String {
    format!("{name}/{lease:x}")
}

/// The keys of a name, in the order of their creation.
async fn queue(rpc: &mut Rpc, name: &str) -> Vec<String> {
    let prefix = format!("{name}/");
    let request = RangeRequest {
        range_end: prefix_end(&prefix),
        key: prefix.into(),
        sort_order: SortOrder::Ascend.into(),
        sort_target: SortTarget::Create.into(),
        ..Default::default()
    };
    let kvs = rpc.range(request).await.unwrap().kvs;
    kvs.iter().map(|kv| String::from_utf8_lossy(&kv.key).into_owned()).collect()
}

/// Waits until the queue of `name` is this one.
async fn queued(rpc: &mut Rpc, name: &str, want: &[String]) {
    let wait = async { while queue(rpc, name).await != want {} };
    tokio::time::timeout(PATIENCE, wait).await.expect("the queue in time");
}

/// Begins to wait for a lock, and returns when its place in the queue is taken.
async fn waiting(rpc: &mut Rpc, name: &str, lease: i64) -> JoinHandle<Result<LockResponse, Status>> {
    let mut before = queue(rpc, name).await;
    let (mut other, of) = (rpc.clone(), name.to_owned());
    let waiting = tokio::spawn(async move { lock(&mut other, &of, lease).await });
    before.push(key(name, lease));
    queued(rpc, name, &before).await;
    waiting
}

fn revision(header: Option<ResponseHeader>) -> i64 {
    let header = header.expect("a header");
    assert!(header.cluster_id != 0 && header.member_id != 0 && header.raft_term > 0, "a full header: {header:?}");
    header.revision
}

fn locked_in_turn(kind: Kind) {
    on_one(kind, async |mut rpc| {
        let leases = [grant(&mut rpc).await, grant(&mut rpc).await, grant(&mut rpc).await];
        let first = lock(&mut rpc, "l", leases[0]).await.unwrap();
        assert_eq!((first.key.clone(), revision(first.header)), (key("l", leases[0]).into(), 2));
        let second = waiting(&mut rpc, "l", leases[1]).await;
        let third = waiting(&mut rpc, "l", leases[2]).await;
        // Another name is another lock, and one that begins like it too.
        assert!(lock(&mut rpc, "l/x", leases[0]).await.is_ok());
        assert!(!second.is_finished() && !third.is_finished());
        let freed = unlock(&mut rpc, &first.key).await.unwrap();
        assert_eq!(revision(Some(freed)), 6);
        let second = second.await.unwrap().unwrap();
        assert_eq!((second.key.clone(), revision(second.header)), (key("l", leases[1]).into(), 6));
        assert!(!third.is_finished());
        // The lock goes with its lease.
        rpc.lease.lease_revoke(LeaseRevokeRequest { id: leases[1] }).await.unwrap();
        let third = third.await.unwrap().unwrap();
        assert_eq!((third.key, revision(third.header)), (key("l", leases[2]).into(), 7));
    });
}

fn locked_again(kind: Kind) {
    on_one(kind, async |mut rpc| {
        let lease = grant(&mut rpc).await;
        let first = lock(&mut rpc, "l", lease).await.unwrap();
        rpc.put("other", "v").await.unwrap();
        let again = lock(&mut rpc, "l", lease).await.unwrap();
        assert_eq!((again.key, revision(again.header)), (first.key, 3), "a lease that holds it holds it");
        // One that waits already keeps its place.
        let second = grant(&mut rpc).await;
        let waits = waiting(&mut rpc, "l", second).await;
        let (mut other, name) = (rpc.clone(), "l");
        let waits_again = tokio::spawn(async move { lock(&mut other, name, second).await });
        unlock(&mut rpc, &key("l", lease).into()).await.unwrap();
        assert_eq!(waits.await.unwrap().unwrap().key, waits_again.await.unwrap().unwrap().key);
        let empty = lock(&mut rpc, "", lease).await.unwrap();
        assert_eq!(empty.key, key("", lease));
    });
}

fn a_lease_of_its_own(kind: Kind) {
    on_one(kind, async |mut rpc| {
        let locked = lock(&mut rpc, "l", 0).await.unwrap();
        let leases = rpc.lease.lease_leases(LeaseLeasesRequest {}).await.unwrap().into_inner().leases;
        assert_eq!(leases.len(), 1);
        let id = leases[0].id;
        assert_eq!(locked.key, key("l", id));
        let request = LeaseTimeToLiveRequest { id, keys: true };
        let lease = rpc.lease.lease_time_to_live(request).await.unwrap().into_inner();
        assert_eq!((lease.granted_ttl, lease.keys), (60, vec![locked.key]));
    });
}

fn lock_refusals(kind: Kind) {
    on_one(kind, async |mut rpc| {
        for lease in [99, -1] {
            refused(lock(&mut rpc, "l", lease).await, Code::Unknown, NO_LEASE);
        }
        refused(unlock(&mut rpc, &Bytes::new()).await, Code::Unknown, NO_KEY);
        let lease = grant(&mut rpc).await;
        let large = lock(&mut rpc, &"x".repeat(1_572_864), lease).await;
        refused(large, Code::Unknown, "etcdserver: request is too large");
        assert!(queue(&mut rpc, "l").await.is_empty());
    });
}

/// A lock is two operations, and counted like anybody's.
fn lock_by_few_operations(kind: Kind) {
    let Some(cluster) = Cluster::start_with(kind, 1, &["--max-txn-ops=1"]) else { return };
    rpc::run(async {
        let mut rpc = Rpc::new(&cluster.members[0]);
        let lease = grant(&mut rpc).await;
        let text = "etcdserver: too many operations in txn request";
        refused(lock(&mut rpc, "l", lease).await, Code::Unknown, text);
        assert!(campaign(&mut rpc, lease, "v").await.is_ok());
    });
}

fn unlocked_by_another(kind: Kind) {
    on_one(kind, async |mut rpc| {
        let (one, other) = (grant(&mut rpc).await, grant(&mut rpc).await);
        let held = lock(&mut rpc, "l", one).await.unwrap();
        let waits = waiting(&mut rpc, "l", other).await;
        // Nobody asks whose lock it is, or whether there is one.
        assert_eq!(revision(Some(unlock(&mut rpc, &"l/none".into()).await.unwrap())), 3);
        rpc.put("l", "not a place in the queue").await.unwrap();
        unlock(&mut rpc, &held.key).await.unwrap();
        assert_eq!(waits.await.unwrap().unwrap().key, key("l", other));
        assert_eq!(queue(&mut rpc, "l").await, [key("l", other)]);
    });
}

fn lease_lost_while_waiting(kind: Kind) {
    on_one(kind, async |mut rpc| {
        let leases = [grant(&mut rpc).await, grant(&mut rpc).await, grant(&mut rpc).await];
        let held = lock(&mut rpc, "l", leases[0]).await.unwrap();
        let lost = waiting(&mut rpc, "l", leases[1]).await;
        let next = waiting(&mut rpc, "l", leases[2]).await;
        rpc.lease.lease_revoke(LeaseRevokeRequest { id: leases[1] }).await.unwrap();
        assert!(!lost.is_finished(), "it is told when its turn would have come");
        unlock(&mut rpc, &held.key).await.unwrap();
        refused(lost.await.unwrap(), Code::Unknown, "mutex: session is expired");
        assert_eq!(next.await.unwrap().unwrap().key, key("l", leases[2]));
    });
}

fn nobody_waits_behind_a_client_that_left(kind: Kind) {
    on_one(kind, async |mut rpc| {
        let leases = [grant(&mut rpc).await, grant(&mut rpc).await, grant(&mut rpc).await];
        let held = lock(&mut rpc, "l", leases[0]).await.unwrap();
        let left = waiting(&mut rpc, "l", leases[1]).await;
        let stays = waiting(&mut rpc, "l", leases[2]).await;
        left.abort();
        queued(&mut rpc, "l", &[key("l", leases[0]), key("l", leases[2])]).await;
        assert!(!stays.is_finished());
        // The holder's client may leave as well: its lease holds the lock.
        unlock(&mut rpc, &held.key).await.unwrap();
        assert_eq!(stays.await.unwrap().unwrap().key, key("l", leases[2]));
        let alive = rpc.lease.lease_leases(LeaseLeasesRequest {}).await.unwrap().into_inner().leases;
        assert_eq!(alive.len(), 3, "a lease outlives its place");
    });
}

fn nobody_waits_behind_a_deadline(kind: Kind) {
    let Some(cluster) = Cluster::start(kind, 1) else { return };
    rpc::run(async {
        let (mut rpc, raw) = (Rpc::new(&cluster.members[0]), Raw::new(&cluster.members[0]));
        let leases = [grant(&mut rpc).await, grant(&mut rpc).await];
        lock(&mut rpc, "l", leases[0]).await.unwrap();
        let request = LockRequest { name: "l".into(), lease: leases[1] }.encode_to_vec();
        // A client that does not look at its own deadline: the server does. etcd's transport resets the stream.
        let answer = raw.call("/v3lockpb.Lock/Lock", frame(&request), &[("grpc-timeout", b"500m")]).await;
        let said = (answer.code, answer.message.as_str()) == (Code::DeadlineExceeded, "context deadline exceeded");
        assert!(said || kind == Kind::Etcd && answer.code == Code::Cancelled, "{answer:?}");
        queued(&mut rpc, "l", &[key("l", leases[0])]).await;
    });
}

async fn campaign(rpc: &mut Rpc, lease: i64, value: &str) -> Result<CampaignResponse, Status> {
    let request = CampaignRequest { name: "e".into(), lease, value: value.to_owned().into() };
    Ok(rpc.election.campaign(request).await?.into_inner())
}

/// Begins a campaign that has to wait, and returns when it stands.
async fn candidate(rpc: &mut Rpc, lease: i64, value: &str) -> JoinHandle<Result<CampaignResponse, Status>> {
    let mut before = queue(rpc, "e").await;
    let (mut other, value) = (rpc.clone(), value.to_owned());
    let waiting = tokio::spawn(async move { campaign(&mut other, lease, &value).await });
    before.push(key("e", lease));
    queued(rpc, "e", &before).await;
    waiting
}

async fn leader(rpc: &mut Rpc) -> Result<(String, String), Status> {
    let response = rpc.election.leader(LeaderRequest { name: "e".into() }).await?.into_inner();
    revision(response.header);
    let kv = response.kv.expect("a leader's key");
    let text = |bytes: &Bytes| String::from_utf8_lossy(bytes).into_owned();
    Ok((text(&kv.key), text(&kv.value)))
}

async fn proclaim(rpc: &mut Rpc, leader: Option<LeaderKey>, value: &str) -> Result<i64, Status> {
    let request = ProclaimRequest { leader, value: value.to_owned().into() };
    Ok(revision(rpc.election.proclaim(request).await?.into_inner().header))
}

async fn resign(rpc: &mut Rpc, leader: Option<LeaderKey>) -> Result<i64, Status> {
    Ok(revision(rpc.election.resign(ResignRequest { leader }).await?.into_inner().header))
}

fn campaigns_in_turn(kind: Kind) {
    on_one(kind, async |mut rpc| {
        let leases = [grant(&mut rpc).await, grant(&mut rpc).await];
        let first = campaign(&mut rpc, leases[0], "one").await.unwrap();
        let ours = LeaderKey { name: "e".into(), key: key("e", leases[0]).into(), rev: 2, lease: leases[0] };
        assert_eq!((revision(first.header), first.leader.as_ref()), (2, Some(&ours)));
        let second = candidate(&mut rpc, leases[1], "two").await;
        assert_eq!(leader(&mut rpc).await.unwrap(), (key("e", leases[0]), "one".to_owned()));
        assert_eq!(proclaim(&mut rpc, first.leader.clone(), "more").await.unwrap(), 4);
        assert_eq!(leader(&mut rpc).await.unwrap().1, "more");
        assert!(!second.is_finished());
        assert_eq!(resign(&mut rpc, first.leader.clone()).await.unwrap(), 5);
        let second = second.await.unwrap().unwrap();
        let theirs = LeaderKey { name: "e".into(), key: key("e", leases[1]).into(), rev: 3, lease: leases[1] };
        assert_eq!((revision(second.header), second.leader), (3, Some(theirs)), "the header is that of its candidacy");
        assert_eq!(leader(&mut rpc).await.unwrap(), (key("e", leases[1]), "two".to_owned()));
        // Whoever has resigned proclaims nothing, and resigning again changes nothing.
        refused(proclaim(&mut rpc, first.leader.clone(), "late").await, Code::Unknown, "election: not leader");
        assert_eq!(resign(&mut rpc, first.leader).await.unwrap(), 5);
        assert_eq!(leader(&mut rpc).await.unwrap().1, "two");
    });
}

fn proclaimed_again(kind: Kind) {
    on_one(kind, async |mut rpc| {
        let lease = grant(&mut rpc).await;
        let first = campaign(&mut rpc, lease, "one").await.unwrap();
        let same = campaign(&mut rpc, lease, "one").await.unwrap();
        assert_eq!((revision(same.header), same.leader), (2, first.leader.clone()), "the same campaign");
        let changed = campaign(&mut rpc, lease, "two").await.unwrap();
        assert_eq!(
            (revision(changed.header), changed.leader),
            (2, first.leader),
            "it proclaims, and says when it asked"
        );
        assert_eq!(leader(&mut rpc).await.unwrap(), (key("e", lease), "two".to_owned()));
        assert_eq!(queue(&mut rpc, "e").await, [key("e", lease)]);
    });
}

fn election_refusals(kind: Kind) {
    on_one(kind, async |mut rpc| {
        let missing = "\"leader\" field must be provided";
        refused(proclaim(&mut rpc, None, "v").await, Code::Unknown, missing);
        refused(resign(&mut rpc, None).await, Code::Unknown, missing);
        refused(leader(&mut rpc).await, Code::Unknown, "election: no leader");
        refused(campaign(&mut rpc, 99, "v").await, Code::Unknown, NO_LEASE);
        // A leader field without a lease is given one, whatever comes of it.
        refused(proclaim(&mut rpc, Some(LeaderKey::default()), "v").await, Code::Unknown, NO_KEY);
        refused(resign(&mut rpc, Some(LeaderKey::default())).await, Code::Unknown, NO_KEY);
        let leases = rpc.lease.lease_leases(LeaseLeasesRequest {}).await.unwrap().into_inner().leases;
        assert_eq!(leases.len(), 2);
        let nobody = |rev| Some(LeaderKey { name: "e".into(), key: "e/x".into(), rev, lease: 99 });
        refused(proclaim(&mut rpc, nobody(3), "v").await, Code::Unknown, "election: not leader");
        // Nobody's key at revision 0 is a key that does not exist.
        refused(proclaim(&mut rpc, nobody(0), "v").await, Code::Unknown, NO_LEASE);
        assert_eq!(resign(&mut rpc, nobody(3)).await.unwrap(), 1);
        let own = |lease| Some(LeaderKey { name: "e".into(), key: "e/x".into(), rev: 0, lease });
        let lease = grant(&mut rpc).await;
        assert_eq!(proclaim(&mut rpc, own(lease), "v").await.unwrap(), 2);
        assert_eq!(leader(&mut rpc).await.unwrap(), ("e/x".to_owned(), "v".to_owned()));
    });
}

async fn observe(rpc: &mut Rpc) -> Streaming<LeaderResponse> {
    rpc.election.observe(LeaderRequest { name: "e".into() }).await.unwrap().into_inner()
}

/// The next leader and its proclamation, and the header's revision.
async fn seen(stream: &mut Streaming<LeaderResponse>) -> (String, i64) {
    let message = tokio::time::timeout(PATIENCE, stream.message()).await.expect("a leader in time");
    let response = message.unwrap().expect("the stream goes on");
    let kv = response.kv.unwrap();
    (format!("{}={}", String::from_utf8_lossy(&kv.key), String::from_utf8_lossy(&kv.value)), revision(response.header))
}

fn observed(kind: Kind) {
    on_one(kind, async |mut rpc| {
        let leases = [grant(&mut rpc).await, grant(&mut rpc).await];
        let [one, two] = leases.map(|lease| key("e", lease));
        // etcd answers the stream itself with its first message only.
        let mut other = rpc.clone();
        let early = tokio::spawn(async move { observe(&mut other).await });
        let first = campaign(&mut rpc, leases[0], "a").await.unwrap();
        let mut early = early.await.unwrap();
        assert_eq!(seen(&mut early).await, (format!("{one}=a"), 2));
        rpc.put("other", "v").await.unwrap();
        let mut late = observe(&mut rpc).await;
        assert_eq!(seen(&mut late).await, (format!("{one}=a"), 3), "the header of now, the key of then");
        let second = candidate(&mut rpc, leases[1], "b").await;
        proclaim(&mut rpc, first.leader.clone(), "c").await.unwrap();
        for stream in [&mut early, &mut late] {
            assert_eq!(seen(stream).await, (format!("{one}=c"), 5));
        }
        resign(&mut rpc, first.leader).await.unwrap();
        second.await.unwrap().unwrap();
        for stream in [&mut early, &mut late] {
            assert_eq!(seen(stream).await, (format!("{two}=b"), 6));
        }
        // Nobody, and then somebody again.
        rpc.lease.lease_revoke(LeaseRevokeRequest { id: leases[1] }).await.unwrap();
        refused(leader(&mut rpc).await, Code::Unknown, "election: no leader");
        campaign(&mut rpc, leases[0], "d").await.unwrap();
        for stream in [&mut early, &mut late] {
            assert_eq!(seen(stream).await, (format!("{one}=d"), 8));
        }
    });
}

fn candidates_that_left(kind: Kind) {
    on_one(kind, async |mut rpc| {
        let leases = [grant(&mut rpc).await, grant(&mut rpc).await, grant(&mut rpc).await];
        let first = campaign(&mut rpc, leases[0], "a").await.unwrap();
        let left = candidate(&mut rpc, leases[1], "b").await;
        let stays = candidate(&mut rpc, leases[2], "c").await;
        left.abort();
        queued(&mut rpc, "e", &[key("e", leases[0]), key("e", leases[2])]).await;
        resign(&mut rpc, first.leader).await.unwrap();
        assert_eq!(stays.await.unwrap().unwrap().leader.unwrap().lease, leases[2]);
    });
}

/// One of three that is left alone, asked by clients that want a leader.
fn without_a_leader(kind: Kind) {
    let Some(mut cluster) = Cluster::start(kind, 3) else { return };
    rpc::run(async { Rpc::new(&cluster.members[0]).put("k", "v").await.unwrap() });
    cluster.members[1].kill();
    cluster.members[2].kill();
    eventually("the member sees that nobody leads", PATIENCE, || {
        rpc::run(async { (Rpc::new(&cluster.members[0]).status().await.ok()?.leader == 0).then_some(()) })
    });
    rpc::run(async {
        let mut rpc = Rpc::new(&cluster.members[0]);
        let text = "etcdserver: no leader";
        let mut lock = tonic::Request::new(LockRequest { name: "l".into(), lease: 0 });
        lock.metadata_mut().insert("hasleader", "true".parse().unwrap());
        refused(rpc.lock.lock(lock).await, Code::Unavailable, text);
        let mut observe = tonic::Request::new(LeaderRequest { name: "e".into() });
        observe.metadata_mut().insert("hasleader", "true".parse().unwrap());
        refused(rpc.election.observe(observe).await, Code::Unavailable, text);
        // Whoever does not ask is told when the read has waited long enough, with the library's code.
        let leader = rpc.election.leader(LeaderRequest { name: "e".into() }).await;
        refused(leader, Code::Unknown, "etcdserver: request timed out");
    });
}

/// Waits at a follower, whose leader dies: the wait survives it.
fn across_a_leaders_death(kind: Kind) {
    let Some(mut cluster) = Cluster::start(kind, 3) else { return };
    let leads = eventually("a member leads", PATIENCE, || {
        rpc::run(async {
            for (index, member) in cluster.members.iter().enumerate() {
                let status = Rpc::to(&member.client_url(), Duration::from_secs(2)).status().await.ok()?;
                if status.leader == status.header?.member_id {
                    return Some(index);
                }
            }
            None
        })
    });
    let url = cluster.members[(leads + 1) % 3].client_url();
    // One runtime for all of it: the waits go on while the leader is killed.
    rpc::run(async {
        let mut rpc = Rpc::to(&url, PATIENCE);
        let leases = [grant(&mut rpc).await, grant(&mut rpc).await];
        let held = lock(&mut rpc, "l", leases[0]).await.unwrap();
        let waits = waiting(&mut rpc, "l", leases[1]).await;
        let first = campaign(&mut rpc, leases[0], "a").await.unwrap();
        let stands = candidate(&mut rpc, leases[1], "b").await;
        let mut observer = observe(&mut rpc).await;
        assert_eq!(seen(&mut observer).await.0, format!("{}=a", key("e", leases[0])));
        cluster.members[leads].kill();
        let freed = async { while unlock(&mut rpc, &held.key).await.is_err() {} };
        tokio::time::timeout(PATIENCE, freed).await.expect("another leader in time");
        assert_eq!(waits.await.unwrap().unwrap().key, key("l", leases[1]));
        resign(&mut rpc, first.leader).await.unwrap();
        assert_eq!(stands.await.unwrap().unwrap().leader.unwrap().lease, leases[1]);
        assert_eq!(seen(&mut observer).await.0, format!("{}=b", key("e", leases[1])));
    });
}
