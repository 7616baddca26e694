//! The life of a stream: what it does not choke on, and how it ends.

use std::time::Instant;

use e2e::http::ask;
use e2e::rpc::{self, Rpc};
use e2e::watcher::spell;
use e2e::{Cluster, Kind, PATIENCE, Watcher};
use keelson_proto::etcdserverpb::watch_request::RequestUnion;
use keelson_proto::etcdserverpb::{WatchCreateRequest, WatchRequest};
use tonic::Code;

use super::{on_one, open, watch};

on_both!(invalid_union, too_large_a_request, canceled_by_its_client, ended_by_its_server, a_flood_of_requests);

/// Contract 2.7: a request that is none of the three is ignored.
fn invalid_union(kind: Kind) {
    on_one(kind, &[], async |rpc| {
        let create = WatchRequest { request_union: Some(RequestUnion::CreateRequest(watch("k"))) };
        let requests = [WatchRequest { request_union: None }, create, WatchRequest { request_union: None }];
        let mut responses = rpc.watch.watch(tokio_stream::iter(requests)).await.unwrap().into_inner();
        let created = responses.message().await.unwrap().unwrap();
        assert!(created.created && created.watch_id == 0);
        rpc.put("k", "v").await.unwrap();
        assert_eq!(spell(&responses.message().await.unwrap().unwrap()), ["put k=v @2"]);
    });
}

fn too_large_a_request(kind: Kind) {
    on_one(kind, &[], async |rpc| {
        let mut watcher = open(rpc, watch("k")).await;
        let large = WatchCreateRequest { key: vec![b'k'; 3 << 20].into(), ..Default::default() };
        watcher.create(large).await;
        let status = watcher.next().await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
        assert_eq!(status.message(), "grpc: received message larger than max (3145738 vs. 2097152)");
    });
}

/// A client that goes takes its watches with it, and counts as canceled.
fn canceled_by_its_client(kind: Kind) {
    let Some(cluster) = Cluster::start(kind, 1) else { return };
    let member = &cluster.members[0];
    rpc::run(async {
        let mut rpc = Rpc::new(member);
        let mut watcher = open(&mut rpc, watch("k")).await;
        watcher.create(watch("other")).await;
        assert!(watcher.response().await.created);
        assert_eq!(streams_that_ended(member.metrics_port), None);
        drop(watcher);
        let deadline = Instant::now() + PATIENCE;
        while streams_that_ended(member.metrics_port) != Some("1".to_owned()) {
            assert!(Instant::now() < deadline, "the stream's end is not counted");
            // The reset leaves while this runtime turns.
            rpc.get("k").await.unwrap();
        }
    });
}

fn streams_that_ended(port: u16) -> Option<String> {
    let page = ask(port, "GET", "/metrics").unwrap().body;
    let start = "grpc_server_handled_total{grpc_code=\"Canceled\",grpc_method=\"Watch\",\
                 grpc_service=\"etcdserverpb.Watch\",grpc_type=\"bidi_stream\"} ";
    let value = page.lines().find_map(|line| line.strip_prefix(start))?;
    (value != "0").then(|| value.to_owned())
}

fn ended_by_its_server(kind: Kind) {
    let Some(mut cluster) = Cluster::start(kind, 1) else { return };
    rpc::run(async {
        let mut rpc = Rpc::new(&cluster.members[0]);
        let mut watcher = open(&mut rpc, watch("k")).await;
        rpc.put("k", "1").await.unwrap();
        // Within its time: a watch does not keep a server from stopping.
        cluster.members[0].stop();
        assert_eq!(watcher.events(1).await, ["put k=1 @2"], "what was sent is there");
        let status = watcher.next().await.unwrap_err();
        // etcd cuts the connection; ours says that it stopped.
        assert!(matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Internal), "{status:?}");
    });
}

/// Requests that have no answer, more than fit one turn, and then one that has.
fn a_flood_of_requests(kind: Kind) {
    on_one(kind, &[], async |rpc| {
        let mut watcher = Watcher::open(rpc, watch("k")).await;
        assert!(watcher.response().await.created);
        for id in 1..500 {
            watcher.cancel(id).await;
        }
        watcher.cancel(0).await;
        assert!(watcher.response().await.canceled);
    });
}
