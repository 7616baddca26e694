//! A stored value as the typed model: unwrapped, defaulted as the API server does on reading, parsed.
//!
//! What a value holds that cannot be read costs that field, never the object: it is noted and left out, as kube-proxy
//! does. Only a value that is no object of its kind at all is an error.

use bytes::Bytes;
use ipnet::IpNet;
use keelson_proto::k8s::{core_v1, discovery_v1, networking_v1};
use prost::Message;
use proxy_core::model::convert::{FieldError, parse_cidr};
use proxy_core::model::{EndpointSlice, Node, Service, k8s, mirror};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::{Body, Kind, StorageError, convert, open};

/// An object in Kubernetes' shape, out of either encoding.
fn shape<M, S>(kind: Kind, value: &Bytes, convert: impl Fn(M) -> S) -> Result<S, StorageError>
where
    M: Message + Default,
    S: DeserializeOwned,
{
    match open(kind, value)? {
        Body::Protobuf(raw) => Ok(convert(M::decode(raw)?)),
        Body::Json(json) => serde_json::from_slice(&json).map_err(|error| StorageError::Json(error.to_string())),
    }
}

/// A Service in Kubernetes' shape, without judgement.
pub fn service_shape(value: &Bytes) -> Result<k8s::Service, StorageError> {
    shape(Kind::Service, value, convert::service)
}

pub fn service(value: &Bytes, notes: &mut Vec<FieldError>) -> Result<Service, StorageError> {
    let mut service = service_shape(value)?;
    service.set_defaults();
    Ok(service.to_model(notes))
}

/// `None` for a slice of host names.
pub fn endpoint_slice(value: &Bytes, notes: &mut Vec<FieldError>) -> Result<Option<EndpointSlice>, StorageError> {
    let mut slice: k8s::EndpointSlice =
        shape::<discovery_v1::EndpointSlice, _>(Kind::EndpointSlice, value, convert::endpoint_slice)?;
    slice.set_defaults();
    Ok(slice.to_model(notes))
}

/// The slices that stand for Endpoints.
pub fn endpoints(value: &Bytes, notes: &mut Vec<FieldError>) -> Result<Vec<EndpointSlice>, StorageError> {
    let mut endpoints: k8s::Endpoints = shape::<core_v1::Endpoints, _>(Kind::Endpoints, value, convert::endpoints)?;
    endpoints.set_defaults();
    Ok(mirror::to_model(&endpoints, notes))
}

/// The Node and whether load balancers should send it traffic.
pub fn node(value: &Bytes, notes: &mut Vec<FieldError>) -> Result<(Node, Eligibility), StorageError> {
    let (node, eligibility) = match open(Kind::Node, value)? {
        Body::Protobuf(raw) => {
            let message = core_v1::Node::decode(raw)?;
            let deleting = message.metadata.as_ref().is_some_and(|meta| meta.deletion_timestamp.is_some());
            let taints = message.spec.iter().flat_map(|spec| &spec.taints);
            let tainted = taints.map(|taint| taint.key()).any(|key| key == TAINT_TO_BE_DELETED);
            (convert::node(message), Eligibility::of(deleting, tainted))
        }
        Body::Json(json) => {
            let refuse = |error: serde_json::Error| StorageError::Json(error.to_string());
            let life: Life = serde_json::from_slice(&json).map_err(refuse)?;
            let tainted = life.spec.taints.iter().any(|taint| taint.key == TAINT_TO_BE_DELETED);
            let eligibility = Eligibility::of(life.metadata.deletion_timestamp.is_some(), tainted);
            (serde_json::from_slice(&json).map_err(refuse)?, eligibility)
        }
    };
    Ok((node.to_model(notes), eligibility))
}

/// Set by the cluster autoscaler on a node that it is about to remove.
const TAINT_TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

/// Should load balancers go on sending traffic to this node?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Eligibility {
    Eligible,
    GoingAway,
}

impl Eligibility {
    fn of(deleting: bool, tainted: bool) -> Eligibility {
        if deleting || tainted { Eligibility::GoingAway } else { Eligibility::Eligible }
    }
}

/// What tells of a Node in JSON that it is going away.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Life {
    metadata: LifeMeta,
    spec: LifeSpec,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct LifeMeta {
    deletion_timestamp: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct LifeSpec {
    taints: Vec<LifeTaint>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct LifeTaint {
    key: String,
}

/// The ranges of a ServiceCIDR.
pub fn service_cidrs(value: &Bytes) -> Result<Vec<IpNet>, StorageError> {
    let cidrs = match open(Kind::ServiceCidr, value)? {
        Body::Protobuf(raw) => networking_v1::ServiceCidr::decode(raw)?.spec.unwrap_or_default().cidrs,
        Body::Json(json) => {
            let object: CidrObject =
                serde_json::from_slice(&json).map_err(|error| StorageError::Json(error.to_string()))?;
            object.spec.cidrs
        }
    };
    Ok(cidrs.iter().filter_map(|cidr| parse_cidr(cidr)).collect())
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct CidrObject {
    spec: CidrSpec,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct CidrSpec {
    cidrs: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::wrap;
    use keelson_proto::k8s::core_v1::{NodeSpec, ServicePort, ServiceSpec, Taint};
    use keelson_proto::k8s::meta_v1::{ObjectMeta, Time};

    fn named(name: &str) -> Option<ObjectMeta> {
        Some(ObjectMeta { name: Some(name.into()), namespace: Some("shop".into()), ..Default::default() })
    }

    #[test]
    fn both_encodings_give_the_same_service_with_defaults() {
        let spec = ServiceSpec {
            cluster_ip: Some("10.96.0.9".into()),
            ports: vec![ServicePort { port: Some(80), ..Default::default() }],
            ..Default::default()
        };
        let message = core_v1::Service { metadata: named("web"), spec: Some(spec), status: None };
        let mut notes = Vec::new();
        let from_protobuf = service(&wrap(Kind::Service, &message, &[]), &mut notes).unwrap();
        let json = r#"{"kind":"Service","apiVersion":"v1","metadata":{"name":"web","namespace":"shop",
            "managedFields":[{"manager":"x"}]},"spec":{"clusterIP":"10.96.0.9","ports":[{"port":80}]}}"#;
        assert_eq!(service(&Bytes::from_static(json.as_bytes()), &mut notes).unwrap(), from_protobuf);
        assert_eq!(notes, []);
        assert_eq!(from_protobuf.name.to_string(), "shop/web");
        assert_eq!(from_protobuf.ports[0].port, 80);
    }

    #[test]
    fn a_bad_field_costs_itself_only() {
        let spec = ServiceSpec {
            cluster_ip: Some("10.96.0.9".into()),
            external_ips: vec!["nowhere".into(), "192.0.2.1".into()],
            ..Default::default()
        };
        let message = core_v1::Service { metadata: named("web"), spec: Some(spec), status: None };
        let mut notes = Vec::new();
        let read = service(&wrap(Kind::Service, &message, &[]), &mut notes).unwrap();
        assert_eq!(read.external_ips, ["192.0.2.1".parse::<std::net::IpAddr>().unwrap()]);
        assert_eq!(notes.len(), 1);
        assert_eq!(notes[0].field, "spec.externalIPs[0]");
    }

    #[test]
    fn a_node_that_is_leaving_is_not_eligible() {
        let mut message = core_v1::Node { metadata: named("n1"), ..Default::default() };
        let read = |message: &core_v1::Node| node(&wrap(Kind::Node, message, &[]), &mut Vec::new()).unwrap().1;
        assert_eq!(read(&message), Eligibility::Eligible);
        let taint = Taint { key: Some(TAINT_TO_BE_DELETED.into()), ..Default::default() };
        message.spec = Some(NodeSpec { taints: vec![taint], ..Default::default() });
        assert_eq!(read(&message), Eligibility::GoingAway);
        message.spec = None;
        message.metadata.as_mut().unwrap().deletion_timestamp = Some(Time { seconds: Some(1), nanos: None });
        assert_eq!(read(&message), Eligibility::GoingAway);
    }

    #[test]
    fn the_ranges_of_a_service_cidr_are_read() {
        let json = br#"{"kind":"ServiceCIDR","spec":{"cidrs":["10.96.0.0/12","fd00:10:96::/112"]}}"#;
        let ranges = service_cidrs(&Bytes::from_static(json)).unwrap();
        assert_eq!(ranges.iter().map(ToString::to_string).collect::<Vec<_>>(), ["10.96.0.0/12", "fd00:10:96::/112"]);
    }

    /// What kube-apiserver 1.36.3 stored for its own Service.
    const KUBERNETES: &str = "6b3873000a0d0a02763112075365727669636512e5040aee030a0a6b756265726e6574657312001a0764656661756c74\
         22002a2436373632346337342d666163332d343235332d396564302d36343865666435633032636432003800420808d4\
         c782d80610005a160a09636f6d706f6e656e7412096170697365727665725a160a0870726f7669646572120a6b756265\
         726e657465738a01ed020a0e6b7562652d61706973657276657212065570646174651a027631220808d4c782d8061000\
         32084669656c647356313ab8020ab5027b22663a6d65746164617461223a7b22663a6c6162656c73223a7b222e223a7b\
         7d2c22663a636f6d706f6e656e74223a7b7d2c22663a70726f7669646572223a7b7d7d7d2c22663a73706563223a7b22\
         663a636c75737465724950223a7b7d2c22663a696e7465726e616c54726166666963506f6c696379223a7b7d2c22663a\
         697046616d696c79506f6c696379223a7b7d2c22663a706f727473223a7b222e223a7b7d2c226b3a7b5c22706f72745c\
         223a3434332c5c2270726f746f636f6c5c223a5c225443505c227d223a7b222e223a7b7d2c22663a6e616d65223a7b7d\
         2c22663a706f7274223a7b7d2c22663a70726f746f636f6c223a7b7d2c22663a746172676574506f7274223a7b7d7d7d\
         2c22663a73657373696f6e416666696e697479223a7b7d2c22663a74797065223a7b7d7d7d4200126e0a1b0a05687474\
         7073120354435018bb032208080010ebea021a0028001a0931302e39362e302e312209436c757374657249503a044e6f\
         6e65420052005a00600068008a010b53696e676c65537461636b92010931302e39362e302e319a010449507634b20107\
         436c75737465721a020a001a002200";
    /// What it stored for a slice that `kubectl create` brought.
    const SLICE: &str = "6b3873000a240a13646973636f766572792e6b38732e696f2f7631120d456e64706f696e74536c69636512df020ab302\
         0a087468656972732d3112001a0764656661756c7422002a2430323262386631652d356237392d343764632d39663333\
         2d6237393537316331306238653200380142080894c882d80610005a240a1a6b756265726e657465732e696f2f736572\
         766963652d6e616d6512067468656972738a01be010a0e6b75626563746c2d63726561746512065570646174651a1364\
         6973636f766572792e6b38732e696f2f763122080894c882d806100032084669656c647356313a790a777b22663a6164\
         647265737354797065223a7b7d2c22663a656e64706f696e7473223a7b7d2c22663a6d65746164617461223a7b22663a\
         6c6162656c73223a7b222e223a7b7d2c22663a6b756265726e657465732e696f2f736572766963652d6e616d65223a7b\
         7d7d7d2c22663a706f727473223a7b7d7d420012150a0831302e312e302e311202080132026e313a017a1a0a0a001203\
         54435018903f2204495076341a002200";

    fn bytes(hex: &str) -> Bytes {
        let byte = |at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
        (0..hex.len()).step_by(2).map(byte).collect::<Vec<u8>>().into()
    }

    #[test]
    fn what_kube_apiserver_stores_is_read() {
        let mut notes = Vec::new();
        let kubernetes = service(&bytes(KUBERNETES), &mut notes).unwrap();
        assert_eq!(kubernetes.name.to_string(), "default/kubernetes");
        assert_eq!(kubernetes.cluster_ips, ["10.96.0.1".parse::<std::net::IpAddr>().unwrap()]);
        assert_eq!((kubernetes.ports[0].port, kubernetes.ports[0].node_port), (443, None));
        let slice = endpoint_slice(&bytes(SLICE), &mut notes).unwrap().unwrap();
        assert_eq!(slice.service.as_deref(), Some("theirs"));
        assert_eq!(slice.ports[0].port, Some(8080));
        let endpoint = &slice.endpoints[0];
        assert_eq!((endpoint.address.to_string().as_str(), endpoint.node_name.as_deref()), ("10.1.0.1", Some("n1")));
        assert_eq!((endpoint.conditions.ready, endpoint.conditions.serving), (Some(true), None));
        assert_eq!(notes, []);
    }

    #[test]
    fn a_rewrite_of_what_kube_apiserver_stores_keeps_its_managed_fields() {
        let value = bytes(KUBERNETES);
        let Body::Protobuf(raw) = open(Kind::Service, &value).unwrap() else { panic!("protobuf") };
        let managed = crate::storage::managed_fields(&raw);
        assert!(String::from_utf8_lossy(&managed).contains("f:clusterIP"));
        let again = wrap(Kind::Service, &core_v1::Service::decode(raw).unwrap(), &managed);
        let Body::Protobuf(raw) = open(Kind::Service, &again).unwrap() else { panic!("protobuf") };
        assert_eq!(crate::storage::managed_fields(&raw), managed);
        assert_eq!(service_shape(&again).unwrap(), service_shape(&value).unwrap());
    }
}
