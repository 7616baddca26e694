//! The error table: each row that one member can be brought to say, code and text to the letter. Clients match on the text.

use std::fmt::Debug;

use e2e::rpc::{self, Rpc, put};
use e2e::{Cluster, Kind};
use keelson_proto::etcdserverpb::request_op::Request;
use keelson_proto::etcdserverpb::{
    CompactionRequest, Compare, DeleteRangeRequest, LeaseGrantRequest, LeaseRevokeRequest, PutRequest, RangeRequest,
    RequestOp, TxnRequest,
};
use tonic::{Code, Status};

on_both!(keys_and_values, revisions, sort_options, transactions, leases, sizes, unknown_methods);

const EMPTY_KEY: &str = "etcdserver: key is not provided";
const KEY_NOT_FOUND: &str = "etcdserver: key not found";
const COMPACTED: &str = "etcdserver: mvcc: required revision has been compacted";
const FUTURE: &str = "etcdserver: mvcc: required revision is a future revision";
const DUPLICATE: &str = "etcdserver: duplicate key given in txn request";
const TOO_MANY: &str = "etcdserver: too many operations in txn request";
const NO_LEASE: &str = "etcdserver: requested lease not found";

/// Holds an answer against the code and the text it has to refuse with.
#[track_caller]
fn refused<T: Debug>(answer: Result<T, Status>, code: Code, text: &str) {
    match answer {
        Ok(answer) => panic!("not refused with {text:?} but answered {answer:?}"),
        Err(status) => assert_eq!((status.code(), status.message()), (code, text)),
    }
}

fn on_one(kind: Kind, body: impl AsyncFnOnce(Rpc)) {
    let Some(cluster) = Cluster::start(kind, 1) else { return };
    rpc::run(async { body(Rpc::new(&cluster.members[0])).await });
}

fn range(key: &str) -> RangeRequest {
    RangeRequest { key: key.to_owned().into(), ..Default::default() }
}

fn op(request: Request) -> RequestOp {
    RequestOp { request: Some(request) }
}

fn puts(keys: impl IntoIterator<Item = String>) -> Vec<RequestOp> {
    keys.into_iter().map(|key| op(Request::RequestPut(put(&key, "v")))).collect()
}

fn delete(key: &str, end: &str) -> RequestOp {
    let request = DeleteRangeRequest { key: key.to_owned().into(), range_end: end.to_owned().into(), prev_kv: false };
    op(Request::RequestDeleteRange(request))
}

fn then(success: Vec<RequestOp>) -> TxnRequest {
    TxnRequest { success, ..Default::default() }
}

fn keys_and_values(kind: Kind) {
    on_one(kind, async |mut rpc| {
        refused(rpc.put("", "v").await, Code::InvalidArgument, EMPTY_KEY);
        refused(rpc.get("").await, Code::InvalidArgument, EMPTY_KEY);
        refused(rpc.delete(DeleteRangeRequest::default()).await, Code::InvalidArgument, EMPTY_KEY);
        // The key is looked at before anything else is.
        refused(rpc.range(RangeRequest { sort_order: 9, ..range("") }).await, Code::InvalidArgument, EMPTY_KEY);

        let keep = |value: &str, lease| PutRequest { ignore_value: true, lease, ..put("k", value) };
        refused(rpc.kv_put(keep("", 0)).await, Code::InvalidArgument, KEY_NOT_FOUND);
        refused(rpc.kv_put(keep("v", 0)).await, Code::InvalidArgument, "etcdserver: value is provided");
        let keep_lease = |lease| PutRequest { ignore_lease: true, lease, ..put("k", "v") };
        refused(rpc.kv_put(keep_lease(0)).await, Code::InvalidArgument, KEY_NOT_FOUND);
        refused(rpc.kv_put(keep_lease(7)).await, Code::InvalidArgument, "etcdserver: lease is provided");
        refused(rpc.kv_put(PutRequest { lease: 7, ..put("k", "v") }).await, Code::NotFound, NO_LEASE);
        let both = PutRequest { ignore_value: true, ignore_lease: true, lease: 7, ..put("k", "v") };
        refused(rpc.kv_put(both).await, Code::InvalidArgument, "etcdserver: value is provided");

        let answer = rpc.get("k").await.unwrap();
        assert_eq!((answer.count, answer.header.unwrap().revision), (0, 1), "a refused put writes nothing");
    });
}

fn revisions(kind: Kind) {
    on_one(kind, async |mut rpc| {
        for round in 0..5 {
            rpc.put("k", &round.to_string()).await.unwrap();
        }
        let at = |revision| RangeRequest { revision, ..range("k") };
        refused(rpc.range(at(7)).await, Code::OutOfRange, FUTURE);
        refused(rpc.range(RangeRequest { serializable: true, ..at(7) }).await, Code::OutOfRange, FUTURE);
        rpc.compact(4).await.unwrap();
        refused(rpc.range(at(3)).await, Code::OutOfRange, COMPACTED);
        assert_eq!(rpc.range(at(4)).await.unwrap().kvs[0].value, "2", "the compacted revision itself can be read");
        assert_eq!(rpc.range(at(-1)).await.unwrap().kvs[0].value, "4", "a negative revision is the newest");
        refused(rpc.compact(4).await, Code::OutOfRange, COMPACTED);
        refused(rpc.compact(3).await, Code::OutOfRange, COMPACTED);
        refused(rpc.compact(7).await, Code::OutOfRange, FUTURE);
        let lazy = CompactionRequest { revision: 0, physical: false };
        refused(rpc.kv.compact(lazy).await, Code::OutOfRange, COMPACTED);

        // A read inside a transaction fails all of it, on the branch that is taken only.
        let read = |revision| op(Request::RequestRange(RangeRequest { revision, ..range("k") }));
        let writes = |mut reads: Vec<RequestOp>| {
            reads.extend(puts(["other".to_owned()]));
            reads
        };
        refused(rpc.txn(then(writes(vec![read(3)]))).await, Code::OutOfRange, COMPACTED);
        refused(rpc.txn(then(writes(vec![read(7)]))).await, Code::OutOfRange, FUTURE);
        refused(rpc.txn(then(vec![read(3)])).await, Code::OutOfRange, COMPACTED);
        let not_taken = TxnRequest { failure: vec![read(3)], ..then(puts(["taken".to_owned()])) };
        assert!(rpc.txn(not_taken).await.unwrap().succeeded);
        assert_eq!(rpc.get("other").await.unwrap().count, 0, "nothing of a refused transaction is done");
    });
}

fn sort_options(kind: Kind) {
    on_one(kind, async |mut rpc| {
        let text = "etcdserver: invalid sort option";
        refused(rpc.range(RangeRequest { sort_order: 3, ..range("k") }).await, Code::InvalidArgument, text);
        refused(rpc.range(RangeRequest { sort_target: 5, ..range("k") }).await, Code::InvalidArgument, text);
        refused(rpc.range(RangeRequest { sort_order: -1, ..range("k") }).await, Code::InvalidArgument, text);
        let inside = op(Request::RequestRange(RangeRequest { sort_target: 5, ..range("k") }));
        refused(rpc.txn(then(vec![inside])).await, Code::InvalidArgument, text);
    });
}

fn transactions(kind: Kind) {
    on_one(kind, async |mut rpc| {
        let invalid = Code::InvalidArgument;
        let many = |count: usize| puts((0..count).map(|number| format!("k{number:03}")));
        refused(rpc.txn(then(many(129))).await, invalid, TOO_MANY);
        assert!(rpc.txn(then(many(128))).await.is_ok());
        let compares = vec![Compare { key: "k".into(), ..Default::default() }; 129];
        refused(rpc.txn(TxnRequest { compare: compares, ..Default::default() }).await, invalid, TOO_MANY);
        // A nested transaction has what its parent leaves over.
        let nested = |inner: usize, outer: usize| {
            let mut ops = many(outer - 1);
            ops.push(op(Request::RequestTxn(then(puts((0..inner).map(|number| format!("n{number:03}")))))));
            then(ops)
        };
        refused(rpc.txn(nested(29, 100)).await, invalid, TOO_MANY);
        assert!(rpc.txn(nested(28, 100)).await.is_ok());

        let twice = || puts(["a".to_owned(), "a".to_owned()]);
        refused(rpc.txn(then(twice())).await, invalid, DUPLICATE);
        refused(rpc.txn(TxnRequest { failure: twice(), ..Default::default() }).await, invalid, DUPLICATE);
        let mut put_and_delete = puts(["a".to_owned()]);
        put_and_delete.push(delete("a", "b"));
        refused(rpc.txn(then(put_and_delete)).await, invalid, DUPLICATE);
        let mut delete_then_nested_put = vec![delete("a", "c")];
        delete_then_nested_put.push(op(Request::RequestTxn(then(puts(["b".to_owned()])))));
        refused(rpc.txn(then(delete_then_nested_put)).await, invalid, DUPLICATE);
        let mut put_then_nested_put = puts(["a".to_owned()]);
        put_then_nested_put.push(op(Request::RequestTxn(then(puts(["a".to_owned()])))));
        refused(rpc.txn(then(put_then_nested_put)).await, invalid, DUPLICATE);
        assert!(rpc.txn(then(vec![delete("a", "c"), delete("b", "d")])).await.is_ok(), "deletes may overlap");
        let both_branches =
            TxnRequest { success: puts(["a".to_owned()]), failure: puts(["a".to_owned()]), ..Default::default() };
        assert!(rpc.txn(then(vec![op(Request::RequestTxn(both_branches))])).await.is_ok(), "only one branch is taken");

        refused(rpc.txn(then(vec![RequestOp { request: None }])).await, invalid, KEY_NOT_FOUND);
        let no_key = TxnRequest { compare: vec![Compare::default()], ..Default::default() };
        refused(rpc.txn(no_key).await, invalid, EMPTY_KEY);
        refused(rpc.txn(then(puts([String::new()]))).await, invalid, EMPTY_KEY);
        refused(rpc.txn(then(vec![delete("", "")])).await, invalid, EMPTY_KEY);
        refused(rpc.txn(then(vec![op(Request::RequestRange(range("")))])).await, invalid, EMPTY_KEY);
        let keep = |request| then(vec![op(Request::RequestPut(request))]);
        refused(rpc.txn(keep(PutRequest { ignore_value: true, ..put("new", "") })).await, invalid, KEY_NOT_FOUND);
        refused(rpc.txn(keep(PutRequest { lease: 7, ..put("new", "v") })).await, Code::NotFound, NO_LEASE);
        assert_eq!(rpc.get("new").await.unwrap().count, 0);
    });
}

fn leases(kind: Kind) {
    on_one(kind, async |mut rpc| {
        let grant = |ttl, id| LeaseGrantRequest { ttl, id };
        refused(
            rpc.lease.lease_grant(grant(9_000_000_001, 0)).await,
            Code::OutOfRange,
            "etcdserver: too large lease TTL",
        );
        assert_eq!(rpc.lease.lease_grant(grant(60, 77)).await.unwrap().into_inner().id, 77);
        let exists = "etcdserver: lease already exists";
        refused(rpc.lease.lease_grant(grant(60, 77)).await, Code::FailedPrecondition, exists);
        refused(rpc.lease.lease_revoke(LeaseRevokeRequest { id: 78 }).await, Code::NotFound, NO_LEASE);
        refused(rpc.lease.lease_revoke(LeaseRevokeRequest { id: 0 }).await, Code::NotFound, NO_LEASE);
    });
}

fn sizes(kind: Kind) {
    on_one(kind, async |mut rpc| {
        const MIB: usize = 1024 * 1024;
        // The limit of 1.5 MiB counts the whole entry; a message more than half a MiB beyond it is not even read.
        assert!(rpc.put("k", &"x".repeat(MIB + MIB / 2 - 200)).await.is_ok());
        let large = "etcdserver: request is too large";
        refused(rpc.put("k", &"x".repeat(MIB + MIB / 2 + 1)).await, Code::InvalidArgument, large);
        refused(rpc.put("k", &"x".repeat(2 * MIB - 100)).await, Code::InvalidArgument, large);
        let status = rpc.put("k", &"x".repeat(2 * MIB)).await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
        assert_eq!(status.message(), "grpc: received message larger than max (2097160 vs. 2097152)");
        assert_eq!(rpc.get("k").await.unwrap().header.unwrap().revision, 2);
    });
}

/// A method or a service that is not there, on the path that tonic's clients never take.
fn unknown_methods(kind: Kind) {
    let Some(cluster) = Cluster::start(kind, 1) else { return };
    rpc::run(async {
        let url = cluster.members[0].client_url();
        let channel = tonic::transport::Endpoint::from_shared(url).unwrap().connect().await.unwrap();
        for (path, text) in [
            ("/etcdserverpb.KV/Unheard", "unknown method Unheard for service etcdserverpb.KV"),
            ("/unheard.Of/Method", "unknown service unheard.Of"),
        ] {
            let mut client = tonic::client::Grpc::new(channel.clone());
            client.ready().await.unwrap();
            let codec = tonic_prost::ProstCodec::<RangeRequest, RangeRequest>::default();
            let path = path.parse().unwrap();
            let answer = client.unary(tonic::Request::new(range("k")), path, codec).await;
            refused(answer, Code::Unimplemented, text);
        }
    });
}
