//! The desired state of the kernel, as a value: what [`crate::plan`] answers, what backends render,
//! what [`crate::trace`] walks.
//!
//! ```text
//!  destination ─┬─ frontends[address, protocol, port] ─┐
//!               └─ node_ports[family, protocol, port] ─┴▶ ServicePortId + scope ─▶ service_ports[id]
//!                                                                                   ├ cluster: backends anywhere
//!                                                                                   └ local:   backends on this node
//! ```
//!
//! A first packet is looked up in this order; the first that answers decides:
//! 1. `frontends`, by destination address, protocol and port;
//! 2. `node_ports`, if the destination is one of `node.node_port_addresses`;
//! 3. `cluster_ips`: a known address, but no such port: reject;
//! 4. `node.service_cidrs`: an address no Service has: drop;
//! 5. otherwise the packet is not for us.
//!
//! What a scope does with the packet:
//! - [`Scope::ClusterIp`] goes by `internal_policy`.
//! - [`Scope::LoadBalancer`] is dropped unless the source lies in `source_ranges` (if there are any); then, like
//!   [`Scope::ExternalIp`] and every node port, it goes by `external_policy`:
//!   - `Cluster`: masquerade, any backend of `cluster`;
//!   - `Local`: a source that local detection knows as a pod goes to `cluster` as it is; the node itself goes to `cluster`
//!     masqueraded (both as if they had gone out and come back in); everybody else goes to `local` with its address kept.
//!
//! And whatever the scope, these are masqueraded:
//! - what goes to one of `cluster_ips`, if `node.masquerade_all`, or if there is local detection and the source is not one of
//!   this node's pods;
//! - a packet that a backend of `hairpin` would receive from itself.
//!
//! Invariants, which [`crate::plan`] keeps and backends may build on:
//! - every id in `frontends` and `node_ports` is in `service_ports`; a key has one owner, although two Services may ask
//!   for it;
//! - the set a policy leads to is there (`Some`), be it empty; backends are sorted, without duplicates, and of the
//!   family of their id;
//! - ranges are sorted, disjoint and not adjacent: the kernel refuses overlapping intervals that come by netlink, and the
//!   whole batch with them;
//! - equal states give equal dataplanes, in whatever order the objects came.
//!
//! Nothing here names a kernel object: serials, steps, chains, map entries belong to the backend that needs them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::model::{Family, NamespacedName, Protocol, TrafficPolicy};
use crate::range::AddressRange;

/// Everything the kernel should do for Services on this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dataplane {
    pub node: NodePlan,
    pub service_ports: BTreeMap<ServicePortId, ServicePortPlan>,
    pub frontends: BTreeMap<Frontend, Target>,
    pub node_ports: BTreeMap<NodePort, ServicePortId>,
    /// Every ClusterIP in use.
    pub cluster_ips: BTreeSet<IpAddr>,
    /// The addresses of all backends on this node: who may meet itself.
    pub hairpin: BTreeSet<IpAddr>,
}

/// One port of one Service in one family: the identity of whatever a backend keeps for it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ServicePortId {
    pub service: NamespacedName,
    pub port_name: Arc<str>,
    pub protocol: Protocol,
    pub family: Family,
}

impl fmt::Display for ServicePortId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.service)?;
        if !self.port_name.is_empty() {
            write!(f, ":{}", self.port_name)?;
        }
        write!(f, " {} {}", self.protocol, self.family)
    }
}

/// How one Service port is served. The ports and addresses by which it is reached are in [`Dataplane::frontends`] and
/// [`Dataplane::node_ports`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePortPlan {
    /// For ClusterIPs.
    pub internal_policy: TrafficPolicy,
    /// For external addresses, load balancer addresses and the node port.
    pub external_policy: TrafficPolicy,
    /// Backends anywhere; `None` if no frontend leads to them.
    pub cluster: Option<Backends>,
    /// Backends on this node; `None` if no frontend leads to them.
    pub local: Option<Backends>,
    /// Seconds a client sticks to its backend, whichever address and policy it comes by; `None` without affinity.
    pub affinity_timeout_s: Option<u32>,
    /// Who may use the load balancer's addresses; `None` is everybody.
    pub source_ranges: Option<Vec<AddressRange>>,
}

impl ServicePortPlan {
    /// The set that `policy` leads to.
    pub fn backends(&self, policy: TrafficPolicy) -> Option<&Backends> {
        match policy {
            TrafficPolicy::Cluster => self.cluster.as_ref(),
            TrafficPolicy::Local => self.local.as_ref(),
        }
    }
}

/// A set of backends to choose from at random.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backends {
    /// Sorted by address and port, without duplicates.
    pub list: Vec<Backend>,
    /// What to do while the list is empty.
    pub when_empty: WhenEmpty,
}

/// Where a connection can be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Backend {
    pub address: SocketAddr,
    /// It is on this node.
    pub local: bool,
}

/// The answer of a set without backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenEmpty {
    /// Nobody serves this Service: say so (TCP reset, ICMP port unreachable).
    Reject,
    /// Other nodes serve it: stay silent, so that the client or the load balancer tries elsewhere.
    Drop,
}

/// An address and port by which a Service is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Frontend {
    pub address: IpAddr,
    pub protocol: Protocol,
    pub port: u16,
}

impl fmt::Display for Frontend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", SocketAddr::new(self.address, self.port), self.protocol)
    }
}

/// A port on this node's addresses by which a Service is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodePort {
    pub family: Family,
    pub protocol: Protocol,
    pub port: u16,
}

impl fmt::Display for NodePort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.port, self.protocol, self.family)
    }
}

/// Where a frontend leads, and by which rules. Of two Services that ask for one frontend the smaller target wins:
/// nobody takes over another's ClusterIP by calling it an external IP.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Target {
    pub scope: Scope,
    pub id: ServicePortId,
}

/// What kind of address a frontend is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    ClusterIp,
    LoadBalancer,
    ExternalIp,
}

/// What holds for the whole node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodePlan {
    /// Masquerade everything that comes by a ClusterIP.
    pub masquerade_all: bool,
    /// The bit of the packet mark that asks for masquerade in postrouting.
    pub masquerade_mark: u32,
    pub local_detection: LocalDetection,
    pub node_port_addresses: NodePortAddresses,
    /// Where ClusterIPs come from: what is in here and no Service's is dropped. Sorted, disjoint, both families.
    pub service_cidrs: Vec<AddressRange>,
}

/// How a packet of one of this node's pods is told from others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum LocalDetection {
    /// It is not: ClusterIP traffic is not masqueraded for its origin, and no pod is short-circuited.
    #[default]
    None,
    /// By source address. Sorted, disjoint, both families; a family without a range has no local detection.
    PodCidrs(Vec<AddressRange>),
    /// By the interface the packet came in by: any whose name begins so.
    InterfacePrefix(String),
    /// By the interface the packet came in by.
    Interface(String),
}

/// On which of this node's addresses node ports answer. Never on loopback addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// All that the kernel calls local.
    AllLocal,
    Only(BTreeSet<IpAddr>),
}

impl Default for NodePortAddresses {
    fn default() -> Self {
        NodePortAddresses::Only(BTreeSet::new())
    }
}

/// The keys under which two dataplanes differ: added, removed or with another value. The new value, if there is one, is
/// in the new dataplane.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Anything in [`Dataplane::node`].
    pub node: bool,
    pub service_ports: BTreeSet<ServicePortId>,
    pub frontends: BTreeSet<Frontend>,
    pub node_ports: BTreeSet<NodePort>,
    pub cluster_ips: BTreeSet<IpAddr>,
    pub hairpin: BTreeSet<IpAddr>,
}

impl Changes {
    pub fn is_empty(&self) -> bool {
        *self == Changes::default()
    }

    /// What differs between two dataplanes, by walking both: for a start, a restart or a check. The planner knows the same
    /// without a walk after each change.
    pub fn between(old: &Dataplane, new: &Dataplane) -> Self {
        Changes {
            node: old.node != new.node,
            service_ports: differing(&old.service_ports, &new.service_ports),
            frontends: differing(&old.frontends, &new.frontends),
            node_ports: differing(&old.node_ports, &new.node_ports),
            cluster_ips: old.cluster_ips.symmetric_difference(&new.cluster_ips).copied().collect(),
            hairpin: old.hairpin.symmetric_difference(&new.hairpin).copied().collect(),
        }
    }
}

fn differing<K: Ord + Clone, V: PartialEq>(old: &BTreeMap<K, V>, new: &BTreeMap<K, V>) -> BTreeSet<K> {
    let gone = old.keys().filter(|key| !new.contains_key(*key));
    let changed = new.iter().filter(|(key, value)| old.get(*key) != Some(*value)).map(|(key, _)| key);
    gone.chain(changed).cloned().collect()
}
