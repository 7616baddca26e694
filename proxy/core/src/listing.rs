//! A dataplane as text, for golden tests, debug logs and whoever asks what the proxy thinks. Everything in it is
//! printed, in a fixed order; nothing parses it.

use std::collections::BTreeMap;
use std::fmt;

use crate::dataplane::{
    Backends, Changes, Dataplane, Frontend, LocalDetection, NodePlan, NodePort, NodePortAddresses, Scope,
    ServicePortId, ServicePortPlan, WhenEmpty,
};

impl fmt::Display for Dataplane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.node)?;
        line(f, "cluster ips", &self.cluster_ips)?;
        line(f, "hairpin", &self.hairpin)?;
        let mut frontends: BTreeMap<&ServicePortId, Vec<(Scope, &Frontend)>> = BTreeMap::new();
        for (frontend, target) in &self.frontends {
            frontends.entry(&target.id).or_default().push((target.scope, frontend));
        }
        let mut node_ports: BTreeMap<&ServicePortId, &NodePort> = BTreeMap::new();
        node_ports.extend(self.node_ports.iter().map(|(node_port, id)| (id, node_port)));
        for (id, plan) in &self.service_ports {
            writeln!(f, "service {id}")?;
            let mut of_id = frontends.remove(id).unwrap_or_default();
            of_id.sort_unstable();
            for (scope, frontend) in of_id {
                writeln!(f, "  {scope} {frontend}")?;
            }
            if let Some(node_port) = node_ports.get(id) {
                writeln!(f, "  node port {}", node_port.port)?;
            }
            write!(f, "{plan}")?;
        }
        Ok(())
    }
}

impl fmt::Display for NodePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = if self.masquerade_all { ", all to cluster ips" } else { "" };
        writeln!(f, "masquerade: mark {:#x}{all}", self.masquerade_mark)?;
        match &self.local_detection {
            LocalDetection::None => writeln!(f, "pods: not told from others")?,
            LocalDetection::PodCidrs(ranges) => line(f, "pods", ranges)?,
            LocalDetection::Interface(name) => writeln!(f, "pods: interface {name}")?,
            LocalDetection::InterfacePrefix(prefix) => writeln!(f, "pods: interfaces {prefix}*")?,
        }
        match &self.node_port_addresses {
            NodePortAddresses::AllLocal => writeln!(f, "node ports: on all local addresses")?,
            NodePortAddresses::Only(addresses) => line(f, "node ports", addresses)?,
        }
        line(f, "service cidrs", &self.service_cidrs)
    }
}

impl fmt::Display for ServicePortPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "  policies: internal {:?}, external {:?}", self.internal_policy, self.external_policy)?;
        if let Some(seconds) = self.affinity_timeout_s {
            writeln!(f, "  affinity: {seconds} s")?;
        }
        if let Some(ranges) = &self.source_ranges {
            line(f, "  load balancer for", ranges)?;
        }
        for (name, set) in [("cluster", &self.cluster), ("local", &self.local)] {
            if let Some(set) = set {
                writeln!(f, "  {name}: {set}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Backends {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.list.is_empty() {
            return f.write_str(match self.when_empty {
                WhenEmpty::Reject => "nobody, reject",
                WhenEmpty::Drop => "nobody here, drop",
            });
        }
        for (i, backend) in self.list.iter().enumerate() {
            let separator = if i == 0 { "" } else { ", " };
            let local = if backend.local { " (here)" } else { "" };
            write!(f, "{separator}{}{local}", backend.address)?;
        }
        Ok(())
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Scope::ClusterIp => "cluster ip",
            Scope::LoadBalancer => "load balancer",
            Scope::ExternalIp => "external ip",
        })
    }
}

impl fmt::Display for Changes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.node {
            writeln!(f, "node")?;
        }
        self.service_ports.iter().try_for_each(|id| writeln!(f, "service {id}"))?;
        self.frontends.iter().try_for_each(|frontend| writeln!(f, "frontend {frontend}"))?;
        self.node_ports.iter().try_for_each(|node_port| writeln!(f, "node port {node_port}"))?;
        self.cluster_ips.iter().try_for_each(|ip| writeln!(f, "cluster ip {ip}"))?;
        self.hairpin.iter().try_for_each(|ip| writeln!(f, "hairpin {ip}"))
    }
}

fn line<T: fmt::Display>(f: &mut fmt::Formatter<'_>, name: &str, items: impl IntoIterator<Item = T>) -> fmt::Result {
    write!(f, "{name}:")?;
    let mut none = true;
    for item in items {
        none = false;
        write!(f, " {item}")?;
    }
    writeln!(f, "{}", if none { " none" } else { "" })
}
