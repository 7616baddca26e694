//! Which endpoints of a Service port may be used, from this node: kube-proxy's categories.
//!
//! *Usable* means ready. Where nothing is ready, endpoints that terminate but still serve are the fallback, so that the last
//! pods of a rolling update are used to the end; for the Cluster and the Local set independently.
//!
//! - The **Cluster set** holds usable endpoints anywhere. If every ready endpoint has a node hint and one is hinted for this
//!   node, only those; else if every ready endpoint has a zone hint and one is hinted for this node's zone, only those. One
//!   ready endpoint without a hint turns that kind of hint off: half-hinted slices are being rewritten. The fallback knows no
//!   hints.
//! - The **Local set** holds usable endpoints on this node, whatever the hints.
//!
//! One address and port may be listed twice, in two slices or as an old and a new pod: the entry that does not terminate
//! wins.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use crate::dataplane::Backend;
use crate::model::{Endpoint, EndpointSlice, Family, Protocol};

/// An endpoint of one Service port.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    pub address: SocketAddr,
    pub endpoint: &'a Endpoint,
    pub local: bool,
}

impl Candidate<'_> {
    fn ready(&self) -> bool {
        self.endpoint.conditions.is_ready()
    }

    fn serves_its_end(&self) -> bool {
        self.endpoint.conditions.is_serving() && self.endpoint.conditions.is_terminating()
    }

    /// Of two entries for one address the greater is believed. After termination the order only has to be the same whatever
    /// order slices came in.
    fn rank(&self) -> (bool, bool, bool, bool) {
        let conditions = self.endpoint.conditions;
        (!conditions.is_terminating(), conditions.is_ready(), conditions.is_serving(), self.local)
    }

    fn backend(&self) -> Backend {
        Backend { address: self.address, local: self.local }
    }
}

/// Where this node is.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    pub node: &'a str,
    pub zone: Option<&'a str>,
}

/// The usable endpoints of one Service port. A set that was not asked for is `None`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Categories {
    pub cluster: Option<Vec<Backend>>,
    pub local: Option<Vec<Backend>>,
    /// Somewhere in the cluster there is a usable endpoint, although perhaps in none of the sets.
    pub any: bool,
}

/// The endpoints that `slices` list for the port of that name, each address once, sorted by address. Slices of other
/// families, ports without a number and addresses that no Service may lead to are passed over.
pub fn candidates<'a>(
    slices: impl Iterator<Item = &'a EndpointSlice>,
    port_name: &str,
    protocol: Protocol,
    family: Family,
    place: Place<'_>,
) -> Vec<Candidate<'a>> {
    let mut found: BTreeMap<SocketAddr, Candidate<'a>> = BTreeMap::new();
    for slice in slices.filter(|slice| slice.family == family) {
        let named = slice.ports.iter().filter(|port| *port.name == *port_name && port.protocol == protocol);
        for port in named.filter_map(|port| port.port) {
            for endpoint in &slice.endpoints {
                let address = SocketAddr::new(endpoint.address, port);
                let local = endpoint.node_name.as_deref() == Some(place.node);
                let candidate = Candidate { address, endpoint, local };
                let known = found.entry(address).or_insert(candidate);
                if candidate.rank() > known.rank() {
                    *known = candidate;
                }
            }
        }
    }
    found.into_values().collect()
}

/// Sorts candidates into the sets that are asked for.
pub fn categorize(candidates: &[Candidate<'_>], cluster: bool, local: bool, place: Place<'_>) -> Categories {
    Categories {
        cluster: cluster.then(|| {
            let topology = Topology::of(candidates, place);
            usable(candidates.iter().filter(|candidate| !candidate.ready() || topology.allows(candidate, place)))
        }),
        local: local.then(|| usable(candidates.iter().filter(|candidate| candidate.local))),
        any: candidates.iter().any(|candidate| candidate.ready() || candidate.serves_its_end()),
    }
}

/// The ready ones, or else those that terminate and still serve.
fn usable<'a>(candidates: impl Iterator<Item = &'a Candidate<'a>> + Clone) -> Vec<Backend> {
    let ready: Vec<Backend> =
        candidates.clone().filter(|candidate| candidate.ready()).map(Candidate::backend).collect();
    if ready.is_empty() { candidates.filter(|c| c.serves_its_end()).map(Candidate::backend).collect() } else { ready }
}

/// Which hints hold for a set of endpoints, seen from one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Topology {
    Anywhere,
    SameNode,
    SameZone,
}

impl Topology {
    fn of(candidates: &[Candidate<'_>], place: Place<'_>) -> Self {
        let ready = || candidates.iter().filter(|candidate| candidate.ready());
        for (mode, hinted) in [
            (Topology::SameNode, (|c| !c.endpoint.node_hints.is_empty()) as fn(&Candidate<'_>) -> bool),
            (Topology::SameZone, |c| !c.endpoint.zone_hints.is_empty()),
        ] {
            if ready().all(hinted) && ready().any(|candidate| mode.allows(candidate, place)) {
                return mode;
            }
        }
        Topology::Anywhere
    }

    fn allows(self, candidate: &Candidate<'_>, place: Place<'_>) -> bool {
        match self {
            Topology::Anywhere => true,
            Topology::SameNode => candidate.endpoint.node_hints.contains(place.node),
            Topology::SameZone => place.zone.is_some_and(|zone| candidate.endpoint.zone_hints.contains(zone)),
        }
    }
}
