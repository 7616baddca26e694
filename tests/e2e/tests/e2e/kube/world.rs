//! What a cluster is made of: its objects, and how to see that its controllers have nothing left to do with them. No pod ever runs:
//! there is no node.

use e2e::kube::client::{Client, Refusal, text};
use serde_json::{Value, json};

/// Those that have work without a node.
pub(super) const CONTROLLERS: &[&str] = &[
    "deployment-controller",
    "replicaset-controller",
    "namespace-controller",
    "garbage-collector-controller",
    "endpointslice-controller",
    "serviceaccount-controller",
    "root-ca-certificate-publisher-controller",
    "clusterrole-aggregation-controller",
    "ttl-after-finished-controller",
    // Deletes for good what an apiserver had marked when its store went away between the two writes of a pod's deletion.
    "pod-garbage-collector-controller",
];

pub(super) const SECRETS: usize = 500;
const CONFIGMAPS: usize = 1500;
const SERVICES: usize = 240;
/// Services with a selector: each is given a slice, though nothing is ready behind it.
const SELECTING: usize = 60;
const THINGS: usize = 300;
const EVENTS: usize = 200;
const LEASES: usize = 150;
/// What is deleted with its owner.
const OWNED: usize = 40;
const DEPLOYMENTS: usize = 8;
const NAMESPACES: [&str; 4] = ["bulk", "churn", "doomed", "fresh"];

/// What kubectl applies: namespaces, a kind of its own, Deployments, and the owner of [`OWNED`] others.
pub(super) fn manifest() -> String {
    let mut items: Vec<Value> = NAMESPACES
        .iter()
        .map(|name| json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}))
        .collect();
    items.push(json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "things.keelson.dev"},
        "spec": {
            "group": "keelson.dev",
            "scope": "Namespaced",
            "names": {"plural": "things", "singular": "thing", "kind": "Thing"},
            "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": {
                "type": "object", "x-kubernetes-preserve-unknown-fields": true,
            }}}],
        },
    }));
    items.extend((0..DEPLOYMENTS).map(|number| deployment("bulk", &format!("web-{number}"))));
    items.push(deployment("doomed", "web"));
    items.push(configmap("bulk", "owner", json!({})));
    json!({"apiVersion": "v1", "kind": "List", "items": items}).to_string()
}

fn deployment(namespace: &str, name: &str) -> Value {
    json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "replicas": 3,
            // No pod is ever ready without a node: rolling, it would wait for the first new one.
            "strategy": {"type": "Recreate"},
            "selector": {"matchLabels": {"app": name}},
            "template": {
                "metadata": {"labels": {"app": name}},
                "spec": {"containers": [{"name": "main", "image": "example.invalid/main:1"}]},
            },
        },
    })
}

pub(super) fn configmap(namespace: &str, name: &str, data: Value) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": namespace},
        "data": data,
    })
}

/// What the Rust client creates, each with the collection it belongs to; `owner` is the uid of the ConfigMap of that name.
pub(super) fn bulk(owner: &str) -> Vec<(String, Value)> {
    let core = |namespace: &str, plural: &str| format!("/api/v1/namespaces/{namespace}/{plural}");
    let things = |namespace: &str| format!("/apis/keelson.dev/v1/namespaces/{namespace}/things");
    let mut jobs = Vec::new();
    let text = "a value as long as many are, which is to say not very long, but not a word either".repeat(3);
    for (namespace, configmaps, secrets, many) in [("bulk", CONFIGMAPS, SECRETS, THINGS), ("doomed", 150, 50, 50)] {
        jobs.extend((0..configmaps).map(|number| {
            let object = configmap(namespace, &format!("c-{number:04}"), json!({"text": text}));
            (core(namespace, "configmaps"), object)
        }));
        jobs.extend((0..secrets).map(|number| {
            let metadata = json!({"name": format!("s-{number:04}")});
            let object =
                json!({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": {"word": "secret"}});
            (core(namespace, "secrets"), object)
        }));
        jobs.extend((0..many).map(|number| {
            let metadata = json!({"name": format!("t-{number:04}")});
            let object =
                json!({"apiVersion": "keelson.dev/v1", "kind": "Thing", "metadata": metadata, "spec": {"number": number}});
            (things(namespace), object)
        }));
    }
    jobs.extend((0..SERVICES + SELECTING).map(|number| {
        let mut spec = json!({"ports": [{"port": 80}]});
        if number < SELECTING {
            spec["selector"] = json!({"app": format!("app-{number}")});
        }
        let metadata = json!({"name": format!("v-{number:04}")});
        let object = json!({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec});
        (core("bulk", "services"), object)
    }));
    jobs.extend((0..EVENTS).map(|number| {
        let object = json!({
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": format!("told-{number:04}")},
            "involvedObject": {"kind": "ConfigMap", "namespace": "bulk", "name": format!("c-{number:04}")},
            "reason": "Told",
            "message": "so that it is told",
            "type": "Normal",
        });
        (core("bulk", "events"), object)
    }));
    jobs.extend((0..LEASES).map(|number| {
        let object = json!({
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": format!("l-{number:04}")},
            "spec": {"holderIdentity": "nobody", "leaseDurationSeconds": 40},
        });
        ("/apis/coordination.k8s.io/v1/namespaces/bulk/leases".to_owned(), object)
    }));
    jobs.extend((0..OWNED).map(|number| {
        let mut object = configmap("bulk", &format!("owned-{number:04}"), json!({}));
        object["metadata"]["labels"] = json!({"owned": "yes"});
        object["metadata"]["ownerReferences"] =
            json!([{"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": owner}]);
        (core("bulk", "configmaps"), object)
    }));
    jobs
}

/// What the controllers still have to do; nothing once they are at rest.
pub(super) async fn unsettled(client: &Client) -> Result<Vec<String>, Refusal> {
    let mut open = Vec::new();
    let mut pods = 0;
    let deployments = client.list("/apis/apps/v1/deployments", "").await?.items;
    for deployment in &deployments {
        let figure = |pointer: &str| deployment.pointer(pointer).and_then(Value::as_u64).unwrap_or(0);
        let wanted = figure("/spec/replicas");
        pods += wanted;
        let observed = figure("/status/observedGeneration") == figure("/metadata/generation");
        if !observed || [figure("/status/replicas"), figure("/status/updatedReplicas")] != [wanted; 2] {
            open.push(format!("Deployment {}: {}", text(deployment, "/metadata/name"), deployment["status"]));
        }
    }
    // web-0 to web-7 without web-2, which is deleted; `doomed` and its own go as well.
    let slices = "/apis/discovery.k8s.io/v1/namespaces/bulk/endpointslices";
    for (collection, query, wanted) in [
        ("/apis/apps/v1/deployments", "", DEPLOYMENTS - 1),
        ("/api/v1/pods", "", usize::try_from(pods).unwrap()),
        (slices, "", SELECTING),
        ("/api/v1/configmaps", "labelSelector=owned%3Dyes", 0),
        ("/api/v1/namespaces/doomed/configmaps", "", 0),
    ] {
        let found = client.list(collection, query).await?.items.len();
        if found != wanted {
            open.push(format!("{found} of {wanted} {collection}?{query}"));
        }
    }
    let namespaces = client.list("/api/v1/namespaces", "").await?.items;
    for namespace in namespaces.iter().map(|namespace| text(namespace, "/metadata/name")) {
        if namespace == "doomed" {
            open.push("namespace doomed is there".to_owned());
            continue;
        }
        for path in ["serviceaccounts/default", "configmaps/kube-root-ca.crt"] {
            match client.get(&format!("/api/v1/namespaces/{namespace}/{path}")).await {
                Ok(_) => {}
                Err(refusal) if refusal.status == 404 => open.push(format!("{namespace} has no {path}")),
                Err(refusal) => return Err(refusal),
            }
        }
    }
    Ok(open)
}
