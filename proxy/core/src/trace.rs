//! What must happen to a packet: the oracle that every backend is held against.
//!
//! [`trace`] walks a [`Dataplane`] as `dataplane.rs` tells it, for the first packet of a connection. Where chance decides it
//! answers with all that may happen: the set of endpoints, and for each whether the source address is replaced.
//!
//! Affinity is chance here too: any endpoint may be the remembered one. What the network does to a packet before or after
//! (routes, other people's rules) is not traced.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use crate::dataplane::{
    Backends, Dataplane, Frontend, LocalDetection, NodePort, NodePortAddresses, Scope, ServicePortPlan, WhenEmpty,
};
use crate::model::{Family, Protocol, TrafficPolicy};
use crate::range;

/// The first packet of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet<'a> {
    pub origin: Origin<'a>,
    pub source: IpAddr,
    pub destination: IpAddr,
    pub protocol: Protocol,
    pub port: u16,
    /// The destination is an address of this node. Asked only where node ports answer on all of them.
    pub destination_is_local: bool,
}

/// Where a packet meets our rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin<'a> {
    /// A process on this node (not in a pod of its own) sent it: its source address is this node's.
    Node,
    /// It came in by this interface: from a pod, or from outside.
    Interface(&'a str),
}

/// What becomes of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Not for a Service; it goes its way.
    NoMatch,
    /// Refused: TCP reset or ICMP port unreachable.
    Reject,
    /// Silently dropped.
    Drop,
    /// Sent on to one of these. Never empty.
    Translate(BTreeSet<Translation>),
}

/// One way a packet may be sent on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Translation {
    pub endpoint: SocketAddr,
    /// Its source address becomes this node's.
    pub masquerade: bool,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::NoMatch => f.write_str("no match"),
            Verdict::Reject => f.write_str("reject"),
            Verdict::Drop => f.write_str("drop"),
            Verdict::Translate(ways) => {
                for (i, way) in ways.iter().enumerate() {
                    let separator = if i == 0 { "" } else { ", " };
                    let masquerade = if way.masquerade { " masquerade" } else { "" };
                    write!(f, "{separator}{}{masquerade}", way.endpoint)?;
                }
                Ok(())
            }
        }
    }
}

/// What must happen to `packet`.
pub fn trace(dataplane: &Dataplane, packet: &Packet<'_>) -> Verdict {
    let Packet { destination, protocol, port, .. } = *packet;
    let frontend = Frontend { address: destination, protocol, port };
    if let Some(target) = dataplane.frontends.get(&frontend) {
        // Every frontend's id has a plan; a dataplane without it says that nobody serves.
        let Some(plan) = dataplane.service_ports.get(&target.id) else { return Verdict::Reject };
        return match target.scope {
            Scope::ClusterIp => internal(dataplane, plan, packet),
            Scope::LoadBalancer if is_shut_out(plan, packet) => Verdict::Drop,
            Scope::LoadBalancer | Scope::ExternalIp => external(dataplane, plan, packet),
        };
    }
    let node_port = NodePort { family: Family::of(destination), protocol, port };
    if has_node_ports(dataplane, packet)
        && let Some(id) = dataplane.node_ports.get(&node_port)
    {
        let plan = dataplane.service_ports.get(id);
        return plan.map_or(Verdict::Reject, |plan| external(dataplane, plan, packet));
    }
    if dataplane.cluster_ips.contains(&destination) {
        return Verdict::Reject;
    }
    if range::contains(&dataplane.node.service_cidrs, destination) {
        return Verdict::Drop;
    }
    Verdict::NoMatch
}

fn internal(dataplane: &Dataplane, plan: &ServicePortPlan, packet: &Packet<'_>) -> Verdict {
    choose(dataplane, plan.backends(plan.internal_policy), packet, false)
}

fn external(dataplane: &Dataplane, plan: &ServicePortPlan, packet: &Packet<'_>) -> Verdict {
    let (backends, masquerade) = match plan.external_policy {
        TrafficPolicy::Cluster => (&plan.cluster, true),
        TrafficPolicy::Local if is_from_pod(dataplane, packet) == Some(true) => (&plan.cluster, false),
        TrafficPolicy::Local if packet.origin == Origin::Node => (&plan.cluster, true),
        TrafficPolicy::Local => (&plan.local, false),
    };
    choose(dataplane, backends.as_ref(), packet, masquerade)
}

/// Any of the backends. `masquerade` says what the policy asks for; ClusterIPs and hairpins may ask for it as well.
fn choose(dataplane: &Dataplane, backends: Option<&Backends>, packet: &Packet<'_>, masquerade: bool) -> Verdict {
    let Some(backends) = backends else { return Verdict::Reject };
    if backends.list.is_empty() {
        return match backends.when_empty {
            WhenEmpty::Reject => Verdict::Reject,
            WhenEmpty::Drop => Verdict::Drop,
        };
    }
    let masquerade = masquerade || is_foreign_to_cluster_ip(dataplane, packet);
    let ways = backends.list.iter().map(|backend| {
        let hairpin = backend.local && backend.address.ip() == packet.source;
        Translation { endpoint: backend.address, masquerade: masquerade || hairpin }
    });
    Verdict::Translate(ways.collect())
}

/// Does the packet go to a ClusterIP, by whatever frontend, and not come from one of this node's pods?
fn is_foreign_to_cluster_ip(dataplane: &Dataplane, packet: &Packet<'_>) -> bool {
    dataplane.cluster_ips.contains(&packet.destination)
        && (dataplane.node.masquerade_all || is_from_pod(dataplane, packet) == Some(false))
}

fn is_shut_out(plan: &ServicePortPlan, packet: &Packet<'_>) -> bool {
    plan.source_ranges.as_ref().is_some_and(|ranges| !range::contains(ranges, packet.source))
}

fn has_node_ports(dataplane: &Dataplane, packet: &Packet<'_>) -> bool {
    match &dataplane.node.node_port_addresses {
        NodePortAddresses::Only(addresses) => addresses.contains(&packet.destination),
        NodePortAddresses::AllLocal => packet.destination_is_local && !packet.destination.is_loopback(),
    }
}

/// Is the packet one of this node's pods'? `None` if there is no way to tell.
fn is_from_pod(dataplane: &Dataplane, packet: &Packet<'_>) -> Option<bool> {
    match &dataplane.node.local_detection {
        LocalDetection::None => None,
        LocalDetection::PodCidrs(ranges) => {
            let family = Family::of(packet.source);
            let known = ranges.iter().any(|range| Family::of(range.first) == family);
            known.then(|| range::contains(ranges, packet.source))
        }
        LocalDetection::Interface(name) => Some(packet.origin == Origin::Interface(name)),
        LocalDetection::InterfacePrefix(prefix) => {
            Some(matches!(packet.origin, Origin::Interface(name) if name.starts_with(prefix.as_str())))
        }
    }
}
