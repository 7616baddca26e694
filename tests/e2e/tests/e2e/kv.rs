//! Keys, ranges and transactions over gRPC: what every field of an answer is.

use e2e::rpc::{self, Rpc, prefix_end, put};
use e2e::{Cluster, Kind};
use keelson_proto::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use keelson_proto::etcdserverpb::range_request::{SortOrder, SortTarget};
use keelson_proto::etcdserverpb::request_op::Request;
use keelson_proto::etcdserverpb::response_op::Response;
use keelson_proto::etcdserverpb::{
    Compare, DeleteRangeRequest, LeaseGrantRequest, MemberListRequest, PutRequest, RangeRequest, RangeResponse,
    RequestOp, ResponseHeader, TxnRequest,
};
use keelson_proto::mvccpb::KeyValue;

on_both!(
    headers,
    generations,
    range_bounds,
    limits_and_counts,
    filters,
    sorting,
    old_revisions,
    put_options,
    deletes,
    compares,
    nested_transactions,
    reads_in_transactions,
    status_and_members,
    answers_of_any_size,
);

fn on_one(kind: Kind, body: impl AsyncFnOnce(&mut Rpc)) {
    let Some(cluster) = Cluster::start(kind, 1) else { return };
    rpc::run(async { body(&mut Rpc::new(&cluster.members[0])).await });
}

fn all() -> RangeRequest {
    RangeRequest { key: "\0".into(), range_end: "\0".into(), ..Default::default() }
}

fn keys(answer: &RangeResponse) -> Vec<String> {
    answer.kvs.iter().map(|kv| text(&kv.key)).collect()
}

fn text(bytes: &bytes::Bytes) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn revision(header: &Option<ResponseHeader>) -> i64 {
    header.as_ref().unwrap().revision
}

fn kv(key: &str, value: &str, create_revision: i64, mod_revision: i64, version: i64) -> KeyValue {
    let (key, value) = (key.to_owned().into(), value.to_owned().into());
    KeyValue { key, value, create_revision, mod_revision, version, lease: 0 }
}

fn op(request: Request) -> RequestOp {
    RequestOp { request: Some(request) }
}

fn op_put(key: &str, value: &str) -> RequestOp {
    op(Request::RequestPut(put(key, value)))
}

fn op_get(key: &str) -> RequestOp {
    op(Request::RequestRange(RangeRequest { key: key.to_owned().into(), ..Default::default() }))
}

fn op_delete(key: &str) -> RequestOp {
    op(Request::RequestDeleteRange(DeleteRangeRequest { key: key.to_owned().into(), ..Default::default() }))
}

fn headers(kind: Kind) {
    on_one(kind, async |rpc| {
        let status = rpc.status().await.unwrap();
        let header = status.header.unwrap();
        assert!(header.cluster_id != 0 && header.member_id != 0 && header.raft_term > 0);
        assert_eq!(header.revision, 1, "an empty store is at revision 1");

        let wrote = rpc.put("a", "1").await.unwrap().header.unwrap();
        assert_eq!(wrote, ResponseHeader { revision: 2, ..header });
        rpc.put("a", "2").await.unwrap();
        let read = rpc.range(RangeRequest { key: "a".into(), revision: 2, ..Default::default() }).await.unwrap();
        assert_eq!(read.header.unwrap(), ResponseHeader { revision: 3, ..header }, "the newest, not the one asked for");

        let nothing = rpc.delete(DeleteRangeRequest { key: "b".into(), ..Default::default() }).await.unwrap();
        assert_eq!(nothing.header.unwrap(), ResponseHeader { revision: 3, ..header }, "nothing changed");

        let txn =
            rpc.txn(TxnRequest { success: vec![op_put("c", "1"), op_get("c")], ..Default::default() }).await.unwrap();
        assert_eq!(txn.header.unwrap(), ResponseHeader { revision: 4, ..header });
        for response in txn.responses {
            let inner = match response.response.unwrap() {
                Response::ResponsePut(answer) => answer.header,
                Response::ResponseRange(answer) => answer.header,
                other => panic!("{other:?}"),
            };
            let bare = ResponseHeader { revision: 4, ..Default::default() };
            assert_eq!(inner.unwrap(), bare, "an inner header carries a revision and nothing else");
        }
        assert_eq!(rpc.compact(4).await.unwrap().header.unwrap(), ResponseHeader { revision: 4, ..header });
        let granted = rpc.lease.lease_grant(LeaseGrantRequest { ttl: 60, id: 0 }).await.unwrap().into_inner();
        assert_eq!(granted.header.unwrap(), ResponseHeader { revision: 4, ..header });
        let members = rpc.cluster.member_list(MemberListRequest { linearizable: true }).await.unwrap().into_inner();
        assert_eq!(members.header.unwrap(), ResponseHeader { revision: 0, ..header }, "no revision here");
    });
}

fn generations(kind: Kind) {
    on_one(kind, async |rpc| {
        rpc.put("k", "1").await.unwrap();
        rpc.put("k", "2").await.unwrap();
        assert_eq!(rpc.get("k").await.unwrap().kvs, [kv("k", "2", 2, 3, 2)]);
        rpc.delete(DeleteRangeRequest { key: "k".into(), ..Default::default() }).await.unwrap();
        assert_eq!(rpc.get("k").await.unwrap().count, 0);
        rpc.put("k", "").await.unwrap();
        assert_eq!(
            rpc.get("k").await.unwrap().kvs,
            [kv("k", "", 5, 5, 1)],
            "a delete starts over; a value may be empty"
        );
    });
}

fn range_bounds(kind: Kind) {
    on_one(kind, async |rpc| {
        for key in ["a", "a\u{0}", "ab", "b", "b/1", "b/2", "c"] {
            rpc.put(key, "v").await.unwrap();
        }
        let mut between = async |key: &[u8], end: &[u8]| {
            let (key, range_end) = (key.to_vec().into(), end.to_vec().into());
            keys(&rpc.range(RangeRequest { key, range_end, ..Default::default() }).await.unwrap())
        };
        assert_eq!(between(b"a", b"").await, ["a"]);
        assert_eq!(between(b"a", b"b").await, ["a", "a\u{0}", "ab"]);
        assert_eq!(between(b"b/", b"b0").await, ["b/1", "b/2"]);
        assert_eq!(between(b"b", b"\0").await, ["b", "b/1", "b/2", "c"], "from a key on");
        assert_eq!(between(b"\0", b"\0").await.len(), 7, "everything");
        assert!(between(b"c", b"a").await.is_empty(), "an end before the start is no error");
        assert!(between(b"c", b"c").await.is_empty());
        assert!(between(b"\xff", b"\0").await.is_empty());
    });
}

fn limits_and_counts(kind: Kind) {
    on_one(kind, async |rpc| {
        for number in 0..10 {
            rpc.put(&format!("k{number}"), "v").await.unwrap();
        }
        let limited = |limit| RangeRequest { limit, ..all() };
        for (limit, len, more) in [(0, 10, false), (3, 3, true), (9, 9, true), (10, 10, false), (11, 10, false)] {
            let answer = rpc.range(limited(limit)).await.unwrap();
            assert_eq!((answer.kvs.len(), answer.more, answer.count), (len, more, 10), "limit {limit}");
        }
        let answer = rpc.range(RangeRequest { count_only: true, ..limited(3) }).await.unwrap();
        assert_eq!((answer.kvs.len(), answer.more, answer.count), (0, false, 10));
        let answer = rpc.range(RangeRequest { keys_only: true, ..limited(3) }).await.unwrap();
        assert!(answer.kvs.iter().all(|kv| kv.value.is_empty() && kv.version == 1 && kv.mod_revision > 0));
        assert_eq!((answer.kvs.len(), answer.more, answer.count), (3, true, 10));
        let none = RangeRequest { key: "nothing".into(), keys_only: true, ..Default::default() };
        assert_eq!(rpc.range(none).await.unwrap().count, 0);
    });
}

fn filters(kind: Kind) {
    on_one(kind, async |rpc| {
        for key in ["a", "b", "c", "a", "d"] {
            rpc.put(key, "v").await.unwrap(); // revisions 2 to 6; a is created at 2 and changed at 5
        }
        let mut filtered = async |request: RangeRequest| {
            let answer = rpc.range(request).await.unwrap();
            (keys(&answer).concat(), answer.more, answer.count)
        };
        assert_eq!(filtered(RangeRequest { min_mod_revision: 4, ..all() }).await, ("acd".into(), false, 4));
        assert_eq!(filtered(RangeRequest { max_mod_revision: 4, ..all() }).await, ("bc".into(), false, 4));
        assert_eq!(filtered(RangeRequest { min_create_revision: 3, ..all() }).await, ("bcd".into(), false, 4));
        assert_eq!(filtered(RangeRequest { max_create_revision: 3, ..all() }).await, ("ab".into(), false, 4));
        let limited = RangeRequest { min_mod_revision: 4, limit: 2, ..all() };
        assert_eq!(filtered(limited).await, ("ac".into(), true, 4), "filtered first, then cut; the count ignores both");
        let last = RangeRequest { min_mod_revision: 6, limit: 1, ..all() };
        assert_eq!(filtered(last).await, ("d".into(), false, 4));
    });
}

fn sorting(kind: Kind) {
    on_one(kind, async |rpc| {
        // Made in the order b, c, a; then c is put twice more.
        for (key, value) in [("b", "2"), ("c", "3"), ("a", "9"), ("c", "1"), ("c", "0")] {
            rpc.put(key, value).await.unwrap();
        }
        let mut sorted = async |target: SortTarget, order: SortOrder, limit: i64| {
            let (sort_target, sort_order) = (target.into(), order.into());
            let answer = rpc.range(RangeRequest { sort_target, sort_order, limit, ..all() }).await.unwrap();
            keys(&answer).concat() + if answer.more { "+" } else { "" }
        };
        assert_eq!(sorted(SortTarget::Key, SortOrder::None, 0).await, "abc");
        assert_eq!(sorted(SortTarget::Key, SortOrder::Descend, 0).await, "cba");
        assert_eq!(sorted(SortTarget::Key, SortOrder::Descend, 2).await, "cb+", "sorted first, then cut");
        assert_eq!(sorted(SortTarget::Create, SortOrder::Ascend, 0).await, "bca");
        assert_eq!(sorted(SortTarget::Mod, SortOrder::Ascend, 0).await, "bac");
        assert_eq!(sorted(SortTarget::Mod, SortOrder::Descend, 1).await, "c+");
        assert_eq!(sorted(SortTarget::Value, SortOrder::Ascend, 0).await, "cba");
        assert_eq!(sorted(SortTarget::Version, SortOrder::Descend, 1).await, "c+");
        assert_eq!(sorted(SortTarget::Mod, SortOrder::None, 0).await, "bac", "no order is ascending here");
        // etcd's quirk: no order counts as the order of keys when it comes to how many are loaded.
        assert_eq!(sorted(SortTarget::Mod, SortOrder::None, 1).await, "b+");
    });
}

fn old_revisions(kind: Kind) {
    on_one(kind, async |rpc| {
        rpc.put("a", "1").await.unwrap();
        rpc.put("b", "1").await.unwrap();
        rpc.put("a", "2").await.unwrap();
        rpc.delete(DeleteRangeRequest { key: "b".into(), ..Default::default() }).await.unwrap();
        rpc.put("c", "1").await.unwrap();
        let mut at = async |revision| {
            let answer = rpc.range(RangeRequest { revision, ..all() }).await.unwrap();
            let pairs: Vec<String> = answer.kvs.iter().map(|kv| text(&kv.key) + &text(&kv.value)).collect();
            (pairs.join(" "), answer.count)
        };
        assert_eq!(at(1).await, (String::new(), 0));
        assert_eq!(at(2).await, ("a1".into(), 1));
        assert_eq!(at(3).await, ("a1 b1".into(), 2));
        assert_eq!(at(4).await, ("a2 b1".into(), 2));
        assert_eq!(at(5).await, ("a2".into(), 1));
        assert_eq!(at(6).await, ("a2 c1".into(), 2));
        rpc.compact(4).await.unwrap();
        let answer = rpc.range(RangeRequest { revision: 4, ..all() }).await.unwrap();
        assert_eq!(keys(&answer), ["a", "b"], "the compacted revision reads as it did");
    });
}

fn put_options(kind: Kind) {
    on_one(kind, async |rpc| {
        let lease = rpc.lease.lease_grant(LeaseGrantRequest { ttl: 600, id: 5 }).await.unwrap().into_inner().id;
        let first = rpc.kv_put(PutRequest { prev_kv: true, lease, ..put("k", "1") }).await.unwrap();
        assert_eq!(first.prev_kv, None);
        let second = rpc.kv_put(PutRequest { prev_kv: true, ignore_lease: true, ..put("k", "2") }).await.unwrap();
        assert_eq!(second.prev_kv, Some(KeyValue { lease: 5, ..kv("k", "1", 2, 2, 1) }));
        assert_eq!(rpc.get("k").await.unwrap().kvs, [KeyValue { lease: 5, ..kv("k", "2", 2, 3, 2) }]);
        rpc.kv_put(PutRequest { ignore_value: true, ..put("k", "") }).await.unwrap();
        assert_eq!(rpc.get("k").await.unwrap().kvs, [kv("k", "2", 2, 4, 3)], "a put without a lease detaches");
        let large = "x".repeat(1_000_000);
        rpc.put("large", &large).await.unwrap();
        assert_eq!(rpc.get("large").await.unwrap().kvs[0].value, large);
        let binary: Vec<u8> = (0..=255).collect();
        let request = PutRequest { key: binary.clone().into(), value: binary.clone().into(), ..Default::default() };
        rpc.kv_put(request).await.unwrap();
        let read = rpc.range(RangeRequest { key: binary.clone().into(), ..Default::default() }).await.unwrap();
        assert_eq!(read.kvs[0].value, binary);
    });
}

fn deletes(kind: Kind) {
    on_one(kind, async |rpc| {
        for key in ["a", "b/1", "b/2", "c"] {
            rpc.put(key, "v").await.unwrap();
        }
        let range = DeleteRangeRequest { key: "b/".into(), range_end: prefix_end("b/"), prev_kv: true };
        let answer = rpc.delete(range.clone()).await.unwrap();
        assert_eq!((answer.deleted, revision(&answer.header)), (2, 6), "all at one revision");
        assert_eq!(answer.prev_kvs, [kv("b/1", "v", 3, 3, 1), kv("b/2", "v", 4, 4, 1)]);
        let again = rpc.delete(range).await.unwrap();
        assert_eq!((again.deleted, again.prev_kvs.len(), revision(&again.header)), (0, 0, 6));
        let rest = DeleteRangeRequest { key: "\0".into(), range_end: "\0".into(), prev_kv: false };
        let answer = rpc.delete(rest).await.unwrap();
        assert_eq!((answer.deleted, answer.prev_kvs.len()), (2, 0));
        assert_eq!(rpc.range(all()).await.unwrap().count, 0);
    });
}

fn compares(kind: Kind) {
    on_one(kind, async |rpc| {
        rpc.put("a", "m").await.unwrap();
        rpc.put("a", "m").await.unwrap();
        rpc.put("b", "n").await.unwrap();
        let mut holds =
            async |key: &str, result: CompareResult, target: CompareTarget, union: Option<TargetUnion>, end: &str| {
                let compare = Compare {
                    key: key.to_owned().into(),
                    result: result.into(),
                    target: target.into(),
                    target_union: union,
                    range_end: end.to_owned().into(),
                };
                rpc.txn(TxnRequest { compare: vec![compare], ..Default::default() }).await.unwrap().succeeded
            };
        use CompareResult::{Equal, Greater, Less, NotEqual};
        use CompareTarget::{Create, Lease, Mod, Value, Version};
        let value = |text: &'static str| Some(TargetUnion::Value(text.into()));
        assert!(holds("a", Equal, Version, Some(TargetUnion::Version(2)), "").await);
        assert!(!holds("a", Equal, Version, Some(TargetUnion::Version(1)), "").await);
        assert!(holds("a", Greater, Mod, Some(TargetUnion::ModRevision(2)), "").await);
        assert!(holds("a", Less, Create, Some(TargetUnion::CreateRevision(3)), "").await);
        assert!(holds("a", Equal, Lease, Some(TargetUnion::Lease(0)), "").await);
        assert!(holds("a", Equal, Value, value("m"), "").await);
        assert!(holds("a", Less, Value, value("n"), "").await);
        assert!(holds("a", Greater, Value, value("a"), "").await);
        assert!(holds("a", NotEqual, Value, value("x"), "").await);
        // A key that is not there has revision, version and lease zero, but no value, not even another one.
        assert!(holds("z", Equal, Version, Some(TargetUnion::Version(0)), "").await);
        assert!(holds("z", Equal, Create, None, "").await);
        assert!(holds("z", Less, Mod, Some(TargetUnion::ModRevision(1)), "").await);
        assert!(!holds("z", Equal, Value, value(""), "").await);
        assert!(!holds("z", NotEqual, Value, value("m"), "").await);
        // Over a range every key has to pass.
        assert!(holds("a", Greater, Value, value("l"), "c").await);
        assert!(!holds("a", Equal, Value, value("m"), "c").await);
        assert!(holds("a", Less, Mod, Some(TargetUnion::ModRevision(5)), "\0").await);
        assert!(!holds("x", Greater, Version, Some(TargetUnion::Version(0)), "z").await);
        assert!(holds("x", Equal, Version, Some(TargetUnion::Version(0)), "z").await);
    });
}

fn nested_transactions(kind: Kind) {
    on_one(kind, async |rpc| {
        rpc.put("a", "1").await.unwrap();
        let missing = |key: &str| Compare {
            key: key.to_owned().into(),
            target: CompareTarget::Create.into(),
            result: CompareResult::Equal.into(),
            target_union: Some(TargetUnion::CreateRevision(0)),
            range_end: Default::default(),
        };
        // The inner comparison sees the state before the outer put of the same key.
        let inner = TxnRequest {
            compare: vec![missing("new")],
            success: vec![op_put("seen", "absent")],
            failure: vec![op_put("seen", "present")],
        };
        let outer = TxnRequest {
            compare: vec![missing("nothing")],
            success: vec![op_put("new", "1"), op(Request::RequestTxn(inner)), op_get("seen"), op_delete("a")],
            failure: vec![],
        };
        let answer = rpc.txn(outer).await.unwrap();
        assert!(answer.succeeded);
        assert_eq!(revision(&answer.header), 3, "one revision for all of it");
        let [_, nested, seen, deleted] = answer.responses.try_into().expect("an answer for each operation");
        let Some(Response::ResponseTxn(nested)) = nested.response else { panic!("{nested:?}") };
        assert!(nested.succeeded);
        assert_eq!((nested.responses.len(), nested.header), (1, Some(ResponseHeader::default())), "an empty header");
        let Some(Response::ResponseRange(seen)) = seen.response else { panic!("{seen:?}") };
        assert_eq!(seen.kvs, [kv("seen", "absent", 3, 3, 1)], "an operation sees what came before it");
        let Some(Response::ResponseDeleteRange(deleted)) = deleted.response else { panic!("{deleted:?}") };
        assert_eq!(deleted.deleted, 1);
        assert_eq!(keys(&rpc.range(all()).await.unwrap()), ["new", "seen"]);
    });
}

fn reads_in_transactions(kind: Kind) {
    on_one(kind, async |rpc| {
        rpc.put("a", "1").await.unwrap();
        rpc.put("a", "2").await.unwrap();
        let old = op(Request::RequestRange(RangeRequest { key: "a".into(), revision: 2, ..Default::default() }));
        let only_reads = TxnRequest { success: vec![op_get("a"), old.clone()], ..Default::default() };
        let answer = rpc.txn(only_reads).await.unwrap();
        assert_eq!(revision(&answer.header), 3, "reading changes nothing");
        let values: Vec<String> = answer
            .responses
            .into_iter()
            .map(|response| match response.response.unwrap() {
                Response::ResponseRange(answer) => text(&answer.kvs[0].value),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(values, ["2", "1"]);
        let mixed = TxnRequest { success: vec![op_get("a"), op_put("a", "3"), op_get("a"), old], ..Default::default() };
        let answer = rpc.txn(mixed).await.unwrap();
        let seen: Vec<(String, i64)> = answer
            .responses
            .iter()
            .filter_map(|response| match response.response.as_ref().unwrap() {
                Response::ResponseRange(answer) => Some((text(&answer.kvs[0].value), revision(&answer.header))),
                _ => None,
            })
            .collect();
        assert_eq!(seen, [("2".into(), 3), ("3".into(), 4), ("1".into(), 4)], "a revision grows with the first change");
        let empty = rpc.txn(TxnRequest::default()).await.unwrap();
        assert!(empty.succeeded && empty.responses.is_empty());
        assert_eq!(revision(&empty.header), 4);
    });
}

fn status_and_members(kind: Kind) {
    let Some(cluster) = Cluster::start(kind, 1) else { return };
    let member = &cluster.members[0];
    rpc::run(async {
        let mut rpc = Rpc::new(member);
        rpc.put("a", "1").await.unwrap();
        let status = rpc.status().await.unwrap();
        assert!(status.version.starts_with("3.7."), "{}", status.version);
        assert_eq!(status.leader, status.header.unwrap().member_id);
        assert!(status.raft_index > 0 && status.raft_applied_index > 0 && status.raft_term > 0);
        assert!(status.db_size > 0 && status.db_size_in_use > 0);
        assert_eq!(status.db_size_quota, 2 * 1024 * 1024 * 1024);
        assert!(status.errors.is_empty() && !status.is_learner);

        for linearizable in [true, false] {
            let list = rpc.cluster.member_list(MemberListRequest { linearizable }).await.unwrap().into_inner();
            let [only] = list.members.as_slice() else { panic!("{list:?}") };
            assert_eq!((only.id, only.name.as_str()), (status.leader, member.name.as_str()));
            assert_eq!(only.client_urls, [member.client_url()]);
            assert_eq!(only.peer_urls, [format!("http://127.0.0.1:{}", member.peer_port)]);
        }
    });
}

/// No limit stands on an answer: it may be many times the largest request.
fn answers_of_any_size(kind: Kind) {
    on_one(kind, async |rpc| {
        let value = "x".repeat(1024 * 1024);
        for n in 0..12 {
            rpc.put(&format!("large/{n:02}"), &value).await.unwrap();
        }
        let answer = rpc.range(all()).await.unwrap();
        assert_eq!((answer.count, answer.more, answer.kvs.len()), (12, false, 12));
        assert!(answer.kvs.iter().all(|kv| kv.value == value));
        let op = |_| op(Request::RequestRange(all()));
        let twice = TxnRequest { success: (0..2).map(op).collect(), ..TxnRequest::default() };
        let answer = rpc.txn(twice).await.unwrap();
        assert_eq!(answer.responses.len(), 2);
        for response in answer.responses {
            let Some(Response::ResponseRange(range)) = response.response else { panic!("not a range") };
            assert_eq!((range.count, range.kvs.len()), (12, 12));
        }
    });
}
