//! Between Kubernetes' messages and its objects as they are written, field by field.
//!
//! In a message everything is optional; in the shape of `proxy_core::model::k8s`, what is empty is absent. Kubernetes
//! itself makes no difference for these fields: its own encoder writes empty texts, its decoder takes absent ones.
//!
//! The functions `to_…` write: from a shape to a message. Metadata is not written here, because most of it is the store's and not the
//! author's; `apply/write.rs` merges it.

use keelson_proto::k8s::{core_v1, discovery_v1, intstr, meta_v1};
use proxy_core::model::k8s;

fn some(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

fn text(value: Option<String>) -> String {
    value.unwrap_or_default()
}

/// The metadata of an object, as far as Keelson reads it.
pub fn metadata(meta: Option<meta_v1::ObjectMeta>) -> k8s::ObjectMeta {
    let meta = meta.unwrap_or_default();
    k8s::ObjectMeta {
        name: text(meta.name),
        namespace: text(meta.namespace),
        uid: text(meta.uid),
        generation: meta.generation.unwrap_or_default(),
        creation_timestamp: None,
        deletion_timestamp: None,
        labels: meta.labels,
        annotations: meta.annotations,
        finalizers: meta.finalizers,
    }
}

pub fn service(message: core_v1::Service) -> k8s::Service {
    k8s::Service {
        api_version: "v1".into(),
        kind: "Service".into(),
        metadata: metadata(message.metadata),
        spec: service_spec(message.spec.unwrap_or_default()),
        status: service_status(message.status.unwrap_or_default()),
    }
}

fn service_spec(spec: core_v1::ServiceSpec) -> k8s::ServiceSpec {
    k8s::ServiceSpec {
        ports: spec.ports.into_iter().map(service_port).collect(),
        selector: spec.selector,
        cluster_ip: text(spec.cluster_ip),
        cluster_ips: spec.cluster_ips,
        service_type: text(spec.r#type),
        external_ips: spec.external_ips,
        session_affinity: text(spec.session_affinity),
        session_affinity_config: spec.session_affinity_config.map(|config| k8s::SessionAffinityConfig {
            client_ip: config
                .client_ip
                .map(|client_ip| k8s::ClientIpConfig { timeout_seconds: client_ip.timeout_seconds }),
        }),
        load_balancer_ip: text(spec.load_balancer_ip),
        load_balancer_source_ranges: spec.load_balancer_source_ranges,
        load_balancer_class: spec.load_balancer_class,
        allocate_load_balancer_node_ports: spec.allocate_load_balancer_node_ports,
        external_name: text(spec.external_name),
        external_traffic_policy: text(spec.external_traffic_policy),
        internal_traffic_policy: text(spec.internal_traffic_policy),
        traffic_distribution: spec.traffic_distribution,
        health_check_node_port: spec.health_check_node_port.unwrap_or_default(),
        publish_not_ready_addresses: spec.publish_not_ready_addresses.unwrap_or_default(),
        ip_families: spec.ip_families,
        ip_family_policy: spec.ip_family_policy,
    }
}

fn service_port(port: core_v1::ServicePort) -> k8s::ServicePort {
    k8s::ServicePort {
        name: text(port.name),
        protocol: text(port.protocol),
        port: port.port.unwrap_or_default(),
        target_port: port.target_port.map(|target| match target.r#type() {
            0 => k8s::IntOrString::Int(target.int_val()),
            _ => k8s::IntOrString::String(text(target.str_val)),
        }),
        node_port: port.node_port.unwrap_or_default(),
        app_protocol: port.app_protocol,
    }
}

fn service_status(status: core_v1::ServiceStatus) -> k8s::ServiceStatus {
    let ingress = status.load_balancer.unwrap_or_default().ingress.into_iter().map(|ingress| {
        k8s::LoadBalancerIngress { ip: text(ingress.ip), hostname: text(ingress.hostname), ip_mode: ingress.ip_mode }
    });
    k8s::ServiceStatus { load_balancer: k8s::LoadBalancerStatus { ingress: ingress.collect() } }
}

pub fn endpoint_slice(message: discovery_v1::EndpointSlice) -> k8s::EndpointSlice {
    k8s::EndpointSlice {
        api_version: "discovery.k8s.io/v1".into(),
        kind: "EndpointSlice".into(),
        metadata: metadata(message.metadata),
        address_type: text(message.address_type),
        endpoints: message.endpoints.into_iter().map(slice_endpoint).collect(),
        ports: message
            .ports
            .into_iter()
            .map(|port| k8s::EndpointPort {
                name: port.name,
                protocol: port.protocol,
                port: port.port,
                app_protocol: port.app_protocol,
            })
            .collect(),
    }
}

fn slice_endpoint(endpoint: discovery_v1::Endpoint) -> k8s::Endpoint {
    let conditions = endpoint.conditions.unwrap_or_default();
    k8s::Endpoint {
        addresses: endpoint.addresses,
        conditions: k8s::EndpointConditions {
            ready: conditions.ready,
            serving: conditions.serving,
            terminating: conditions.terminating,
        },
        hostname: endpoint.hostname,
        target_ref: endpoint.target_ref.map(reference),
        deprecated_topology: endpoint.deprecated_topology,
        node_name: endpoint.node_name,
        zone: endpoint.zone,
        hints: endpoint.hints.map(|hints| k8s::EndpointHints {
            for_zones: hints.for_zones.into_iter().map(|zone| k8s::Named { name: text(zone.name) }).collect(),
            for_nodes: hints.for_nodes.into_iter().map(|node| k8s::Named { name: text(node.name) }).collect(),
        }),
    }
}

fn reference(reference: core_v1::ObjectReference) -> k8s::ObjectReference {
    k8s::ObjectReference {
        kind: text(reference.kind),
        namespace: text(reference.namespace),
        name: text(reference.name),
        uid: text(reference.uid),
    }
}

pub fn endpoints(message: core_v1::Endpoints) -> k8s::Endpoints {
    k8s::Endpoints {
        api_version: "v1".into(),
        kind: "Endpoints".into(),
        metadata: metadata(message.metadata),
        subsets: message
            .subsets
            .into_iter()
            .map(|subset| k8s::EndpointSubset {
                addresses: subset.addresses.into_iter().map(endpoint_address).collect(),
                not_ready_addresses: subset.not_ready_addresses.into_iter().map(endpoint_address).collect(),
                ports: subset
                    .ports
                    .into_iter()
                    .map(|port| k8s::EndpointPort {
                        name: port.name,
                        protocol: port.protocol,
                        port: port.port,
                        app_protocol: port.app_protocol,
                    })
                    .collect(),
            })
            .collect(),
    }
}

fn endpoint_address(address: core_v1::EndpointAddress) -> k8s::EndpointAddress {
    k8s::EndpointAddress {
        ip: text(address.ip),
        hostname: text(address.hostname),
        node_name: address.node_name,
        target_ref: address.target_ref.map(reference),
    }
}

pub fn node(message: core_v1::Node) -> k8s::Node {
    let spec = message.spec.unwrap_or_default();
    let addresses = message.status.unwrap_or_default().addresses.into_iter();
    k8s::Node {
        api_version: "v1".into(),
        kind: "Node".into(),
        metadata: metadata(message.metadata),
        spec: k8s::NodeSpec { pod_cidr: text(spec.pod_cidr), pod_cidrs: spec.pod_cidrs },
        status: k8s::NodeStatus {
            addresses: addresses
                .map(|address| k8s::NodeAddress { address_type: text(address.r#type), address: text(address.address) })
                .collect(),
        },
    }
}

// ---- Writing ---------------------------------------------------------------------------------------

pub fn to_service_spec(spec: &k8s::ServiceSpec) -> core_v1::ServiceSpec {
    core_v1::ServiceSpec {
        ports: spec.ports.iter().map(to_service_port).collect(),
        selector: spec.selector.clone(),
        cluster_ip: some(&spec.cluster_ip),
        r#type: some(&spec.service_type),
        external_ips: spec.external_ips.clone(),
        session_affinity: some(&spec.session_affinity),
        load_balancer_ip: some(&spec.load_balancer_ip),
        load_balancer_source_ranges: spec.load_balancer_source_ranges.clone(),
        external_name: some(&spec.external_name),
        external_traffic_policy: some(&spec.external_traffic_policy),
        health_check_node_port: (spec.health_check_node_port != 0).then_some(spec.health_check_node_port),
        publish_not_ready_addresses: spec.publish_not_ready_addresses.then_some(true),
        session_affinity_config: spec.session_affinity_config.as_ref().map(|config| core_v1::SessionAffinityConfig {
            client_ip: config
                .client_ip
                .as_ref()
                .map(|client_ip| core_v1::ClientIpConfig { timeout_seconds: client_ip.timeout_seconds }),
        }),
        ip_family_policy: spec.ip_family_policy.clone(),
        cluster_ips: spec.cluster_ips.clone(),
        ip_families: spec.ip_families.clone(),
        allocate_load_balancer_node_ports: spec.allocate_load_balancer_node_ports,
        load_balancer_class: spec.load_balancer_class.clone(),
        internal_traffic_policy: some(&spec.internal_traffic_policy),
        traffic_distribution: spec.traffic_distribution.clone(),
    }
}

fn to_service_port(port: &k8s::ServicePort) -> core_v1::ServicePort {
    let target = port.target_port.clone().unwrap_or(k8s::IntOrString::Int(port.port));
    core_v1::ServicePort {
        name: some(&port.name),
        protocol: some(&port.protocol),
        port: Some(port.port),
        target_port: Some(match target {
            k8s::IntOrString::Int(number) => {
                intstr::IntOrString { r#type: Some(0), int_val: Some(number), str_val: None }
            }
            k8s::IntOrString::String(name) => {
                intstr::IntOrString { r#type: Some(1), int_val: None, str_val: Some(name) }
            }
        }),
        node_port: (port.node_port != 0).then_some(port.node_port),
        app_protocol: port.app_protocol.clone(),
    }
}

pub fn to_ingress(ingress: &k8s::LoadBalancerIngress) -> core_v1::LoadBalancerIngress {
    core_v1::LoadBalancerIngress {
        ip: some(&ingress.ip),
        hostname: some(&ingress.hostname),
        ip_mode: ingress.ip_mode.clone(),
        ports: Vec::new(),
    }
}

/// Everything but the metadata.
pub fn to_endpoint_slice(slice: &k8s::EndpointSlice) -> discovery_v1::EndpointSlice {
    discovery_v1::EndpointSlice {
        metadata: None,
        endpoints: slice.endpoints.iter().map(to_slice_endpoint).collect(),
        ports: slice
            .ports
            .iter()
            .map(|port| discovery_v1::EndpointPort {
                name: port.name.clone(),
                protocol: port.protocol.clone(),
                port: port.port,
                app_protocol: port.app_protocol.clone(),
            })
            .collect(),
        address_type: some(&slice.address_type),
    }
}

fn to_slice_endpoint(endpoint: &k8s::Endpoint) -> discovery_v1::Endpoint {
    discovery_v1::Endpoint {
        addresses: endpoint.addresses.clone(),
        conditions: Some(discovery_v1::EndpointConditions {
            ready: endpoint.conditions.ready,
            serving: endpoint.conditions.serving,
            terminating: endpoint.conditions.terminating,
        }),
        hostname: endpoint.hostname.clone(),
        target_ref: endpoint.target_ref.as_ref().map(to_reference),
        deprecated_topology: endpoint.deprecated_topology.clone(),
        node_name: endpoint.node_name.clone(),
        zone: endpoint.zone.clone(),
        hints: endpoint.hints.as_ref().map(|hints| discovery_v1::EndpointHints {
            for_zones: hints
                .for_zones
                .iter()
                .map(|zone| discovery_v1::ForZone { name: Some(zone.name.clone()) })
                .collect(),
            for_nodes: hints
                .for_nodes
                .iter()
                .map(|node| discovery_v1::ForNode { name: Some(node.name.clone()) })
                .collect(),
        }),
    }
}

fn to_reference(reference: &k8s::ObjectReference) -> core_v1::ObjectReference {
    core_v1::ObjectReference {
        kind: some(&reference.kind),
        namespace: some(&reference.namespace),
        name: some(&reference.name),
        uid: some(&reference.uid),
        ..Default::default()
    }
}

/// Everything but the metadata.
pub fn to_endpoints(endpoints: &k8s::Endpoints) -> core_v1::Endpoints {
    core_v1::Endpoints {
        metadata: None,
        subsets: endpoints
            .subsets
            .iter()
            .map(|subset| core_v1::EndpointSubset {
                addresses: subset.addresses.iter().map(to_endpoint_address).collect(),
                not_ready_addresses: subset.not_ready_addresses.iter().map(to_endpoint_address).collect(),
                ports: subset
                    .ports
                    .iter()
                    .map(|port| core_v1::EndpointPort {
                        name: port.name.clone(),
                        port: port.port,
                        protocol: port.protocol.clone(),
                        app_protocol: port.app_protocol.clone(),
                    })
                    .collect(),
            })
            .collect(),
    }
}

fn to_endpoint_address(address: &k8s::EndpointAddress) -> core_v1::EndpointAddress {
    core_v1::EndpointAddress {
        ip: some(&address.ip),
        target_ref: address.target_ref.as_ref().map(to_reference),
        hostname: some(&address.hostname),
        node_name: address.node_name.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proxy_core::model::manifest;

    fn read(yaml: &str) -> manifest::Object {
        let value: serde_norway::Value = serde_norway::from_str(yaml).unwrap();
        manifest::objects(1, &value).unwrap().remove(0)
    }

    #[test]
    fn a_service_with_every_field_comes_back_from_its_message() {
        let manifest::Object::Service(mut written) = read(
            "
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop, labels: {a: b}}
spec:
  type: LoadBalancer
  ports:
  - {name: http, port: 80, targetPort: web, nodePort: 30080, appProtocol: http}
  - {name: dns, port: 53, protocol: UDP}
  selector: {app: web}
  clusterIP: 10.96.0.9
  clusterIPs: [10.96.0.9, 'fd00::9']
  externalIPs: [192.0.2.1]
  sessionAffinity: ClientIP
  sessionAffinityConfig: {clientIP: {timeoutSeconds: 60}}
  loadBalancerIP: 192.0.2.2
  loadBalancerSourceRanges: [203.0.113.0/24]
  loadBalancerClass: example.com/fast
  allocateLoadBalancerNodePorts: false
  externalTrafficPolicy: Local
  internalTrafficPolicy: Local
  trafficDistribution: PreferClose
  healthCheckNodePort: 30999
  publishNotReadyAddresses: true
  ipFamilies: [IPv4, IPv6]
  ipFamilyPolicy: RequireDualStack
",
        ) else {
            panic!("a service")
        };
        let message = core_v1::Service { spec: Some(to_service_spec(&written.spec)), ..Default::default() };
        written.metadata = k8s::ObjectMeta::default();
        assert_eq!(service(message), *written);
    }

    #[test]
    fn a_slice_and_endpoints_come_back_from_their_messages() {
        let manifest::Object::EndpointSlice(mut written) = read(
            "
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints:
- addresses: [10.1.0.1]
  conditions: {ready: false, serving: true, terminating: true}
  nodeName: n1
  zone: z1
  hostname: h
  targetRef: {kind: Pod, name: p, namespace: default, uid: u}
  hints: {forZones: [{name: z1}], forNodes: [{name: n1}]}
- addresses: [10.1.0.2]
",
        ) else {
            panic!("a slice")
        };
        written.metadata = k8s::ObjectMeta::default();
        assert_eq!(endpoint_slice(to_endpoint_slice(&written)), written);

        let manifest::Object::Endpoints(mut written) = read(
            "
apiVersion: v1
kind: Endpoints
metadata: {name: web}
subsets:
- addresses: [{ip: 10.1.0.1, nodeName: n1, hostname: h}]
  notReadyAddresses: [{ip: 10.1.0.2, targetRef: {kind: Pod, name: p}}]
  ports: [{name: http, port: 8080}]
",
        ) else {
            panic!("endpoints")
        };
        written.metadata = k8s::ObjectMeta::default();
        assert_eq!(endpoints(to_endpoints(&written)), written);
    }
}
