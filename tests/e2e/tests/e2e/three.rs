//! Three members: who answers what, what a dead leader costs, and how one that was away comes back.

use std::time::{Duration, Instant};

use e2e::rpc::{self, Rpc, put};
use e2e::{Cluster, Kind, PATIENCE, Watcher, eventually};
use keelson_proto::etcdserverpb::request_op::Request;
use keelson_proto::etcdserverpb::{MemberListRequest, RangeRequest, RequestOp, TxnRequest, WatchCreateRequest};
use tonic::{Code, Status};

on_both!(
    through_followers,
    agreement_on_who_is_who,
    watched_on_every_member,
    the_leader_dies,
    one_comes_back_from_its_log,
    one_comes_back_from_a_snapshot,
    without_quorum,
    all_restarted_at_once,
);

/// What the members wait for a leader's heartbeat at least, by default.
const ELECTION_TIMEOUT: Duration = Duration::from_secs(1);

async fn local(rpc: &mut Rpc, key: &str) -> Result<Option<String>, Status> {
    let request = RangeRequest { key: key.to_owned().into(), serializable: true, ..Default::default() };
    let answer = rpc.range(request).await?;
    Ok(answer.kvs.first().map(|kv| String::from_utf8_lossy(&kv.value).into_owned()))
}

/// The index of the member that leads, once one says so of itself.
pub(crate) fn leader(cluster: &Cluster) -> usize {
    eventually("a member leads", PATIENCE, || {
        rpc::run(async {
            for (index, member) in cluster.members.iter().enumerate().filter(|(_, member)| member.runs()) {
                let Ok(status) = Rpc::to(&member.client_url(), Duration::from_secs(2)).status().await else { continue };
                if status.leader == status.header.map_or(0, |header| header.member_id) {
                    return Some(index);
                }
            }
            None
        })
    })
}

/// The two that are not `index`.
pub(crate) fn others(index: usize) -> [usize; 2] {
    [(index + 1) % 3, (index + 2) % 3]
}

fn through_followers(kind: Kind) {
    let Some(cluster) = Cluster::start(kind, 3) else { return };
    let [one, other] = others(leader(&cluster));
    rpc::run(async {
        let (mut writer, mut reader) = (Rpc::new(&cluster.members[one]), Rpc::new(&cluster.members[other]));
        for number in 0..100 {
            let value = number.to_string();
            let wrote = writer.put("k", &value).await.unwrap();
            let read = reader.get("k").await.unwrap();
            assert_eq!(read.kvs[0].value, value, "a linearizable read sees every put that was answered");
            assert!(read.header.unwrap().revision >= wrote.header.unwrap().revision);
        }
        let txn = TxnRequest {
            success: vec![RequestOp { request: Some(Request::RequestPut(put("t", "1"))) }],
            ..Default::default()
        };
        assert!(writer.txn(txn).await.unwrap().succeeded);
        assert_eq!(reader.get("t").await.unwrap().count, 1);
        writer.compact(50).await.unwrap();
        let old = RangeRequest { key: "k".into(), revision: 49, ..Default::default() };
        assert_eq!(reader.range(old).await.unwrap_err().code(), Code::OutOfRange);
    });
}

fn agreement_on_who_is_who(kind: Kind) {
    let Some(cluster) = Cluster::start(kind, 3) else { return };
    rpc::run(async {
        let mut lists = Vec::new();
        let mut leaders = Vec::new();
        let mut ids = Vec::new();
        for member in &cluster.members {
            let mut rpc = Rpc::new(member);
            rpc.put("k", "v").await.unwrap();
            let request = MemberListRequest { linearizable: true };
            let list = rpc.cluster.member_list(request).await.unwrap().into_inner();
            let status = rpc.status().await.unwrap();
            let header = status.header.unwrap();
            let me = list.members.iter().find(|other| other.id == header.member_id).expect("a member lists itself");
            assert_eq!(
                (me.name.as_str(), me.client_urls.as_slice()),
                (member.name.as_str(), &[member.client_url()][..])
            );
            let mut members = list.members;
            members.sort_by_key(|member| member.id);
            lists.push((header.cluster_id, members));
            leaders.push((status.leader, status.raft_term));
            ids.push(header.member_id);
        }
        assert!(lists.iter().all(|list| *list == lists[0] && list.1.len() == 3), "{lists:#?}");
        assert!(leaders.iter().all(|leader| *leader == leaders[0]) && ids.contains(&leaders[0].0), "{leaders:?}");
    });
}

fn watched_on_every_member(kind: Kind) {
    let Some(cluster) = Cluster::start(kind, 3) else { return };
    rpc::run(async {
        let mut watchers = Vec::new();
        for member in &cluster.members {
            let create = WatchCreateRequest { key: "k".into(), start_revision: 1, ..Default::default() };
            let mut watcher = Watcher::open(&mut Rpc::new(member), create).await;
            assert!(watcher.response().await.created);
            watchers.push(watcher);
        }
        for round in 0..30 {
            Rpc::new(&cluster.members[round % 3]).put("k", &round.to_string()).await.unwrap();
        }
        let want: Vec<String> = (0..30).map(|round| format!("put k={round} @{}", round + 2)).collect();
        for watcher in &mut watchers {
            assert_eq!(watcher.events(30).await, want);
        }
    });
}

fn the_leader_dies(kind: Kind) {
    let Some(mut cluster) = Cluster::start(kind, 3) else { return };
    rpc::run(async { Rpc::new(&cluster.members[0]).put("before", "1").await.unwrap() });
    let dead = leader(&cluster);
    let survivors = others(dead);
    let begun = Instant::now();
    cluster.members[dead].kill();
    let urls = survivors.map(|index| cluster.members[index].client_url());
    let took = rpc::run(async {
        // A put that fell into the election may hang for seconds: ask again, first one survivor, then the other.
        let mut rpcs = urls.map(|url| Rpc::to(&url, Duration::from_millis(500)));
        let mut turn = 0;
        while rpcs[turn % 2].put("after", "1").await.is_err() {
            turn += 1;
            assert!(begun.elapsed() < PATIENCE, "no put for {PATIENCE:?}");
        }
        begun.elapsed()
    });
    assert!(took < 3 * ELECTION_TIMEOUT, "the first put took {took:?}");
    assert_ne!(leader(&cluster), dead);

    cluster.members[dead].restart();
    let newest = rpc::run(async {
        let newest = Rpc::to(&urls_of(&cluster, survivors[0]), PATIENCE).get("after").await.unwrap();
        newest.header.unwrap().revision
    });
    caught_up(&cluster, dead, newest);
    rpc::run(async {
        let mut rpc = Rpc::new(&cluster.members[dead]);
        for key in ["before", "after"] {
            assert_eq!(local(&mut rpc, key).await.unwrap().as_deref(), Some("1"), "{key}");
        }
    });
}

fn urls_of(cluster: &Cluster, index: usize) -> String {
    cluster.members[index].client_url()
}

/// Waits until a member's own data has reached `revision`.
fn caught_up(cluster: &Cluster, index: usize, revision: i64) {
    eventually("the member catches up", PATIENCE, || {
        rpc::run(async {
            let request = RangeRequest { key: "x".into(), serializable: true, ..Default::default() };
            let answer = Rpc::new(&cluster.members[index]).range(request).await.ok()?;
            (answer.header?.revision >= revision).then_some(())
        })
    });
}

fn one_comes_back_from_its_log(kind: Kind) {
    let Some(mut cluster) = Cluster::start(kind, 3) else { return };
    let away = others(leader(&cluster))[0];
    let here = others(away)[0];
    cluster.members[away].kill();
    let revision = rpc::run(async {
        let mut rpc = Rpc::new(&cluster.members[here]);
        for number in 0..200 {
            rpc.put(&format!("k{number}"), "v").await.unwrap();
        }
        rpc.get("k0").await.unwrap().header.unwrap().revision
    });
    cluster.members[away].restart();
    caught_up(&cluster, away, revision);
    rpc::run(async {
        let mut rpc = Rpc::new(&cluster.members[away]);
        assert_eq!(local(&mut rpc, "k199").await.unwrap().as_deref(), Some("v"));
        rpc.put("through the one that came back", "v").await.unwrap();
    });
}

/// Longer away than the log is kept: it is sent a whole state. Its watchers hear every revision all the same.
fn one_comes_back_from_a_snapshot(kind: Kind) {
    let extra = ["--snapshot-count=100"];
    let Some(mut cluster) = Cluster::start_with(kind, 3, &extra) else { return };
    let away = others(leader(&cluster))[0];
    let here = others(away)[0];
    rpc::run(async { Rpc::new(&cluster.members[away]).put("early", "v").await.unwrap() });
    cluster.members[away].kill();
    // etcd keeps 5,000 entries for who is slow; twice that is surely cut.
    let revision = rpc::run(async {
        let rpc = Rpc::new(&cluster.members[here]);
        let mut tasks = tokio::task::JoinSet::new();
        for worker in 0..100 {
            let mut rpc = rpc.clone();
            tasks.spawn(async move {
                for number in 0..110 {
                    rpc.put(&format!("k/{worker}/{number}"), "v").await.unwrap();
                }
            });
        }
        tasks.join_all().await;
        rpc.clone().get("early").await.unwrap().header.unwrap().revision
    });
    assert_eq!(revision, 2 + 11_000);
    cluster.members[away].restart();
    caught_up(&cluster, away, revision);
    rpc::run(async {
        let mut returned = Rpc::new(&cluster.members[away]);
        let everything = |serializable| RangeRequest {
            key: "\0".into(),
            range_end: "\0".into(),
            serializable,
            ..Default::default()
        };
        let own = returned.range(everything(true)).await.unwrap();
        let theirs = Rpc::new(&cluster.members[here]).range(everything(false)).await.unwrap();
        assert_eq!(own.count, 11_001);
        assert!(own.kvs == theirs.kvs, "the same keys, revisions and values");
        let create =
            WatchCreateRequest { key: "\0".into(), range_end: "\0".into(), start_revision: 2, ..Default::default() };
        let mut watcher = Watcher::open(&mut returned, create).await;
        assert!(watcher.response().await.created);
        let mut next = 2;
        while next <= revision {
            for event in watcher.response().await.events {
                assert_eq!(event.kv.unwrap().mod_revision, next, "no revision is missing from its history");
                next += 1;
            }
        }
    });
}

fn without_quorum(kind: Kind) {
    let Some(mut cluster) = Cluster::start(kind, 3) else { return };
    let left = others(leader(&cluster))[0];
    rpc::run(async { Rpc::new(&cluster.members[left]).put("k", "v").await.unwrap() });
    rpc::run(async {
        let mut rpc = Rpc::new(&cluster.members[left]);
        let create = WatchCreateRequest { key: "k".into(), ..Default::default() };
        let needs_leader = |request: &mut tonic::Request<_>| {
            request.metadata_mut().insert("hasleader", "true".parse().unwrap());
        };
        let mut guarded = Watcher::open_with(&mut rpc, create.clone(), needs_leader).await.unwrap();
        let mut unguarded = Watcher::open(&mut rpc, create).await;
        assert!(guarded.response().await.created && unguarded.response().await.created);
        for index in others(left) {
            cluster.members[index].kill();
        }
        let status = guarded.next().await.unwrap_err();
        assert_eq!((status.code(), status.message()), (Code::Unavailable, "etcdserver: no leader"));
        assert!(unguarded.silent_for(Duration::from_millis(100)).await, "who did not ask for a leader waits on");

        let mut call = tonic::Request::new(put("k", "w"));
        call.metadata_mut().insert("hasleader", "true".parse().unwrap());
        let status = rpc.kv.put(call).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (Code::Unavailable, "etcdserver: no leader"));

        assert_eq!(local(&mut rpc, "k").await.unwrap().as_deref(), Some("v"), "its own data can be read");
        let status = rpc.status().await.unwrap();
        assert_eq!((status.leader, status.errors.as_slice()), (0, &["etcdserver: no leader".to_owned()][..]));

        // Both wait for a leader as long as a request may take: five seconds and two election timeouts.
        let mut writer = rpc.clone();
        let begun = Instant::now();
        let (wrote, read) = tokio::join!(writer.put("k", "w"), rpc.get("k"));
        let waited = begun.elapsed();
        let (wrote, read) = (wrote.unwrap_err(), read.unwrap_err());
        // A proposal that no leader takes is not even in the log, which etcd tells by another error.
        assert_eq!((wrote.code(), wrote.message()), (Code::DeadlineExceeded, "context deadline exceeded"));
        assert_eq!((read.code(), read.message()), (Code::Unavailable, "etcdserver: request timed out"));
        assert!((Duration::from_millis(6_900)..Duration::from_secs(9)).contains(&waited), "{waited:?}");
    });
    let back = others(left)[0];
    cluster.members[back].restart();
    rpc::run(async {
        let mut rpc = Rpc::new(&cluster.members[left]);
        rpc.put("k", "x").await.unwrap();
        assert_eq!(rpc.get("k").await.unwrap().kvs[0].value, "x");
    });
}

fn all_restarted_at_once(kind: Kind) {
    let Some(mut cluster) = Cluster::start(kind, 3) else { return };
    rpc::run(async {
        let mut rpc = Rpc::new(&cluster.members[0]);
        for number in 0..50 {
            rpc.put(&format!("k{number}"), "v").await.unwrap();
        }
    });
    for round in 0..3 {
        cluster.members.iter_mut().for_each(e2e::Member::kill);
        cluster.members.iter_mut().for_each(e2e::Member::spawn);
        cluster.members.iter().for_each(e2e::Member::wait_ready);
        rpc::run(async {
            for member in &cluster.members {
                let mut rpc = Rpc::new(member);
                let all = RangeRequest { key: "k".into(), range_end: "l".into(), ..Default::default() };
                assert_eq!(rpc.range(all).await.unwrap().count, 50);
                let wrote = rpc.put("round", &round.to_string()).await.unwrap();
                assert!(wrote.header.unwrap().revision > 51);
            }
        });
    }
}
