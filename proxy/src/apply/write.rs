//! Objects as they will be stored: what the author wrote, merged with what the store holds.
//!
//! A new object gets a uid and the time of its creation. One that exists keeps them, its status, owners, finalizers and
//! managed fields; labels and everything under `spec` (or the endpoints and ports) are replaced. So are annotations, but for
//! those that components of Kubernetes write on their own (a name under `kubernetes.io/`). An EndpointSlice that changes has its
//! generation counted up, as the API server does.
//!
//! What the author says of a status is stored only while nobody else has said anything: without a controller there is no one
//! else to give a Service the address of its load balancer.

use std::collections::BTreeMap;
use std::net::IpAddr;

use bytes::Bytes;
use keelson_proto::k8s::{core_v1, discovery_v1, meta_v1, networking_v1};
use prost::Message;
use proxy_core::model::{Family, NamespacedName, k8s};

use crate::storage::{Body, Kind, StorageError, convert, managed_fields, open, wrap};

/// What makes an object one of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Birth {
    pub uid: String,
    /// Seconds since 1970.
    pub time: i64,
}

/// A stored object, taken apart so that it can be put together again.
struct Stored<M> {
    message: M,
    managed_fields: Vec<u8>,
}

fn stored<M: Message + Default>(kind: Kind, value: &Bytes) -> Result<Stored<M>, StorageError> {
    match open(kind, value)? {
        Body::Protobuf(raw) => Ok(Stored { managed_fields: managed_fields(&raw), message: M::decode(raw)? }),
        // It would have to be written back as JSON, whole: refused rather than half of it lost.
        Body::Json(_) => Err(StorageError::Json("objects stored as JSON are read, but not rewritten".into())),
    }
}

/// The metadata to store. `None` for `old` makes a new object.
fn metadata(new: &k8s::ObjectMeta, old: Option<meta_v1::ObjectMeta>, birth: &Birth) -> meta_v1::ObjectMeta {
    let Some(mut meta) = old else {
        return meta_v1::ObjectMeta {
            name: Some(new.name.clone()),
            namespace: (!new.namespace.is_empty()).then(|| new.namespace.clone()),
            uid: Some(birth.uid.clone()),
            creation_timestamp: Some(time(birth.time)),
            labels: new.labels.clone(),
            annotations: new.annotations.clone(),
            finalizers: new.finalizers.clone(),
            ..Default::default()
        };
    };
    meta.labels = new.labels.clone();
    meta.annotations = annotations(&meta.annotations, &new.annotations);
    meta
}

fn time(seconds: i64) -> meta_v1::Time {
    meta_v1::Time { seconds: Some(seconds), nanos: Some(0) }
}

fn annotations(old: &BTreeMap<String, String>, new: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let of_kubernetes = |name: &str| name.split_once('/').is_some_and(|(domain, _)| domain.ends_with("kubernetes.io"));
    let mut merged: BTreeMap<String, String> =
        old.iter().filter(|(name, _)| of_kubernetes(name)).map(|(n, v)| (n.clone(), v.clone())).collect();
    merged.extend(new.iter().map(|(name, value)| (name.clone(), value.clone())));
    merged
}

fn same_metadata(new: &k8s::ObjectMeta, old: &k8s::ObjectMeta) -> bool {
    new.labels == old.labels && annotations(&old.annotations, &new.annotations) == old.annotations
}

/// The value to store for a Service that is settled; `None` if that is what is stored already.
pub fn service(new: &k8s::Service, old: Option<&Bytes>, birth: &Birth) -> Result<Option<Bytes>, StorageError> {
    let mut message = core_v1::Service::default();
    let mut managed_fields = Vec::new();
    if let Some(old) = old {
        let stored = stored::<core_v1::Service>(Kind::Service, old)?;
        let mut shape = convert::service(stored.message.clone());
        shape.set_defaults();
        let keeps_status = new.status == k8s::ServiceStatus::default() || new.status == shape.status;
        if shape.spec == new.spec && same_metadata(&new.metadata, &shape.metadata) && keeps_status {
            return Ok(None);
        }
        message = stored.message;
        managed_fields = stored.managed_fields;
    }
    let is_new = old.is_none();
    message.metadata = Some(metadata(&new.metadata, message.metadata.filter(|_| !is_new), birth));
    message.spec = Some(convert::to_service_spec(&new.spec));
    let status = message.status.get_or_insert_default();
    if !new.status.load_balancer.ingress.is_empty() {
        let ingress = new.status.load_balancer.ingress.iter().map(convert::to_ingress).collect();
        status.load_balancer = Some(core_v1::LoadBalancerStatus { ingress });
    }
    status.load_balancer.get_or_insert_default();
    Ok(Some(wrap(Kind::Service, &message, &managed_fields)))
}

/// The value to store for an EndpointSlice; `None` if that is what is stored already.
pub fn endpoint_slice(
    new: &k8s::EndpointSlice,
    old: Option<&Bytes>,
    birth: &Birth,
) -> Result<Option<Bytes>, StorageError> {
    let mut message = convert::to_endpoint_slice(new);
    let Some(old) = old else {
        message.metadata = Some(metadata(&new.metadata, None, birth));
        message.metadata.get_or_insert_default().generation = Some(1);
        return Ok(Some(wrap(Kind::EndpointSlice, &message, &[])));
    };
    let mut stored = stored::<discovery_v1::EndpointSlice>(Kind::EndpointSlice, old)?;
    let meta = stored.message.metadata.take().unwrap_or_default();
    let mut shape = convert::endpoint_slice(stored.message);
    shape.set_defaults();
    let same = shape.endpoints == new.endpoints && shape.ports == new.ports && shape.address_type == new.address_type;
    if same && same_metadata(&new.metadata, &convert::metadata(Some(meta.clone()))) {
        return Ok(None);
    }
    let generation = meta.generation() + 1;
    message.metadata = Some(metadata(&new.metadata, Some(meta), birth));
    message.metadata.get_or_insert_default().generation = Some(generation);
    Ok(Some(wrap(Kind::EndpointSlice, &message, &stored.managed_fields)))
}

/// The address type of a stored slice, which may not change.
pub fn address_type(old: &Bytes) -> Result<String, StorageError> {
    let stored = stored::<discovery_v1::EndpointSlice>(Kind::EndpointSlice, old)?;
    Ok(stored.message.address_type.unwrap_or_default())
}

/// The value to store for Endpoints; `None` if that is what is stored already.
pub fn endpoints(new: &k8s::Endpoints, old: Option<&Bytes>, birth: &Birth) -> Result<Option<Bytes>, StorageError> {
    let mut message = convert::to_endpoints(new);
    let Some(old) = old else {
        message.metadata = Some(metadata(&new.metadata, None, birth));
        return Ok(Some(wrap(Kind::Endpoints, &message, &[])));
    };
    let mut stored = stored::<core_v1::Endpoints>(Kind::Endpoints, old)?;
    let meta = stored.message.metadata.take().unwrap_or_default();
    let mut shape = convert::endpoints(stored.message);
    shape.set_defaults();
    if shape.subsets == new.subsets && same_metadata(&new.metadata, &convert::metadata(Some(meta.clone()))) {
        return Ok(None);
    }
    message.metadata = Some(metadata(&new.metadata, Some(meta), birth));
    Ok(Some(wrap(Kind::Endpoints, &message, &stored.managed_fields)))
}

/// The object that says that a Service has an address: what the API server's allocator creates.
pub fn ip_address(address: IpAddr, service: &NamespacedName, birth: &Birth) -> Bytes {
    let family = match Family::of(address) {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    };
    let labels =
        [("ipaddress.kubernetes.io/ip-family", family), ("ipaddress.kubernetes.io/managed-by", "ipallocator.k8s.io")];
    let message = networking_v1::IpAddress {
        metadata: Some(meta_v1::ObjectMeta {
            name: Some(address.to_string()),
            uid: Some(birth.uid.clone()),
            creation_timestamp: Some(time(birth.time)),
            labels: labels.into_iter().map(|(name, value)| (name.into(), value.into())).collect(),
            ..Default::default()
        }),
        spec: Some(networking_v1::IpAddressSpec {
            parent_ref: Some(networking_v1::ParentReference {
                group: Some(String::new()),
                resource: Some("services".into()),
                namespace: Some(service.namespace.to_string()),
                name: Some(service.name.to_string()),
            }),
        }),
    };
    wrap(Kind::IpAddress, &message, &[])
}

/// The allocation of node ports: a stored one with other contents, or a new one.
pub fn node_ports(range: &str, bits: Vec<u8>, old: Option<&Bytes>) -> Result<Bytes, StorageError> {
    let mut message = core_v1::RangeAllocation::default();
    let mut managed_fields = Vec::new();
    if let Some(old) = old {
        let stored = stored::<core_v1::RangeAllocation>(Kind::RangeAllocation, old)?;
        message = stored.message;
        managed_fields = stored.managed_fields;
    }
    message.metadata.get_or_insert_default().creation_timestamp.get_or_insert_default();
    message.range = Some(range.to_owned());
    message.data = Some(bits.into());
    Ok(wrap(Kind::RangeAllocation, &message, &managed_fields))
}

/// An object with finalizers, marked as being deleted: it goes when the last of them has been served. `None` if it has none,
/// or cannot be rewritten; then the key is deleted.
pub fn marked_for_deletion(kind: Kind, old: &Bytes, now: i64) -> Option<Bytes> {
    fn mark<M: Message + Default>(
        kind: Kind,
        old: &Bytes,
        now: i64,
        metadata: impl Fn(&mut M) -> &mut Option<meta_v1::ObjectMeta>,
    ) -> Option<Bytes> {
        let mut stored = stored::<M>(kind, old).ok()?;
        let meta = metadata(&mut stored.message).as_mut().filter(|meta| !meta.finalizers.is_empty())?;
        meta.deletion_timestamp.get_or_insert_with(|| time(now));
        meta.deletion_grace_period_seconds = Some(0);
        Some(wrap(kind, &stored.message, &stored.managed_fields))
    }
    match kind {
        Kind::Service => mark::<core_v1::Service>(kind, old, now, |message| &mut message.metadata),
        Kind::EndpointSlice => mark::<discovery_v1::EndpointSlice>(kind, old, now, |message| &mut message.metadata),
        _ => mark::<core_v1::Endpoints>(kind, old, now, |message| &mut message.metadata),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::message;
    use proxy_core::model::manifest::{self, Object};

    fn birth() -> Birth {
        Birth { uid: "u-1".into(), time: 1_700_000_000 }
    }

    fn read(yaml: &str) -> Object {
        let value: serde_norway::Value = serde_norway::from_str(yaml).unwrap();
        manifest::objects(1, &value).unwrap().remove(0)
    }

    fn web(rest: &str) -> k8s::Service {
        let yaml = format!(
            "{{apiVersion: v1, kind: Service, metadata: {{name: web, {rest}}}, spec: {{ports: [{{port: 80}}]}}}}"
        );
        match read(&yaml) {
            Object::Service(service) => *service,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_new_object_is_born_and_the_same_again_is_no_change() {
        let service = web("labels: {a: b}");
        let value = super::service(&service, None, &birth()).unwrap().unwrap();
        let stored: core_v1::Service = message(Kind::Service, &value).unwrap();
        let meta = stored.metadata.unwrap();
        assert_eq!((meta.uid(), meta.name(), meta.namespace()), ("u-1", "web", "default"));
        assert_eq!(meta.creation_timestamp.unwrap().seconds, Some(1_700_000_000));
        assert_eq!(super::service(&service, Some(&value), &birth()).unwrap(), None);
    }

    #[test]
    fn a_rewrite_keeps_what_is_not_the_authors() {
        let old = core_v1::Service {
            metadata: Some(meta_v1::ObjectMeta {
                name: Some("web".into()),
                namespace: Some("default".into()),
                uid: Some("u-0".into()),
                labels: [("gone".to_owned(), "x".to_owned())].into(),
                annotations: [
                    ("mine.example.com/a".to_owned(), "gone".to_owned()),
                    ("endpoints.kubernetes.io/b".to_owned(), "kept".to_owned()),
                ]
                .into(),
                finalizers: vec!["service.kubernetes.io/load-balancer-cleanup".into()],
                ..Default::default()
            }),
            spec: None,
            status: Some(core_v1::ServiceStatus {
                load_balancer: Some(core_v1::LoadBalancerStatus {
                    ingress: vec![core_v1::LoadBalancerIngress { ip: Some("192.0.2.1".into()), ..Default::default() }],
                }),
                conditions: Vec::new(),
            }),
        };
        let managed = b"\x8a\x01\x03abc";
        let value = wrap(Kind::Service, &old, managed);
        let new = service(&web("labels: {a: b}"), Some(&value), &birth()).unwrap().unwrap();
        let stored: core_v1::Service = message(Kind::Service, &new).unwrap();
        assert_eq!(stored.status, old.status);
        let meta = stored.metadata.unwrap();
        assert_eq!(meta.uid(), "u-0");
        assert_eq!(meta.finalizers.len(), 1);
        assert_eq!(meta.labels.keys().collect::<Vec<_>>(), ["a"]);
        assert_eq!(meta.annotations.keys().collect::<Vec<_>>(), ["endpoints.kubernetes.io/b"]);
        let Body::Protobuf(raw) = open(Kind::Service, &new).unwrap() else { panic!("protobuf") };
        assert_eq!(managed_fields(&raw), managed);
        let marked = marked_for_deletion(Kind::Service, &new, 5).expect("it has a finalizer");
        let stored: core_v1::Service = message(Kind::Service, &marked).unwrap();
        assert_eq!(stored.metadata.unwrap().deletion_timestamp.unwrap().seconds, Some(5));
        assert_eq!(
            marked_for_deletion(Kind::Service, &wrap(Kind::Service, &core_v1::Service::default(), &[]), 5),
            None
        );
    }

    #[test]
    fn a_slice_counts_its_changes() {
        let slice = |address: &str| match read(&format!(
            "{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {{name: web-1}}, addressType: IPv4, \
             endpoints: [{{addresses: [{address}]}}]}}"
        )) {
            Object::EndpointSlice(slice) => slice,
            other => panic!("{other:?}"),
        };
        let generation = |value: &Bytes| {
            let stored: discovery_v1::EndpointSlice = message(Kind::EndpointSlice, value).unwrap();
            stored.metadata.unwrap().generation()
        };
        let first = endpoint_slice(&slice("10.0.0.1"), None, &birth()).unwrap().unwrap();
        assert_eq!(generation(&first), 1);
        assert_eq!(endpoint_slice(&slice("10.0.0.1"), Some(&first), &birth()).unwrap(), None);
        let second = endpoint_slice(&slice("10.0.0.2"), Some(&first), &birth()).unwrap().unwrap();
        assert_eq!(generation(&second), 2);
        assert_eq!(address_type(&second).unwrap(), "IPv4");
    }

    #[test]
    fn json_is_not_rewritten() {
        let json = Bytes::from_static(br#"{"kind":"Service","metadata":{"name":"web"}}"#);
        let error = service(&web(""), Some(&json), &birth()).unwrap_err();
        assert!(error.to_string().contains("not rewritten"), "{error}");
    }
}
