//! What the sources have told us so far, and which Services are to be planned again because of it.
//!
//! A [`State`] holds every Service, EndpointSlice and Endpoints object, and the own Node. [`State::apply`] takes one change
//! and marks the Services it touches as dirty: a slice those it belongs to (before and after), a Node all of them, an object
//! that is what it was nobody. [`crate::plan::Planner`] takes the marks.
//!
//! Sources report when their first list of a kind is complete ([`Change::Synced`]); the shell plans nothing before
//! [`State::is_synced`], for half a list looks like Services without endpoints.
//!
//! The state keeps no history and judges no object: a Service of another proxy is in here too, the planner skips it.

use std::collections::{BTreeMap, BTreeSet};
use std::mem;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::model::{EndpointSlice, NamespacedName, Node, Service};

/// What the planner needs to know of this node and was told by configuration or by the kernel, not by the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeConfig {
    /// The name of this node: endpoints of that `nodeName` are local.
    pub name: Arc<str>,
    /// This node's own addresses, one a family; empty means those of the Node object.
    pub node_ips: Vec<IpAddr>,
    /// Every address of this node's interfaces, from which `NodePortSelection::Cidrs` selects.
    pub local_addresses: Vec<IpAddr>,
    pub node_port_addresses: NodePortSelection,
    pub detect_local: DetectLocal,
    /// Masquerade all traffic to ClusterIPs.
    pub masquerade_all: bool,
    /// Which bit of the packet mark asks for masquerade, 0 to 31.
    pub masquerade_bit: u8,
    /// Where ClusterIPs come from. May overlap.
    pub service_cidrs: Vec<IpNet>,
    /// Serve the Services whose label `service.kubernetes.io/service-proxy-name` is this; `None` serves those without it.
    pub proxy_name: Option<Arc<str>>,
}

impl NodeConfig {
    /// kube-proxy's defaults, for a node of that name.
    pub fn new(name: impl Into<Arc<str>>) -> Self {
        NodeConfig {
            name: name.into(),
            node_ips: Vec::new(),
            local_addresses: Vec::new(),
            node_port_addresses: NodePortSelection::Primary,
            detect_local: DetectLocal::None,
            masquerade_all: false,
            masquerade_bit: 14,
            service_cidrs: Vec::new(),
            proxy_name: None,
        }
    }
}

/// `--nodeport-addresses`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodePortSelection {
    /// The node's own address of each family.
    Primary,
    /// All local addresses but loopback.
    All,
    /// Those of `NodeConfig::local_addresses` that lie in one of these.
    Cidrs(Vec<IpNet>),
}

/// `--detect-local-mode`: how this node's pods are known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DetectLocal {
    /// They are not.
    None,
    /// By source address, in the cluster's pod CIDRs.
    ClusterCidrs(Vec<IpNet>),
    /// By source address, in the Node object's `spec.podCIDRs`.
    NodeCidrs,
    /// By interface.
    Interface(String),
    /// By the beginning of the interface's name.
    InterfacePrefix(String),
}

/// The kinds of objects that sources report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Service,
    EndpointSlice,
    Endpoints,
    Node,
}

/// One thing a source reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    ServiceSet(Service),
    ServiceGone(NamespacedName),
    SliceSet(EndpointSlice),
    SliceGone(NamespacedName),
    /// An Endpoints object, as the slices that [`crate::model::mirror::to_model`] made of it.
    EndpointsSet(NamespacedName, Vec<EndpointSlice>),
    EndpointsGone(NamespacedName),
    /// The own Node; others are of no interest.
    NodeSet(Node),
    NodeGone,
    /// Every object of that kind that existed at the start has been reported.
    Synced(Kind),
}

/// Which Services must be planned again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dirty {
    All,
    Some(BTreeSet<NamespacedName>),
}

/// Every object the sources have reported.
#[derive(Clone, Debug)]
pub struct State {
    services: BTreeMap<NamespacedName, Service>,
    slices: BTreeMap<NamespacedName, EndpointSlice>,
    /// Service → its slices, by their label.
    slices_of: BTreeMap<NamespacedName, BTreeSet<NamespacedName>>,
    /// Endpoints → the slices made of it.
    mirrored: BTreeMap<NamespacedName, Vec<EndpointSlice>>,
    node: Option<Node>,
    synced: BTreeSet<Kind>,
    dirty: Dirty,
}

impl Default for State {
    fn default() -> Self {
        State {
            services: BTreeMap::new(),
            slices: BTreeMap::new(),
            slices_of: BTreeMap::new(),
            mirrored: BTreeMap::new(),
            node: None,
            synced: BTreeSet::new(),
            dirty: Dirty::Some(BTreeSet::new()),
        }
    }
}

impl State {
    pub fn new() -> Self {
        State::default()
    }

    /// Takes in one change. Setting what is there already, or removing what is not, changes nothing.
    pub fn apply(&mut self, change: Change) {
        match change {
            Change::ServiceSet(service) => {
                let name = service.name.clone();
                if self.services.get(&name) != Some(&service) {
                    self.services.insert(name.clone(), service);
                    self.mark(name);
                }
            }
            Change::ServiceGone(name) => {
                if self.services.remove(&name).is_some() {
                    self.mark(name);
                }
            }
            Change::SliceSet(slice) => {
                if self.slices.get(&slice.name) != Some(&slice) {
                    self.remove_slice(&slice.name);
                    self.insert_slice(slice);
                }
            }
            Change::SliceGone(name) => self.remove_slice(&name),
            Change::EndpointsSet(name, slices) => {
                if self.mirrored.get(&name) != Some(&slices) {
                    self.mirrored.insert(name.clone(), slices);
                    self.mark(name);
                }
            }
            Change::EndpointsGone(name) => {
                if self.mirrored.remove(&name).is_some() {
                    self.mark(name);
                }
            }
            Change::NodeSet(node) => self.set_node(Some(node)),
            Change::NodeGone => self.set_node(None),
            Change::Synced(kind) => {
                self.synced.insert(kind);
            }
        }
    }

    fn set_node(&mut self, node: Option<Node>) {
        if self.node != node {
            self.node = node;
            // Its zone chooses endpoints, its addresses open source ranges: any Service may be touched.
            self.dirty = Dirty::All;
        }
    }

    fn insert_slice(&mut self, slice: EndpointSlice) {
        if let Some(service) = service_of(&slice) {
            self.slices_of.entry(service.clone()).or_default().insert(slice.name.clone());
            self.mark(service);
        }
        self.slices.insert(slice.name.clone(), slice);
    }

    fn remove_slice(&mut self, name: &NamespacedName) {
        let Some(service) = self.slices.remove(name).as_ref().and_then(service_of) else { return };
        if let Some(names) = self.slices_of.get_mut(&service) {
            names.remove(name);
            if names.is_empty() {
                self.slices_of.remove(&service);
            }
        }
        self.mark(service);
    }

    fn mark(&mut self, service: NamespacedName) {
        if let Dirty::Some(names) = &mut self.dirty {
            names.insert(service);
        }
    }

    /// The marks since the last call.
    pub fn take_dirty(&mut self) -> Dirty {
        mem::replace(&mut self.dirty, Dirty::Some(BTreeSet::new()))
    }

    /// Has the source reported all objects of that kind that were there at the start?
    pub fn has_synced(&self, kind: Kind) -> bool {
        self.synced.contains(&kind)
    }

    /// May the kernel be programmed? Not before Services and EndpointSlices are both complete. A source that reports Endpoints
    /// or the Node too had better wait for those as well: without them a Service may look like nobody serves it, or pods like
    /// strangers.
    pub fn is_synced(&self) -> bool {
        self.has_synced(Kind::Service) && self.has_synced(Kind::EndpointSlice)
    }

    pub fn service(&self, name: &NamespacedName) -> Option<&Service> {
        self.services.get(name)
    }

    pub fn services(&self) -> impl Iterator<Item = &Service> {
        self.services.values()
    }

    pub fn node(&self) -> Option<&Node> {
        self.node.as_ref()
    }

    /// The slices that serve a Service, in a stable order: its EndpointSlices, or those made of its Endpoints if it has
    /// none.
    pub fn slices_of(&self, service: &NamespacedName) -> impl Iterator<Item = &EndpointSlice> {
        let own = self.slices_of.get(service);
        let made = self.mirrored.get(service).filter(|_| own.is_none());
        own.into_iter().flatten().filter_map(|name| self.slices.get(name)).chain(made.into_iter().flatten())
    }

    /// The names of all objects of a kind, so that a source that lists anew can tell which are gone.
    pub fn names(&self, kind: Kind) -> Vec<NamespacedName> {
        match kind {
            Kind::Service => self.services.keys().cloned().collect(),
            Kind::EndpointSlice => self.slices.keys().cloned().collect(),
            Kind::Endpoints => self.mirrored.keys().cloned().collect(),
            Kind::Node => self.node.iter().map(|node| NamespacedName::new("", node.name.clone())).collect(),
        }
    }
}

/// The Service a slice is labelled with. Slices marked headless are for DNS, not for proxies.
fn service_of(slice: &EndpointSlice) -> Option<NamespacedName> {
    let name = slice.service.clone().filter(|_| !slice.headless)?;
    Some(NamespacedName::new(slice.name.namespace.clone(), name))
}
