//! How Kubernetes keeps its objects in the store: under which keys, and in which bytes.
//!
//! ```text
//! /registry/services/specs/<namespace>/<name>        Service           /registry/ipaddresses/<ip>          IPAddress
//! /registry/endpointslices/<namespace>/<name>        EndpointSlice     /registry/ranges/servicenodeports   RangeAllocation
//! /registry/services/endpoints/<namespace>/<name>    Endpoints         /registry/servicecidrs/<name>       ServiceCIDR
//! /registry/minions/<node>                           Node
//! ```
//! A value is `k8s\0` and a protobuf `Unknown`, which names the kind and holds the object; or JSON, where the API server
//! was told so. An encrypted value is refused by its prefix, never guessed at. The resource version is not in the value:
//! it is the key's mod revision.
//!
//! [`convert`] turns the messages into the shapes of `proxy_core::model::k8s` and back; [`decode`] goes on to the typed model.
//!
//! What it does not do: it speaks to no store, and knows no kind that the proxy neither reads nor writes.

pub mod convert;
pub mod decode;

use std::net::IpAddr;

use bytes::{BufMut, Bytes, BytesMut};
use keelson_proto::k8s::runtime::{TypeMeta, Unknown};
use prost::Message;
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, encode_key, encode_varint, skip_field};

const MAGIC: &[u8] = b"k8s\0";
const ENCRYPTED: &[u8] = b"k8s:enc:";

/// Why a stored value cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StorageError {
    #[error("the value is encrypted at rest ({provider}); Keelson reads plain values only")]
    Encrypted { provider: String },
    #[error("the value is neither Kubernetes protobuf nor JSON (it begins with {begins:?})")]
    Format { begins: String },
    #[error("the value is a {found}, not a {wanted}")]
    Kind { found: String, wanted: &'static str },
    #[error("the value has content encoding {0:?}")]
    Encoding(String),
    #[error("the protobuf does not parse: {0}")]
    Protobuf(#[from] prost::DecodeError),
    #[error("the JSON does not parse: {0}")]
    Json(String),
}

/// The kinds that are read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    Service,
    EndpointSlice,
    Endpoints,
    Node,
    ServiceCidr,
    IpAddress,
    RangeAllocation,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Service => "Service",
            Kind::EndpointSlice => "EndpointSlice",
            Kind::Endpoints => "Endpoints",
            Kind::Node => "Node",
            Kind::ServiceCidr => "ServiceCIDR",
            Kind::IpAddress => "IPAddress",
            Kind::RangeAllocation => "RangeAllocation",
        }
    }

    fn api_version(self) -> &'static str {
        match self {
            Kind::Service | Kind::Endpoints | Kind::Node | Kind::RangeAllocation => "v1",
            Kind::EndpointSlice => "discovery.k8s.io/v1",
            Kind::ServiceCidr | Kind::IpAddress => "networking.k8s.io/v1",
        }
    }

    /// Its folder under the prefix, with both slashes.
    fn folder(self) -> &'static str {
        match self {
            Kind::Service => "/services/specs/",
            Kind::EndpointSlice => "/endpointslices/",
            Kind::Endpoints => "/services/endpoints/",
            Kind::Node => "/minions/",
            Kind::ServiceCidr => "/servicecidrs/",
            Kind::IpAddress => "/ipaddresses/",
            Kind::RangeAllocation => "/ranges/",
        }
    }
}

/// The keys under one `--etcd-prefix`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keys {
    prefix: String,
}

impl Keys {
    /// `prefix` as in `--etcd-prefix`: with or without slashes around it, as kube-apiserver takes it.
    pub fn new(prefix: &str) -> Keys {
        let inner = prefix.trim_matches('/');
        Keys { prefix: if inner.is_empty() { String::new() } else { format!("/{inner}") } }
    }

    /// What the keys of all objects of a kind begin with.
    pub fn all(&self, kind: Kind) -> String {
        format!("{}{}", self.prefix, kind.folder())
    }

    pub fn namespaced(&self, kind: Kind, namespace: &str, name: &str) -> String {
        format!("{}{namespace}/{name}", self.all(kind))
    }

    pub fn node(&self, name: &str) -> String {
        self.all(Kind::Node) + name
    }

    /// The key whose existence says that an address is taken. The name is the address in its one canonical spelling.
    pub fn ip_address(&self, address: IpAddr) -> String {
        self.all(Kind::IpAddress) + &address.to_string()
    }

    pub fn node_port_range(&self) -> String {
        self.all(Kind::RangeAllocation) + "servicenodeports"
    }

    /// Namespace and name out of the key of an object of that kind.
    pub fn split<'k>(&self, kind: Kind, key: &'k [u8]) -> Option<(&'k str, &'k str)> {
        let key = std::str::from_utf8(key).ok()?.strip_prefix(self.prefix.as_str())?.strip_prefix(kind.folder())?;
        key.split_once('/').filter(|(namespace, name)| !namespace.is_empty() && !name.is_empty())
    }
}

/// The end of the range of keys that begin with `prefix`.
pub fn prefix_end(prefix: &str) -> Bytes {
    let mut end = prefix.as_bytes().to_vec();
    while let Some(last) = end.pop() {
        if last < 0xff {
            end.push(last + 1);
            return end.into();
        }
    }
    // All 0xff, which no text is: every key from here on.
    Bytes::from_static(b"\0")
}

/// A value without its wrapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    Protobuf(Bytes),
    Json(Bytes),
}

/// Unwraps a value that must be of that kind.
pub fn open(kind: Kind, value: &Bytes) -> Result<Body, StorageError> {
    if let Some(rest) = value.strip_prefix(ENCRYPTED) {
        let provider = rest.split(|byte| *byte == b':').next().unwrap_or_default();
        return Err(StorageError::Encrypted { provider: String::from_utf8_lossy(provider).into_owned() });
    }
    if value.first() == Some(&b'{') {
        return Ok(Body::Json(value.clone()));
    }
    if !value.starts_with(MAGIC) {
        let begins = value.iter().take(8).copied().collect::<Vec<u8>>();
        return Err(StorageError::Format { begins: String::from_utf8_lossy(&begins).into_owned() });
    }
    let unknown = Unknown::decode(value.slice(MAGIC.len()..))?;
    if let Some(encoding) = unknown.content_encoding.filter(|encoding| !encoding.is_empty()) {
        return Err(StorageError::Encoding(encoding));
    }
    let found = unknown.type_meta.unwrap_or_default();
    if found.kind() != kind.name() {
        let found = format!("{} of {:?}", found.kind(), found.api_version());
        return Err(StorageError::Kind { found, wanted: kind.name() });
    }
    Ok(Body::Protobuf(unknown.raw.unwrap_or_default()))
}

/// Reads an object as the message `M` of that kind. Its `managedFields` are skipped; who means to write the object back
/// asks [`managed_fields`].
pub fn message<M: Message + Default>(kind: Kind, value: &Bytes) -> Result<M, StorageError> {
    match open(kind, value)? {
        Body::Protobuf(raw) => Ok(M::decode(raw)?),
        Body::Json(_) => Err(StorageError::Format { begins: "{".into() }),
    }
}

/// Wraps an object as the API server stores it. `managed_fields` are appended to the object's metadata as they are.
pub fn wrap<M: Message>(kind: Kind, object: &M, managed_fields: &[u8]) -> Bytes {
    let raw = append_to_metadata(object.encode_to_vec(), managed_fields);
    let type_meta = TypeMeta { api_version: Some(kind.api_version().into()), kind: Some(kind.name().into()) };
    let unknown = Unknown {
        type_meta: Some(type_meta),
        raw: Some(raw.into()),
        content_encoding: Some(String::new()),
        content_type: Some(String::new()),
    };
    let mut value = BytesMut::with_capacity(MAGIC.len() + unknown.encoded_len());
    value.put_slice(MAGIC);
    unknown.encode(&mut value).expect("a BytesMut grows");
    value.freeze()
}

const METADATA: u32 = 1;
const MANAGED_FIELDS: u32 = 17;

/// The `managedFields` of a stored object, still encoded: who writes an object back that the API server wrote keeps them.
pub fn managed_fields(raw: &Bytes) -> Vec<u8> {
    let mut kept = Vec::new();
    // What does not parse was refused by the decoder before; here it only ends the walk.
    let _ = for_each_field(raw, |number, _, content| {
        if number == METADATA {
            for_each_field(content, |number, whole, _| {
                if number == MANAGED_FIELDS {
                    kept.extend_from_slice(whole);
                }
                Ok(())
            })?;
        }
        Ok(())
    });
    kept
}

/// Puts `extra` behind the fields of the metadata, which every object has first.
fn append_to_metadata(object: Vec<u8>, extra: &[u8]) -> Vec<u8> {
    if extra.is_empty() {
        return object;
    }
    let mut out = Vec::with_capacity(object.len() + extra.len() + 8);
    for_each_field(&object, |number, whole, content| {
        if number == METADATA {
            encode_key(METADATA, WireType::LengthDelimited, &mut out);
            encode_varint((content.len() + extra.len()) as u64, &mut out);
            out.extend_from_slice(content);
            out.extend_from_slice(extra);
        } else {
            out.extend_from_slice(whole);
        }
        Ok(())
    })
    .expect("what prost has just encoded parses");
    out
}

/// Walks the fields of a message: number, the whole field, and its content if it is length-delimited (else empty).
fn for_each_field(
    message: &[u8],
    mut visit: impl FnMut(u32, &[u8], &[u8]) -> Result<(), prost::DecodeError>,
) -> Result<(), prost::DecodeError> {
    let mut rest = message;
    while !rest.is_empty() {
        let start = rest;
        let (number, wire_type) = decode_key(&mut rest)?;
        let mut content = rest;
        skip_field(wire_type, number, &mut rest, DecodeContext::default())?;
        let whole = &start[..start.len() - rest.len()];
        if wire_type == WireType::LengthDelimited {
            decode_varint(&mut content)?;
            content = &content[..content.len() - rest.len()];
        } else {
            content = &[];
        }
        visit(number, whole, content)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use keelson_proto::k8s::core_v1::Service;
    use keelson_proto::k8s::meta_v1::ObjectMeta;

    #[test]
    fn keys_are_kubernetes_keys_whatever_slashes_the_prefix_has() {
        for prefix in ["/registry", "registry", "/registry/"] {
            let keys = Keys::new(prefix);
            assert_eq!(keys.namespaced(Kind::Service, "shop", "web"), "/registry/services/specs/shop/web");
            assert_eq!(keys.all(Kind::EndpointSlice), "/registry/endpointslices/");
            assert_eq!(keys.node("n1"), "/registry/minions/n1");
            assert_eq!(keys.ip_address("fd00:0::A".parse().unwrap()), "/registry/ipaddresses/fd00::a");
            assert_eq!(keys.node_port_range(), "/registry/ranges/servicenodeports");
            let split = keys.split(Kind::Service, b"/registry/services/specs/shop/web");
            assert_eq!(split, Some(("shop", "web")));
            assert_eq!(keys.split(Kind::Service, b"/registry/services/endpoints/shop/web"), None);
        }
        assert_eq!(Keys::new("/a/b").all(Kind::Node), "/a/b/minions/");
        assert_eq!(prefix_end("/registry/minions/"), "/registry/minions0");
    }

    #[test]
    fn what_is_not_plain_kubernetes_is_refused_by_name() {
        let refuse = |value: &'static [u8]| open(Kind::Service, &Bytes::from_static(value)).unwrap_err().to_string();
        assert_eq!(
            refuse(b"k8s:enc:aescbc:v1:key1:\x01\x02"),
            "the value is encrypted at rest (aescbc); Keelson reads plain values only"
        );
        assert_eq!(
            refuse(b"hello world"),
            "the value is neither Kubernetes protobuf nor JSON (it begins with \"hello wo\")"
        );
        assert!(refuse(b"k8s\0\xff\xff").starts_with("the protobuf does not parse"));
        let endpoints = wrap(Kind::Endpoints, &Service::default(), &[]);
        let error = open(Kind::Service, &endpoints).unwrap_err();
        assert_eq!(error.to_string(), "the value is a Endpoints of \"v1\", not a Service");
    }

    #[test]
    fn managed_fields_survive_a_rewrite() {
        let metadata = ObjectMeta { name: Some("web".into()), ..Default::default() };
        let object = Service { metadata: Some(metadata), ..Default::default() };
        // Two entries of field 17, as an API server writes them: whatever is in them stays.
        let managed = [b"\x8a\x01\x03abc".as_slice(), b"\x8a\x01\x01z".as_slice()].concat();
        let value = wrap(Kind::Service, &object, &managed);
        let Body::Protobuf(raw) = open(Kind::Service, &value).unwrap() else { panic!("protobuf") };
        assert_eq!(managed_fields(&raw), managed);
        assert_eq!(message::<Service>(Kind::Service, &value).unwrap(), object);
    }
}
