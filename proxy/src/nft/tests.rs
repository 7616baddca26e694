//! The backend over the kernel's twin: what it writes does to every packet what the dataplane says must happen.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use proptest::prelude::*;
use proptest::sample::select;
use proxy_core::dataplane::{Changes, Dataplane};
use proxy_core::model::{
    Conditions, Endpoint, EndpointPort, EndpointSlice, Family, Ingress, IpMode, NamespacedName, Protocol, Service,
    ServicePort, ServiceType, TrafficPolicy,
};
use proxy_core::plan::Planner;
use proxy_core::state::{Change, DetectLocal, NodeConfig, NodePortSelection, State};
use proxy_core::trace::{Origin, Packet};

use super::diff::RETIRE_AFTER;
use super::fake::FakeKernel;
use super::kernel::Kernel;
use super::listing::Answer;
use super::object::{Op, SetId};
use super::render::Unserved;
use super::{Nft, trace};

const NODE: &str = "node-1";

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// The n-th pod: even ones live on this node.
fn pod(family: Family, n: u8) -> IpAddr {
    match family {
        Family::V4 => IpAddr::from([10, 244, n % 2, 10 + n]),
        Family::V6 => ip(&format!("fd00:244:{}::{:x}", n % 2, 10 + n)),
    }
}

fn address(family: Family, v4: &str, v6: &str) -> IpAddr {
    ip(if family == Family::V4 { v4 } else { v6 })
}

/// A Service and its endpoints, in few words.
#[derive(Clone, Debug)]
struct Spec {
    n: u8,
    family: Family,
    protocol: Protocol,
    node_port: Option<u16>,
    external: bool,
    balanced: bool,
    ranges: Option<Vec<&'static str>>,
    affinity: Option<u32>,
    internal: TrafficPolicy,
    outside: TrafficPolicy,
    endpoints: Vec<(u8, bool)>,
}

impl Spec {
    fn simple(n: u8, pods: &[u8]) -> Spec {
        Spec {
            n,
            family: Family::V4,
            protocol: Protocol::Tcp,
            node_port: None,
            external: false,
            balanced: false,
            ranges: None,
            affinity: None,
            internal: TrafficPolicy::Cluster,
            outside: TrafficPolicy::Cluster,
            endpoints: pods.iter().map(|pod| (*pod, true)).collect(),
        }
    }

    fn name(&self) -> NamespacedName {
        NamespacedName::new("default", format!("s{}", self.n))
    }

    fn cluster_ip(&self) -> IpAddr {
        address(self.family, &format!("10.96.0.{}", self.n + 1), &format!("fd00:96::{}", self.n + 1))
    }

    fn changes(&self) -> [Change; 2] {
        let outside = |v4, v6| vec![address(self.family, v4, v6)];
        let ingress = outside("1.2.3.4", "2001:db8::4").into_iter().map(|ip| Ingress { ip, mode: IpMode::Vip });
        let service = Service {
            name: self.name(),
            service_type: if self.balanced { ServiceType::LoadBalancer } else { ServiceType::NodePort },
            cluster_ips: vec![self.cluster_ip()],
            external_ips: if self.external { outside("192.168.99.9", "fd00:99::9") } else { Vec::new() },
            ingress: if self.balanced { ingress.collect() } else { Vec::new() },
            ports: vec![ServicePort {
                name: "".into(),
                protocol: self.protocol,
                port: 80 + u16::from(self.n % 2),
                node_port: self.node_port,
            }],
            affinity_timeout_s: self.affinity,
            external_traffic_policy: self.outside,
            internal_traffic_policy: self.internal,
            source_ranges: self.ranges.iter().flatten().map(|text| text.parse().expect("a range")).collect(),
            proxy_name: None,
        };
        let endpoint = |(n, ready): &(u8, bool)| Endpoint {
            address: pod(self.family, *n),
            conditions: Conditions { ready: Some(*ready), serving: Some(true), terminating: Some(!ready) },
            node_name: Some(if n % 2 == 0 { NODE.into() } else { Arc::from("node-2") }),
            zone_hints: Default::default(),
            node_hints: Default::default(),
        };
        let slice = EndpointSlice {
            name: self.name(),
            service: Some(self.name().name),
            family: self.family,
            headless: false,
            ports: vec![EndpointPort { name: "".into(), protocol: self.protocol, port: Some(8080) }],
            endpoints: self.endpoints.iter().map(endpoint).collect(),
        };
        [Change::ServiceSet(service), Change::SliceSet(slice)]
    }
}

fn a_spec() -> impl Strategy<Value = Spec> {
    let families = select(vec![Family::V4, Family::V6]);
    let protocols = select(vec![Protocol::Tcp, Protocol::Udp, Protocol::Sctp]);
    let policies = || select(vec![TrafficPolicy::Cluster, TrafficPolicy::Local]);
    let node_port = proptest::option::of(select(vec![30_001_u16, 30_002]));
    let ranges = proptest::option::of(select(vec![
        vec!["203.0.113.0/25"],
        vec!["10.0.0.0/8", "203.0.113.0/24", "2001:db8::/32"],
    ]));
    let endpoints = proptest::collection::btree_map(0_u8..6, any::<bool>(), 0..5);
    let flags = (any::<bool>(), any::<bool>());
    let affinity = proptest::option::of(select(vec![10_u32, 10_800]));
    (0_u8..6, families, protocols, node_port, flags, ranges, affinity, policies(), policies(), endpoints).prop_map(
        |(n, family, protocol, node_port, (external, balanced), ranges, affinity, internal, outside, endpoints)| Spec {
            n,
            family,
            protocol,
            node_port,
            external,
            balanced,
            ranges,
            affinity,
            internal,
            outside,
            endpoints: endpoints.into_iter().collect(),
        },
    )
}

fn a_config() -> impl Strategy<Value = NodeConfig> {
    let nets = |list: &[&str]| list.iter().map(|text| text.parse().expect("a net")).collect::<Vec<_>>();
    let detection = select(vec![
        DetectLocal::None,
        DetectLocal::ClusterCidrs(nets(&["10.244.0.0/24", "fd00:244::/64"])),
        DetectLocal::ClusterCidrs(nets(&["10.244.0.0/24"])),
        DetectLocal::Interface("veth0".into()),
        DetectLocal::InterfacePrefix("veth".into()),
    ]);
    let node_ports = select(vec![NodePortSelection::Primary, NodePortSelection::All]);
    let cidrs = select(vec![nets(&[]), nets(&["10.96.0.0/12", "10.96.0.0/16", "fd00:96::/108"])]);
    (detection, node_ports, any::<bool>(), cidrs).prop_map(
        |(detect_local, node_port_addresses, masquerade_all, cidrs)| NodeConfig {
            node_ips: vec![ip("192.168.0.2"), ip("fd00:192::2")],
            detect_local,
            node_port_addresses,
            masquerade_all,
            service_cidrs: cidrs,
            ..NodeConfig::new(NODE)
        },
    )
}

/// Every packet that could tell two dataplanes apart.
fn packets() -> Vec<Packet<'static>> {
    let mut packets = Vec::new();
    for family in Family::BOTH {
        let node = address(family, "192.168.0.2", "fd00:192::2");
        let sources = [
            (Origin::Node, node),
            (Origin::Interface("veth0"), pod(family, 0)),
            (Origin::Interface("veth1"), pod(family, 2)),
            (Origin::Interface("eth0"), pod(family, 1)),
            (Origin::Interface("eth0"), address(family, "203.0.113.2", "2001:db8::2")),
            (Origin::Interface("eth0"), address(family, "203.0.113.130", "2001:db9::2")),
        ];
        let mut destinations: Vec<IpAddr> = (0..7).map(|n| Spec::simple(n, &[]).with(family).cluster_ip()).collect();
        destinations.extend([node, address(family, "127.0.0.1", "::1"), address(family, "8.8.8.8", "2001:4860::8")]);
        destinations.push(address(family, "192.168.99.9", "fd00:99::9"));
        destinations.push(address(family, "1.2.3.4", "2001:db8::4"));
        for (origin, source) in sources {
            for destination in &destinations {
                for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
                    for port in [80, 81, 30_001, 30_002] {
                        packets.push(Packet {
                            origin,
                            source,
                            destination: *destination,
                            protocol,
                            port,
                            destination_is_local: *destination == node || destination.is_loopback(),
                        });
                    }
                }
            }
        }
    }
    packets
}

impl Spec {
    fn with(self, family: Family) -> Spec {
        Spec { family, ..self }
    }
}

fn assert_same_traces(kernel: &FakeKernel, dataplane: &Dataplane) {
    for packet in packets() {
        let expected = proxy_core::trace::trace(dataplane, &packet);
        let found = trace::trace(kernel, &packet);
        assert_eq!(found.as_ref(), Ok(&expected), "{packet:?}\n{dataplane}");
    }
}

/// A cluster, its planner, and the backend over a twin.
struct World {
    state: State,
    planner: Planner,
    nft: Nft<FakeKernel>,
    now: Instant,
}

impl World {
    fn new(config: NodeConfig, specs: &[Spec]) -> World {
        let nft = Nft::new(FakeKernel::default());
        let mut world = World { state: State::new(), planner: Planner::new(config), nft, now: Instant::now() };
        for spec in specs {
            world.set(spec);
        }
        world.planner.update(&mut world.state);
        world.nft.reconcile(world.planner.dataplane(), world.now).expect("a first reconcile");
        world
    }

    fn set(&mut self, spec: &Spec) {
        spec.changes().into_iter().for_each(|change| self.state.apply(change));
    }

    fn remove(&mut self, spec: &Spec) {
        self.state.apply(Change::ServiceGone(spec.name()));
        self.state.apply(Change::SliceGone(spec.name()));
    }

    fn follow(&mut self) -> super::Applied {
        let changes = self.planner.update(&mut self.state);
        self.nft.reconcile_changes(self.planner.dataplane(), &changes, self.now).expect("a change")
    }

    fn dataplane(&self) -> &Dataplane {
        self.planner.dataplane()
    }

    /// Lets time pass until nothing is left to retire.
    fn settle(&mut self) {
        self.now += RETIRE_AFTER;
        let applied = self.nft.retire(self.now).expect("a retirement");
        assert_eq!(applied.retire_at, None);
    }

    /// The process dies and another takes over.
    fn restart(self) -> World {
        World { nft: Nft::new(self.nft.kernel.reopen()), ..self }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn the_elements_do_what_the_dataplane_says(
        config in a_config(),
        specs in proptest::collection::vec(a_spec(), 0..6),
    ) {
        let mut world = World::new(config, &specs);
        assert_same_traces(world.nft.kernel(), &world.planner.dataplane().clone());
    }

    #[test]
    fn changes_lead_where_a_fresh_start_leads(
        config in a_config(),
        before in proptest::collection::vec(a_spec(), 0..6),
        after in proptest::collection::vec((a_spec(), any::<bool>()), 1..6),
    ) {
        let mut world = World::new(config, &before);
        for (spec, remove) in &after {
            if *remove { world.remove(spec) } else { world.set(spec) }
            world.follow();
            // Whoever is overtaken by the change still gets where he was going: both generations answer.
            assert_same_traces(&world.nft.kernel, world.planner.dataplane());
        }
        world.settle();
        assert_same_traces(&world.nft.kernel, world.planner.dataplane());
        let fresh = world.nft.kernel.batches.len();
        let applied = world.nft.reconcile(world.planner.dataplane(), world.now).expect("the same again");
        prop_assert_eq!((applied.elements_added, applied.elements_deleted), (0, 0));
        prop_assert_eq!(world.nft.kernel.batches.len(), fresh);
    }

    #[test]
    fn a_restart_adopts_everything_and_writes_nothing(
        config in a_config(),
        before in proptest::collection::vec(a_spec(), 0..6),
        after in proptest::collection::vec(a_spec(), 0..3),
    ) {
        let mut world = World::new(config, &before);
        after.iter().for_each(|spec| world.set(spec));
        world.follow();
        world.settle();
        let elements = world.nft.kernel.all_elements();
        let mut world = world.restart();
        let applied = world.nft.reconcile(world.planner.dataplane(), world.now).expect("an adoption");
        prop_assert_eq!((applied.elements_added, applied.elements_deleted), (0, 0));
        prop_assert_eq!(world.nft.kernel.all_elements(), elements);
        let claims = world.nft.kernel.batches.iter().flatten().all(|op| matches!(op, Op::AddTable { .. }));
        prop_assert!(claims, "{:?}", world.nft.kernel.batches);
    }

    #[test]
    fn another_configuration_takes_over_in_one_transaction(
        first in a_config(),
        second in a_config(),
        specs in proptest::collection::vec(a_spec(), 0..6),
    ) {
        let mut world = World::new(first, &specs);
        world.planner.reconfigure(second);
        let batches = world.nft.kernel.batches.len();
        world.follow();
        prop_assert!(world.nft.kernel.batches.len() <= batches + 1);
        assert_same_traces(&world.nft.kernel, world.planner.dataplane());
    }
}

fn config() -> NodeConfig {
    NodeConfig { node_ips: vec![ip("192.168.0.2")], ..NodeConfig::new(NODE) }
}

#[test]
fn one_endpoint_more_or_less_is_a_handful_of_elements() {
    let specs: Vec<_> = (0..5).map(|n| Spec::simple(n, &[0, 1, 2])).collect();
    let mut world = World::new(config(), &specs);
    world.set(&Spec::simple(1, &[0, 1, 2, 3]));
    let applied = world.follow();
    assert_eq!((applied.transactions, applied.elements_added, applied.elements_deleted), (1, 2, 1));
    world.set(&Spec::simple(1, &[1, 2, 3]));
    let applied = world.follow();
    assert_eq!((applied.transactions, applied.elements_added, applied.elements_deleted), (1, 2, 3));
    assert_eq!(applied.retire_at, None, "a set that only shrinks leaves nothing behind");
    let sent = world.nft.kernel.batches.last().expect("a batch");
    assert_eq!(sent.len(), 4, "{sent:?}");
}

#[test]
fn what_a_packet_may_be_on_its_way_to_goes_later() {
    let mut world = World::new(config(), &[Spec::simple(1, &[0, 1])]);
    world.set(&Spec::simple(1, &[]));
    let applied = world.follow();
    assert_eq!((applied.elements_added, applied.elements_deleted), (1, 2), "the frontend refuses, a hairpin is gone");
    assert_eq!(applied.retire_at, Some(world.now + RETIRE_AFTER));
    let endpoints = |world: &World| world.nft.kernel.all_elements()[&(Family::V4, SetId::Endpoints)].len();
    assert_eq!(endpoints(&world), 2);
    let early = world.nft.retire(world.now).expect("nothing is due");
    assert_eq!((early.elements_deleted, early.transactions), (0, 0));
    world.settle();
    assert_eq!(endpoints(&world), 0);
}

#[test]
fn endpoints_that_come_back_are_not_retired() {
    let mut world = World::new(config(), &[Spec::simple(1, &[0, 1])]);
    world.set(&Spec::simple(1, &[]));
    world.follow();
    world.set(&Spec::simple(1, &[0, 1]));
    world.follow();
    world.settle();
    assert_same_traces(&world.nft.kernel, world.planner.dataplane());
}

#[test]
fn a_foreign_change_is_repaired_once_it_is_known() {
    let mut world = World::new(config(), &[Spec::simple(1, &[0, 1])]);
    let before = world.nft.kernel.all_elements();
    let table = world.nft.kernel.tables.get_mut(&Family::V4).expect("a table");
    table.sets.get_mut(&SetId::Endpoints).expect("a map").clear();
    world.nft.distrust();
    let applied = world.nft.reconcile_changes(&world.planner.dataplane().clone(), &Changes::default(), world.now);
    assert_eq!(applied.expect("a repair").elements_added, 2);
    assert_eq!(world.nft.kernel.all_elements(), before);

    world.nft.kernel.tables.clear();
    world.nft.distrust();
    world.nft.reconcile(world.planner.dataplane(), world.now).expect("a repair of everything");
    assert_eq!(world.nft.kernel.all_elements(), before);

    let chains = &mut world.nft.kernel.tables.get_mut(&Family::V6).expect("a table").chains;
    chains.get_mut("services").expect("a chain").rules.pop();
    world.nft.distrust();
    world.nft.reconcile(world.planner.dataplane(), world.now).expect("a repair of rules");
    assert_eq!(world.nft.kernel.tables[&Family::V6].chains["services"].rules.len(), 4);
}

#[test]
fn after_a_refusal_the_kernel_is_read_again() {
    let mut world = World::new(config(), &[Spec::simple(1, &[0, 1])]);
    let table = world.nft.kernel.tables.get_mut(&Family::V4).expect("a table");
    table.sets.get_mut(&SetId::Frontends).expect("a map").clear();
    world.set(&Spec::simple(1, &[0, 1, 2]));
    let changes = world.planner.update(&mut world.state);
    let before = world.nft.kernel.all_elements();
    let error = world.nft.reconcile_changes(world.planner.dataplane(), &changes, world.now).expect_err("a refusal");
    assert!(error.to_string().contains("delete 1 elements of ip keelson frontends"), "{error}");
    assert_eq!(world.nft.kernel.all_elements(), before);
    world.nft.reconcile_changes(world.planner.dataplane(), &Changes::default(), world.now).expect("the next try");
    assert_same_traces(&world.nft.kernel, world.planner.dataplane());
}

#[test]
fn a_large_set_gets_a_chain_of_its_own_and_keeps_it_after_a_restart() {
    let endpoints: Vec<u8> = (0..200).collect();
    let mut world = World::new(config(), &[Spec::simple(1, &endpoints)]);
    assert!(world.nft.kernel.tables[&Family::V4].chains.contains_key("pick-200"));
    world = world.restart();
    let applied = world.nft.reconcile(world.planner.dataplane(), world.now).expect("an adoption");
    assert_eq!((applied.elements_added, applied.elements_deleted), (0, 0));
    assert_same_traces(&world.nft.kernel, world.planner.dataplane());
}

#[test]
fn what_cannot_be_programmed_is_said_and_refused() {
    let mut world = World::new(config(), &[]);
    let mut spec = Spec::simple(1, &[0]);
    let mut changes = spec.changes();
    let Change::SliceSet(slice) = &mut changes[1] else { panic!("the second is the slice") };
    let one = slice.endpoints[0].clone();
    slice.endpoints = (0..4_100_u32)
        .map(|n| Endpoint { address: IpAddr::from((0x0a01_0000 + n).to_be_bytes()), ..one.clone() })
        .collect();
    spec.affinity = Some(10);
    let [service, _] = spec.changes();
    let [_, slice] = changes;
    world.state.apply(service);
    world.state.apply(slice);
    let applied = world.follow();
    assert!(matches!(applied.unserved[..], [(_, Unserved::TooManyAffinityEndpoints(4_100))]), "{:?}", applied.unserved);
    let packet = packets()
        .into_iter()
        .find(|packet| packet.destination == spec.cluster_ip() && packet.port == 81)
        .expect("a packet to it");
    assert_eq!(trace::trace(&world.nft.kernel, &packet), Ok(proxy_core::trace::Verdict::Reject));
}

#[test]
fn the_listing_says_where_every_frontend_leads() {
    let mut spec = Spec::simple(1, &[0, 1]);
    spec.node_port = Some(30_001);
    let mut world = World::new(config(), &[spec, Spec::simple(2, &[])]);
    let listing = world.nft.listing().expect("a listing");
    let found: Vec<_> = listing.iter().map(|row| (row.address, row.port, row.external, row.answer.clone())).collect();
    let both = Answer::Endpoints([0, 1].map(|n| SocketAddr::new(pod(Family::V4, n), 8080)).to_vec());
    assert_eq!(
        found,
        [
            (None, 30_001, true, both.clone()),
            (Some(ip("10.96.0.2")), 81, false, both),
            (Some(ip("10.96.0.3")), 80, false, Answer::Refused),
        ]
    );
}

#[test]
fn udp_destinations_that_changed_are_named() {
    let mut spec = Spec { protocol: Protocol::Udp, node_port: Some(30_001), ..Spec::simple(1, &[0, 1]) };
    let mut world = World::new(config(), &[]);
    world.set(&spec);
    assert_eq!(world.follow().stale.count(), 2);
    world.set(&Spec::simple(2, &[0]));
    assert_eq!(world.follow().stale.count(), 0, "tcp flows are left alone");
    spec.endpoints.pop();
    world.set(&spec);
    assert_eq!(world.follow().stale.count(), 2);
    world.remove(&spec);
    assert_eq!(world.follow().stale.count(), 2);
    assert!(world.dataplane().node_ports.is_empty());
}

#[test]
fn cleanup_removes_what_a_dead_process_left_and_nothing_of_a_living_one() {
    let world = World::new(config(), &[Spec::simple(1, &[0])]);
    let mut living = world.nft.kernel;
    let tables = living.tables.clone();
    let mut other = Nft::new(FakeKernel::default());
    other.kernel.tables = tables;
    for table in other.kernel.tables.values_mut() {
        table.own_by(99);
    }
    let error = other.cleanup().expect_err("it is somebody's");
    assert!(error.to_string().contains("belongs to another process"), "{error}");
    assert_eq!(living.tables().expect("a list").len(), 2);

    let mut after = Nft::new(living.reopen());
    after.cleanup().expect("a cleanup");
    assert!(after.kernel.tables.is_empty());
    after.cleanup().expect("nothing to do");
    let mut old = Nft::new(FakeKernel::without_ownership());
    old.reconcile(&Dataplane::default(), Instant::now()).expect("an older kernel");
    old.cleanup().expect("a cleanup there");
    assert!(old.kernel.tables.is_empty());
}
