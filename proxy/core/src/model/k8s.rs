//! Kubernetes' objects in Kubernetes' own shape: field names as in its JSON, addresses and enums still strings.
//!
//! One shape for every source: YAML files and `keelson-proxy apply` read it by serde, the store's protobuf is copied into
//! it field by field. Nothing is judged here. `convert.rs` fills in what the API server would have defaulted and turns it
//! into the typed [model](crate::model); `manifest.rs` reads documents and refuses what the API server would refuse.
//!
//! Where a typo would silently change what is served (a Service's spec, a slice), unknown fields are refused; metadata,
//! status and Nodes have too many fields that do not matter here, and are skipped. `null` means absent everywhere, as it does
//! to Kubernetes.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};

/// `null` is the same as nothing at all.
fn nullable<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(value: D) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(value)?.unwrap_or_default())
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// `metav1.ObjectMeta`, the fields that Keelson reads or keeps.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ObjectMeta {
    #[serde(deserialize_with = "nullable")]
    pub name: String,
    #[serde(deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub namespace: String,
    #[serde(deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub uid: String,
    #[serde(deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub generation: i64,
    /// RFC 3339, as Kubernetes writes it; carried, not read.
    #[serde(skip_serializing_if = "is_default")]
    pub creation_timestamp: Option<String>,
    #[serde(skip_serializing_if = "is_default")]
    pub deletion_timestamp: Option<String>,
    #[serde(deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub labels: BTreeMap<String, String>,
    #[serde(deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub annotations: BTreeMap<String, String>,
    #[serde(deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub finalizers: Vec<String>,
}

/// `v1.Service`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Service {
    #[serde(deserialize_with = "nullable")]
    pub api_version: String,
    #[serde(deserialize_with = "nullable")]
    pub kind: String,
    #[serde(deserialize_with = "nullable")]
    pub metadata: ObjectMeta,
    #[serde(deserialize_with = "nullable")]
    pub spec: ServiceSpec,
    #[serde(deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub status: ServiceStatus,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct ServiceSpec {
    #[serde(deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub ports: Vec<ServicePort>,
    #[serde(deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub selector: BTreeMap<String, String>,
    /// `None`, spelled out, for a headless Service.
    #[serde(rename = "clusterIP", deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub cluster_ip: String,
    #[serde(rename = "clusterIPs", deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub cluster_ips: Vec<String>,
    #[serde(rename = "type", deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub service_type: String,
    #[serde(rename = "externalIPs", deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub external_ips: Vec<String>,
    #[serde(deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub session_affinity: String,
    #[serde(skip_serializing_if = "is_default")]
    pub session_affinity_config: Option<SessionAffinityConfig>,
    #[serde(rename = "loadBalancerIP", deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub load_balancer_ip: String,
    #[serde(deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub load_balancer_source_ranges: Vec<String>,
    #[serde(skip_serializing_if = "is_default")]
    pub load_balancer_class: Option<String>,
    #[serde(skip_serializing_if = "is_default")]
    pub allocate_load_balancer_node_ports: Option<bool>,
    #[serde(deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub external_name: String,
    #[serde(deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub external_traffic_policy: String,
    #[serde(deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub internal_traffic_policy: String,
    #[serde(skip_serializing_if = "is_default")]
    pub traffic_distribution: Option<String>,
    #[serde(deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub health_check_node_port: i32,
    #[serde(deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub publish_not_ready_addresses: bool,
    #[serde(deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub ip_families: Vec<String>,
    #[serde(skip_serializing_if = "is_default")]
    pub ip_family_policy: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct ServicePort {
    #[serde(deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub name: String,
    #[serde(deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub protocol: String,
    pub port: i32,
    /// For whoever makes the EndpointSlices; a proxy never reads it.
    #[serde(skip_serializing_if = "is_default")]
    pub target_port: Option<IntOrString>,
    #[serde(deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub node_port: i32,
    #[serde(skip_serializing_if = "is_default")]
    pub app_protocol: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum IntOrString {
    Int(i32),
    String(String),
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SessionAffinityConfig {
    #[serde(rename = "clientIP")]
    pub client_ip: Option<ClientIpConfig>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct ClientIpConfig {
    pub timeout_seconds: Option<i32>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceStatus {
    #[serde(deserialize_with = "nullable")]
    pub load_balancer: LoadBalancerStatus,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoadBalancerStatus {
    #[serde(deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub ingress: Vec<LoadBalancerIngress>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LoadBalancerIngress {
    #[serde(deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub ip: String,
    #[serde(deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub hostname: String,
    #[serde(skip_serializing_if = "is_default")]
    pub ip_mode: Option<String>,
}

/// `discovery.k8s.io/v1` EndpointSlice.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct EndpointSlice {
    #[serde(deserialize_with = "nullable")]
    pub api_version: String,
    #[serde(deserialize_with = "nullable")]
    pub kind: String,
    #[serde(deserialize_with = "nullable")]
    pub metadata: ObjectMeta,
    /// `IPv4`, `IPv6` or `FQDN`.
    #[serde(deserialize_with = "nullable")]
    pub address_type: String,
    #[serde(deserialize_with = "nullable")]
    pub endpoints: Vec<Endpoint>,
    #[serde(deserialize_with = "nullable")]
    pub ports: Vec<EndpointPort>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Endpoint {
    #[serde(deserialize_with = "nullable")]
    pub addresses: Vec<String>,
    #[serde(deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub conditions: EndpointConditions,
    #[serde(skip_serializing_if = "is_default")]
    pub hostname: Option<String>,
    #[serde(skip_serializing_if = "is_default")]
    pub target_ref: Option<ObjectReference>,
    #[serde(deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub deprecated_topology: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "is_default")]
    pub node_name: Option<String>,
    #[serde(skip_serializing_if = "is_default")]
    pub zone: Option<String>,
    #[serde(skip_serializing_if = "is_default")]
    pub hints: Option<EndpointHints>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EndpointConditions {
    #[serde(skip_serializing_if = "is_default")]
    pub ready: Option<bool>,
    #[serde(skip_serializing_if = "is_default")]
    pub serving: Option<bool>,
    #[serde(skip_serializing_if = "is_default")]
    pub terminating: Option<bool>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct EndpointHints {
    #[serde(deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub for_zones: Vec<Named>,
    #[serde(deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub for_nodes: Vec<Named>,
}

/// `ForZone` and `ForNode`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Named {
    pub name: String,
}

/// The port of a slice, and of a subset of Endpoints.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct EndpointPort {
    #[serde(skip_serializing_if = "is_default")]
    pub name: Option<String>,
    #[serde(skip_serializing_if = "is_default")]
    pub protocol: Option<String>,
    #[serde(skip_serializing_if = "is_default")]
    pub port: Option<i32>,
    #[serde(skip_serializing_if = "is_default")]
    pub app_protocol: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ObjectReference {
    #[serde(deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub kind: String,
    #[serde(deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub namespace: String,
    #[serde(deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub name: String,
    #[serde(deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub uid: String,
}

/// `v1.Endpoints`, the old form of a slice.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Endpoints {
    #[serde(deserialize_with = "nullable")]
    pub api_version: String,
    #[serde(deserialize_with = "nullable")]
    pub kind: String,
    #[serde(deserialize_with = "nullable")]
    pub metadata: ObjectMeta,
    #[serde(deserialize_with = "nullable")]
    pub subsets: Vec<EndpointSubset>,
}

/// Every address has every port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct EndpointSubset {
    #[serde(deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub addresses: Vec<EndpointAddress>,
    #[serde(deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub not_ready_addresses: Vec<EndpointAddress>,
    #[serde(deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub ports: Vec<EndpointPort>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct EndpointAddress {
    #[serde(deserialize_with = "nullable")]
    pub ip: String,
    #[serde(deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub hostname: String,
    #[serde(skip_serializing_if = "is_default")]
    pub node_name: Option<String>,
    #[serde(skip_serializing_if = "is_default")]
    pub target_ref: Option<ObjectReference>,
}

/// `v1.Node`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Node {
    #[serde(deserialize_with = "nullable")]
    pub api_version: String,
    #[serde(deserialize_with = "nullable")]
    pub kind: String,
    #[serde(deserialize_with = "nullable")]
    pub metadata: ObjectMeta,
    #[serde(deserialize_with = "nullable")]
    pub spec: NodeSpec,
    #[serde(deserialize_with = "nullable")]
    pub status: NodeStatus,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeSpec {
    #[serde(rename = "podCIDR", deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub pod_cidr: String,
    #[serde(rename = "podCIDRs", deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub pod_cidrs: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeStatus {
    #[serde(deserialize_with = "nullable", skip_serializing_if = "is_default")]
    pub addresses: Vec<NodeAddress>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeAddress {
    #[serde(rename = "type", deserialize_with = "nullable")]
    pub address_type: String,
    #[serde(deserialize_with = "nullable")]
    pub address: String,
}
