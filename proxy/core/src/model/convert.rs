//! From Kubernetes' shape to the typed model: defaults first, then parsing.
//!
//! Two readers with two needs share this. A source must go on whatever an object holds: a bad address costs that address,
//! never the Service, as in kube-proxy; so conversion drops what it cannot read and notes a [`FieldError`] for each. A
//! manifest that somebody applies must be right: `manifest.rs` converts in the same way and refuses if there is any note.
//!
//! Addresses are read as old Kubernetes versions wrote them ([`parse_ip`]).

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use ipnet::IpNet;

use super::k8s;
use super::{
    Conditions, Endpoint, EndpointPort, EndpointSlice, Family, Ingress, IpMode, NamespacedName, Node, Protocol,
    Service, ServicePort, ServiceType, TrafficPolicy,
};

pub const LABEL_SERVICE_NAME: &str = "kubernetes.io/service-name";
pub const LABEL_PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
pub const LABEL_HEADLESS: &str = "service.kubernetes.io/headless";
pub const LABEL_ZONE: &str = "topology.kubernetes.io/zone";

/// The affinity timeout of a Service that asks for affinity and names no timeout: three hours.
pub const DEFAULT_AFFINITY_TIMEOUT_S: u32 = 10_800;
/// What the API server allows at most: a day.
pub const MAX_AFFINITY_TIMEOUT_S: u32 = 86_400;

/// A field that could not be read, by its path in the object, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct FieldError {
    pub field: String,
    pub reason: String,
}

impl FieldError {
    pub(crate) fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        FieldError { field: field.into(), reason: reason.into() }
    }
}

impl k8s::ObjectMeta {
    fn namespaced_name(&self) -> NamespacedName {
        let namespace = if self.namespace.is_empty() { "default" } else { &self.namespace };
        NamespacedName::new(namespace, self.name.as_str())
    }
}

impl k8s::Service {
    /// Writes in what the API server fills in when an object leaves it out. Idempotent.
    pub fn set_defaults(&mut self) {
        default_to(&mut self.metadata.namespace, "default");
        let spec = &mut self.spec;
        default_to(&mut spec.session_affinity, "None");
        default_to(&mut spec.service_type, "ClusterIP");
        if spec.session_affinity == "ClientIP" {
            let client_ip = spec.session_affinity_config.get_or_insert_default().client_ip.get_or_insert_default();
            client_ip.timeout_seconds.get_or_insert(DEFAULT_AFFINITY_TIMEOUT_S as i32);
        } else {
            spec.session_affinity_config = None;
        }
        for port in &mut spec.ports {
            default_to(&mut port.protocol, "TCP");
            port.target_port.get_or_insert(k8s::IntOrString::Int(port.port));
        }
        let has_address = matches!(spec.service_type.as_str(), "ClusterIP" | "NodePort" | "LoadBalancer");
        if matches!(spec.service_type.as_str(), "NodePort" | "LoadBalancer")
            || (has_address && !spec.external_ips.is_empty())
        {
            default_to(&mut spec.external_traffic_policy, "Cluster");
        }
        if has_address {
            default_to(&mut spec.internal_traffic_policy, "Cluster");
        }
        if spec.service_type == "LoadBalancer" {
            spec.allocate_load_balancer_node_ports.get_or_insert(true);
            for ingress in &mut self.status.load_balancer.ingress {
                if !ingress.ip.is_empty() && ingress.ip_mode.is_none() {
                    ingress.ip_mode = Some("VIP".into());
                }
            }
        }
    }

    /// The Service as the planner sees it. What cannot be read is left out and noted in `problems`.
    pub fn to_model(&self, problems: &mut Vec<FieldError>) -> Service {
        let spec = &self.spec;
        let service_type = one_of(
            &spec.service_type,
            "spec.type",
            &[
                ("", ServiceType::ClusterIp),
                ("ClusterIP", ServiceType::ClusterIp),
                ("NodePort", ServiceType::NodePort),
                ("LoadBalancer", ServiceType::LoadBalancer),
                ("ExternalName", ServiceType::ExternalName),
            ],
            problems,
        );
        Service {
            name: self.metadata.namespaced_name(),
            service_type: service_type.unwrap_or_default(),
            cluster_ips: self.cluster_ips(problems),
            external_ips: addresses(&spec.external_ips, "spec.externalIPs", problems),
            ingress: self.ingress(problems),
            ports: spec.ports.iter().enumerate().filter_map(|(i, port)| service_port(i, port, problems)).collect(),
            affinity_timeout_s: self.affinity(problems),
            external_traffic_policy: policy(&spec.external_traffic_policy, "spec.externalTrafficPolicy", problems),
            internal_traffic_policy: policy(&spec.internal_traffic_policy, "spec.internalTrafficPolicy", problems),
            source_ranges: nets(&spec.load_balancer_source_ranges, "spec.loadBalancerSourceRanges", problems),
            proxy_name: self.metadata.labels.get(LABEL_PROXY_NAME).map(|name| name.as_str().into()),
        }
    }

    fn cluster_ips(&self, problems: &mut Vec<FieldError>) -> Vec<IpAddr> {
        let spec = &self.spec;
        if spec.cluster_ip == "None" || spec.cluster_ips.first().is_some_and(|ip| ip == "None") {
            return Vec::new();
        }
        if spec.cluster_ips.is_empty() {
            let single: &[String] =
                if spec.cluster_ip.is_empty() { &[] } else { std::slice::from_ref(&spec.cluster_ip) };
            return single.iter().filter_map(|ip| address(ip, "spec.clusterIP".into(), problems)).collect();
        }
        addresses(&spec.cluster_ips, "spec.clusterIPs", problems)
    }

    fn ingress(&self, problems: &mut Vec<FieldError>) -> Vec<Ingress> {
        let mut list = Vec::new();
        for (i, ingress) in self.status.load_balancer.ingress.iter().enumerate() {
            // A host name only: nothing to capture.
            if ingress.ip.is_empty() {
                continue;
            }
            let field = format!("status.loadBalancer.ingress[{i}]");
            let modes = [("VIP", IpMode::Vip), ("Proxy", IpMode::Proxy)];
            let mode = match &ingress.ip_mode {
                None => Some(IpMode::Vip),
                Some(mode) => one_of(mode, &format!("{field}.ipMode"), &modes, problems),
            };
            let ip = address(&ingress.ip, format!("{field}.ip"), problems);
            list.extend(ip.zip(mode).map(|(ip, mode)| Ingress { ip, mode }));
        }
        list
    }

    fn affinity(&self, problems: &mut Vec<FieldError>) -> Option<u32> {
        let spec = &self.spec;
        let kinds = [("", false), ("None", false), ("ClientIP", true)];
        if !one_of(&spec.session_affinity, "spec.sessionAffinity", &kinds, problems).unwrap_or(false) {
            return None;
        }
        let configured = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
        let Some(seconds) = configured.and_then(|client_ip| client_ip.timeout_seconds) else {
            return Some(DEFAULT_AFFINITY_TIMEOUT_S);
        };
        match u32::try_from(seconds) {
            Ok(seconds) if (1..=MAX_AFFINITY_TIMEOUT_S).contains(&seconds) => Some(seconds),
            _ => {
                problems.push(FieldError::new(
                    "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
                    format!("{seconds} is not between 1 and {MAX_AFFINITY_TIMEOUT_S}"),
                ));
                Some(DEFAULT_AFFINITY_TIMEOUT_S)
            }
        }
    }
}

fn service_port(i: usize, port: &k8s::ServicePort, problems: &mut Vec<FieldError>) -> Option<ServicePort> {
    let field = format!("spec.ports[{i}]");
    let node_port = match port.node_port {
        0 => None,
        number => port_number(number, format!("{field}.nodePort"), problems),
    };
    let protocol = protocol(&port.protocol, format!("{field}.protocol"), problems);
    let number = port_number(port.port, format!("{field}.port"), problems);
    Some(ServicePort { name: port.name.as_str().into(), protocol: protocol?, port: number?, node_port })
}

impl k8s::EndpointSlice {
    /// Writes in what the API server fills in when an object leaves it out. Idempotent.
    pub fn set_defaults(&mut self) {
        default_to(&mut self.metadata.namespace, "default");
        default_ports(&mut self.ports);
    }

    /// The slice as the planner sees it; `None` if it holds host names, or its address type is unknown (noted).
    pub fn to_model(&self, problems: &mut Vec<FieldError>) -> Option<EndpointSlice> {
        let kinds = [("IPv4", Some(Family::V4)), ("IPv6", Some(Family::V6)), ("FQDN", None)];
        let family = one_of(&self.address_type, "addressType", &kinds, problems)??;
        let mut endpoints = Vec::with_capacity(self.endpoints.len());
        for (i, endpoint) in self.endpoints.iter().enumerate() {
            endpoints.extend(slice_endpoint(i, endpoint, family, problems));
        }
        let labels = &self.metadata.labels;
        Some(EndpointSlice {
            name: self.metadata.namespaced_name(),
            service: labels.get(LABEL_SERVICE_NAME).filter(|name| !name.is_empty()).map(|name| name.as_str().into()),
            family,
            headless: labels.contains_key(LABEL_HEADLESS),
            ports: endpoint_ports(&self.ports, "ports", problems),
            endpoints,
        })
    }
}

fn slice_endpoint(
    i: usize,
    endpoint: &k8s::Endpoint,
    family: Family,
    problems: &mut Vec<FieldError>,
) -> Option<Endpoint> {
    let Some(first) = endpoint.addresses.first() else {
        problems.push(FieldError::new(format!("endpoints[{i}].addresses"), "no address"));
        return None;
    };
    let field = format!("endpoints[{i}].addresses[0]");
    let address = address(first, field.clone(), problems)?;
    if Family::of(address) != family {
        problems.push(FieldError::new(field, format!("{address} is not an {family} address, as addressType says")));
        return None;
    }
    let names = |list: &[k8s::Named]| list.iter().map(|hint| Arc::from(hint.name.as_str())).collect();
    let hints = endpoint.hints.as_ref();
    Some(Endpoint {
        address,
        conditions: Conditions {
            ready: endpoint.conditions.ready,
            serving: endpoint.conditions.serving,
            terminating: endpoint.conditions.terminating,
        },
        node_name: endpoint.node_name.as_deref().map(Arc::from),
        zone_hints: hints.map(|hints| names(&hints.for_zones)).unwrap_or_default(),
        node_hints: hints.map(|hints| names(&hints.for_nodes)).unwrap_or_default(),
    })
}

impl k8s::Endpoints {
    /// Writes in what the API server fills in when an object leaves it out. Idempotent.
    pub fn set_defaults(&mut self) {
        default_to(&mut self.metadata.namespace, "default");
        self.subsets.iter_mut().for_each(|subset| default_ports(&mut subset.ports));
    }
}

impl k8s::Node {
    /// The node as the planner sees it. What cannot be read is left out and noted in `problems`.
    pub fn to_model(&self, problems: &mut Vec<FieldError>) -> Node {
        let mut pod_cidrs = nets(&self.spec.pod_cidrs, "spec.podCIDRs", problems);
        if self.spec.pod_cidrs.is_empty() && !self.spec.pod_cidr.is_empty() {
            pod_cidrs = nets(std::slice::from_ref(&self.spec.pod_cidr), "spec.podCIDR", problems);
        }
        let mut found: Vec<IpAddr> = Vec::new();
        for kind in ["InternalIP", "ExternalIP"] {
            for (i, listed) in self.status.addresses.iter().enumerate().filter(|(_, a)| a.address_type == kind) {
                found.extend(address(&listed.address, format!("status.addresses[{i}].address"), problems));
            }
        }
        let mut addresses: Vec<IpAddr> = Vec::new();
        for ip in found {
            if addresses.iter().all(|known| Family::of(*known) != Family::of(ip)) {
                addresses.push(ip);
            }
        }
        Node {
            name: self.metadata.name.as_str().into(),
            zone: self.metadata.labels.get(LABEL_ZONE).map(|zone| zone.as_str().into()),
            pod_cidrs,
            addresses,
        }
    }
}

pub(super) fn endpoint_ports(
    ports: &[k8s::EndpointPort],
    field: &str,
    problems: &mut Vec<FieldError>,
) -> Vec<EndpointPort> {
    let mut list = Vec::with_capacity(ports.len());
    for (i, port) in ports.iter().enumerate() {
        let protocol =
            protocol(port.protocol.as_deref().unwrap_or_default(), format!("{field}[{i}].protocol"), problems);
        let number = match port.port {
            None | Some(0) => None,
            Some(number) => match port_number(number, format!("{field}[{i}].port"), problems) {
                None => continue,
                some => some,
            },
        };
        let name = port.name.as_deref().unwrap_or_default().into();
        list.extend(protocol.map(|protocol| EndpointPort { name, protocol, port: number }));
    }
    list
}

fn default_ports(ports: &mut [k8s::EndpointPort]) {
    for port in ports {
        port.name.get_or_insert_default();
        port.protocol.get_or_insert_with(|| "TCP".into());
    }
}

fn default_to(field: &mut String, value: &str) {
    if field.is_empty() {
        *field = value.into();
    }
}

fn one_of<T: Copy>(value: &str, field: &str, known: &[(&str, T)], problems: &mut Vec<FieldError>) -> Option<T> {
    let found = known.iter().find(|(name, _)| *name == value).map(|(_, meaning)| *meaning);
    if found.is_none() {
        let names: Vec<&str> = known.iter().map(|(name, _)| *name).filter(|name| !name.is_empty()).collect();
        problems.push(FieldError::new(field, format!("{value:?} is none of {}", names.join(", "))));
    }
    found
}

fn policy(value: &str, field: &str, problems: &mut Vec<FieldError>) -> TrafficPolicy {
    let known = [("", TrafficPolicy::Cluster), ("Cluster", TrafficPolicy::Cluster), ("Local", TrafficPolicy::Local)];
    one_of(value, field, &known, problems).unwrap_or_default()
}

fn protocol(value: &str, field: String, problems: &mut Vec<FieldError>) -> Option<Protocol> {
    let known = [("", Protocol::Tcp), ("TCP", Protocol::Tcp), ("UDP", Protocol::Udp), ("SCTP", Protocol::Sctp)];
    one_of(value, &field, &known, problems)
}

fn port_number(number: i32, field: String, problems: &mut Vec<FieldError>) -> Option<u16> {
    match u16::try_from(number) {
        Ok(port) if port > 0 => Some(port),
        _ => {
            problems.push(FieldError::new(field, format!("{number} is not between 1 and 65535")));
            None
        }
    }
}

fn address(text: &str, field: String, problems: &mut Vec<FieldError>) -> Option<IpAddr> {
    let parsed = parse_ip(text);
    if parsed.is_none() {
        problems.push(FieldError::new(field, format!("{text:?} is not an IP address")));
    }
    parsed
}

fn addresses(texts: &[String], field: &str, problems: &mut Vec<FieldError>) -> Vec<IpAddr> {
    texts.iter().enumerate().filter_map(|(i, text)| address(text, format!("{field}[{i}]"), problems)).collect()
}

fn nets(texts: &[String], field: &str, problems: &mut Vec<FieldError>) -> Vec<IpNet> {
    let mut list = Vec::with_capacity(texts.len());
    for (i, text) in texts.iter().enumerate() {
        match parse_cidr(text) {
            Some(net) => list.push(net),
            None => problems.push(FieldError::new(format!("{field}[{i}]"), format!("{text:?} is not a CIDR"))),
        }
    }
    list
}

/// Reads an address as Kubernetes does in objects that exist: leading zeros are decimal (`010.0.0.1` is 10.0.0.1), and
/// an IPv4 address in IPv6 clothes (`::ffff:10.0.0.1`) is the IPv4 address.
pub fn parse_ip(text: &str) -> Option<IpAddr> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Some(address.to_canonical());
    }
    let mut octets = [0u8; 4];
    let mut parts = text.split('.');
    for octet in &mut octets {
        *octet = decimal(parts.next()?)?;
    }
    parts.next().is_none().then_some(IpAddr::V4(Ipv4Addr::from(octets)))
}

/// Reads a CIDR with the same leniency, and with spaces around it, as `loadBalancerSourceRanges` may have. Bits beyond the
/// prefix are cleared.
pub fn parse_cidr(text: &str) -> Option<IpNet> {
    let (address, prefix) = text.trim().split_once('/')?;
    let net = IpNet::new(parse_ip(address)?, decimal(prefix)?).ok()?;
    Some(net.trunc())
}

fn decimal(text: &str) -> Option<u8> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    // All digits: this fails only if the number is too big.
    text.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_old_objects_hold_them() {
        for (text, address) in [
            ("10.0.0.1", "10.0.0.1"),
            ("010.000.000.001", "10.0.0.1"),
            ("::ffff:10.0.0.1", "10.0.0.1"),
            ("fd00:0::1", "fd00::1"),
        ] {
            assert_eq!(parse_ip(text), Some(address.parse().unwrap()), "{text}");
        }
        for text in
            ["", "10.0.0", "10.0.0.1.2", "10.0.0.256", "10.0.0.+1", "10.0.0.1/8", " 10.0.0.1", "fd00::g", "0x0a.0.0.1"]
        {
            assert_eq!(parse_ip(text), None, "{text}");
        }
        for (text, net) in
            [("10.1.2.3/8", "10.0.0.0/8"), (" 203.0.113.000/025 ", "203.0.113.0/25"), ("fd00::1/64", "fd00::/64")]
        {
            assert_eq!(parse_cidr(text), Some(net.parse().unwrap()), "{text}");
        }
        for text in ["10.0.0.0", "10.0.0.0/33", "10.0.0.0/", "10.0.0.0/-1", "fd00::/129", "/8"] {
            assert_eq!(parse_cidr(text), None, "{text}");
        }
    }

    #[test]
    fn a_nodes_address_is_its_first_internal_one_else_external_one_a_family() {
        let node = |addresses: &[(&str, &str)]| {
            let mut node = k8s::Node::default();
            let list = addresses
                .iter()
                .map(|(kind, address)| k8s::NodeAddress { address_type: (*kind).into(), address: (*address).into() });
            node.status.addresses = list.collect();
            let ips = node.to_model(&mut Vec::new()).addresses;
            ips.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(node(&[("Hostname", "n1"), ("ExternalIP", "1.1.1.1"), ("InternalIP", "10.0.0.1")]), "10.0.0.1");
        assert_eq!(node(&[("ExternalIP", "1.1.1.1"), ("ExternalIP", "2.2.2.2")]), "1.1.1.1");
        assert_eq!(
            node(&[("InternalIP", "10.0.0.1"), ("InternalIP", "10.0.0.2"), ("ExternalIP", "2001:db8::1")]),
            "10.0.0.1 2001:db8::1"
        );
    }
}
