//! What the planner knows of Kubernetes: Services, EndpointSlices and the own Node, with everything parsed.
//!
//! Sources (the store, an API server, files) read objects in Kubernetes' own shape ([`k8s`]) and turn them into these
//! types once, at the border. From here on an address is an [`IpAddr`], a port a `u16` and a protocol an enum, so no
//! rule of the planner ever meets a string that might not parse. What Kubernetes leaves open stays open: conditions are
//! `Option<bool>`, because "absent" and "false" mean different things ([`Conditions`]).
//!
//! Only what decides about traffic is kept: no selectors, target ports, owners or managed fields. A name is shared
//! (`Arc<str>`), because every port, frontend and id of a Service repeats it.
//!
//! This module does not decide which objects count; that is [`crate::plan`] and
//! [`crate::topology`]. Old `Endpoints`
//! objects become EndpointSlices in [`mirror`].

pub mod convert;
pub mod k8s;
pub mod manifest;
pub mod mirror;

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// The name of an object within the cluster.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NamespacedName {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

impl NamespacedName {
    pub fn new(namespace: impl Into<Arc<str>>, name: impl Into<Arc<str>>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for NamespacedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// An IP family. A dual-stack Service is planned once a family, as if it were two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Family {
    #[serde(rename = "IPv4")]
    V4,
    #[serde(rename = "IPv6")]
    V6,
}

impl Family {
    pub const BOTH: [Family; 2] = [Family::V4, Family::V6];

    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Family::V4 } else { Family::V6 }
    }

    pub fn of_net(net: &IpNet) -> Self {
        Family::of(net.addr())
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::V4 => "ipv4",
            Family::V6 => "ipv6",
        })
    }
}

/// A transport protocol a Service can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

impl Protocol {
    /// The number in the IP header.
    pub fn number(self) -> u8 {
        match self {
            Protocol::Tcp => 6,
            Protocol::Udp => 17,
            Protocol::Sctp => 132,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::Sctp => "sctp",
        })
    }
}

/// Which endpoints may serve: all of the cluster's, or this node's only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum TrafficPolicy {
    #[default]
    Cluster,
    Local,
}

/// `spec.type`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ServiceType {
    #[default]
    #[serde(rename = "ClusterIP")]
    ClusterIp,
    NodePort,
    LoadBalancer,
    ExternalName,
}

/// A Service, as far as it decides about traffic.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    pub name: NamespacedName,
    pub service_type: ServiceType,
    /// Empty for a headless Service.
    pub cluster_ips: Vec<IpAddr>,
    pub external_ips: Vec<IpAddr>,
    pub ingress: Vec<Ingress>,
    pub ports: Vec<ServicePort>,
    /// `sessionAffinity: ClientIP` and its timeout in seconds; `None` without affinity.
    pub affinity_timeout_s: Option<u32>,
    pub external_traffic_policy: TrafficPolicy,
    pub internal_traffic_policy: TrafficPolicy,
    /// `loadBalancerSourceRanges`; empty means everybody.
    pub source_ranges: Vec<IpNet>,
    /// The label `service.kubernetes.io/service-proxy-name`: another proxy's Service, unless it is ours.
    pub proxy_name: Option<Arc<str>>,
}

/// One port of a Service. Where traffic goes is named by the EndpointSlice's port of the same name, never by `targetPort`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServicePort {
    /// Empty if the Service has one port without a name.
    pub name: Arc<str>,
    pub protocol: Protocol,
    pub port: u16,
    pub node_port: Option<u16>,
}

/// An address a load balancer was given, from `status.loadBalancer.ingress`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ingress {
    pub ip: IpAddr,
    pub mode: IpMode,
}

/// How a load balancer delivers: with the packet's destination unchanged (`Vip`), or as a proxy with its own addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum IpMode {
    #[default]
    #[serde(rename = "VIP")]
    Vip,
    Proxy,
}

/// An EndpointSlice of one family. Slices of host names (`addressType: FQDN`) never become one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointSlice {
    pub name: NamespacedName,
    /// The label `kubernetes.io/service-name`: the Service, in the same namespace. A slice without it serves nobody.
    pub service: Option<Arc<str>>,
    pub family: Family,
    /// The label `service.kubernetes.io/headless` is there: the slice is not for proxies.
    pub headless: bool,
    pub ports: Vec<EndpointPort>,
    pub endpoints: Vec<Endpoint>,
}

/// A port that all endpoints of a slice have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointPort {
    pub name: Arc<str>,
    pub protocol: Protocol,
    /// `None` means every port, which a proxy ignores.
    pub port: Option<u16>,
}

/// One endpoint. Only the first address of the object counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    pub address: IpAddr,
    pub conditions: Conditions,
    pub node_name: Option<Arc<str>>,
    /// `hints.forZones`; empty means no zone hint.
    pub zone_hints: BTreeSet<Arc<str>>,
    /// `hints.forNodes`; empty means no node hint.
    pub node_hints: BTreeSet<Arc<str>>,
}

/// The conditions of an endpoint as the object states them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Conditions {
    pub ready: Option<bool>,
    pub serving: Option<bool>,
    pub terminating: Option<bool>,
}

impl Conditions {
    /// Absent means ready: whoever writes slices by hand need not know of conditions.
    pub fn is_ready(self) -> bool {
        self.ready.unwrap_or(true)
    }

    /// Absent means serving, as kube-proxy reads it.
    pub fn is_serving(self) -> bool {
        self.serving.unwrap_or(true)
    }

    /// Absent means not terminating.
    pub fn is_terminating(self) -> bool {
        self.terminating.unwrap_or(false)
    }
}

/// The node this proxy runs on, as its Node object describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    pub name: Arc<str>,
    /// The label `topology.kubernetes.io/zone`.
    pub zone: Option<Arc<str>>,
    pub pod_cidrs: Vec<IpNet>,
    /// One address a family at most: the first internal one, else the first external one.
    pub addresses: Vec<IpAddr>,
}
