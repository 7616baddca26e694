//! The client that matters most: a real kube-apiserver boots on the store, serves kubectl, and leaves what we read ourselves.

mod calls;
mod churn;
mod judge;
mod life;
mod world;

use e2e::kube::Apiserver;
use e2e::rpc::{self, Rpc, prefix_end};
use e2e::{Cluster, Kind, PATIENCE};
use keelson_proto::etcdserverpb::RangeRequest;
use keelson_proto::k8s::{core_v1::Service, runtime::Unknown};
use keelson_proto::mvccpb::KeyValue;
use prost::Message;

on_both!(an_apiserver_works, an_apiserver_survives_its_store);

/// What an object is stored as: four bytes, then an `Unknown` that carries the object's own bytes.
fn decode<T: Message + Default>(kv: &KeyValue, kind: &str) -> T {
    let stored = kv.value.strip_prefix(b"k8s\0").expect("Kubernetes' protobuf storage");
    let envelope = Unknown::decode(stored).expect("an Unknown");
    assert_eq!(envelope.type_meta.expect("a type").kind(), kind);
    T::decode(envelope.raw.expect("the object").as_ref()).expect("the object")
}

fn under(cluster: &Cluster, prefix: &str) -> Vec<KeyValue> {
    let request = RangeRequest { key: prefix.to_owned().into(), range_end: prefix_end(prefix), ..Default::default() };
    rpc::run(async { Rpc::new(&cluster.members[0]).range(request).await.unwrap().kvs })
}

fn an_apiserver_works(kind: Kind) {
    // As kubeadm starts it: the apiserver wants to be told how far its watches are.
    let extra = ["--watch-progress-notify-interval=5s"];
    let Some(cluster) = Cluster::start_with(kind, 1, &extra) else { return };
    let Some(server) = Apiserver::start(&cluster.endpoints()) else { return };
    eprintln!("{kind:?}: ready after {:?}", server.ready_after);

    let watching = server.begin(&["get", "configmaps", "-n", "default", "--watch", "-o", "name"]);
    server.ok(&["create", "configmap", "told", "--from-literal=word=first"]);
    watching.wait_for("configmap/told", PATIENCE);
    server.ok(&["patch", "configmap", "told", "--type=merge", "-p", r#"{"data":{"word":"second"}}"#]);
    watching.wait_for_nth("configmap/told", 2, PATIENCE);
    assert_eq!(server.ok(&["get", "configmap", "told", "-o", "jsonpath={.data.word}"]), "second");
    for number in 0..30 {
        server.ok(&["create", "configmap", &format!("many-{number}"), "--from-literal=a=b"]);
    }
    // In pages, each at the revision of the first.
    let listed = server.ok(&["get", "configmaps", "-n", "default", "--chunk-size=7", "-o", "name"]);
    assert_eq!(listed.lines().filter(|line| line.contains("/many-")).count(), 30);
    server.ok(&["delete", "configmap", "told"]);
    watching.wait_for_nth("configmap/told", 3, PATIENCE);
    assert!(server.kubectl(&["get", "configmap", "told"]).stderr.contains("NotFound"));
    assert!(server.ok(&["create", "service", "clusterip", "web", "--tcp=80:8080"]).contains("created"));
    assert!(server.ok(&["create", "service", "nodeport", "door", "--tcp=80:8080"]).contains("created"));

    let services: Vec<Service> =
        under(&cluster, "/registry/services/specs/").iter().map(|kv| decode(kv, "Service")).collect();
    let facts: Vec<(String, String, i32)> = services
        .iter()
        .map(|service| {
            let (metadata, spec) = (service.metadata.as_ref().unwrap(), service.spec.as_ref().unwrap());
            let address = spec.cluster_ip().to_owned();
            (format!("{}/{}", metadata.namespace(), metadata.name()), address, spec.ports[0].node_port())
        })
        .collect();
    let names: Vec<&str> = facts.iter().map(|(name, ..)| name.as_str()).collect();
    assert_eq!(names, ["default/door", "default/kubernetes", "default/web"]);
    assert_eq!(facts[1].1, "10.96.0.1");
    assert!(facts.iter().all(|(_, address, _)| address.starts_with("10.")), "{facts:?}");
    assert!((30_000..=32_767).contains(&facts[0].2), "{facts:?}");
    assert!(under(&cluster, "/registry/").len() > 150);
}

fn an_apiserver_survives_its_store(kind: Kind) {
    let Some(mut cluster) = Cluster::start(kind, 1) else { return };
    let Some(server) = Apiserver::start(&cluster.endpoints()) else { return };
    server.ok(&["create", "configmap", "before", "--from-literal=a=b"]);
    let watching = server.begin(&["get", "configmaps", "-n", "default", "--watch", "-o", "name"]);
    watching.wait_for("configmap/before", PATIENCE);
    cluster.members[0].kill();
    cluster.members[0].restart();
    e2e::eventually("kube-apiserver writes again", 2 * PATIENCE, || {
        (server.kubectl(&["create", "configmap", "after", "--from-literal=a=b"]).status == 0).then_some(())
    });
    watching.wait_for("configmap/after", PATIENCE);
    assert!(server.ok(&["get", "configmap", "before", "after", "-o", "name"]).lines().count() == 2);
}
