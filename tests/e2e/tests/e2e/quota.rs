//! Alarms and what they refuse: the quota's NOSPACE, CORRUPT raised by hand, and who may lower them.

use std::time::Duration;

use e2e::rpc::{self, Rpc, put};
use e2e::{Cluster, Kind, http};
use keelson_proto::etcdserverpb::alarm_request::AlarmAction;
use keelson_proto::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use keelson_proto::etcdserverpb::request_op::Request;
use keelson_proto::etcdserverpb::{
    AlarmRequest, AlarmType, Compare, DefragmentRequest, DeleteRangeRequest, LeaseGrantRequest, LeaseKeepAliveRequest,
    LeaseRevokeRequest, MemberListRequest, RangeRequest, RequestOp, TxnRequest, TxnResponse,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

on_both!(alarms_by_hand, corrupt, filled_up, crossed_by_many_at_once, one_small_quota_of_three, through_etcdctl);

type Result<T> = std::result::Result<T, Status>;

/// Ours counts logical bytes and etcd its file: a quota that is large beside either's own needs.
const QUOTA: i64 = 16 << 20;
const VALUE_BYTES: usize = 256 << 10;

async fn alarm(rpc: &mut Rpc, action: AlarmAction, member_id: u64, alarm: AlarmType) -> Vec<(u64, AlarmType)> {
    let request = AlarmRequest { action: action.into(), member_id, alarm: alarm.into() };
    let answer = rpc.maintenance.alarm(request).await.unwrap().into_inner();
    assert!(answer.header.unwrap().revision > 0, "a full header");
    let mut alarms: Vec<_> = answer.alarms.iter().map(|a| (a.member_id, a.alarm())).collect();
    alarms.sort_by_key(|(member, alarm)| (*alarm as i32, *member));
    alarms
}

async fn alarms(rpc: &mut Rpc) -> Vec<(u64, AlarmType)> {
    alarm(rpc, AlarmAction::Get, 0, AlarmType::None).await
}

async fn disarm(rpc: &mut Rpc) {
    for (member, kind) in alarms(rpc).await {
        assert_eq!(alarm(rpc, AlarmAction::Deactivate, member, kind).await, [(member, kind)]);
    }
    assert_eq!(alarms(rpc).await, []);
}

async fn put_big(rpc: &mut Rpc, key: &str) -> Result<()> {
    rpc.put(key, &"x".repeat(VALUE_BYTES)).await.map(drop)
}

async fn delete_all(rpc: &mut Rpc) -> Result<i64> {
    let all = DeleteRangeRequest { key: "\0".into(), range_end: "\0".into(), ..Default::default() };
    Ok(rpc.delete(all).await?.deleted)
}

async fn grant(rpc: &mut Rpc, id: i64, ttl: i64) -> Result<()> {
    rpc.lease.lease_grant(LeaseGrantRequest { ttl, id }).await.map(drop)
}

async fn revoke(rpc: &mut Rpc, id: i64) -> Result<()> {
    rpc.lease.lease_revoke(LeaseRevokeRequest { id }).await.map(drop)
}

async fn keep_alive(rpc: &mut Rpc, id: i64) -> i64 {
    let (requests, queue) = tokio::sync::mpsc::channel(1);
    requests.send(LeaseKeepAliveRequest { id }).await.unwrap();
    let mut answers = rpc.lease.lease_keep_alive(ReceiverStream::new(queue)).await.unwrap().into_inner();
    answers.message().await.unwrap().expect("an answer").ttl
}

fn op(request: Request) -> RequestOp {
    RequestOp { request: Some(request) }
}

fn get_op(key: &str) -> RequestOp {
    op(Request::RequestRange(RangeRequest { key: key.to_owned().into(), ..Default::default() }))
}

fn delete_op(key: &str) -> RequestOp {
    op(Request::RequestDeleteRange(DeleteRangeRequest { key: key.to_owned().into(), ..Default::default() }))
}

fn put_op(key: &str) -> RequestOp {
    op(Request::RequestPut(put(key, "v")))
}

fn big_op(key: &str) -> RequestOp {
    op(Request::RequestPut(put(key, &"x".repeat(VALUE_BYTES))))
}

/// A transaction whose comparison holds: `success` is done.
async fn txn(rpc: &mut Rpc, success: Vec<RequestOp>, failure: Vec<RequestOp>) -> Result<TxnResponse> {
    let compare = vec![Compare {
        result: CompareResult::Equal.into(),
        target: CompareTarget::Version.into(),
        key: "never".into(),
        target_union: Some(TargetUnion::Version(0)),
        ..Default::default()
    }];
    rpc.txn(TxnRequest { compare, success, failure }).await
}

#[track_caller]
fn no_space<T: std::fmt::Debug>(answer: Result<T>) {
    let status = answer.unwrap_err();
    let says = (status.code(), status.message());
    assert_eq!(says, (Code::ResourceExhausted, "etcdserver: mvcc: database space exceeded"));
}

#[track_caller]
fn is_corrupt<T: std::fmt::Debug>(answer: Result<T>) {
    let status = answer.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::DataLoss, "etcdserver: corrupt cluster"));
}

/// Status' errors; how protobuf's text separates fields is said to be nobody's business.
async fn errors(rpc: &mut Rpc) -> Vec<String> {
    let status = rpc.status().await.unwrap();
    status.errors.iter().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
}

/// Makes room again: etcd's file shrinks only when it is told to.
async fn make_room(kind: Kind, rpc: &mut Rpc) {
    delete_all(rpc).await.unwrap();
    let revision = rpc.get("any").await.unwrap().header.unwrap().revision;
    rpc.compact(revision).await.unwrap();
    if kind == Kind::Etcd {
        rpc.maintenance.defragment(DefragmentRequest {}).await.unwrap();
    }
}

fn alarms_by_hand(kind: Kind) {
    use AlarmAction::{Activate, Deactivate, Get};
    use AlarmType::{Corrupt, None, Nospace};
    let Some(mut cluster) = Cluster::start(kind, 1) else { return };
    rpc::run(async {
        let rpc = &mut Rpc::new(&cluster.members[0]);
        assert_eq!(alarms(rpc).await, []);
        assert_eq!(alarm(rpc, Activate, 7, Nospace).await, [(7, Nospace)], "of any member, known or not");
        assert_eq!(alarm(rpc, Activate, 7, Nospace).await, [(7, Nospace)], "again is no mistake");
        assert_eq!(alarm(rpc, Activate, 8, Nospace).await, [(8, Nospace)]);
        assert_eq!(alarm(rpc, Activate, 8, Corrupt).await, [(8, Corrupt)]);
        assert_eq!(alarm(rpc, Activate, 8, None).await, []);
        assert_eq!(alarm(rpc, Deactivate, 9, Nospace).await, []);
        assert_eq!(alarm(rpc, Deactivate, 8, None).await, []);
        let both = [(7, Nospace), (8, Nospace)];
        assert_eq!(alarm(rpc, Get, 0, Nospace).await, both);
        assert_eq!(alarm(rpc, Get, 7, Nospace).await, both, "whose they are is not asked");
        assert_eq!(alarm(rpc, Get, 0, Corrupt).await, [(8, Corrupt)]);
        assert_eq!(alarm(rpc, Get, 0, None).await, [(7, Nospace), (8, Nospace), (8, Corrupt)]);
    });
    cluster.members[0].kill();
    cluster.members[0].restart();
    rpc::run(async {
        let rpc = &mut Rpc::new(&cluster.members[0]);
        assert_eq!(alarms(rpc).await, [(7, Nospace), (8, Nospace), (8, Corrupt)], "they outlive the process");
        is_corrupt(rpc.put("k", "v").await);
        assert_eq!(alarm(rpc, Deactivate, 8, Corrupt).await, [(8, Corrupt)]);
        no_space(rpc.put("k", "v").await);
        assert_eq!(alarm(rpc, Deactivate, 7, Nospace).await, [(7, Nospace)]);
        no_space(rpc.put("k", "v").await);
        assert_eq!(alarm(rpc, Deactivate, 8, Nospace).await, [(8, Nospace)]);
        assert_eq!(alarm(rpc, Deactivate, 8, Nospace).await, []);
        rpc.put("k", "v").await.unwrap();
    });
}

fn corrupt(kind: Kind) {
    let Some(cluster) = Cluster::start(kind, 1) else { return };
    let port = cluster.members[0].client_port;
    rpc::run(async {
        let rpc = &mut Rpc::new(&cluster.members[0]);
        rpc.put("k", "v").await.unwrap();
        grant(rpc, 1, 100).await.unwrap();
        alarm(rpc, AlarmAction::Activate, 7, AlarmType::Corrupt).await;

        is_corrupt(rpc.put("k", "w").await);
        is_corrupt(delete_all(rpc).await);
        is_corrupt(txn(rpc, vec![put_op("k")], vec![]).await);
        is_corrupt(txn(rpc, vec![delete_op("k")], vec![]).await);
        is_corrupt(txn(rpc, vec![get_op("k")], vec![put_op("k")]).await);
        is_corrupt(rpc.compact(1).await);
        is_corrupt(grant(rpc, 2, 100).await);
        is_corrupt(revoke(rpc, 1).await);

        assert_eq!(rpc.get("k").await.unwrap().kvs[0].value, "v");
        assert!(txn(rpc, vec![get_op("k")], vec![get_op("k")]).await.unwrap().succeeded, "nothing in it can write");
        assert_eq!(keep_alive(rpc, 1).await, 100);
        let members = MemberListRequest { linearizable: true };
        assert_eq!(rpc.cluster.member_list(members).await.unwrap().into_inner().members.len(), 1);
        assert_eq!(errors(rpc).await, ["memberID:7 alarm:CORRUPT"]);
        let health = http::ask(port, "GET", "/health").unwrap();
        assert_eq!((health.status, health.body.trim()), (503, r#"{"health":"false","reason":"ALARM CORRUPT"}"#));
        let excluded = http::get(port, "/health?exclude=CORRUPT");
        assert_eq!(excluded.trim(), r#"{"health":"true","reason":""}"#);

        disarm(rpc).await;
        rpc.put("k", "w").await.unwrap();
        revoke(rpc, 1).await.unwrap();
        assert_eq!(errors(rpc).await, [""; 0]);
    });
}

fn filled_up(kind: Kind) {
    let flag = format!("--quota-backend-bytes={QUOTA}");
    let Some(cluster) = Cluster::start_with(kind, 1, &[&flag]) else { return };
    let port = cluster.members[0].client_port;
    rpc::run(async {
        let rpc = &mut Rpc::new(&cluster.members[0]);
        grant(rpc, 1, 100).await.unwrap();
        let mut written = 0;
        let refused = loop {
            match put_big(rpc, &format!("k{written}")).await {
                Ok(()) => written += 1,
                Err(status) => break status,
            }
            assert!(written < 200, "{written} values of 256 KiB went into 16 MiB");
        };
        no_space::<()>(Err(refused));
        assert!(written >= 32, "{written} values of 256 KiB were all that went into 16 MiB");
        let status = rpc.status().await.unwrap();
        let me = status.header.unwrap().member_id;
        assert_eq!(alarms(rpc).await, [(me, AlarmType::Nospace)], "it stands when the refusal comes");
        assert_eq!(status.db_size_quota, QUOTA);
        assert_eq!(errors(rpc).await, [format!("memberID:{me} alarm:NOSPACE")]);
        let health = http::ask(port, "GET", "/health").unwrap();
        assert_eq!((health.status, health.body.trim()), (503, r#"{"health":"false","reason":"ALARM NOSPACE"}"#));

        // Refused: what costs space; and what would go over the quota, before it is even looked at.
        no_space(rpc.put("small", "v").await);
        no_space(put_big(rpc, "").await);
        no_space(txn(rpc, vec![big_op("a"), big_op("a")], vec![]).await);
        no_space(txn(rpc, vec![put_op("a")], vec![]).await);
        no_space(txn(rpc, vec![get_op("k0")], vec![put_op("a")]).await);
        no_space(grant(rpc, 2, 100).await);
        no_space(grant(rpc, 2, 9_000_000_001).await);
        // Not: what reads, deletes or makes room.
        assert_eq!(rpc.get("k0").await.unwrap().count, 1);
        assert!(txn(rpc, vec![delete_op("k0")], vec![]).await.unwrap().succeeded);
        assert!(txn(rpc, vec![get_op("k1")], vec![]).await.unwrap().succeeded);
        assert_eq!(keep_alive(rpc, 1).await, 100);
        revoke(rpc, 1).await.unwrap();

        // Lowered too early, the next write raises it again.
        disarm(rpc).await;
        no_space(put_big(rpc, "again").await);
        assert_eq!(alarms(rpc).await, [(me, AlarmType::Nospace)]);

        make_room(kind, rpc).await;
        no_space(rpc.put("small", "v").await);
        assert_eq!(alarms(rpc).await, [(me, AlarmType::Nospace)], "room alone does not lower it");
        disarm(rpc).await;
        rpc.put("small", "v").await.unwrap();
        grant(rpc, 2, 100).await.unwrap();
        assert_eq!(alarms(rpc).await, []);
    });
}

/// Writes that were on their way when the quota was crossed are applied, and refused all the same.
fn crossed_by_many_at_once(kind: Kind) {
    const WAVE: usize = 300;
    let flag = format!("--quota-backend-bytes={QUOTA}");
    let Some(cluster) = Cluster::start_with(kind, 1, &[&flag]) else { return };
    rpc::run(async {
        let rpc = &mut Rpc::new(&cluster.members[0]);
        let (mut answered, mut refused) = (Vec::new(), Vec::new());
        for wave in 0..10 {
            let mut tasks = tokio::task::JoinSet::new();
            for number in 0..WAVE {
                let (mut rpc, key) = (rpc.clone(), format!("{wave}/{number}"));
                tasks.spawn(async move { (rpc.put(&key, &"x".repeat(64 << 10)).await, key) });
            }
            for (answer, key) in tasks.join_all().await {
                match answer {
                    Ok(_) => answered.push(key),
                    Err(status) => {
                        no_space::<()>(Err(status));
                        refused.push(key);
                    }
                }
            }
            if !refused.is_empty() {
                break;
            }
        }
        assert!(!refused.is_empty(), "{} values of 64 KiB went into 16 MiB", answered.len());
        for key in &answered {
            assert_eq!(rpc.get(key).await.unwrap().count, 1, "{key} was answered");
        }
        let mut applied = 0;
        for key in &refused {
            applied += rpc.get(key).await.unwrap().count;
        }
        // Which of etcd's writes meet its size depends on when its file was last measured.
        if kind == Kind::Keelson {
            assert!(applied > 0, "of {} that were refused none was applied", refused.len());
        }
        assert_eq!(alarms(rpc).await.len(), 1);
    });
}

/// The member that runs out of space stops all of them.
fn one_small_quota_of_three(kind: Kind) {
    let Some(mut cluster) = Cluster::prepare(kind, 3, &[]) else { return };
    cluster.members[0].add_flags(&[&format!("--quota-backend-bytes={QUOTA}")]);
    cluster.members.iter_mut().for_each(e2e::Member::spawn);
    cluster.members.iter().for_each(e2e::Member::wait_ready);
    rpc::run(async {
        let [mut small, mut wide, mut other] = [0, 1, 2].map(|index| Rpc::new(&cluster.members[index]));
        let mut written = 0;
        while let Ok(()) = put_big(&mut wide, &format!("k{written}")).await {
            written += 1;
            assert!(written < 300, "{written} values of 256 KiB, and no alarm");
        }
        let id = small.status().await.unwrap().header.unwrap().member_id;
        for rpc in [&mut small, &mut wide, &mut other] {
            assert_eq!(alarms(rpc).await, [(id, AlarmType::Nospace)], "all know whose it is");
            no_space(rpc.put("small", "v").await);
            assert_eq!(errors(rpc).await, [format!("memberID:{id} alarm:NOSPACE")]);
        }
        assert_eq!(small.status().await.unwrap().db_size_quota, QUOTA);
        assert_eq!(wide.status().await.unwrap().db_size_quota, 2 << 30);

        // A write through another member is done, and raises it again where there is no room.
        disarm(&mut wide).await;
        wide.put("through another", "v").await.unwrap();
        rpc::until("it is raised again", async || {
            (alarms(&mut wide).await == [(id, AlarmType::Nospace)]).then_some(())
        })
        .await;
        assert_eq!(wide.get("through another").await.unwrap().count, 1);

        make_room(kind, &mut small).await;
        disarm(&mut wide).await;
        wide.put("roomy", "v").await.unwrap();
        assert_eq!(small.get("roomy").await.unwrap().count, 1);
        small.put("roomy too", "v").await.unwrap();
        assert_eq!(alarms(&mut small).await, []);
    });
}

fn through_etcdctl(kind: Kind) {
    let Some(cluster) = Cluster::start(kind, 1) else { return };
    let Some(ctl) = cluster.ctl() else { return };
    let lines = |text: String| -> Vec<String> {
        text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
    };
    assert_eq!(ctl.ok(&["alarm", "list"]), "");
    rpc::run(async {
        let rpc = &mut Rpc::to(&cluster.members[0].client_url(), Duration::from_secs(20));
        alarm(rpc, AlarmAction::Activate, 7, AlarmType::Nospace).await;
    });
    assert_eq!(lines(ctl.ok(&["alarm", "list"])), ["memberID:7 alarm:NOSPACE"]);
    let refused = ctl.run(&["put", "k", "v"]);
    assert_eq!(refused.status, 1);
    assert!(refused.stderr.contains("Error: etcdserver: mvcc: database space exceeded"), "{refused:?}");
    assert_eq!(lines(ctl.ok(&["alarm", "disarm"])), ["memberID:7 alarm:NOSPACE"]);
    assert_eq!(ctl.ok(&["alarm", "disarm"]), "");
    assert_eq!(ctl.ok(&["put", "k", "v"]), "OK\n");
}
