//! Leases: granted, kept alive, asked about, revoked, expired.

use std::time::{Duration, Instant};

use e2e::rpc::{self, Rpc, prefix_end, put};
use e2e::{Cluster, Kind, Watcher};
use keelson_proto::etcdserverpb::{
    LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveRequest, LeaseKeepAliveResponse, LeaseLeasesRequest,
    LeaseRevokeRequest, LeaseTimeToLiveRequest, LeaseTimeToLiveResponse, PutRequest, WatchCreateRequest,
};
use tokio_stream::wrappers::ReceiverStream;

on_both!(granted, revoked, kept_alive, expired, attached, across_a_restart, on_three_members);

async fn grant(rpc: &mut Rpc, ttl: i64, id: i64) -> LeaseGrantResponse {
    rpc.lease.lease_grant(LeaseGrantRequest { ttl, id }).await.unwrap().into_inner()
}

async fn ask(rpc: &mut Rpc, id: i64) -> LeaseTimeToLiveResponse {
    rpc.lease.lease_time_to_live(LeaseTimeToLiveRequest { id, keys: true }).await.unwrap().into_inner()
}

async fn keep_alive(rpc: &mut Rpc, ids: &[i64]) -> Vec<LeaseKeepAliveResponse> {
    let (requests, queue) = tokio::sync::mpsc::channel(ids.len());
    for &id in ids {
        requests.send(LeaseKeepAliveRequest { id }).await.unwrap();
    }
    let mut answers = rpc.lease.lease_keep_alive(ReceiverStream::new(queue)).await.unwrap().into_inner();
    let mut got = Vec::new();
    while got.len() < ids.len() {
        got.push(answers.message().await.unwrap().expect("an answer for each"));
    }
    got
}

async fn ids(rpc: &mut Rpc) -> Vec<i64> {
    let list = rpc.lease.lease_leases(LeaseLeasesRequest {}).await.unwrap().into_inner();
    let mut ids: Vec<i64> = list.leases.iter().map(|lease| lease.id).collect();
    ids.sort_unstable();
    ids
}

async fn put_leased(rpc: &mut Rpc, key: &str, lease: i64) {
    rpc.kv_put(PutRequest { lease, ..put(key, "v") }).await.unwrap();
}

async fn watch_all(rpc: &mut Rpc) -> Watcher {
    let everything = WatchCreateRequest { key: "\0".into(), range_end: "\0".into(), ..Default::default() };
    let mut watcher = Watcher::open(rpc, everything).await;
    assert!(watcher.response().await.created);
    watcher
}

fn on_one(kind: Kind, body: impl AsyncFnOnce(&mut Rpc)) {
    let Some(cluster) = Cluster::start(kind, 1) else { return };
    rpc::run(async { body(&mut Rpc::new(&cluster.members[0])).await });
}

fn granted(kind: Kind) {
    on_one(kind, async |rpc| {
        let drawn = grant(rpc, 100, 0).await;
        assert!(drawn.id > 0 && drawn.ttl == 100 && drawn.error.is_empty());
        assert_eq!(drawn.header.unwrap().revision, 1, "a lease is no change of a key");
        let chosen = grant(rpc, 60, 42).await;
        assert_eq!((chosen.id, chosen.ttl), (42, 60));
        assert_eq!(grant(rpc, 1, 43).await.ttl, 2, "at least one and a half election timeouts");
        assert_eq!(grant(rpc, 0, 44).await.ttl, 2);
        assert_eq!(grant(rpc, -5, 45).await.ttl, 2);
        assert_eq!(grant(rpc, 9_000_000_000, 46).await.ttl, 9_000_000_000);
        let mut all = vec![42, 43, 44, 45, 46, drawn.id];
        all.sort_unstable();
        assert_eq!(ids(rpc).await, all);
        let answer = ask(rpc, 42).await;
        assert_eq!((answer.id, answer.granted_ttl), (42, 60));
        assert!((1..=60).contains(&answer.ttl), "{answer:?}");
        let unknown = ask(rpc, 999).await;
        assert_eq!((unknown.id, unknown.ttl, unknown.granted_ttl, unknown.keys.len()), (999, -1, 0, 0));
    });
}

fn revoked(kind: Kind) {
    on_one(kind, async |rpc| {
        grant(rpc, 100, 1).await;
        for key in ["b", "a", "c"] {
            put_leased(rpc, key, 1).await;
        }
        let mut watcher = watch_all(rpc).await;
        let answer = rpc.lease.lease_revoke(LeaseRevokeRequest { id: 1 }).await.unwrap().into_inner();
        assert_eq!(answer.header.unwrap().revision, 5, "one revision for all its keys");
        assert_eq!(watcher.events(3).await, ["delete a @5", "delete b @5", "delete c @5"]);
        assert!(ids(rpc).await.is_empty());
        grant(rpc, 100, 2).await;
        let answer = rpc.lease.lease_revoke(LeaseRevokeRequest { id: 2 }).await.unwrap().into_inner();
        assert_eq!(answer.header.unwrap().revision, 5, "nothing was attached, nothing changed");
    });
}

fn kept_alive(kind: Kind) {
    on_one(kind, async |rpc| {
        grant(rpc, 100, 1).await;
        grant(rpc, 2, 2).await;
        let answers = keep_alive(rpc, &[1, 2, 3, 1]).await;
        let got: Vec<(i64, i64)> = answers.iter().map(|answer| (answer.id, answer.ttl)).collect();
        assert_eq!(
            got,
            [(1, 100), (2, 2), (3, 0), (1, 100)],
            "one that is not there lives for 0 seconds, without an error"
        );
        assert!(answers.iter().all(|answer| answer.header.unwrap().revision == 1));

        // Kept alive for longer than it would live by itself.
        let begun = Instant::now();
        let mut beat = tokio::time::interval(Duration::from_millis(300));
        while begun.elapsed() < Duration::from_secs(4) {
            beat.tick().await;
            assert_eq!(keep_alive(rpc, &[2]).await[0].ttl, 2);
        }
        assert_eq!(ask(rpc, 2).await.granted_ttl, 2);
    });
}

fn expired(kind: Kind) {
    on_one(kind, async |rpc| {
        let mut watcher = watch_all(rpc).await;
        let begun = Instant::now();
        grant(rpc, 2, 1).await;
        grant(rpc, 100, 2).await;
        put_leased(rpc, "a", 1).await;
        put_leased(rpc, "b", 1).await;
        put_leased(rpc, "stays", 2).await;
        assert_eq!(watcher.events(3).await.len(), 3);
        let gone = watcher.response().await;
        let lived = begun.elapsed();
        assert_eq!(e2e::watcher::spell(&gone), ["delete a @5", "delete b @5"]);
        assert!(lived >= Duration::from_millis(1_900), "too early: {lived:?}");
        assert!(lived < Duration::from_secs(8), "too late: {lived:?}");
        assert_eq!(ids(rpc).await, [2]);
        assert_eq!(ask(rpc, 1).await.ttl, -1);
        assert_eq!(keep_alive(rpc, &[1]).await[0].ttl, 0);
        assert_eq!(rpc.get("stays").await.unwrap().count, 1);
    });
}

fn attached(kind: Kind) {
    on_one(kind, async |rpc| {
        grant(rpc, 100, 1).await;
        grant(rpc, 100, 2).await;
        for key in ["a", "b", "c", "d"] {
            put_leased(rpc, key, 1).await;
        }
        put_leased(rpc, "b", 2).await; // moves
        rpc.put("c", "free").await.unwrap(); // leaves
        rpc.delete(keelson_proto::etcdserverpb::DeleteRangeRequest { key: "d".into(), ..Default::default() })
            .await
            .unwrap();
        let keys = |answer: LeaseTimeToLiveResponse| {
            let mut keys: Vec<String> =
                answer.keys.iter().map(|key| String::from_utf8_lossy(key).into_owned()).collect();
            keys.sort();
            keys
        };
        assert_eq!(keys(ask(rpc, 1).await), ["a"]);
        assert_eq!(keys(ask(rpc, 2).await), ["b"]);
        let without = LeaseTimeToLiveRequest { id: 1, keys: false };
        assert!(rpc.lease.lease_time_to_live(without).await.unwrap().into_inner().keys.is_empty());
        rpc.lease.lease_revoke(LeaseRevokeRequest { id: 1 }).await.unwrap();
        let all = keelson_proto::etcdserverpb::RangeRequest {
            key: "\0".into(),
            range_end: prefix_end(""),
            ..Default::default()
        };
        let left: Vec<String> =
            rpc.range(all).await.unwrap().kvs.iter().map(|kv| String::from_utf8_lossy(&kv.key).into_owned()).collect();
        assert_eq!(left, ["b", "c"]);
    });
}

fn across_a_restart(kind: Kind) {
    let Some(mut cluster) = Cluster::start(kind, 1) else { return };
    rpc::run(async {
        let mut rpc = Rpc::new(&cluster.members[0]);
        grant(&mut rpc, 100, 1).await;
        grant(&mut rpc, 2, 2).await;
        put_leased(&mut rpc, "long", 1).await;
        put_leased(&mut rpc, "short", 2).await;
        cluster.members[0].kill();
        cluster.members[0].restart();
        let mut rpc = Rpc::new(&cluster.members[0]);
        let mut watcher = watch_all(&mut rpc).await;
        let answer = ask(&mut rpc, 1).await;
        assert_eq!(
            (answer.granted_ttl, answer.keys.len()),
            (100, 1),
            "leases and what hangs on them outlive the process"
        );
        assert_eq!(watcher.events(1).await, ["delete short @4"], "and so does expiry");
    });
}

/// A follower passes a lease's affairs on to the leader, and expiry reaches all members.
fn on_three_members(kind: Kind) {
    let Some(cluster) = Cluster::start(kind, 3) else { return };
    rpc::run(async {
        let mut members: Vec<Rpc> = cluster.members.iter().map(Rpc::new).collect();
        for (id, member) in (1..).zip(&mut members) {
            grant(member, 100, id).await;
            put_leased(member, &format!("k{id}"), id).await;
        }
        grant(&mut members[0], 2, 9).await;
        put_leased(&mut members[1], "short", 9).await;
        for member in &mut members {
            let answers = keep_alive(member, &[1, 2, 3, 4]).await;
            assert_eq!(answers.iter().map(|answer| answer.ttl).collect::<Vec<_>>(), [100, 100, 100, 0]);
            for id in 1..=3 {
                let answer = ask(member, id).await;
                assert_eq!((answer.granted_ttl, answer.keys.len()), (100, 1));
            }
        }
        for member in &mut members {
            let past = WatchCreateRequest { key: "short".into(), start_revision: 1, ..Default::default() };
            let mut watcher = Watcher::open(member, past).await;
            assert!(watcher.response().await.created);
            assert_eq!(watcher.events(2).await, ["put short=v @5", "delete short @6"]);
        }
    });
}
