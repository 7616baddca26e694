//! From what the cluster says to what the kernel should do.
//!
//! [`plan`] is the rule: a state and a configuration give a dataplane. [`Planner`] gives the same by planning only the
//! Services that changed, and says which keys differ; that it is the same is a property under test.
//!
//! Which Services count: not `ExternalName`, not headless, and ours by the label `service-proxy-name`. Each port is planned
//! once for each family in which the Service has a ClusterIP. It is reached by that ClusterIP, by the external IPs and the
//! load balancer's `VIP` addresses of the family, and by its node port.
//!
//! Two Services may ask for one external address and port, or (never by way of an API server) for one node port. One gets
//! it, by the order of [`Target`]; the others wait, and one of them moves up when the owner goes.
//!
//! Not here: health-check node ports, metrics, conntrack. Nor does the planner decide when to plan: the shell does, once both
//! kinds have synced.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::dataplane::{
    Backends, Changes, Dataplane, Frontend, LocalDetection, NodePlan, NodePort, NodePortAddresses, Scope,
    ServicePortId, ServicePortPlan, Target, WhenEmpty,
};
use crate::model::{Family, IpMode, NamespacedName, Service, ServicePort, ServiceType, TrafficPolicy};
use crate::range::{self, AddressRange};
use crate::state::{DetectLocal, Dirty, NodeConfig, NodePortSelection, State};
use crate::topology::{self, Place};

/// The whole dataplane that a state asks for.
pub fn plan(state: &State, config: &NodeConfig) -> Dataplane {
    let mut planner = Planner::new(config.clone());
    planner.plan_services(state, Dirty::All);
    planner.dataplane
}

/// Keeps a dataplane up to date with a state, at the cost of what changed.
#[derive(Clone, Debug)]
pub struct Planner {
    config: NodeConfig,
    dataplane: Dataplane,
    /// What each planned Service asks for.
    claims: BTreeMap<NamespacedName, Vec<Claims>>,
    /// Who else asks for a frontend or node port that has an owner.
    waiting_frontends: BTreeMap<Frontend, BTreeSet<Target>>,
    waiting_node_ports: BTreeMap<NodePort, BTreeSet<ServicePortId>>,
    /// How many Service ports use an address that `cluster_ips` or `hairpin` lists.
    cluster_ip_uses: BTreeMap<IpAddr, usize>,
    hairpin_uses: BTreeMap<IpAddr, usize>,
    /// Nothing has been planned yet with this configuration.
    stale: bool,
}

/// By what a Service port wants to be reached.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Claims {
    id: ServicePortId,
    cluster_ip: IpAddr,
    frontends: BTreeMap<Frontend, Scope>,
    node_port: Option<NodePort>,
}

/// One Service port, planned.
struct Planned {
    claims: Claims,
    plan: ServicePortPlan,
}

/// What the keys that an update touched held before it.
#[derive(Default)]
struct Before {
    service_ports: BTreeMap<ServicePortId, Option<ServicePortPlan>>,
    frontends: BTreeMap<Frontend, Option<Target>>,
    node_ports: BTreeMap<NodePort, Option<ServicePortId>>,
    /// Addresses that came or went: one that did both is not in here.
    cluster_ips: BTreeSet<IpAddr>,
    hairpin: BTreeSet<IpAddr>,
}

impl Planner {
    pub fn new(config: NodeConfig) -> Self {
        Planner {
            config,
            dataplane: Dataplane::default(),
            claims: BTreeMap::new(),
            waiting_frontends: BTreeMap::new(),
            waiting_node_ports: BTreeMap::new(),
            cluster_ip_uses: BTreeMap::new(),
            hairpin_uses: BTreeMap::new(),
            stale: true,
        }
    }

    /// What the kernel should do, as of the last update.
    pub fn dataplane(&self) -> &Dataplane {
        &self.dataplane
    }

    pub fn config(&self) -> &NodeConfig {
        &self.config
    }

    /// Takes another configuration (the node's addresses changed, say); the next update plans everything.
    pub fn reconfigure(&mut self, config: NodeConfig) {
        self.stale |= self.config != config;
        self.config = config;
    }

    /// Plans again what changed in `state` since the last update, and says which keys of the dataplane now differ.
    pub fn update(&mut self, state: &mut State) -> Changes {
        let dirty = state.take_dirty();
        self.plan_services(state, if self.stale { Dirty::All } else { dirty })
    }

    fn plan_services(&mut self, state: &State, dirty: Dirty) -> Changes {
        self.stale = false;
        let node = plan_node(state, &self.config);
        let node_changed = self.dataplane.node != node;
        self.dataplane.node = node;
        let names: BTreeSet<NamespacedName> = match dirty {
            Dirty::Some(names) => names,
            Dirty::All => self.claims.keys().cloned().chain(state.services().map(|s| s.name.clone())).collect(),
        };
        let mut before = Before::default();
        for name in names {
            let planned = state.service(&name).map(|service| plan_service(service, state, &self.config));
            self.replace(name, planned.unwrap_or_default(), &mut before);
        }
        self.changes(node_changed, before)
    }

    /// Puts the new plan of a Service in place of the old one.
    fn replace(&mut self, name: NamespacedName, planned: Vec<Planned>, before: &mut Before) {
        let (claims, plans): (Vec<Claims>, Vec<ServicePortPlan>) =
            planned.into_iter().map(|planned| (planned.claims, planned.plan)).unzip();
        let old = self.claims.remove(&name).unwrap_or_default();
        // New uses are counted before old ones are given up, so that an address which stays is never noted.
        let ids: Vec<ServicePortId> = claims.iter().map(|claims| claims.id.clone()).collect();
        for (id, plan) in ids.iter().zip(plans) {
            self.set_plan(id, Some(plan), before);
        }
        for gone in old.iter().filter(|old| !ids.contains(&old.id)) {
            self.set_plan(&gone.id, None, before);
        }
        if old != claims {
            for claims in &claims {
                use_address(&mut self.cluster_ip_uses, claims.cluster_ip, &mut before.cluster_ips);
            }
            for old in &old {
                self.release(old, before);
            }
            for claims in &claims {
                self.claim(claims, before);
            }
        }
        if !claims.is_empty() {
            self.claims.insert(name, claims);
        }
    }

    fn set_plan(&mut self, id: &ServicePortId, plan: Option<ServicePortPlan>, before: &mut Before) {
        for ip in plan.iter().flat_map(local_addresses) {
            use_address(&mut self.hairpin_uses, ip, &mut before.hairpin);
        }
        let old = match plan {
            Some(plan) => self.dataplane.service_ports.insert(id.clone(), plan),
            None => self.dataplane.service_ports.remove(id),
        };
        for ip in old.iter().flat_map(local_addresses) {
            disuse_address(&mut self.hairpin_uses, ip, &mut before.hairpin);
        }
        before.service_ports.entry(id.clone()).or_insert(old);
    }

    fn claim(&mut self, claims: &Claims, before: &mut Before) {
        for (frontend, scope) in &claims.frontends {
            let target = Target { scope: *scope, id: claims.id.clone() };
            let owner = self.dataplane.frontends.get(frontend).cloned();
            before.frontends.entry(*frontend).or_insert(owner);
            claim(&mut self.dataplane.frontends, &mut self.waiting_frontends, *frontend, target);
        }
        if let Some(node_port) = claims.node_port {
            let owner = self.dataplane.node_ports.get(&node_port).cloned();
            before.node_ports.entry(node_port).or_insert(owner);
            claim(&mut self.dataplane.node_ports, &mut self.waiting_node_ports, node_port, claims.id.clone());
        }
    }

    fn release(&mut self, claims: &Claims, before: &mut Before) {
        disuse_address(&mut self.cluster_ip_uses, claims.cluster_ip, &mut before.cluster_ips);
        for (frontend, scope) in &claims.frontends {
            let target = Target { scope: *scope, id: claims.id.clone() };
            let owner = self.dataplane.frontends.get(frontend).cloned();
            before.frontends.entry(*frontend).or_insert(owner);
            release(&mut self.dataplane.frontends, &mut self.waiting_frontends, frontend, &target);
        }
        if let Some(node_port) = claims.node_port {
            let owner = self.dataplane.node_ports.get(&node_port).cloned();
            before.node_ports.entry(node_port).or_insert(owner);
            release(&mut self.dataplane.node_ports, &mut self.waiting_node_ports, &node_port, &claims.id);
        }
    }

    /// Keys that hold something else than before; and the two address sets, brought up to date.
    fn changes(&mut self, node: bool, before: Before) -> Changes {
        for (set, uses, touched) in [
            (&mut self.dataplane.cluster_ips, &self.cluster_ip_uses, &before.cluster_ips),
            (&mut self.dataplane.hairpin, &self.hairpin_uses, &before.hairpin),
        ] {
            for ip in touched {
                if uses.contains_key(ip) {
                    set.insert(*ip)
                } else {
                    set.remove(ip)
                };
            }
        }
        Changes {
            node,
            service_ports: differing(before.service_ports, &self.dataplane.service_ports),
            frontends: differing(before.frontends, &self.dataplane.frontends),
            node_ports: differing(before.node_ports, &self.dataplane.node_ports),
            cluster_ips: before.cluster_ips,
            hairpin: before.hairpin,
        }
    }
}

fn differing<K: Ord, V: PartialEq>(before: BTreeMap<K, Option<V>>, now: &BTreeMap<K, V>) -> BTreeSet<K> {
    before.into_iter().filter(|(key, old)| now.get(key) != old.as_ref()).map(|(key, _)| key).collect()
}

/// Gives `key` to the smallest that asks for it; whoever does not get it waits.
fn claim<K: Ord + Copy, T: Ord + Clone>(
    owners: &mut BTreeMap<K, T>,
    waiting: &mut BTreeMap<K, BTreeSet<T>>,
    key: K,
    asking: T,
) {
    let waits = match owners.get(&key) {
        None => {
            owners.insert(key, asking);
            return;
        }
        Some(owner) if *owner == asking => return,
        Some(owner) if *owner < asking => Some(asking),
        Some(_) => owners.insert(key, asking),
    };
    waiting.entry(key).or_default().extend(waits);
}

/// Takes `key` from `leaving`, or its place in the queue; the next in the queue moves up.
fn release<K: Ord + Copy, T: Ord + Clone>(
    owners: &mut BTreeMap<K, T>,
    waiting: &mut BTreeMap<K, BTreeSet<T>>,
    key: &K,
    leaving: &T,
) {
    if owners.get(key) == Some(leaving) {
        match waiting.get_mut(key).and_then(BTreeSet::pop_first) {
            Some(next) => owners.insert(*key, next),
            None => owners.remove(key),
        };
    } else if let Some(queue) = waiting.get_mut(key) {
        queue.remove(leaving);
    }
    if waiting.get(key).is_some_and(BTreeSet::is_empty) {
        waiting.remove(key);
    }
}

fn use_address(uses: &mut BTreeMap<IpAddr, usize>, ip: IpAddr, touched: &mut BTreeSet<IpAddr>) {
    let count = uses.entry(ip).or_default();
    *count += 1;
    if *count == 1 {
        toggle(touched, ip);
    }
}

fn disuse_address(uses: &mut BTreeMap<IpAddr, usize>, ip: IpAddr, touched: &mut BTreeSet<IpAddr>) {
    let Some(count) = uses.get_mut(&ip) else { return };
    *count -= 1;
    if *count == 0 {
        uses.remove(&ip);
        toggle(touched, ip);
    }
}

/// An address that comes and goes within one update has not changed.
fn toggle(touched: &mut BTreeSet<IpAddr>, ip: IpAddr) {
    if !touched.remove(&ip) {
        touched.insert(ip);
    }
}

/// The addresses of a plan's backends on this node, each once.
fn local_addresses(plan: &ServicePortPlan) -> impl Iterator<Item = IpAddr> {
    let sets = plan.cluster.iter().chain(&plan.local);
    let local = sets.flat_map(|set| &set.list).filter(|backend| backend.local);
    local.map(|backend| backend.address.ip()).collect::<BTreeSet<IpAddr>>().into_iter()
}

fn node_ips<'a>(state: &'a State, config: &'a NodeConfig) -> &'a [IpAddr] {
    if config.node_ips.is_empty() { state.node().map_or(&[], |node| &node.addresses) } else { &config.node_ips }
}

fn plan_node(state: &State, config: &NodeConfig) -> NodePlan {
    let nets = |nets: &[IpNet]| range::merge(nets.iter().copied());
    let usable = |ips: &mut dyn Iterator<Item = &IpAddr>| {
        NodePortAddresses::Only(ips.filter(|ip| !ip.is_loopback()).copied().collect())
    };
    NodePlan {
        masquerade_all: config.masquerade_all,
        masquerade_mark: 1 << (config.masquerade_bit & 31),
        local_detection: match &config.detect_local {
            DetectLocal::None => LocalDetection::None,
            DetectLocal::ClusterCidrs(cidrs) => LocalDetection::PodCidrs(nets(cidrs)),
            DetectLocal::NodeCidrs => {
                LocalDetection::PodCidrs(state.node().map(|node| nets(&node.pod_cidrs)).unwrap_or_default())
            }
            DetectLocal::Interface(name) => LocalDetection::Interface(name.clone()),
            DetectLocal::InterfacePrefix(prefix) => LocalDetection::InterfacePrefix(prefix.clone()),
        },
        node_port_addresses: match &config.node_port_addresses {
            NodePortSelection::All => NodePortAddresses::AllLocal,
            NodePortSelection::Primary => usable(&mut node_ips(state, config).iter()),
            NodePortSelection::Cidrs(cidrs) => {
                let selected = |ip: &&IpAddr| cidrs.iter().any(|cidr| cidr.contains(*ip));
                usable(&mut config.local_addresses.iter().filter(selected))
            }
        },
        service_cidrs: nets(&config.service_cidrs),
    }
}

/// A Service's ports in each of its families; none if it is not ours to serve.
fn plan_service(service: &Service, state: &State, config: &NodeConfig) -> Vec<Planned> {
    if service.service_type == ServiceType::ExternalName || service.proxy_name != config.proxy_name {
        return Vec::new();
    }
    let mut planned: Vec<Planned> = Vec::new();
    for family in Family::BOTH {
        // A headless Service has no ClusterIP in any family.
        let Some(cluster_ip) = service.cluster_ips.iter().copied().find(|ip| Family::of(*ip) == family) else {
            continue;
        };
        for port in &service.ports {
            let id = ServicePortId {
                service: service.name.clone(),
                port_name: port.name.clone(),
                protocol: port.protocol,
                family,
            };
            // No API server lets two ports share name and protocol. The first is as good as the second.
            if planned.iter().all(|earlier| earlier.claims.id != id) {
                planned.push(plan_port(service, port, cluster_ip, id, state, config));
            }
        }
    }
    planned
}

fn plan_port(
    service: &Service,
    port: &ServicePort,
    cluster_ip: IpAddr,
    id: ServicePortId,
    state: &State,
    config: &NodeConfig,
) -> Planned {
    let family = id.family;
    let vips: Vec<IpAddr> = service
        .ingress
        .iter()
        .filter(|ingress| ingress.mode == IpMode::Vip && Family::of(ingress.ip) == family)
        .map(|ingress| ingress.ip)
        .collect();
    let mut frontends = BTreeMap::new();
    let scoped = (service.external_ips.iter().map(|ip| (*ip, Scope::ExternalIp)))
        .chain(vips.iter().map(|ip| (*ip, Scope::LoadBalancer)))
        .chain([(cluster_ip, Scope::ClusterIp)]);
    for (address, scope) in scoped.filter(|(ip, _)| Family::of(*ip) == family) {
        // An address that is several things is the first of them in the order of scopes, so a load balancer's source
        // ranges can't be passed by naming its address an external IP as well.
        let frontend = Frontend { address, protocol: port.protocol, port: port.port };
        let known = frontends.entry(frontend).or_insert(scope);
        *known = scope.min(*known);
    }
    let node_port = port.node_port.map(|number| NodePort { family, protocol: port.protocol, port: number });
    let reachable_outside = node_port.is_some() || frontends.values().any(|scope| *scope != Scope::ClusterIp);
    let external_policy = if reachable_outside { external_policy(service) } else { TrafficPolicy::Cluster };
    let internal_policy = service.internal_traffic_policy;
    let node = state.node();
    let place = Place { node: &config.name, zone: node.and_then(|node| node.zone.as_deref()) };
    let candidates = topology::candidates(state.slices_of(&service.name), &port.name, port.protocol, family, place);
    // A Local policy needs the Cluster set too: pods and this node go as if they had come back in from outside.
    let needs_cluster = reachable_outside || internal_policy == TrafficPolicy::Cluster;
    let needs_local = [internal_policy, external_policy].contains(&TrafficPolicy::Local);
    let categories = topology::categorize(&candidates, needs_cluster, needs_local, place);
    let elsewhere = if categories.any { WhenEmpty::Drop } else { WhenEmpty::Reject };
    let plan = ServicePortPlan {
        internal_policy,
        external_policy,
        cluster: categories.cluster.map(|list| Backends { list, when_empty: WhenEmpty::Reject }),
        local: categories.local.map(|list| Backends { list, when_empty: elsewhere }),
        affinity_timeout_s: service.affinity_timeout_s,
        source_ranges: source_ranges(service, family, &vips, node_ips(state, config)),
    };
    Planned { claims: Claims { id, cluster_ip, frontends, node_port }, plan }
}

/// `externalTrafficPolicy` holds for a Service that is meant to be reached from outside.
fn external_policy(service: &Service) -> TrafficPolicy {
    match service.service_type {
        ServiceType::NodePort | ServiceType::LoadBalancer => service.external_traffic_policy,
        ServiceType::ClusterIp if !service.external_ips.is_empty() => service.external_traffic_policy,
        _ => TrafficPolicy::Cluster,
    }
}

/// Who may use the load balancer's addresses. Everybody, if there are no addresses or no ranges of the family, or one range
/// is everybody. If this node may, so may the addresses themselves: where they are bound locally, the node speaks from them.
fn source_ranges(service: &Service, family: Family, vips: &[IpAddr], node_ips: &[IpAddr]) -> Option<Vec<AddressRange>> {
    let nets: Vec<IpNet> = service.source_ranges.iter().filter(|net| Family::of_net(net) == family).copied().collect();
    if vips.is_empty() || nets.is_empty() || nets.iter().any(|net| net.prefix_len() == 0) {
        return None;
    }
    let node_may = node_ips.iter().any(|ip| nets.iter().any(|net| net.contains(ip)));
    let own = vips.iter().filter(|_| node_may).map(|ip| AddressRange::from(*ip));
    Some(range::merge(nets.iter().map(|net| AddressRange::from(*net)).chain(own)))
}
