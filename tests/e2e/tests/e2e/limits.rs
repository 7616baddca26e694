//! Limits and malformed requests, on every path into the server: the texts and codes are grpc-go's.

use e2e::raw::{Raw, announced, frame};
use e2e::rpc;
use e2e::{Cluster, Kind};
use keelson_proto::etcdserverpb::watch_request::RequestUnion;
use keelson_proto::etcdserverpb::{
    LeaseGrantRequest, PutRequest, PutResponse, RangeRequest, RangeStreamResponse, WatchCreateRequest, WatchRequest,
};
use prost::Message;
use tonic::Code;

on_both!(messages_too_large, malformed_messages, counted_messages, metadata, deadlines, names_of_methods);

const PUT: &str = "/etcdserverpb.KV/Put";
const RANGE: &str = "/etcdserverpb.KV/Range";
const RANGE_STREAM: &str = "/etcdserverpb.KV/RangeStream";
const COMPACT: &str = "/etcdserverpb.KV/Compact";
const GRANT: &str = "/etcdserverpb.Lease/LeaseGrant";
const KEEP_ALIVE: &str = "/etcdserverpb.Lease/LeaseKeepAlive";
const WATCH: &str = "/etcdserverpb.Watch/Watch";
const LOCK: &str = "/v3lockpb.Lock/Lock";
const OBSERVE: &str = "/v3electionpb.Election/Observe";

/// Thin handler, routed unary, both kinds of streams, and the recipes.
const EVERYWHERE: [&str; 9] = [PUT, RANGE, RANGE_STREAM, COMPACT, GRANT, KEEP_ALIVE, WATCH, LOCK, OBSERVE];
const STREAMS: [&str; 4] = [RANGE_STREAM, KEEP_ALIVE, WATCH, OBSERVE];

fn on_one(kind: Kind, body: impl AsyncFnOnce(Raw)) {
    let Some(cluster) = Cluster::start(kind, 1) else { return };
    rpc::run(async { body(Raw::new(&cluster.members[0])).await });
}

/// Sends `body` and holds the answer against a code and a text.
async fn refused(raw: &Raw, path: &str, body: Vec<u8>, code: Code, text: &str) {
    let answer = raw.call(path, body, &[]).await;
    // Go's protobuf writes a space or a wider one, by the build.
    let message = answer.message.replace('\u{a0}', " ");
    assert_eq!((answer.code, message.as_str()), (code, text), "{path}");
}

fn put_k() -> Vec<u8> {
    PutRequest { key: "k".into(), ..Default::default() }.encode_to_vec()
}

fn messages_too_large(kind: Kind) {
    on_one(kind, async |raw| {
        // Refused by what the prefix announces: the rest never comes.
        let text = "grpc: received message larger than max (2097153 vs. 2097152)";
        for path in EVERYWHERE {
            refused(&raw, path, announced(0, 2_097_153, b"abc"), Code::ResourceExhausted, text).await;
        }
        let text = "grpc: received message larger than max (4294967295 vs. 2097152)";
        refused(&raw, PUT, announced(2, 0xffff_ffff, b""), Code::ResourceExhausted, text).await;
        // Between the request's limit and the message's, it is the request that is too large.
        let large = PutRequest { key: "k".into(), value: vec![0; 2_097_000].into(), ..Default::default() };
        let text = "etcdserver: request is too large";
        refused(&raw, PUT, frame(&large.encode_to_vec()), Code::InvalidArgument, text).await;
    });
}

fn malformed_messages(kind: Kind) {
    on_one(kind, async |raw| {
        for path in EVERYWHERE {
            let stream = STREAMS.contains(&path);
            let before = if stream {
                "grpc: failed to unmarshal the received message"
            } else {
                "grpc: error unmarshalling request"
            };
            let text = format!("{before}: proto: cannot parse invalid wire-format data");
            refused(&raw, path, frame(b"\xff\xff\xff"), Code::Internal, &text).await;
            refused(&raw, path, frame(b"\x0a\x05ab"), Code::Internal, &text).await;
            let compressed = "grpc: compressed flag set with identity or empty encoding";
            refused(&raw, path, announced(1, 0, b""), Code::Internal, compressed).await;
            let format = "grpc: received unexpected payload format 2";
            refused(&raw, path, announced(2, 0, b""), Code::Internal, format).await;
            let code = if stream { Code::Internal } else { Code::Unknown };
            refused(&raw, path, announced(0, 4, b"abc"), code, "unexpected EOF").await;
        }
        let text = "grpc: error unmarshalling request: string field contains invalid UTF-8";
        refused(&raw, "/etcdserverpb.Cluster/MemberAdd", frame(b"\x0a\x02\xff\xfe"), Code::Internal, text).await;
    });
}

/// Too few and too many.
fn counted_messages(kind: Kind) {
    on_one(kind, async |raw| {
        // To a request without any DATA etcd gives no answer at all.
        for nothing in [&b"a"[..], b"abcd"] {
            for path in [PUT, RANGE, COMPACT, GRANT, LOCK] {
                refused(&raw, path, nothing.to_vec(), Code::Unknown, "EOF").await;
            }
            let text = "cardinality violation: received no request message from non-client-streaming RPC";
            refused(&raw, RANGE_STREAM, nothing.to_vec(), Code::Internal, text).await;
            refused(&raw, OBSERVE, nothing.to_vec(), Code::Internal, text).await;
            refused(&raw, KEEP_ALIVE, nothing.to_vec(), Code::Ok, "").await;
        }
        // What follows a unary request's message is not looked at.
        for rest in [frame(&put_k()), b"abc".to_vec(), announced(2, 0xffff_ffff, b"")] {
            let answer = raw.call(PUT, [frame(&put_k()), rest.clone()].concat(), &[]).await;
            assert_eq!(answer.code, Code::Ok, "{answer:?}");
            assert!(PutResponse::decode(&answer.data[5..]).unwrap().header.is_some());
            let grant = LeaseGrantRequest { ttl: 60, id: 0 }.encode_to_vec();
            assert_eq!(raw.call(GRANT, [frame(&grant), rest].concat(), &[]).await.code, Code::Ok);
        }
        let range = RangeRequest { key: "k".into(), ..Default::default() }.encode_to_vec();
        let text = "cardinality violation: received multiple request messages for non-client-streaming RPC";
        refused(&raw, RANGE_STREAM, [frame(&range), frame(&range)].concat(), Code::Internal, text).await;
        let answer = raw.call(RANGE_STREAM, [frame(&range), b"abc".to_vec()].concat(), &[]).await;
        assert_eq!(answer.code, Code::Ok);
        let response = RangeStreamResponse::decode(&answer.data[5..]).unwrap();
        assert_eq!(response.range_response.unwrap().count, 1);
    });
}

fn metadata(kind: Kind) {
    on_one(kind, async |raw| {
        let range = frame(&RangeRequest { key: "k".into(), ..Default::default() }.encode_to_vec());
        let create = WatchCreateRequest { key: "k".into(), ..Default::default() };
        let watch = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
        let bodies = [
            (RANGE, range.clone()),
            (RANGE_STREAM, range),
            (GRANT, frame(&LeaseGrantRequest { ttl: 60, id: 0 }.encode_to_vec())),
            (WATCH, frame(&watch.encode_to_vec())),
        ];
        for (path, body) in bodies {
            let answer = raw.call(path, body.clone(), &[("client-api-version", b"3.7\xff")]).await;
            let text = "etcdserver: invalid client api version";
            assert_eq!((answer.code, answer.message.as_str()), (Code::InvalidArgument, text), "{path}");
            if path != WATCH {
                let both: [(&str, &[u8]); 2] = [("client-api-version", b"3.7"), ("hasleader", b"true")];
                assert_eq!(raw.call(path, body, &both).await.code, Code::Ok, "{path}");
            }
        }
    });
}

fn deadlines(kind: Kind) {
    on_one(kind, async |raw| {
        let put = || frame(&put_k());
        for (timeout, why) in [
            ("1", "transport: timeout string is too short: \"1\""),
            ("1x", "transport: timeout unit is not recognized: \"1x\""),
            ("123456789S", "transport: timeout string is too long: \"123456789S\""),
            ("-1S", "strconv.ParseUint: parsing \"-1\": invalid syntax"),
        ] {
            let answer = raw.call(PUT, put(), &[("grpc-timeout", timeout.as_bytes())]).await;
            assert_eq!((answer.code, answer.message), (Code::Internal, format!("malformed grpc-timeout: {why}")));
        }
        for timeout in ["10S", "1M", "99999999H"] {
            assert_eq!(raw.call(PUT, put(), &[("grpc-timeout", timeout.as_bytes())]).await.code, Code::Ok);
        }
        // A stream that nothing else ends is ended by its deadline.
        let create = WatchCreateRequest { key: "none".into(), ..Default::default() };
        let watch = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
        for (path, body) in [(WATCH, frame(&watch.encode_to_vec())), (OBSERVE, frame(b""))] {
            let answer = raw.call(path, body, &[("grpc-timeout", b"300m")]).await;
            // etcd's transport may reset the stream before its handler has said why.
            let reset = kind == Kind::Etcd && answer.code == Code::Cancelled;
            let said = (answer.code, answer.message.as_str()) == (Code::DeadlineExceeded, "context deadline exceeded");
            assert!(said || reset, "{path}: {answer:?}");
        }
    });
}

fn names_of_methods(kind: Kind) {
    on_one(kind, async |raw| {
        for (path, text) in [
            ("/v3lockpb.Lock/Unheard", "unknown method Unheard for service v3lockpb.Lock"),
            ("/v3electionpb.Election/Unheard", "unknown method Unheard for service v3electionpb.Election"),
            ("/etcdserverpb.Watch/Unheard", "unknown method Unheard for service etcdserverpb.Watch"),
            ("/etcdserverpb.KV/", "unknown method  for service etcdserverpb.KV"),
            ("/nomethod", "malformed method name: \"/nomethod\""),
            ("/a/b/c", "unknown service a/b"),
            ("//Put", "unknown service "),
        ] {
            refused(&raw, path, frame(b""), Code::Unimplemented, text).await;
        }
    });
}
