//! Properties of the planner over random clusters: small worlds in which names, addresses and ports collide all the time.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use proptest::collection::{btree_set, vec};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::test_runner::{RngSeed, TestRunner};
use proxy_core::dataplane::{Changes, Dataplane, NodePortAddresses, Scope, ServicePortId, ServicePortPlan};
use proxy_core::model::{
    Conditions, Endpoint, EndpointPort, EndpointSlice, Family, Ingress, IpMode, NamespacedName, Node, Protocol,
    Service, ServicePort, ServiceType, TrafficPolicy,
};
use proxy_core::plan::{Planner, plan};
use proxy_core::range::{self, AddressRange};
use proxy_core::state::{Change, DetectLocal, Dirty, NodeConfig, NodePortSelection, State};
use proxy_core::trace::{Origin, Packet, Verdict, trace};

const NODES: [&str; 3] = ["node1", "node2", "node3"];
const ZONES: [&str; 2] = ["a", "b"];

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn name() -> impl Strategy<Value = NamespacedName> {
    let namespace = prop_oneof![5 => Just("x"), 1 => Just("y")];
    (namespace, select(vec!["s0", "s1", "s2"])).prop_map(|(ns, name)| NamespacedName::new(ns, name))
}

fn protocol() -> impl Strategy<Value = Protocol> {
    prop_oneof![4 => Just(Protocol::Tcp), 1 => Just(Protocol::Udp)]
}

fn policy() -> impl Strategy<Value = TrafficPolicy> {
    select(vec![TrafficPolicy::Cluster, TrafficPolicy::Local])
}

fn service_ip() -> impl Strategy<Value = IpAddr> {
    select(
        ["172.30.0.1", "172.30.0.2", "172.30.0.3", "1.1.1.1", "1.1.1.2", "fd00:172::1", "fd00:172::2", "2001::1"]
            .map(ip)
            .to_vec(),
    )
}

fn pod_ip() -> impl Strategy<Value = IpAddr> {
    select(["10.0.0.1", "10.0.0.2", "10.0.1.1", "10.0.1.2", "fd00:10::1", "fd00:10::2"].map(ip).to_vec())
}

fn service_port() -> impl Strategy<Value = ServicePort> {
    let number = select(vec![80, 81]);
    let node_port = option::of(select(vec![3001, 3002]));
    (select(vec!["p", "q"]), protocol(), number, node_port).prop_map(|(name, protocol, port, node_port)| ServicePort {
        name: name.into(),
        protocol,
        port,
        node_port,
    })
}

fn service() -> impl Strategy<Value = Service> {
    let types = prop_oneof![
        8 => select(vec![ServiceType::ClusterIp, ServiceType::NodePort, ServiceType::LoadBalancer]),
        1 => Just(ServiceType::ExternalName),
    ];
    let mode = select(vec![IpMode::Vip, IpMode::Vip, IpMode::Proxy]);
    let ingress = (service_ip(), mode).prop_map(|(ip, mode)| Ingress { ip, mode });
    let ranges = select(vec![
        net("10.0.0.0/24"),
        net("192.168.0.0/16"),
        net("192.168.0.0/24"),
        net("fd00:10::/64"),
        net("0.0.0.0/0"),
    ]);
    (
        (name(), types, vec(service_ip(), 0..4), vec(service_ip(), 0..3), vec(ingress, 0..2)),
        (vec(service_port(), 1..4), option::of(1u32..100), policy(), policy()),
        (vec(ranges, 0..3), option::weighted(0.1, Just(Arc::from("other")))),
    )
        .prop_map(|(head, middle, tail)| Service {
            name: head.0,
            service_type: head.1,
            cluster_ips: head.2,
            external_ips: head.3,
            ingress: head.4,
            ports: middle.0,
            affinity_timeout_s: middle.1,
            external_traffic_policy: middle.2,
            internal_traffic_policy: middle.3,
            source_ranges: tail.0,
            proxy_name: tail.1,
        })
}

fn endpoint() -> impl Strategy<Value = Endpoint> {
    let ready = prop_oneof![3 => Just(None), 1 => Just(Some(true)), 2 => Just(Some(false))];
    let condition = || option::of(any::<bool>());
    let hints = |of: &'static [&'static str]| btree_set(select(of.to_vec()).prop_map(Arc::from), 0..2);
    (pod_ip(), (ready, condition(), condition()), option::of(select(NODES.to_vec())), hints(&ZONES), hints(&NODES))
        .prop_map(|(address, (ready, serving, terminating), node, zone_hints, node_hints)| Endpoint {
            address,
            conditions: Conditions { ready, serving, terminating },
            node_name: node.map(Arc::from),
            zone_hints,
            node_hints,
        })
}

fn slice() -> impl Strategy<Value = EndpointSlice> {
    let number = option::weighted(0.9, select(vec![8080u16, 8081]));
    let port = (select(vec!["p", "q"]), protocol(), number).prop_map(|(name, protocol, port)| EndpointPort {
        name: name.into(),
        protocol,
        port,
    });
    (
        (name(), select(vec!["e0", "e1", "e2", "e3"]), 0..10u8),
        select(vec![Family::V4, Family::V4, Family::V6]),
        vec(port, 1..4),
        vec(endpoint(), 0..6),
        0..10u8,
    )
        .prop_map(|((of, name, labelled), family, ports, mut endpoints, headless)| {
            endpoints.retain(|endpoint| Family::of(endpoint.address) == family);
            EndpointSlice {
                name: NamespacedName::new(of.namespace, name),
                service: (labelled > 0).then_some(of.name),
                family,
                headless: headless == 0,
                ports,
                endpoints,
            }
        })
}

fn node() -> impl Strategy<Value = Node> {
    (option::of(select(ZONES.to_vec())), any::<bool>()).prop_map(|(zone, inside)| Node {
        name: "node1".into(),
        zone: zone.map(Arc::from),
        pod_cidrs: vec![net("10.0.0.0/24")],
        addresses: vec![if inside { ip("192.168.0.2") } else { ip("192.168.1.2") }, ip("2001:db8::1")],
    })
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        6 => service().prop_map(Change::ServiceSet),
        2 => name().prop_map(Change::ServiceGone),
        6 => slice().prop_map(Change::SliceSet),
        2 => slice().prop_map(|slice| Change::SliceGone(slice.name)),
        2 => (name(), vec(slice(), 0..2)).prop_map(|(name, slices)| Change::EndpointsSet(name, slices)),
        1 => name().prop_map(Change::EndpointsGone),
        1 => node().prop_map(Change::NodeSet),
        1 => Just(Change::NodeGone),
    ]
}

fn config() -> impl Strategy<Value = NodeConfig> {
    let detect = select(vec![
        DetectLocal::None,
        DetectLocal::ClusterCidrs(vec![net("10.0.0.0/8"), net("10.1.0.0/16")]),
        DetectLocal::NodeCidrs,
        DetectLocal::InterfacePrefix("veth".into()),
    ]);
    let node_ports = select(vec![
        NodePortSelection::Primary,
        NodePortSelection::All,
        NodePortSelection::Cidrs(vec![net("192.168.0.0/24"), net("127.0.0.0/8")]),
    ]);
    (select(vec!["node1", "node2"]), detect, node_ports, any::<bool>()).prop_map(|(name, detect, node_ports, all)| {
        let mut config = NodeConfig::new(name);
        config.detect_local = detect;
        config.node_port_addresses = node_ports;
        config.masquerade_all = all;
        config.local_addresses = ["192.168.0.2", "192.168.1.2", "127.0.0.1", "2001:db8::1"].map(ip).to_vec();
        config.service_cidrs = vec![net("172.30.0.0/16"), net("172.30.0.0/24"), net("fd00:172::/64")];
        config
    })
}

/// A packet, to a frontend or node port of the dataplane if `aim` finds one, else to somewhere.
fn packet() -> impl Strategy<Value = (Packet<'static>, Option<Index>)> {
    let origin = select(vec![Origin::Node, Origin::Interface("veth1"), Origin::Interface("eth0")]);
    let source = prop_oneof![pod_ip(), select(["192.168.0.2", "203.0.113.2", "2600::1"].map(ip).to_vec())];
    let somewhere = prop_oneof![service_ip(), node_ip()];
    (origin, source, somewhere, protocol(), select(vec![80, 82, 3001]), option::weighted(0.8, any::<Index>())).prop_map(
        |(origin, source, destination, protocol, port, aim)| {
            (Packet { origin, source, destination, protocol, port, destination_is_local: false }, aim)
        },
    )
}

fn node_ip() -> impl Strategy<Value = IpAddr> {
    select(["192.168.0.2", "192.168.1.2", "127.0.0.1", "2001:db8::1"].map(ip).to_vec())
}

/// The packet, sent to something that the dataplane knows.
fn aim<'a>(dataplane: &Dataplane, config: &NodeConfig, packet: Packet<'a>, aim: Option<Index>) -> Packet<'a> {
    let node = |family| if family == Family::V4 { ip("192.168.0.2") } else { ip("2001:db8::1") };
    let mut known: Vec<(IpAddr, Protocol, u16)> = Vec::new();
    known.extend(dataplane.frontends.keys().map(|f| (f.address, f.protocol, f.port)));
    known.extend(dataplane.node_ports.keys().map(|n| (node(n.family), n.protocol, n.port)));
    let aimed = match aim {
        Some(index) if !known.is_empty() => {
            let (destination, protocol, port) = known[index.index(known.len())];
            Packet { destination, protocol, port, ..packet }
        }
        _ => packet,
    };
    Packet { destination_is_local: config.local_addresses.contains(&aimed.destination), ..aimed }
}

/// What `dataplane.rs` promises to backends.
fn check_invariants(dataplane: &Dataplane) {
    for (frontend, target) in &dataplane.frontends {
        let plan = &dataplane.service_ports[&target.id];
        assert_eq!(Family::of(frontend.address), target.id.family);
        assert_eq!(frontend.protocol, target.id.protocol);
        match target.scope {
            Scope::ClusterIp => assert!(plan.backends(plan.internal_policy).is_some()),
            Scope::LoadBalancer | Scope::ExternalIp => check_external(plan),
        }
    }
    for (node_port, id) in &dataplane.node_ports {
        assert_eq!((node_port.family, node_port.protocol), (id.family, id.protocol));
        check_external(&dataplane.service_ports[id]);
    }
    let mut here = BTreeSet::new();
    for (id, plan) in &dataplane.service_ports {
        for set in plan.cluster.iter().chain(&plan.local) {
            assert!(set.list.is_sorted_by(|a, b| a.address < b.address), "sorted, without duplicates");
            assert!(set.list.iter().all(|backend| Family::of(backend.address.ip()) == id.family));
            here.extend(set.list.iter().filter(|backend| backend.local).map(|backend| backend.address.ip()));
        }
        assert!(plan.local.iter().flat_map(|set| &set.list).all(|backend| backend.local));
        plan.source_ranges.iter().for_each(|ranges| check_ranges(ranges));
    }
    assert_eq!(dataplane.hairpin, here);
    check_ranges(&dataplane.node.service_cidrs);
    if let NodePortAddresses::Only(addresses) = &dataplane.node.node_port_addresses {
        assert!(addresses.iter().all(|ip| !ip.is_loopback()));
    }
}

fn check_external(plan: &ServicePortPlan) {
    assert!(plan.cluster.is_some(), "pods and this node need it");
    assert!(plan.backends(plan.external_policy).is_some());
}

fn check_ranges(ranges: &[AddressRange]) {
    assert!(ranges.is_sorted_by(|a, b| a.last < b.first), "sorted and disjoint");
    assert_eq!(range::merge(ranges.iter().copied()), ranges, "nothing left to merge");
}

/// Does some object say that this may be sent to?
fn is_usable(state: &State, endpoint: SocketAddr, id: &ServicePortId) -> bool {
    state.slices_of(&id.service).any(|slice| {
        let port = slice.ports.iter().any(|port| {
            port.name == id.port_name && port.protocol == id.protocol && port.port == Some(endpoint.port())
        });
        let listed = slice.endpoints.iter().any(|listed| {
            let conditions = listed.conditions;
            listed.address == endpoint.ip()
                && (conditions.is_ready() || (conditions.is_serving() && conditions.is_terminating()))
        });
        port && listed && slice.family == id.family
    })
}

fn owner<'a>(dataplane: &'a Dataplane, packet: &Packet<'_>) -> &'a ServicePortId {
    let found = dataplane.frontends.iter().find(|(frontend, _)| {
        (frontend.address, frontend.protocol, frontend.port) == (packet.destination, packet.protocol, packet.port)
    });
    let node_port = || {
        dataplane.node_ports.iter().find(|(node_port, _)| {
            (node_port.protocol, node_port.port) == (packet.protocol, packet.port)
                && node_port.family == Family::of(packet.destination)
        })
    };
    found
        .map(|(_, target)| &target.id)
        .or_else(|| node_port().map(|(_, id)| id))
        .expect("what is translated is a Service's")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, rng_seed: RngSeed::Fixed(3), ..ProptestConfig::default() })]

    /// Whatever changes, in whatever batches: the incremental plan is the full plan, what it calls changed is what differs,
    /// and the invariants hold.
    #[test]
    fn incremental_is_full(
        first in config(),
        second in config(),
        batches in vec((vec(change(), 0..6), 0..10u8), 1..8),
    ) {
        let mut state = State::new();
        let mut planner = Planner::new(first);
        for (changes, reconfigure) in batches {
            changes.into_iter().for_each(|change| state.apply(change));
            if reconfigure == 0 {
                planner.reconfigure(second.clone());
            }
            let before = planner.dataplane().clone();
            let changes = planner.update(&mut state);
            let full = plan(&state, planner.config());
            prop_assert_eq!(planner.dataplane(), &full);
            prop_assert_eq!(&changes, &Changes::between(&before, &full));
            check_invariants(&full);
            prop_assert!(planner.update(&mut state).is_empty(), "nothing happened since");
        }
    }

    /// The order in which objects came does not matter.
    #[test]
    fn order_is_nothing(
        config in config(),
        services in vec(service(), 0..6),
        slices in vec(slice(), 0..6),
        order in vec(any::<Index>(), 12),
    ) {
        let last_of_each = |changes: Vec<Change>| {
            let mut state = State::new();
            changes.into_iter().for_each(|change| state.apply(change));
            state
        };
        // One object a name, so that every order ends in the same state.
        let mut seen = BTreeSet::new();
        let mut objects: Vec<Change> = Vec::new();
        objects.extend(services.into_iter().filter(|s| seen.insert((0, s.name.clone()))).map(Change::ServiceSet));
        objects.extend(slices.into_iter().filter(|s| seen.insert((1, s.name.clone()))).map(Change::SliceSet));
        let straight = last_of_each(objects.clone());
        for (i, index) in order.iter().enumerate().take(objects.len()) {
            let other = index.index(objects.len());
            objects.swap(i, other);
        }
        let shuffled = last_of_each(objects);
        prop_assert_eq!(plan(&straight, &config), plan(&shuffled, &config));
    }

    /// Telling the state what it knows marks nothing.
    #[test]
    fn saying_it_twice_changes_nothing(changes in vec(change(), 0..20), again in change()) {
        let mut state = State::new();
        changes.into_iter().for_each(|change| state.apply(change));
        state.apply(again.clone());
        state.take_dirty();
        state.apply(again);
        prop_assert_eq!(state.take_dirty(), Dirty::Some(BTreeSet::new()));
    }

    /// Merging keeps every address, adds none, and leaves nothing to merge.
    #[test]
    fn merged_ranges_hold_the_same_addresses(
        nets in vec((any::<[u8; 2]>(), 8u8..=32), 0..8),
        probes in vec(any::<[u8; 2]>(), 1..20),
    ) {
        let v4 = |[a, b]: [u8; 2]| IpAddr::from([10, a & 3, b & 7, b]);
        let nets: Vec<IpNet> = nets.into_iter().map(|(ip, len)| IpNet::new(v4(ip), len).unwrap().trunc()).collect();
        let merged = range::merge(nets.iter().copied());
        check_ranges(&merged);
        let edges = merged.iter().flat_map(|range| [range.first, range.last]);
        for address in probes.into_iter().map(v4).chain(edges) {
            let naive = nets.iter().any(|net| net.contains(&address));
            prop_assert_eq!(range::contains(&merged, address), naive);
        }
    }
}

/// Nothing is sent where no object allows it, and a set that traffic is sent to is never empty.
#[test]
fn translations_are_usable() {
    let world = (config(), vec(change(), 10..40), vec(packet(), 1..40));
    let fixed =
        ProptestConfig { cases: 400, failure_persistence: None, rng_seed: RngSeed::Fixed(3), ..Default::default() };
    let counts = RefCell::new(BTreeMap::<&str, usize>::new());
    let result = TestRunner::new(fixed).run(&world, |(config, changes, packets)| {
        let mut state = State::new();
        changes.into_iter().for_each(|change| state.apply(change));
        let dataplane = plan(&state, &config);
        for (packet, target) in packets {
            let packet = aim(&dataplane, &config, packet, target);
            let verdict = trace(&dataplane, &packet);
            let kind = match &verdict {
                Verdict::NoMatch => "no match",
                Verdict::Reject => "reject",
                Verdict::Drop => "drop",
                Verdict::Translate(_) => "translate",
            };
            *counts.borrow_mut().entry(kind).or_default() += 1;
            let Verdict::Translate(ways) = verdict else { continue };
            prop_assert!(!ways.is_empty());
            let id = owner(&dataplane, &packet);
            for way in ways {
                prop_assert!(is_usable(&state, way.endpoint, id), "{packet:?} to {}", way.endpoint);
                let hairpin = way.endpoint.ip() == packet.source && dataplane.hairpin.contains(&packet.source);
                prop_assert!(way.masquerade || !hairpin || !is_local(&dataplane, id, way.endpoint));
            }
        }
        Ok(())
    });
    result.unwrap();
    let counts = counts.into_inner();
    println!("{counts:?}");
    assert!(counts.len() == 4 && counts.values().all(|count| *count > 300), "the worlds are too empty: {counts:?}");
}

fn is_local(dataplane: &Dataplane, id: &ServicePortId, endpoint: SocketAddr) -> bool {
    let plan = &dataplane.service_ports[id];
    let mut backends = plan.cluster.iter().chain(&plan.local).flat_map(|set| &set.list);
    backends.any(|backend| backend.local && backend.address == endpoint)
}
