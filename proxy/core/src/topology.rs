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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Conditions, EndpointPort, NamespacedName};

    /// `3 zone=a,b node=n here unready terminating gone`: 10.0.0.3 with hints and conditions, ready unless said otherwise.
    fn endpoint(text: &str) -> Endpoint {
        let mut words = text.split_whitespace();
        let last: u8 = words.next().unwrap().parse().unwrap();
        let mut endpoint = Endpoint {
            address: [10, 0, 0, last].into(),
            conditions: Conditions::default(),
            node_name: None,
            zone_hints: Default::default(),
            node_hints: Default::default(),
        };
        let said = |ready, serving, terminating| Conditions {
            ready: Some(ready),
            serving: Some(serving),
            terminating: Some(terminating),
        };
        for word in words {
            match word.split_once('=') {
                Some(("zone", zones)) => endpoint.zone_hints = zones.split(',').map(Into::into).collect(),
                Some(("node", nodes)) => endpoint.node_hints = nodes.split(',').map(Into::into).collect(),
                None if word == "here" => endpoint.node_name = Some("me".into()),
                None if word == "unready" => endpoint.conditions = said(false, false, false),
                None if word == "terminating" => endpoint.conditions = said(false, true, true),
                None if word == "gone" => endpoint.conditions = said(false, false, true),
                _ => panic!("{word}"),
            }
        }
        endpoint
    }

    fn slice(name: &str, endpoints: &str) -> EndpointSlice {
        EndpointSlice {
            name: NamespacedName::new("ns", name),
            service: Some("svc".into()),
            family: Family::V4,
            headless: false,
            ports: vec![EndpointPort { name: "p".into(), protocol: Protocol::Tcp, port: Some(80) }],
            endpoints: endpoints.split('|').filter(|text| !text.trim().is_empty()).map(endpoint).collect(),
        }
    }

    fn sets(zone: Option<&str>, slices: &[EndpointSlice]) -> String {
        let place = Place { node: "me", zone };
        let found = candidates(slices.iter(), "p", Protocol::Tcp, Family::V4, place);
        let categories = categorize(&found, true, true, place);
        let print = |set: Option<Vec<Backend>>| {
            let numbers = set.unwrap().into_iter().map(|backend| match backend.address.ip() {
                std::net::IpAddr::V4(ip) => ip.octets()[3].to_string(),
                other => panic!("{other}"),
            });
            numbers.collect::<Vec<_>>().join(" ")
        };
        let any = if categories.any { "" } else { ", none" };
        format!("{} / {}{any}", print(categories.cluster), print(categories.local))
    }

    /// What the endpoints are, in which zone this node is, and the Cluster / Local sets.
    #[test]
    fn categories() {
        let a_b_c_a = "3 zone=a | 4 zone=b | 5 zone=c | 6 zone=a";
        for (name, zone, endpoints, expected) in [
            ("nothing", Some("a"), "", " / , none"),
            ("zone hints hold", Some("a"), a_b_c_a, "3 6 / "),
            ("the node has no zone", None, a_b_c_a, "3 4 5 6 / "),
            ("the node's zone is empty", Some(""), "3 zone=a", "3 / "),
            ("nobody is hinted for this zone", Some("b"), "3 zone=a", "3 / "),
            ("Local ignores hints", Some("a"), "3 zone=a here | 4 zone=b here | 5 zone=c | 6 zone=a", "3 6 / 3 4"),
            ("one of two in the zone is unready", Some("a"), "3 zone=a | 4 zone=b | 6 zone=a unready", "3 / "),
            ("all in the zone are unready", Some("a"), "3 zone=a unready | 4 zone=b | 5 zone=c", "4 5 / "),
            ("one has no hint", Some("a"), "3 zone=a | 4 zone=b | 5 | 6 zone=a", "3 4 5 6 / "),
            ("only an unready one has no hint", Some("a"), "3 zone=a | 4 zone=b | 5 unready", "3 / "),
            ("several hints each", Some("c"), "3 zone=a,b,c | 4 zone=b,c | 5 zone=b,d | 6 zone=c", "3 4 6 / "),
            ("node before zone", Some("a"), "3 zone=a node=me | 4 zone=a node=other", "3 / "),
            ("not hinted for this node", Some("a"), "3 zone=a node=x | 4 zone=b node=x", "3 / "),
            ("one has no node hint", Some("a"), "3 zone=a node=me | 4 zone=a | 5 zone=b", "3 4 / "),
            ("node hints without zones", None, "3 node=me,x | 4 node=x", "3 / "),
            ("all are remote", None, "3 | 4", "3 4 / "),
            ("all are local", None, "3 here | 4 here", "3 4 / 3 4"),
            ("some are local", None, "3 here | 4", "3 4 / 3"),
            ("all unready", None, "3 unready | 4 unready here", " / , none"),
            ("some unready", None, "3 unready | 4", "4 / "),
            ("all terminate", None, "3 terminating here | 4 terminating", "3 4 / 3"),
            ("some terminate and do not serve", None, "3 gone here | 4 terminating", "4 / "),
            ("ready ones elsewhere", None, "3 terminating here | 4", "4 / 3"),
            ("ready ones here", None, "3 here | 4 terminating here | 5 terminating", "3 / 3"),
            ("all are gone", None, "3 gone here | 4 gone", " / , none"),
            ("the fallback ignores hints", Some("a"), "3 terminating zone=a | 4 terminating zone=b", "3 4 / "),
        ] {
            assert_eq!(sets(zone, &[slice("s", endpoints)]), expected, "{name}");
        }
    }

    #[test]
    fn of_two_entries_for_one_address_the_one_that_does_not_terminate_wins() {
        let (old, new) = (slice("old", "3 terminating here"), slice("new", "3 here"));
        assert_eq!(sets(None, &[old.clone(), new.clone()]), "3 / 3");
        assert_eq!(sets(None, &[new, old.clone()]), "3 / 3");
        let unready = slice("new", "3 unready here");
        assert_eq!(sets(None, &[old.clone(), unready.clone()]), " / , none", "even if it is not ready");
        assert_eq!(sets(None, &[unready, old]), " / , none");
    }

    #[test]
    fn a_set_that_is_not_asked_for_is_not_made() {
        let place = Place { node: "me", zone: None };
        let slices = [slice("s", "3")];
        let found = candidates(slices.iter(), "p", Protocol::Tcp, Family::V4, place);
        let local = categorize(&found, false, true, place);
        assert_eq!(local, Categories { cluster: None, local: Some(vec![]), any: true });
        assert_eq!(categorize(&found, true, false, place).local, None);
        for (name, protocol, family) in
            [("q", Protocol::Tcp, Family::V4), ("p", Protocol::Udp, Family::V4), ("p", Protocol::Tcp, Family::V6)]
        {
            assert!(candidates(slices.iter(), name, protocol, family, place).is_empty());
        }
    }
}
