//! Leases at their edges: order, refusals, ends that can't be written, lost leaders, and many at once.

use std::time::{Duration, Instant};

use e2e::rpc::{self, Rpc, prefix_end, put};
use e2e::{Cluster, Kind, PATIENCE, Watcher, eventually};
use keelson_proto::etcdserverpb::alarm_request::AlarmAction;
use keelson_proto::etcdserverpb::{
    AlarmRequest, AlarmType, LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveRequest, LeaseLeasesRequest,
    LeaseRevokeRequest, LeaseTimeToLiveRequest, LeaseTimeToLiveResponse, PutRequest, WatchCreateRequest,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

on_both!(
    refused,
    listed_by_their_ends,
    ended_and_not_revoked,
    without_a_leader,
    the_leader_dies,
    kept_alive_across_a_leader_change,
    thousands_end_at_once,
);

type Result<T> = std::result::Result<T, Status>;

async fn grant(rpc: &mut Rpc, id: i64, ttl: i64) -> Result<LeaseGrantResponse> {
    Ok(rpc.lease.lease_grant(LeaseGrantRequest { ttl, id }).await?.into_inner())
}

async fn revoke(rpc: &mut Rpc, id: i64) -> Result<()> {
    rpc.lease.lease_revoke(LeaseRevokeRequest { id }).await.map(drop)
}

async fn ask(rpc: &mut Rpc, id: i64) -> Result<LeaseTimeToLiveResponse> {
    Ok(rpc.lease.lease_time_to_live(LeaseTimeToLiveRequest { id, keys: true }).await?.into_inner())
}

/// One keep-alive on a stream of its own; its TTL.
async fn keep_alive(rpc: &mut Rpc, id: i64) -> Result<i64> {
    let (requests, queue) = tokio::sync::mpsc::channel(1);
    requests.send(LeaseKeepAliveRequest { id }).await.expect("we hold the queue");
    let mut answers = rpc.lease.lease_keep_alive(ReceiverStream::new(queue)).await?.into_inner();
    Ok(answers.message().await?.expect("an answer").ttl)
}

async fn list(rpc: &mut Rpc) -> Vec<i64> {
    let list = rpc.lease.lease_leases(LeaseLeasesRequest {}).await.unwrap().into_inner();
    list.leases.iter().map(|lease| lease.id).collect()
}

fn says<T: std::fmt::Debug>(answer: Result<T>) -> (Code, String) {
    let status = answer.unwrap_err();
    (status.code(), status.message().to_owned())
}

fn on_one(kind: Kind, body: impl AsyncFnOnce(&mut Rpc)) {
    let Some(cluster) = Cluster::start(kind, 1) else { return };
    rpc::run(async { body(&mut Rpc::new(&cluster.members[0])).await });
}

fn leader(cluster: &Cluster) -> usize {
    eventually("a member leads", PATIENCE, || {
        rpc::run(async {
            for (index, member) in cluster.members.iter().enumerate().filter(|(_, member)| member.runs()) {
                let Ok(status) = Rpc::to(&member.client_url(), Duration::from_secs(2)).status().await else { continue };
                if status.leader != 0 && status.leader == status.header.map_or(0, |header| header.member_id) {
                    return Some(index);
                }
            }
            None
        })
    })
}

fn refused(kind: Kind) {
    on_one(kind, async |rpc| {
        let unknown = (Code::NotFound, "etcdserver: requested lease not found".to_owned());
        let exists = (Code::FailedPrecondition, "etcdserver: lease already exists".to_owned());
        let too_large = (Code::OutOfRange, "etcdserver: too large lease TTL".to_owned());
        grant(rpc, 5, 100).await.unwrap();
        assert_eq!(grant(rpc, -5, 100).await.unwrap().id, -5, "any number but 0 will do");
        assert_eq!(says(grant(rpc, 5, 100).await), exists);
        assert_eq!(says(grant(rpc, 6, 9_000_000_001).await), too_large);
        assert_eq!(says(grant(rpc, 5, 9_000_000_001).await), too_large, "the TTL is looked at first");
        assert_eq!(says(grant(rpc, 5, i64::MAX).await), too_large);
        assert_eq!(grant(rpc, 7, i64::MIN).await.unwrap().ttl, 2);
        for id in [0, 6, i64::MIN] {
            assert_eq!(says(revoke(rpc, id).await), unknown, "{id}");
            assert_eq!(keep_alive(rpc, id).await.unwrap(), 0, "{id}");
            let answer = ask(rpc, id).await.unwrap();
            assert_eq!((answer.id, answer.ttl, answer.granted_ttl), (id, -1, 0));
        }
        let with = |lease| PutRequest { lease, ..put("k", "v") };
        assert_eq!(says(rpc.kv_put(with(6)).await), unknown);
        rpc.kv_put(with(-5)).await.unwrap();
        revoke(rpc, -5).await.unwrap();
        assert_eq!(rpc.get("k").await.unwrap().count, 0);
    });
}

fn listed_by_their_ends(kind: Kind) {
    on_one(kind, async |rpc| {
        for (id, ttl) in [(1, 300), (2, 100), (3, 500), (4, 200), (5, 400)] {
            grant(rpc, id, ttl).await.unwrap();
        }
        assert_eq!(list(rpc).await, [2, 4, 1, 5, 3]);
        // Whole seconds lie between them, so that the moment of a grant makes no difference.
        grant(rpc, 6, 250).await.unwrap();
        revoke(rpc, 1).await.unwrap();
        assert_eq!(keep_alive(rpc, 2).await.unwrap(), 100);
        assert_eq!(list(rpc).await, [2, 4, 6, 5, 3]);
    });
}

/// A lease whose revoke the log does not take: here because the CORRUPT alarm refuses it.
fn ended_and_not_revoked(kind: Kind) {
    on_one(kind, async |rpc| {
        grant(rpc, 1, 2).await.unwrap();
        grant(rpc, 2, 100).await.unwrap();
        rpc.kv_put(PutRequest { lease: 1, ..put("k", "v") }).await.unwrap();
        let alarm = |action: AlarmAction| AlarmRequest {
            action: action.into(),
            member_id: 7,
            alarm: AlarmType::Corrupt.into(),
        };
        rpc.maintenance.alarm(alarm(AlarmAction::Activate)).await.unwrap();
        let over = rpc::until("the lease has ended for two seconds", async || {
            Some(ask(rpc, 1).await.unwrap()).filter(|answer| answer.ttl <= -2)
        })
        .await;
        assert_eq!((over.granted_ttl, over.keys.as_slice()), (2, &["k".into()][..]), "what is left counts on below 0");
        assert_eq!(list(rpc).await, [1, 2], "it stands, and so does its key");
        assert_eq!(rpc.get("k").await.unwrap().count, 1);
        let corrupt = (Code::DataLoss, "etcdserver: corrupt cluster".to_owned());
        assert_eq!(says(revoke(rpc, 1).await), corrupt);
        assert_eq!(says(grant(rpc, 3, 100).await), corrupt);
        assert_eq!(says(grant(rpc, 3, 9_000_000_001).await), corrupt, "before its TTL is looked at");
        assert_eq!(keep_alive(rpc, 2).await.unwrap(), 100, "one that lives is kept alive all the same");
        rpc.maintenance.alarm(alarm(AlarmAction::Deactivate)).await.unwrap();
        // etcd may take its time to try again; a client need not.
        let _ = revoke(rpc, 1).await;
        rpc::until("the lease is gone", async || (list(rpc).await == [2]).then_some(())).await;
        assert_eq!(rpc.get("k").await.unwrap().count, 0);
    });
}

/// Both look for a leader as long as a request may take, and say then that there is none.
fn without_a_leader(kind: Kind) {
    let Some(mut cluster) = Cluster::start(kind, 3) else { return };
    rpc::run(async { grant(&mut Rpc::new(&cluster.members[0]), 1, 100).await.unwrap() });
    let left = (leader(&cluster) + 1) % 3;
    (0..3).filter(|&index| index != left).for_each(|index| cluster.members[index].kill());
    eventually("it has lost its leader", PATIENCE, || {
        rpc::run(async {
            let status = Rpc::new(&cluster.members[left]).status().await.ok()?;
            (status.leader == 0).then_some(())
        })
    });
    rpc::run(async {
        let mut rpc = Rpc::new(&cluster.members[left]);
        let no_leader = (Code::Unavailable, "etcdserver: no leader".to_owned());
        let (requests, queue) = tokio::sync::mpsc::channel(1);
        requests.send(LeaseKeepAliveRequest { id: 1 }).await.unwrap();
        let mut call = tonic::Request::new(ReceiverStream::new(queue));
        call.metadata_mut().insert("hasleader", "true".parse().unwrap());
        let answer = rpc.lease.clone().lease_keep_alive(call).await;
        let refused = match answer {
            Ok(stream) => stream.into_inner().message().await.map(drop),
            Err(status) => Err(status),
        };
        assert_eq!(says(refused), no_leader, "who asks for a leader is told at once");

        let begun = Instant::now();
        let (mut one, mut other) = (rpc.clone(), rpc.clone());
        let (kept, left) = tokio::join!(keep_alive(&mut one, 1), ask(&mut other, 1));
        let waited = begun.elapsed();
        assert_eq!(says(kept), no_leader);
        assert_eq!(says(left), no_leader);
        assert!((Duration::from_millis(6_900)..Duration::from_secs(10)).contains(&waited), "{waited:?}");
        assert_eq!(list(&mut rpc).await, [1], "its own table needs no leader");
    });
}

/// The next leader can't know when a lease was last kept alive: it gives the whole TTL again, and an election timeout more.
fn the_leader_dies(kind: Kind) {
    let Some(mut cluster) = Cluster::start(kind, 3) else { return };
    rpc::run(async {
        let mut rpc = Rpc::new(&cluster.members[0]);
        grant(&mut rpc, 1, 60).await.unwrap();
        rpc.kv_put(PutRequest { lease: 1, ..put("k", "v") }).await.unwrap();
        rpc::until("some of it is over", async || Some(ask(&mut rpc, 1).await.unwrap()).filter(|a| a.ttl <= 56)).await;
    });
    let dead = leader(&cluster);
    cluster.members[dead].kill();
    for survivor in (0..3).filter(|&index| index != dead) {
        rpc::run(async {
            let mut rpc = Rpc::new(&cluster.members[survivor]);
            let answer = rpc::until("it answers", async || ask(&mut rpc, 1).await.ok()).await;
            assert!((58..=61).contains(&answer.ttl), "{answer:?}");
            assert_eq!((answer.granted_ttl, answer.keys.len()), (60, 1));
        });
    }
    // And its end comes, by the new leader's clock.
    rpc::run(async {
        let mut rpc = Rpc::new(&cluster.members[(dead + 1) % 3]);
        grant(&mut rpc, 2, 2).await.unwrap();
        rpc.kv_put(PutRequest { lease: 2, ..put("short", "v") }).await.unwrap();
        rpc::until("it has ended", async || (rpc.get("short").await.unwrap().count == 0).then_some(())).await;
        assert_eq!(rpc.get("k").await.unwrap().count, 1);
    });
}

/// Kept alive through a follower while the leader goes: no end is seen, as long as somebody keeps asking.
fn kept_alive_across_a_leader_change(kind: Kind) {
    let Some(mut cluster) = Cluster::start(kind, 3) else { return };
    let dead = leader(&cluster);
    let follower = cluster.members[(dead + 1) % 3].client_url();
    let mut kill = Some(dead);
    let begun = Instant::now();
    rpc::run(async {
        let mut rpc = Rpc::to(&follower, Duration::from_secs(20));
        grant(&mut rpc, 1, 5).await.unwrap();
        rpc.kv_put(PutRequest { lease: 1, ..put("k", "v") }).await.unwrap();
        let mut answered = 0;
        while begun.elapsed() < Duration::from_secs(9) {
            match keep_alive(&mut rpc, 1).await {
                Ok(ttl) => {
                    assert_eq!(ttl, 5);
                    answered += 1;
                }
                Err(status) => assert_eq!(status.code(), Code::Unavailable, "{status:?}"),
            }
            if begun.elapsed() > Duration::from_secs(2)
                && let Some(dead) = kill.take()
            {
                cluster.members[dead].kill();
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert!(answered >= 20, "{answered}");
        assert_eq!(rpc.get("k").await.unwrap().count, 1);
    });
}

/// No event is lost, each key goes once, and no more of them in a second than etcd's limit of 500 a check lets go.
fn thousands_end_at_once(kind: Kind) {
    const LEASES: i64 = 3_000;
    on_one(kind, async |rpc| {
        let create = WatchCreateRequest { key: "l/".into(), range_end: prefix_end("l/"), ..Default::default() };
        let mut watcher = Watcher::open(rpc, create).await;
        assert!(watcher.response().await.created);
        let mut tasks = tokio::task::JoinSet::new();
        for worker in 0..50 {
            let mut rpc = rpc.clone();
            tasks.spawn(async move {
                for id in (1..=LEASES).filter(|id| id % 50 == worker) {
                    grant(&mut rpc, id, 5).await.unwrap();
                    rpc.kv_put(PutRequest { lease: id, ..put(&format!("l/{id}"), "v") }).await.unwrap();
                }
            });
        }
        let mut deleted = Vec::new();
        let mut seen = std::collections::BTreeSet::new();
        while (deleted.len() as i64) < LEASES {
            let response = watcher.response().await;
            for event in response.events {
                if event.r#type == 1 {
                    assert!(seen.insert(event.kv.unwrap().key), "a key goes once");
                    deleted.push(Instant::now());
                }
            }
        }
        tasks.join_all().await;
        // Two checks may fall into a second, and begin a third.
        let fastest = deleted.windows(1_501).map(|span| span[1_500] - span[0]).min().unwrap();
        assert!(fastest > Duration::from_millis(700), "1500 in {fastest:?}");
        assert!(list(rpc).await.is_empty());
        assert_eq!(rpc.get("l/1").await.unwrap().count, 0);
    });
}
