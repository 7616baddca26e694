//! Manifests: documents that hold Services, EndpointSlices, Endpoints, Nodes, or Lists of them.
//!
//! The text format is the caller's business: [`objects`] reads one document out of any serde deserializer that can be
//! walked more than once (a reference to a parsed YAML or JSON value). First the kinds are read, then each object as
//! its kind; so an error names the field by its path, which a tagged enum could not.
//!
//! What the API server would refuse is refused here, because whoever writes straight into the store has nobody else to
//! tell him: fields that cannot be read, names that are no names, ports that are named twice. Not checked: what needs
//! other objects (is a ClusterIP free, does a namespace exist), and the syntax of labels, selectors and annotations.

use std::collections::BTreeSet;
use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_path_to_error::Track;

use super::convert::FieldError;
use super::k8s;

/// One object of a manifest, with its defaults filled in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    Service(Box<k8s::Service>),
    EndpointSlice(k8s::EndpointSlice),
    Endpoints(k8s::Endpoints),
    Node(k8s::Node),
}

impl Object {
    pub fn kind(&self) -> &'static str {
        match self {
            Object::Service(_) => "Service",
            Object::EndpointSlice(_) => "EndpointSlice",
            Object::Endpoints(_) => "Endpoints",
            Object::Node(_) => "Node",
        }
    }

    pub fn metadata(&self) -> &k8s::ObjectMeta {
        match self {
            Object::Service(service) => &service.metadata,
            Object::EndpointSlice(slice) => &slice.metadata,
            Object::Endpoints(endpoints) => &endpoints.metadata,
            Object::Node(node) => &node.metadata,
        }
    }
}

/// What is wrong with a manifest: one line that names the document, the object as far as it has a name, and the field.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("document {document}{}: {error}", .object.as_deref().map(|name| format!(" ({name})")).unwrap_or_default())]
pub struct ManifestError {
    /// Counted from 1.
    pub document: usize,
    /// Kind and name, such as `Service default/web`.
    pub object: Option<String>,
    pub error: FieldError,
}

/// The objects of one document, in order, checked and with defaults; none if the document is empty. `document` is its
/// number in the file, counted from 1, for errors.
pub fn objects<'de, D>(document: usize, value: D) -> Result<Vec<Object>, ManifestError>
where
    D: Deserializer<'de> + Copy,
{
    let refuse = |object: Option<&Header>, error| ManifestError {
        document,
        object: object.and_then(|header| header.title()),
        error,
    };
    let Some(header) = read::<Option<Header>, D>(value).map_err(|error| refuse(None, error))? else {
        return Ok(Vec::new());
    };
    let headers =
        if header.kind == "List" { header.items.as_deref().unwrap_or_default() } else { std::slice::from_ref(&header) };
    for (i, item) in headers.iter().enumerate() {
        item.check_kind().map_err(|mut error| {
            error.field = header.path(i) + &error.field;
            refuse(Some(item), error)
        })?;
    }
    let objects = if header.kind == "List" {
        tracked(value, |value| ListSeed(headers).deserialize(value)).map_err(|error| refuse(None, error))?
    } else {
        vec![tracked(value, |value| ObjectSeed(&header).deserialize(value)).map_err(|e| refuse(Some(&header), e))?]
    };
    for (i, (object, item)) in objects.iter().zip(headers).enumerate() {
        if let Some(mut error) = check(object).into_iter().next() {
            error.field = header.path(i) + &error.field;
            return Err(refuse(Some(item), error));
        }
    }
    Ok(objects)
}

/// Enough of an object to know what it is.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default, expecting = "an object with apiVersion and kind")]
struct Header {
    api_version: String,
    kind: String,
    metadata: HeaderMeta,
    items: Option<Vec<Header>>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct HeaderMeta {
    name: Option<String>,
    namespace: Option<String>,
}

impl Header {
    fn title(&self) -> Option<String> {
        let name = self.metadata.name.as_ref()?;
        Some(match self.kind.as_str() {
            "Node" => format!("Node {name}"),
            kind => format!("{kind} {}/{name}", self.metadata.namespace.as_deref().unwrap_or("default")),
        })
    }

    fn path(&self, item: usize) -> String {
        if self.kind == "List" { format!("items[{item}].") } else { String::new() }
    }

    fn check_kind(&self) -> Result<(), FieldError> {
        let version = match self.kind.as_str() {
            "Service" | "Endpoints" | "Node" => "v1",
            "EndpointSlice" => "discovery.k8s.io/v1",
            "" => return Err(FieldError::new("kind", "is missing")),
            "List" => return Err(FieldError::new("kind", "a List in a List")),
            kind => {
                let known = "Service, EndpointSlice, Endpoints, Node, List";
                return Err(FieldError::new("kind", format!("{kind:?} is none of {known}")));
            }
        };
        if self.api_version != version {
            let found = &self.api_version;
            return Err(FieldError::new("apiVersion", format!("{found:?}, but {} is of {version}", self.kind)));
        }
        Ok(())
    }
}

/// Reads an object as the kind its header names.
struct ObjectSeed<'a>(&'a Header);

impl<'de> DeserializeSeed<'de> for ObjectSeed<'_> {
    type Value = Object;

    fn deserialize<D: Deserializer<'de>>(self, value: D) -> Result<Object, D::Error> {
        match self.0.kind.as_str() {
            "Service" => {
                let mut service = k8s::Service::deserialize(value)?;
                service.set_defaults();
                Ok(Object::Service(Box::new(service)))
            }
            "EndpointSlice" => {
                let mut slice = k8s::EndpointSlice::deserialize(value)?;
                slice.set_defaults();
                Ok(Object::EndpointSlice(slice))
            }
            "Endpoints" => {
                let mut endpoints = k8s::Endpoints::deserialize(value)?;
                endpoints.set_defaults();
                Ok(Object::Endpoints(endpoints))
            }
            _ => Ok(Object::Node(k8s::Node::deserialize(value)?)),
        }
    }
}

/// Reads a List whose items' headers are known.
struct ListSeed<'a>(&'a [Header]);

impl<'de> DeserializeSeed<'de> for ListSeed<'_> {
    type Value = Vec<Object>;

    fn deserialize<D: Deserializer<'de>>(self, value: D) -> Result<Vec<Object>, D::Error> {
        value.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for ListSeed<'_> {
    type Value = Vec<Object>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a List")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Vec<Object>, A::Error> {
        let mut objects = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            if key == "items" {
                objects = map.next_value_seed(ItemsSeed(self.0))?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(objects)
    }
}

struct ItemsSeed<'a>(&'a [Header]);

impl<'de> DeserializeSeed<'de> for ItemsSeed<'_> {
    type Value = Vec<Object>;

    fn deserialize<D: Deserializer<'de>>(self, value: D) -> Result<Vec<Object>, D::Error> {
        value.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for ItemsSeed<'_> {
    type Value = Vec<Object>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<Object>, A::Error> {
        let mut objects = Vec::with_capacity(self.0.len());
        for header in self.0 {
            objects.extend(seq.next_element_seed(ObjectSeed(header))?);
        }
        Ok(objects)
    }
}

fn read<'de, T: Deserialize<'de>, D: Deserializer<'de>>(value: D) -> Result<T, FieldError> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        field_error(path, error.into_inner())
    })
}

fn tracked<'de, T, D: Deserializer<'de>>(
    value: D,
    read: impl FnOnce(serde_path_to_error::Deserializer<'_, '_, D>) -> Result<T, D::Error>,
) -> Result<T, FieldError> {
    let mut track = Track::new();
    let result = read(serde_path_to_error::Deserializer::new(value, &mut track));
    result.map_err(|error| field_error(track.path().to_string(), error))
}

/// A path of "." is the whole document.
fn field_error(path: String, error: impl fmt::Display) -> FieldError {
    FieldError::new(if path == "." { "the document".into() } else { path }, error.to_string())
}

/// Everything wrong with an object, worst first.
fn check(object: &Object) -> Vec<FieldError> {
    let mut problems = Vec::new();
    check_name(object, &mut problems);
    match object {
        Object::Service(service) => {
            service.to_model(&mut problems);
            check_service(service, &mut problems);
        }
        Object::EndpointSlice(slice) => {
            slice.to_model(&mut problems);
            if slice.address_type != "FQDN" {
                check_slice(slice, &mut problems);
            }
        }
        Object::Endpoints(endpoints) => {
            super::mirror::to_model(endpoints, &mut problems);
        }
        Object::Node(node) => {
            node.to_model(&mut problems);
        }
    }
    problems
}

fn check_name(object: &Object, problems: &mut Vec<FieldError>) {
    let meta = object.metadata();
    if meta.name.is_empty() {
        problems.push(FieldError::new("metadata.name", "is missing"));
    } else if matches!(object, Object::Service(_)) && !is_label(&meta.name) {
        problems.push(FieldError::new("metadata.name", format!("{:?} is not a DNS label", meta.name)));
    } else if !meta.name.split('.').all(is_label) || meta.name.len() > 253 {
        problems.push(FieldError::new("metadata.name", format!("{:?} is not a DNS name", meta.name)));
    }
    if !meta.namespace.is_empty() && !is_label(&meta.namespace) {
        problems.push(FieldError::new("metadata.namespace", format!("{:?} is not a DNS label", meta.namespace)));
    }
}

fn check_service(service: &k8s::Service, problems: &mut Vec<FieldError>) {
    let spec = &service.spec;
    if spec.ports.is_empty() && spec.service_type != "ExternalName" && spec.cluster_ip != "None" {
        problems.push(FieldError::new("spec.ports", "a Service needs a port"));
    }
    let mut names = BTreeSet::new();
    let mut numbers = BTreeSet::new();
    for (i, port) in spec.ports.iter().enumerate() {
        let field = |name: &str| format!("spec.ports[{i}].{name}");
        if port.name.is_empty() && spec.ports.len() > 1 {
            problems.push(FieldError::new(field("name"), "a Service with several ports needs a name for each"));
        } else if !port.name.is_empty() && !is_label(&port.name) {
            problems.push(FieldError::new(field("name"), format!("{:?} is not a DNS label", port.name)));
        } else if !names.insert(&port.name) {
            problems.push(FieldError::new(field("name"), format!("{:?} is the name of two ports", port.name)));
        }
        if !numbers.insert((&port.protocol, port.port)) {
            let twice = format!("{} {} is there twice", port.port, port.protocol);
            problems.push(FieldError::new(field("port"), twice));
        }
        if port.node_port != 0 && !matches!(spec.service_type.as_str(), "NodePort" | "LoadBalancer") {
            let reason = format!("not for a Service of type {}", spec.service_type);
            problems.push(FieldError::new(field("nodePort"), reason));
        }
    }
    let first = spec.cluster_ips.first();
    if !spec.cluster_ip.is_empty() && first.is_some_and(|first| *first != spec.cluster_ip) {
        problems.push(FieldError::new("spec.clusterIPs[0]", "differs from spec.clusterIP"));
    }
}

fn check_slice(slice: &k8s::EndpointSlice, problems: &mut Vec<FieldError>) {
    let mut names = BTreeSet::new();
    for (i, port) in slice.ports.iter().enumerate() {
        if !names.insert(port.name.as_deref().unwrap_or_default()) {
            let reason = format!("{:?} is the name of two ports", port.name.as_deref().unwrap_or_default());
            problems.push(FieldError::new(format!("ports[{i}].name"), reason));
        }
    }
}

fn is_label(text: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let bytes = text.as_bytes();
    (1..=63).contains(&bytes.len())
        && bytes.iter().all(|byte| inner(*byte))
        && bytes.first() != Some(&b'-')
        && bytes.last() != Some(&b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_yaml(text: &str) -> Result<Vec<Object>, String> {
        let value: serde_norway::Value = serde_norway::from_str(text).unwrap();
        objects(1, &value).map_err(|error| error.to_string())
    }

    fn service(spec: &str) -> Result<Vec<Object>, String> {
        read_yaml(&format!("{{apiVersion: v1, kind: Service, metadata: {{name: web, namespace: shop}}, spec: {spec}}}"))
    }

    #[test]
    fn a_service_gets_the_api_servers_defaults() {
        let objects = service("{sessionAffinity: ClientIP, ports: [{port: 80}]}").unwrap();
        let Object::Service(service) = &objects[0] else { panic!("{objects:?}") };
        assert_eq!(service.spec.service_type, "ClusterIP");
        assert_eq!(service.spec.ports[0].protocol, "TCP");
        assert_eq!(service.spec.ports[0].target_port, Some(k8s::IntOrString::Int(80)));
        assert_eq!(service.spec.internal_traffic_policy, "Cluster");
        assert_eq!(service.spec.external_traffic_policy, "", "not reachable from outside");
        let timeout = service.spec.session_affinity_config.as_ref().unwrap().client_ip.as_ref().unwrap();
        assert_eq!(timeout.timeout_seconds, Some(10_800));
        let mut again = service.clone();
        again.set_defaults();
        assert_eq!(&again, service, "defaulting is idempotent");
    }

    #[test]
    fn null_is_absent_and_an_empty_document_is_nothing() {
        assert_eq!(read_yaml("null").unwrap(), []);
        assert_eq!(read_yaml("").unwrap(), []);
        let text = "{apiVersion: v1, kind: Service, metadata: {name: web, creationTimestamp: null, labels: null}, \
                    spec: {ports: [{port: 80, name: null}], selector: null}, status: null}";
        assert_eq!(read_yaml(text).unwrap().len(), 1);
        assert_eq!(read_yaml("{apiVersion: v1, kind: List, items: null}").unwrap(), []);
    }

    #[test]
    fn an_error_names_document_object_and_field() {
        let error = |spec| service(spec).unwrap_err();
        let web = "document 1 (Service shop/web): ";
        assert_eq!(error("{}"), format!("{web}spec.ports: a Service needs a port"));
        assert_eq!(
            error("{ports: [{port: 70000}]}"),
            format!("{web}spec.ports[0].port: 70000 is not between 1 and 65535")
        );
        assert_eq!(
            error("{ports: [{port: 80, protocol: tcp}]}"),
            format!("{web}spec.ports[0].protocol: \"tcp\" is none of TCP, UDP, SCTP")
        );
        assert_eq!(
            error("{clusterIP: 10.0.0.256, ports: [{port: 80}]}"),
            format!("{web}spec.clusterIP: \"10.0.0.256\" is not an IP address")
        );
        assert_eq!(
            error("{ports: [{port: 80}, {port: 81}]}"),
            format!("{web}spec.ports[0].name: a Service with several ports needs a name for each")
        );
        let wrong_type = error("{ports: [{port: eighty}]}");
        assert!(wrong_type.starts_with(&format!("{web}spec.ports[0].port: invalid type: string")), "{wrong_type}");
        let typo = error("{ports: [{port: 80}], clusterIp: 10.0.0.1}");
        assert!(typo.starts_with(&format!("{web}spec.clusterIp: unknown field `clusterIp`")), "{typo}");
        assert_eq!(
            read_yaml("{apiVersion: v1, kind: Pod, metadata: {name: a}}").unwrap_err(),
            "document 1 (Pod default/a): kind: \"Pod\" is none of Service, EndpointSlice, Endpoints, Node, List"
        );
        assert_eq!(
            read_yaml("{apiVersion: discovery.k8s.io/v1beta1, kind: EndpointSlice, metadata: {name: a}}").unwrap_err(),
            "document 1 (EndpointSlice default/a): apiVersion: \"discovery.k8s.io/v1beta1\", \
             but EndpointSlice is of discovery.k8s.io/v1"
        );
        let no_object = read_yaml("just words").unwrap_err();
        assert!(no_object.starts_with("document 1: the document: invalid type: string"), "{no_object}");
        assert_eq!(
            read_yaml("{apiVersion: v1, kind: Service, metadata: {name: Web}, spec: {ports: [{port: 1}]}}")
                .unwrap_err(),
            "document 1 (Service default/Web): metadata.name: \"Web\" is not a DNS label"
        );
    }

    #[test]
    fn a_list_holds_objects_of_several_kinds_and_errors_name_the_item() {
        let text = "
apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: Node, metadata: {name: n1}, spec: {podCIDR: 10.1.0.0/16, taints: []}}
- {apiVersion: v1, kind: Service, metadata: {name: web}, spec: {ports: [{port: 80}]}}
- {apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: web-1}, addressType: IPv4, endpoints: []}
";
        let kinds: Vec<_> = read_yaml(text).unwrap().iter().map(Object::kind).collect();
        assert_eq!(kinds, ["Node", "Service", "EndpointSlice"]);
        let bad = text.replace("port: 80", "port: 0");
        let error = read_yaml(&bad).unwrap_err();
        assert_eq!(
            error,
            "document 1 (Service default/web): items[1].spec.ports[0].port: 0 is not between 1 and 65535"
        );
        let bad = text.replace("port: 80", "port: [80]");
        let error = read_yaml(&bad).unwrap_err();
        assert!(error.starts_with("document 1: items[1].spec.ports[0].port: invalid type: sequence"), "{error}");
    }
}
