//! Which elements a Service port is made of.
//!
//! ```text
//!  pair p of the port; S = p's even serial, L = its odd one
//!  endpoints      S . proto . i -> address           L . proto . i -> address     (or picks and slots, with affinity)
//!  frontends      ClusterIP -> S|step or L|step      external -> S|4 or S|5, behind a guard S|3
//!  cluster-side   S|4, S|5 -> S|step                 outside  S|5 -> L|step · S|3 -> S|4, S|5
//! ```
//! An endpoint keeps its index while it lives: one that goes is replaced by the last, so a change of one endpoint is a
//! change of one or two elements however many there are. Pairs are handed out in turn and are found again in the kernel's
//! own elements after a restart; one that is given up is not handed out again before all others were.
//!
//! What it does not do: it does not know what the kernel holds (except to find pairs again); that is [`super::diff`].

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;

use proxy_core::dataplane::{
    Backends, Frontend, NodePlan, NodePort, NodePortAddresses, Scope, ServicePortPlan, WhenEmpty,
};
use proxy_core::dataplane::{LocalDetection, ServicePortId};
use proxy_core::model::{Family, TrafficPolicy};
use proxy_core::range::AddressRange;

use super::diff::Picture;
use super::object::{Data, Id, Key, KeyKind, SetId, key};
use super::skeleton::{
    STEP_DISCARD, STEP_EXTERNAL_CLUSTER, STEP_EXTERNAL_LOCAL, STEP_FIRST_FREE, STEP_GUARDED, STEP_MAX, STEP_REFUSE,
    StepChain, chains_at_start,
};

/// An affinity slot is the step part of an id; 0 is left out so that a slot never looks like a bare serial.
const SLOT_MAX: u16 = Id::STEP_MASK as u16;

pub type Rendered = Vec<(SetId, Key, Data)>;

/// Why a Service port is not in the kernel.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unserved {
    #[error("it needs more than {STEP_MAX} different chains on this node")]
    TooManyChains,
    #[error("session affinity over {0} endpoints: {SLOT_MAX} are the most")]
    TooManyAffinityEndpoints(usize),
    #[error("there are more than {} service ports of its family", Id::PAIR_MAX)]
    TooManyServicePorts,
}

/// Which step each chain has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Steps {
    by_chain: BTreeMap<StepChain, u16>,
    used: BTreeSet<u16>,
    /// Handed out since the last batch: these chains are still to be made.
    fresh: Vec<(StepChain, u16)>,
}

impl Steps {
    pub fn at_start() -> Steps {
        Steps::of(chains_at_start())
    }

    pub fn of(chains: impl IntoIterator<Item = (StepChain, u16)>) -> Steps {
        let by_chain: BTreeMap<_, _> = chains.into_iter().collect();
        let used = by_chain.values().copied().collect();
        Steps { by_chain, used, fresh: Vec::new() }
    }

    fn get(&mut self, chain: StepChain) -> Result<u16, Unserved> {
        if let Some(step) = self.by_chain.get(&chain) {
            return Ok(*step);
        }
        let next = self.used.last().map_or(STEP_FIRST_FREE, |last| last + 1);
        if next > STEP_MAX {
            return Err(Unserved::TooManyChains);
        }
        self.used.insert(next);
        self.by_chain.insert(chain, next);
        self.fresh.push((chain, next));
        Ok(next)
    }

    pub fn take_fresh(&mut self) -> Vec<(StepChain, u16)> {
        std::mem::take(&mut self.fresh)
    }
}

/// Hands out pairs, each only after all others were.
#[derive(Debug)]
pub struct Pairs {
    next: u32,
    used: HashSet<u32>,
}

impl Default for Pairs {
    fn default() -> Self {
        Pairs { next: 1, used: HashSet::new() }
    }
}

impl Pairs {
    /// Begins after every pair that any element names.
    pub fn after(&mut self, pair: u32) {
        self.next = self.next.max(pair + 1);
    }

    fn claim(&mut self, pair: u32) -> bool {
        pair != 0 && self.used.insert(pair)
    }

    fn take(&mut self) -> Result<u32, Unserved> {
        if self.used.len() as u32 >= Id::PAIR_MAX {
            return Err(Unserved::TooManyServicePorts);
        }
        loop {
            if self.next > Id::PAIR_MAX {
                self.next = 1;
            }
            let pair = self.next;
            self.next += 1;
            if self.used.insert(pair) {
                return Ok(pair);
            }
        }
    }

    pub fn give_back(&mut self, pair: u32) {
        self.used.remove(&pair);
    }
}

/// What is remembered of a Service port between changes.
#[derive(Debug)]
pub struct Port {
    pub pair: u32,
    pub frontends: BTreeMap<Frontend, Scope>,
    pub node_ports: BTreeSet<NodePort>,
    cluster: Indices,
    local: Indices,
    slots: Slots,
    /// The keys it has in the kernel.
    pub keys: Vec<(SetId, Key)>,
}

impl Port {
    /// Takes up the pair that its frontends have in the kernel, with the places its endpoints have there; or a new one.
    pub fn begin(
        id: &ServicePortId,
        frontends: BTreeMap<Frontend, Scope>,
        node_ports: BTreeSet<NodePort>,
        picture: &Picture,
        pairs: &mut Pairs,
    ) -> Result<Port, Unserved> {
        let known = frontends
            .keys()
            .map(|frontend| picture.get(SetId::Frontends, &frontend_key(frontend)))
            .chain(node_ports.iter().map(|port| picture.get(SetId::NodePorts, &node_port_key(port))));
        let mut found = None;
        for data in known.flatten() {
            let Data::Id(known) = data else { continue };
            if pairs.claim(known.pair()) {
                found = Some(known.pair());
                break;
            }
        }
        let mut port = Port {
            pair: 0,
            frontends,
            node_ports,
            cluster: Indices::default(),
            local: Indices::default(),
            slots: Slots::default(),
            keys: Vec::new(),
        };
        port.pair = match found {
            Some(pair) => {
                let protocol = id.protocol.number();
                port.cluster = Indices::adopt(picture, Id::new(pair, false, 0), protocol);
                port.local = Indices::adopt(picture, Id::new(pair, true, 0), protocol);
                port.slots = Slots::adopt(picture, pair, protocol);
                pair
            }
            None => pairs.take()?,
        };
        Ok(port)
    }

    /// All elements of this port.
    pub fn render(
        &mut self,
        id: &ServicePortId,
        plan: &ServicePortPlan,
        steps: &mut Steps,
    ) -> Result<Rendered, Unserved> {
        let mut out = Rendered::new();
        if plan.affinity_timeout_s.is_some() {
            let all = [&plan.cluster, &plan.local].into_iter().flatten().flat_map(|set| &set.list);
            self.slots.assign(all.map(|backend| backend.address))?;
        } else {
            self.slots = Slots::default();
        }
        let cluster = self.backends(id, plan, TrafficPolicy::Cluster, steps, &mut out)?;
        let local = self.backends(id, plan, TrafficPolicy::Local, steps, &mut out)?;
        let view = |policy| if policy == TrafficPolicy::Cluster { cluster } else { local };
        let policy_step = match plan.external_policy {
            TrafficPolicy::Cluster => STEP_EXTERNAL_CLUSTER,
            TrafficPolicy::Local => STEP_EXTERNAL_LOCAL,
        };
        let policy = Id::new(self.pair, false, policy_step);
        let guard = Id::new(self.pair, false, STEP_GUARDED);
        let mut external = !self.node_ports.is_empty();
        let mut guarded = false;
        for (frontend, scope) in &self.frontends {
            let target = match (scope, &plan.source_ranges) {
                (Scope::ClusterIp, _) => view(plan.internal_policy),
                (Scope::LoadBalancer, Some(_)) => guard,
                (Scope::LoadBalancer | Scope::ExternalIp, _) => policy,
            };
            external |= *scope != Scope::ClusterIp;
            guarded |= target == guard;
            out.push((SetId::Frontends, frontend_key(frontend), Data::Id(target)));
        }
        for node_port in &self.node_ports {
            out.push((SetId::NodePorts, node_port_key(node_port), Data::Id(policy)));
        }
        if external {
            out.push((SetId::ClusterSide, key().id(policy), Data::Id(cluster)));
            if plan.external_policy == TrafficPolicy::Local {
                out.push((SetId::Outside, key().id(policy), Data::Id(local)));
            }
        }
        if guarded {
            out.push((SetId::Outside, key().id(guard), Data::Id(policy)));
            let ranges = plan.source_ranges.iter().flatten();
            out.extend(ranges.map(|range| (SetId::SourceRanges, source_range_key(guard, range), Data::None)));
        }
        Ok(out)
    }

    /// The elements of one view's endpoints, and the id that leads to them.
    fn backends(
        &mut self,
        id: &ServicePortId,
        plan: &ServicePortPlan,
        policy: TrafficPolicy,
        steps: &mut Steps,
        out: &mut Rendered,
    ) -> Result<Id, Unserved> {
        let local = policy == TrafficPolicy::Local;
        let empty = Backends { list: Vec::new(), when_empty: WhenEmpty::Reject };
        let set = plan.backends(policy).unwrap_or(&empty);
        let indices = if local { &mut self.local } else { &mut self.cluster };
        indices.assign(&set.list.iter().map(|backend| backend.address).collect::<Vec<_>>());
        let with_step = |step| Id::new(self.pair, local, step);
        let serial = with_step(0);
        let count = indices.0.len() as u32;
        if count == 0 {
            return Ok(match set.when_empty {
                WhenEmpty::Reject => with_step(STEP_REFUSE),
                WhenEmpty::Drop => with_step(STEP_DISCARD),
            });
        }
        let protocol = id.protocol.number();
        let Some(timeout_s) = plan.affinity_timeout_s else {
            for (index, address) in indices.0.iter().enumerate() {
                let key = endpoint_key(serial, protocol, index as u32);
                out.push((SetId::Endpoints, key, Data::Endpoint(*address)));
            }
            return Ok(with_step(steps.get(StepChain::Pick(count))?));
        };
        for (index, address) in indices.0.iter().enumerate() {
            let slot = self.slots.of(address);
            // What is picked is remembered, so it has the local bit off (see `skeleton`); the view's slots have it on.
            let pick = Data::Id(Id::new(self.pair, false, slot));
            out.push((SetId::Picks, key().id(serial).index(index as u32), pick));
            let key = key().id(with_step(slot)).protocol(protocol);
            out.push((SetId::Slots, key, Data::Endpoint(*address)));
        }
        Ok(with_step(steps.get(StepChain::Affinity { timeout_s, count, local })?))
    }
}

/// Which endpoint has which index, without holes.
#[derive(Debug, Default)]
struct Indices(Vec<SocketAddr>);

impl Indices {
    fn adopt(picture: &Picture, serial: Id, protocol: u8) -> Indices {
        let mut list = Vec::new();
        let mut seen = HashSet::new();
        loop {
            let index = list.len() as u32;
            let endpoint = match picture.get(SetId::Endpoints, &endpoint_key(serial, protocol, index)) {
                Some(Data::Endpoint(endpoint)) => *endpoint,
                _ => match picture.get(SetId::Picks, &key().id(serial).index(index)) {
                    Some(Data::Id(slot)) => {
                        let view = Id(slot.0 | serial.0 & Id::LOCAL_BIT);
                        match picture.get(SetId::Slots, &key().id(view).protocol(protocol)) {
                            Some(Data::Endpoint(endpoint)) => *endpoint,
                            _ => return Indices(list),
                        }
                    }
                    _ => return Indices(list),
                },
            };
            if !seen.insert(endpoint) {
                return Indices(list);
            }
            list.push(endpoint);
        }
    }

    /// Who stays keeps its index; who comes takes one that is free; the rest is filled from the end.
    fn assign(&mut self, wanted: &[SocketAddr]) {
        if self.0.len() == wanted.len() && wanted.iter().all(|address| self.0.contains(address)) && wanted.len() < 16 {
            return;
        }
        let wanted_set: HashSet<_> = wanted.iter().collect();
        let held: HashSet<_> = self.0.iter().copied().collect();
        let mut fresh = wanted.iter().filter(|address| !held.contains(address)).copied();
        let mut index = 0;
        while index < self.0.len() {
            if wanted_set.contains(&self.0[index]) {
                index += 1;
            } else if let Some(address) = fresh.next() {
                self.0[index] = address;
                index += 1;
            } else {
                // The last one comes here and is looked at next.
                self.0.swap_remove(index);
            }
        }
        self.0.extend(fresh);
    }
}

/// The affinity slots of a pair: an endpoint keeps its number while it lives, and a number rests after that.
#[derive(Debug, Default)]
struct Slots {
    by_address: HashMap<SocketAddr, u16>,
    last: u16,
}

impl Slots {
    fn adopt(picture: &Picture, pair: u32, protocol: u8) -> Slots {
        let mut slots = Slots::default();
        for local in [false, true] {
            let serial = Id::new(pair, local, 0);
            let picks = (0..).map_while(|index| match picture.get(SetId::Picks, &key().id(serial).index(index)) {
                Some(Data::Id(pick)) => Some(*pick),
                _ => None,
            });
            for pick in picks {
                let slot = key().id(Id::new(pair, local, pick.step())).protocol(protocol);
                if let Some(Data::Endpoint(endpoint)) = picture.get(SetId::Slots, &slot) {
                    slots.by_address.insert(*endpoint, pick.step());
                    slots.last = slots.last.max(pick.step());
                }
            }
        }
        slots
    }

    fn assign(&mut self, wanted: impl Iterator<Item = SocketAddr>) -> Result<(), Unserved> {
        let wanted: BTreeSet<_> = wanted.collect();
        if wanted.len() > usize::from(SLOT_MAX) {
            return Err(Unserved::TooManyAffinityEndpoints(wanted.len()));
        }
        self.by_address.retain(|address, _| wanted.contains(address));
        let mut used: HashSet<u16> = self.by_address.values().copied().collect();
        for address in wanted {
            if self.by_address.contains_key(&address) {
                continue;
            }
            loop {
                self.last = if self.last >= SLOT_MAX { 1 } else { self.last + 1 };
                if used.insert(self.last) {
                    break;
                }
            }
            self.by_address.insert(address, self.last);
        }
        Ok(())
    }

    fn of(&self, address: &SocketAddr) -> u16 {
        *self.by_address.get(address).expect("every endpoint of either view was given a slot")
    }
}

pub fn frontend_key(frontend: &Frontend) -> Key {
    key().address(frontend.address).protocol(frontend.protocol.number()).port(frontend.port)
}

pub fn node_port_key(node_port: &NodePort) -> Key {
    key().protocol(node_port.protocol.number()).port(node_port.port)
}

pub fn endpoint_key(serial: Id, protocol: u8, index: u32) -> Key {
    key().id(serial).protocol(protocol).index(index)
}

fn source_range_key(guard: Id, range: &AddressRange) -> Key {
    Key::empty(KeyKind::Range).id_be(guard).address(range.first).id_be(guard).address(range.last)
}

/// The elements of a set of plain intervals: where each begins, and the first address after it.
pub fn intervals(family: Family, set: SetId, ranges: &[AddressRange]) -> Rendered {
    let mut out = Rendered::new();
    for range in ranges.iter().filter(|range| Family::of(range.first) == family) {
        out.push((set, key().address(range.first), Data::None));
        if let Some(next) = successor(range.last) {
            out.push((set, Key::empty(KeyKind::IntervalEnd).address(next), Data::None));
        }
    }
    out
}

fn successor(address: std::net::IpAddr) -> Option<std::net::IpAddr> {
    match address {
        std::net::IpAddr::V4(v4) => u32::from(v4).checked_add(1).map(|next| std::net::Ipv4Addr::from(next).into()),
        std::net::IpAddr::V6(v6) => u128::from(v6).checked_add(1).map(|next| std::net::Ipv6Addr::from(next).into()),
    }
}

/// The elements that follow the node and the configuration.
pub fn node_elements(family: Family, node: &NodePlan) -> Rendered {
    let mut out = intervals(family, SetId::ServiceCidrs, &node.service_cidrs);
    if let LocalDetection::PodCidrs(ranges) = &node.local_detection {
        out.extend(intervals(family, SetId::PodCidrs, ranges));
    }
    if let NodePortAddresses::Only(addresses) = &node.node_port_addresses {
        let own = addresses.iter().filter(|address| Family::of(**address) == family && !address.is_loopback());
        out.extend(own.map(|address| (SetId::NodePortIps, key().address(*address), Data::None)));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(list: &[u16]) -> Vec<SocketAddr> {
        list.iter().map(|port| SocketAddr::from(([10, 0, 0, 1], *port))).collect()
    }

    #[test]
    fn endpoints_keep_their_index() {
        let mut indices = Indices::default();
        indices.assign(&addresses(&[1, 2, 3, 4]));
        indices.assign(&addresses(&[1, 3, 4]));
        assert_eq!(indices.0, addresses(&[1, 4, 3]));
        indices.assign(&addresses(&[0, 1, 3, 4]));
        assert_eq!(indices.0, addresses(&[1, 4, 3, 0]));
        indices.assign(&addresses(&[3, 9]));
        assert_eq!(indices.0, addresses(&[9, 3]));
        indices.assign(&[]);
        assert_eq!(indices.0, addresses(&[]));
    }

    #[test]
    fn slots_rest_before_they_are_used_again() {
        let mut slots = Slots::default();
        slots.assign(addresses(&[1, 2]).into_iter()).expect("few enough");
        slots.assign(addresses(&[2]).into_iter()).expect("few enough");
        slots.assign(addresses(&[2, 3]).into_iter()).expect("few enough");
        assert_eq!(slots.of(&addresses(&[2])[0]), 2);
        assert_eq!(slots.of(&addresses(&[3])[0]), 3);
        let many: Vec<u16> = (0..4096).collect();
        assert_eq!(slots.assign(addresses(&many).into_iter()), Err(Unserved::TooManyAffinityEndpoints(4096)));
    }

    #[test]
    fn pairs_are_not_used_again_before_all_others() {
        let mut pairs = Pairs::default();
        assert_eq!(pairs.take(), Ok(1));
        pairs.give_back(1);
        assert_eq!(pairs.take(), Ok(2));
        pairs.after(Id::PAIR_MAX);
        assert_eq!(pairs.take(), Ok(1));
        assert_eq!(pairs.take(), Ok(3));
    }

    #[test]
    fn an_interval_to_the_end_of_the_family_has_no_end() {
        let range = |first: &str, last: &str| AddressRange {
            first: first.parse().expect("an address"),
            last: last.parse().expect("an address"),
        };
        let all = [range("10.0.0.0", "10.0.0.255"), range("240.0.0.0", "255.255.255.255"), range("fd00::", "fd00::f")];
        let rendered = intervals(Family::V4, SetId::ServiceCidrs, &all);
        assert_eq!(rendered.len(), 3);
        assert_eq!(rendered[1].1.address_at(Family::V4, 0), Some("10.0.1.0".parse().expect("an address")));
    }
}
