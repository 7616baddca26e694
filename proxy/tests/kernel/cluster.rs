//! A cluster in few words: Services and endpoints, planned for this node and given to the real backend.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use proxy::nft::netlink::Netlink;
use proxy::nft::{Applied, Nft};
use proxy_core::model::{
    Conditions, Endpoint, EndpointPort, EndpointSlice, Family, NamespacedName, Protocol, Service, ServicePort,
    ServiceType, TrafficPolicy,
};
use proxy_core::plan::Planner;
use proxy_core::state::{Change, DetectLocal, NodeConfig, State};

pub(crate) const NODE: &str = "node-1";

pub(crate) struct Cluster {
    pub(crate) state: State,
    pub(crate) planner: Planner,
    pub(crate) nft: Nft<Netlink>,
}

/// The node has 192.168.0.2 and fd00:192::2; 10.244.1.0/24, 10.244.2.0/24 and their IPv6 twins are its pods'.
pub(crate) fn config() -> NodeConfig {
    let nets = |list: &[&str]| list.iter().map(|text| text.parse().expect("a net")).collect::<Vec<_>>();
    NodeConfig {
        node_ips: vec![ip("192.168.0.2"), ip("fd00:192::2")],
        detect_local: DetectLocal::ClusterCidrs(nets(&[
            "10.244.1.0/24",
            "10.244.2.0/24",
            "fd00:244:1::/64",
            "fd00:244:2::/64",
        ])),
        service_cidrs: nets(&["10.96.0.0/12", "10.96.0.0/16", "fd00:96::/108"]),
        ..NodeConfig::new(NODE)
    }
}

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

pub(crate) fn at(text: &str) -> SocketAddr {
    text.parse().expect("an address and port")
}

/// A Service with one port.
pub(crate) fn service(
    name: &str,
    addresses: &[&str],
    protocol: Protocol,
    port: u16,
    node_port: Option<u16>,
) -> Service {
    Service {
        name: NamespacedName::new("default", name),
        service_type: ServiceType::NodePort,
        cluster_ips: addresses.iter().map(|text| ip(text)).collect(),
        external_ips: Vec::new(),
        ingress: Vec::new(),
        ports: vec![ServicePort { name: "".into(), protocol, port, node_port }],
        affinity_timeout_s: None,
        external_traffic_policy: TrafficPolicy::Cluster,
        internal_traffic_policy: TrafficPolicy::Cluster,
        source_ranges: Vec::new(),
        proxy_name: None,
    }
}

/// The endpoints of a Service in one family: addresses on this node, or elsewhere.
pub(crate) fn slice(service: &Service, family: Family, port: u16, endpoints: &[(IpAddr, bool)]) -> EndpointSlice {
    let endpoint = |(address, here): &(IpAddr, bool)| Endpoint {
        address: *address,
        conditions: Conditions::default(),
        node_name: Some(if *here { NODE.into() } else { Arc::from("node-2") }),
        zone_hints: Default::default(),
        node_hints: Default::default(),
    };
    EndpointSlice {
        name: NamespacedName::new("default", format!("{}-{family}", service.name.name)),
        service: Some(service.name.name.clone()),
        family,
        headless: false,
        ports: vec![EndpointPort { name: "".into(), protocol: service.ports[0].protocol, port: Some(port) }],
        endpoints: endpoints.iter().map(endpoint).collect(),
    }
}

impl Cluster {
    pub(crate) fn new(config: NodeConfig) -> Cluster {
        let mut cluster =
            Cluster { state: State::new(), planner: Planner::new(config), nft: Nft::open().expect("a netlink socket") };
        cluster.planner.update(&mut cluster.state);
        cluster.nft.adopt(&cluster.planner.dataplane().node.clone()).expect("an adoption");
        cluster
    }

    pub(crate) fn set(&mut self, service: &Service, family: Family, port: u16, endpoints: &[(IpAddr, bool)]) {
        self.state.apply(Change::ServiceSet(service.clone()));
        self.state.apply(Change::SliceSet(slice(service, family, port, endpoints)));
    }

    /// Plans and applies what was set since the last time.
    pub(crate) fn follow(&mut self) -> Applied {
        let changes = self.planner.update(&mut self.state);
        self.nft
            .reconcile_changes(self.planner.dataplane(), &changes, Instant::now())
            .expect("the kernel takes the change")
    }
}
