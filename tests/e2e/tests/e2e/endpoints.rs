//! What is served over HTTP beside gRPC: on the client port and on the metrics port.

use e2e::http::{ask, get};
use e2e::rpc::{self, Rpc};
use e2e::{Cluster, Kind, PATIENCE, eventually};

on_both!(health, version, metrics, both_protocols_on_one_port, health_without_quorum);

fn health(kind: Kind) {
    let Some(cluster) = Cluster::start(kind, 1) else { return };
    let member = &cluster.members[0];
    for port in [member.client_port, member.metrics_port] {
        for path in ["/health", "/health?serializable=true", "/health?exclude=NOSPACE"] {
            let response = ask(port, "GET", path).unwrap();
            assert_eq!((response.status, response.body.trim_end()), (200, r#"{"health":"true","reason":""}"#));
        }
        let response = ask(port, "POST", "/health").unwrap();
        assert_eq!((response.status, response.field("allow")), (405, Some("GET")));
        assert_eq!(ask(port, "GET", "/unheard-of").unwrap().status, 404);
    }
}

fn version(kind: Kind) {
    let Some(cluster) = Cluster::start(kind, 1) else { return };
    let port = cluster.members[0].client_port;
    let answer = eventually("the versions are decided", PATIENCE, || {
        let answer: serde_json::Value = serde_json::from_str(&get(port, "/version")).unwrap();
        (answer["storage"] == "3.7.0" && answer["etcdcluster"] == "3.7.0").then_some(answer)
    });
    assert!(answer["etcdserver"].as_str().unwrap().starts_with("3.7."), "{answer}");
    assert_eq!(answer["etcdcluster"], "3.7.0");
    assert_eq!(ask(port, "GET", "/version").unwrap().field("content-type"), Some("application/json"));
}

/// The value of a metric without labels.
fn sample(text: &str, name: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

fn metrics(kind: Kind) {
    let Some(cluster) = Cluster::start(kind, 1) else { return };
    let member = &cluster.members[0];
    rpc::run(async {
        let mut rpc = Rpc::new(member);
        for number in 0..5 {
            rpc.put("k", &number.to_string()).await.unwrap();
        }
    });
    for port in [member.client_port, member.metrics_port] {
        let response = ask(port, "GET", "/metrics").unwrap();
        assert_eq!(response.status, 200);
        assert!(response.field("content-type").unwrap().starts_with("text/plain; version=0.0.4"));
        let text = response.body;
        assert_eq!(sample(&text, "etcd_server_has_leader"), Some(1.0));
        assert_eq!(sample(&text, "etcd_server_is_leader"), Some(1.0));
        for counter in [
            "etcd_server_leader_changes_seen_total",
            "etcd_server_proposals_committed_total",
            "etcd_server_proposals_applied_total",
            "etcd_mvcc_db_total_size_in_bytes",
            "etcd_mvcc_put_total",
            "process_resident_memory_bytes",
        ] {
            assert!(
                sample(&text, counter).is_some_and(|value| value >= 1.0),
                "{counter}: {:?}",
                sample(&text, counter)
            );
        }
        assert!(text.contains("etcd_disk_wal_fsync_duration_seconds_bucket{le="));
        assert!(
            text.contains(
                r#"grpc_server_handled_total{grpc_code="OK",grpc_method="Put",grpc_service="etcdserverpb.KV""#
            )
        );
    }
}

/// HTTP/1 and gRPC meet on the client port, at the same time and in any order.
fn both_protocols_on_one_port(kind: Kind) {
    let Some(cluster) = Cluster::start(kind, 1) else { return };
    let member = &cluster.members[0];
    rpc::run(async {
        let mut rpc = Rpc::new(member);
        for number in 0..20 {
            rpc.put("k", &number.to_string()).await.unwrap();
            assert!(get(member.client_port, "/health").contains("true"));
        }
    });
}

fn health_without_quorum(kind: Kind) {
    let Some(mut cluster) = Cluster::start(kind, 3) else { return };
    cluster.members[1].kill();
    cluster.members[2].kill();
    let left = &cluster.members[0];
    for port in [left.client_port, left.metrics_port] {
        let response = eventually("the member notices that it has no leader", PATIENCE, || {
            ask(port, "GET", "/health").ok().filter(|response| response.body.contains("NO LEADER"))
        });
        assert_eq!(
            (response.status, response.body.trim_end()),
            (503, r#"{"health":"false","reason":"RAFT NO LEADER"}"#)
        );
        let local = ask(port, "GET", "/health?serializable=true").unwrap();
        assert_eq!(local.status, 200, "{local:?}");
    }
}
