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
