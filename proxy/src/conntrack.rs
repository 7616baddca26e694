//! Stale.
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use proxy_core::model::Family;

/// UDP destinations whose flows may lead to endpoints that are none any more.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stale {
    frontends: BTreeMap<SocketAddr, BTreeSet<SocketAddr>>,
    node_ports: BTreeMap<(Family, u16), BTreeSet<SocketAddr>>,
}

impl Stale {
    /// Flows to `address`:`port` are to be kept only if they lead to one of `endpoints`.
    pub fn frontend(&mut self, address: IpAddr, port: u16, endpoints: impl IntoIterator<Item = SocketAddr>) {
        self.frontends.entry(SocketAddr::new(address, port)).or_default().extend(endpoints);
    }

    /// The same for a node port, on whichever address of this node.
    pub fn node_port(&mut self, family: Family, port: u16, endpoints: impl IntoIterator<Item = SocketAddr>) {
        self.node_ports.entry((family, port)).or_default().extend(endpoints);
    }

    pub fn is_empty(&self) -> bool {
        self.frontends.is_empty() && self.node_ports.is_empty()
    }
}
