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
}
