//! What becomes of a Service before it is stored: families, addresses and ports, as the API server settles them.
//!
//! A new Service is given what it does not ask for; one that exists keeps what it was given, unless the author says
//! otherwise; what a change of type makes superfluous is given back. What is refused is refused in the API server's words.
//!
//! Everything here is a function of its arguments. Whoever calls it must undo the taking if the Service is not stored
//! after all ([`Taken::undo`]).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use proxy_core::model::convert::parse_ip;
use proxy_core::model::{Family, k8s};

use super::allocate::{Addresses, AllocateError, Ports};

/// Why a Service is not stored, as kubectl prints it behind the name of the object.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("{field}: Invalid value: {value}: {reason}")]
    Invalid { field: String, value: String, reason: String },
    #[error("failed to allocate a {what}: {error}")]
    Exhausted { what: &'static str, error: AllocateError },
}

/// What a Service takes from the pools and gives back to them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    pub addresses: Vec<IpAddr>,
    pub ports: Vec<u16>,
    pub addresses_back: Vec<IpAddr>,
    pub ports_back: Vec<u16>,
}

impl Taken {
    /// The Service was not stored: what it took is free again.
    pub fn undo(&self, pool: &mut Pool) {
        self.addresses.iter().for_each(|address| pool.addresses.release(*address));
        self.ports.iter().for_each(|port| pool.ports.release(*port));
    }

    /// The Service was stored: what it gave back is free.
    pub fn settle(&self, pool: &mut Pool) {
        self.addresses_back.iter().for_each(|address| pool.addresses.release(*address));
    }

    pub fn touches_ports(&self) -> bool {
        !self.ports.is_empty() || !self.ports_back.is_empty()
    }
}

/// What can be given to Services.
#[derive(Clone, Debug)]
pub struct Pool {
    pub addresses: Addresses,
    pub ports: Ports,
}

/// Settles `after`, which is to replace `before`. `draw` is asked for random numbers.
pub fn settle(
    after: &mut k8s::Service,
    before: Option<&k8s::Service>,
    pool: &mut Pool,
    draw: &mut impl FnMut() -> u64,
) -> Result<Taken, Refusal> {
    let mut taken = Taken::default();
    let result = settle_into(after, before, pool, draw, &mut taken);
    if result.is_err() {
        taken.undo(pool);
    }
    result.map(|()| taken)
}

fn settle_into(
    after: &mut k8s::Service,
    before: Option<&k8s::Service>,
    pool: &mut Pool,
    draw: &mut impl FnMut() -> u64,
    taken: &mut Taken,
) -> Result<(), Refusal> {
    if let Some(before) = before {
        keep_given(&mut after.spec, &before.spec);
    }
    if !after.spec.cluster_ip.is_empty() && after.spec.cluster_ips.is_empty() {
        after.spec.cluster_ips = vec![after.spec.cluster_ip.clone()];
    }
    settle_families(&mut after.spec, before.map(|before| &before.spec), pool)?;
    if let Some(before) = before {
        check_addresses_stay(&after.spec, &before.spec)?;
    }
    give_addresses(&mut after.spec, before.map(|before| &before.spec), pool, draw, taken)?;
    give_ports(&mut after.spec, before.map(|before| &before.spec), pool, draw, taken)?;
    let spec = &after.spec;
    let (addresses, ports) =
        before.map(|before| (addresses_of(&before.spec), ports_of(&before.spec))).unwrap_or_default();
    let (kept_addresses, kept_ports) = (addresses_of(spec), ports_of(spec));
    taken.addresses_back = addresses.difference(&kept_addresses).copied().collect();
    taken.ports_back = ports.difference(&kept_ports).copied().collect();
    Ok(())
}

/// What a Service had and the author did not mention stays.
fn keep_given(after: &mut k8s::ServiceSpec, before: &k8s::ServiceSpec) {
    if has_cluster_ip(after) && has_cluster_ip(before) {
        // The author who names the address it has anyway does not mean to drop the second one.
        let same = after.cluster_ip.is_empty() || after.cluster_ip == before.cluster_ip;
        if after.cluster_ips.is_empty() && same {
            after.cluster_ip.clone_from(&before.cluster_ip);
            after.cluster_ips.clone_from(&before.cluster_ips);
        }
        if after.ip_families.is_empty() {
            after.ip_families.clone_from(&before.ip_families);
        }
    }
    if wants_node_ports(after) && wants_node_ports(before) {
        let numbers = |spec: &k8s::ServiceSpec| spec.ports.iter().map(|port| port.node_port).collect::<BTreeSet<i32>>();
        let mut used: BTreeSet<i32> = numbers(before).intersection(&numbers(after)).copied().collect();
        let by_name: BTreeMap<&str, i32> =
            before.ports.iter().map(|port| (port.name.as_str(), port.node_port)).collect();
        for port in after.ports.iter_mut().filter(|port| port.node_port == 0) {
            let old = by_name.get(port.name.as_str()).copied().unwrap_or_default();
            if old != 0 && used.insert(old) {
                port.node_port = old;
            }
        }
    }
    if wants_health_check(after) && wants_health_check(before) && after.health_check_node_port == 0 {
        after.health_check_node_port = before.health_check_node_port;
    }
}

fn has_cluster_ip(spec: &k8s::ServiceSpec) -> bool {
    spec.service_type != "ExternalName"
}

fn is_headless(spec: &k8s::ServiceSpec) -> bool {
    spec.cluster_ip == "None"
}

fn wants_node_ports(spec: &k8s::ServiceSpec) -> bool {
    match spec.service_type.as_str() {
        "NodePort" => true,
        "LoadBalancer" => spec.allocate_load_balancer_node_ports.unwrap_or(true),
        _ => false,
    }
}

fn wants_health_check(spec: &k8s::ServiceSpec) -> bool {
    spec.service_type == "LoadBalancer" && spec.external_traffic_policy == "Local"
}

/// Could storing this Service take or give back a node port?
pub fn may_touch_ports(after: Option<&k8s::Service>, before: Option<&k8s::Service>) -> bool {
    let any = |service: &k8s::Service| {
        matches!(service.spec.service_type.as_str(), "NodePort" | "LoadBalancer") || !ports_of(&service.spec).is_empty()
    };
    after.is_some_and(any) || before.is_some_and(any)
}

/// The ClusterIPs of a Service that has some.
pub fn addresses_of(spec: &k8s::ServiceSpec) -> BTreeSet<IpAddr> {
    if !has_cluster_ip(spec) {
        return BTreeSet::new();
    }
    spec.cluster_ips.iter().chain([&spec.cluster_ip]).filter_map(|ip| parse_ip(ip)).collect()
}

/// The node ports of a Service, that for health checks among them.
pub fn ports_of(spec: &k8s::ServiceSpec) -> BTreeSet<u16> {
    let numbers = spec.ports.iter().map(|port| port.node_port).chain([spec.health_check_node_port]);
    numbers.filter(|number| *number != 0).filter_map(|number| u16::try_from(number).ok()).collect()
}

fn quoted(list: &[String]) -> String {
    let quoted: Vec<String> = list.iter().map(|item| format!("{item:?}")).collect();
    format!("[{}]", quoted.join(","))
}

fn family_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}

fn family_named(name: &str) -> Option<Family> {
    match name {
        "IPv4" => Some(Family::V4),
        "IPv6" => Some(Family::V6),
        _ => None,
    }
}

fn other(family: &str) -> &'static str {
    if family == "IPv4" { "IPv6" } else { "IPv4" }
}

/// `ipFamilyPolicy` and `ipFamilies`.
fn settle_families(spec: &mut k8s::ServiceSpec, before: Option<&k8s::ServiceSpec>, pool: &Pool) -> Result<(), Refusal> {
    if !has_cluster_ip(spec) {
        spec.ip_families.clear();
        spec.ip_family_policy = None;
        return Ok(());
    }
    let families: Vec<Family> = pool.addresses.families().collect();
    let selectorless_headless = is_headless(spec) && spec.selector.is_empty();
    let inherited = before.and_then(|before| before.ip_family_policy.clone());
    let default = if selectorless_headless { "RequireDualStack" } else { "SingleStack" };
    let policy = spec.ip_family_policy.take().or(inherited).unwrap_or_else(|| default.into());
    spec.ip_family_policy = Some(policy.clone());
    let single = settle_policy(spec, before, &policy)?;
    infer_families(spec, &families)?;
    if selectorless_headless {
        // Nobody follows its endpoints, so it may claim families that the cluster does not have.
        if spec.ip_families.is_empty() {
            spec.ip_families.extend(families.first().map(|family| family_name(*family).to_owned()));
        }
        if !single && let [only] = spec.ip_families.as_slice() {
            let second = other(only).to_owned();
            spec.ip_families.push(second);
        }
        return Ok(());
    }
    // A Service that only prefers two families is not given or denied the second when the cluster changes.
    let as_before = |before: &k8s::ServiceSpec| {
        policy == "PreferDualStack"
            && before.ip_family_policy.as_deref() == Some("PreferDualStack")
            && spec.cluster_ips == before.cluster_ips
            && spec.ip_families == before.ip_families
    };
    if before.is_some_and(as_before) {
        return Ok(());
    }
    if policy == "RequireDualStack" && families.len() < 2 {
        return Err(refuse_policy(&policy, "this cluster is not configured for dual-stack services"));
    }
    for (i, name) in spec.ip_families.iter().enumerate() {
        if !family_named(name).is_some_and(|family| families.contains(&family)) {
            let reason = "not configured on this cluster".into();
            return Err(Refusal::Invalid {
                field: format!("spec.ipFamilies[{i}]"),
                value: format!("{name:?}"),
                reason,
            });
        }
    }
    if spec.ip_families.is_empty() {
        spec.ip_families.extend(families.first().map(|family| family_name(*family).to_owned()));
    }
    if !single
        && families.len() == 2
        && let [only] = spec.ip_families.as_slice()
    {
        let second = other(only).to_owned();
        spec.ip_families.push(second);
    }
    Ok(())
}

/// Whether `ipFamilyPolicy` asks for one family, once what it says is known to fit the addresses and families asked for.
/// A Service that goes back to one family keeps its first of what it had.
fn settle_policy(
    spec: &mut k8s::ServiceSpec,
    before: Option<&k8s::ServiceSpec>,
    policy: &str,
) -> Result<bool, Refusal> {
    if !matches!(policy, "SingleStack" | "PreferDualStack" | "RequireDualStack") {
        return Err(refuse_policy(
            policy,
            "supported values: \"PreferDualStack\", \"RequireDualStack\", \"SingleStack\"",
        ));
    }
    if policy != "SingleStack" {
        return Ok(false);
    }
    if let Some(before) = before {
        if spec.cluster_ips == before.cluster_ips {
            spec.cluster_ips.truncate(1);
        }
        if spec.ip_families == before.ip_families {
            spec.ip_families.truncate(1);
        }
    }
    for (asked, what) in [(spec.cluster_ips.len(), "cluster IPs"), (spec.ip_families.len(), "IP families")] {
        if asked > 1 {
            let reason = format!("must be 'RequireDualStack' or 'PreferDualStack' when multiple {what} are specified");
            return Err(refuse_policy(policy, &reason));
        }
    }
    Ok(true)
}

fn refuse_policy(policy: &str, reason: &str) -> Refusal {
    Refusal::Invalid { field: "spec.ipFamilyPolicy".into(), value: format!("{policy:?}"), reason: reason.into() }
}

/// An address that was asked for says its family.
fn infer_families(spec: &mut k8s::ServiceSpec, families: &[Family]) -> Result<(), Refusal> {
    if is_headless(spec) {
        return Ok(());
    }
    for (i, text) in spec.cluster_ips.iter().enumerate() {
        let Some(family) = parse_ip(text).map(Family::of) else { continue };
        let name = family_name(family);
        let refuse = |reason: String| Refusal::Invalid {
            field: format!("spec.clusterIPs[{i}]"),
            value: quoted(&spec.cluster_ips),
            reason,
        };
        match spec.ip_families.get(i) {
            Some(asked) if asked != name => {
                return Err(refuse(format!("expected an {asked} value as indicated by `ipFamilies[{i}]`")));
            }
            Some(_) => {}
            None if !families.contains(&family) => {
                return Err(refuse(format!("{name} is not configured on this cluster")));
            }
            None => spec.ip_families.push(name.into()),
        }
    }
    Ok(())
}

fn check_addresses_stay(after: &k8s::ServiceSpec, before: &k8s::ServiceSpec) -> Result<(), Refusal> {
    let had = !before.cluster_ips.is_empty() || !before.cluster_ip.is_empty();
    if !has_cluster_ip(after) || !has_cluster_ip(before) || !had {
        return Ok(());
    }
    let old =
        if before.cluster_ips.is_empty() { std::slice::from_ref(&before.cluster_ip) } else { &before.cluster_ips };
    for (i, (old, new)) in old.iter().zip(&after.cluster_ips).enumerate() {
        if old != new {
            return Err(Refusal::Invalid {
                field: format!("spec.clusterIPs[{i}]"),
                value: quoted(&after.cluster_ips),
                reason: "may not change once set".into(),
            });
        }
    }
    Ok(())
}

fn give_addresses(
    spec: &mut k8s::ServiceSpec,
    before: Option<&k8s::ServiceSpec>,
    pool: &mut Pool,
    draw: &mut impl FnMut() -> u64,
    taken: &mut Taken,
) -> Result<(), Refusal> {
    if !has_cluster_ip(spec) {
        spec.cluster_ip.clear();
        spec.cluster_ips.clear();
        return Ok(());
    }
    if is_headless(spec) {
        spec.cluster_ips = vec!["None".into()];
        return Ok(());
    }
    let held = before.map(addresses_of).unwrap_or_default();
    for (i, name) in spec.ip_families.clone().iter().enumerate() {
        let Some(family) = family_named(name) else { continue };
        let asked = spec.cluster_ips.get(i).filter(|ip| !ip.is_empty()).and_then(|ip| parse_ip(ip));
        let address = match asked {
            Some(address) if held.contains(&address) => address,
            Some(address) => {
                pool.addresses.request(address).map_err(|error| Refusal::Invalid {
                    field: "spec.clusterIPs".into(),
                    value: quoted(&spec.cluster_ips),
                    reason: format!("failed to allocate IP {address}: {error}"),
                })?;
                taken.addresses.push(address);
                address
            }
            None => {
                let chosen = pool.addresses.choose(family, draw());
                let address = chosen.map_err(|error| Refusal::Exhausted { what: "serviceIP", error })?;
                taken.addresses.push(address);
                address
            }
        };
        let text = address.to_string();
        match spec.cluster_ips.get_mut(i) {
            Some(slot) => *slot = text,
            None => spec.cluster_ips.push(text),
        }
    }
    spec.cluster_ip = spec.cluster_ips.first().cloned().unwrap_or_default();
    Ok(())
}

/// Ports of one number share a node port, so that DNS over UDP and over TCP is found at one.
fn give_ports(
    spec: &mut k8s::ServiceSpec,
    before: Option<&k8s::ServiceSpec>,
    pool: &mut Pool,
    draw: &mut impl FnMut() -> u64,
    taken: &mut Taken,
) -> Result<(), Refusal> {
    let mut held = before.map(ports_of).unwrap_or_default();
    let mut asked = BTreeSet::new();
    let mut shared: BTreeMap<i32, i32> = BTreeMap::new();
    for (i, port) in spec.ports.iter().enumerate().filter(|(_, port)| port.node_port != 0) {
        let refuse = |reason: String| Refusal::Invalid {
            field: format!("spec.ports[{i}].nodePort"),
            value: port.node_port.to_string(),
            reason,
        };
        if !asked.insert((port.protocol.clone(), port.node_port)) {
            return Err(refuse(AllocateError::PortTaken.to_string()));
        }
        shared.entry(port.port).or_insert(port.node_port);
        let number = u16::try_from(port.node_port).unwrap_or_default();
        if !held.contains(&number) {
            pool.ports.request(number).map_err(|error| refuse(error.to_string()))?;
            taken.ports.push(number);
            held.insert(number);
        }
    }
    if wants_node_ports(spec) {
        for port in spec.ports.iter_mut().filter(|port| port.node_port == 0) {
            // A number that another port of the same protocol has is of no use to this one.
            let twin = shared.get(&port.port).copied();
            let twin = twin.filter(|number| asked.insert((port.protocol.clone(), *number)));
            port.node_port = match twin {
                Some(number) => number,
                None => {
                    let chosen = pool.ports.choose(draw());
                    let number = chosen.map_err(|error| Refusal::Exhausted { what: "nodePort", error })?;
                    taken.ports.push(number);
                    shared.insert(port.port, number.into());
                    asked.insert((port.protocol.clone(), number.into()));
                    number.into()
                }
            };
        }
    }
    if !wants_health_check(spec) {
        spec.health_check_node_port = 0;
        return Ok(());
    }
    let number = u16::try_from(spec.health_check_node_port).unwrap_or_default();
    if number == 0 {
        let chosen = pool.ports.choose(draw());
        let number = chosen.map_err(|error| Refusal::Exhausted { what: "HealthCheck NodePort", error })?;
        taken.ports.push(number);
        spec.health_check_node_port = number.into();
    } else if !held.contains(&number) {
        pool.ports.request(number).map_err(|error| Refusal::Invalid {
            field: "spec.healthCheckNodePort".into(),
            value: number.to_string(),
            reason: error.to_string(),
        })?;
        taken.ports.push(number);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apply::allocate::AddressBlock;
    use proxy_core::model::manifest::{self, Object};

    fn pool(nets: &[&str]) -> Pool {
        let blocks = nets.iter().map(|net| AddressBlock::new(net.parse().unwrap())).collect();
        Pool { addresses: Addresses::new(blocks), ports: Ports::new(30000, 32767) }
    }

    fn v4() -> Pool {
        pool(&["10.96.0.0/12"])
    }

    fn dual() -> Pool {
        pool(&["10.96.0.0/12", "fd00:10:96::/112"])
    }

    fn written(spec: &str) -> k8s::Service {
        let yaml = format!("{{apiVersion: v1, kind: Service, metadata: {{name: web}}, spec: {spec}}}");
        let value: serde_norway::Value = serde_norway::from_str(&yaml).unwrap();
        match manifest::objects(1, &value).unwrap().remove(0) {
            Object::Service(service) => *service,
            other => panic!("{other:?}"),
        }
    }

    fn settled(
        spec: &str,
        before: Option<&k8s::Service>,
        pool: &mut Pool,
    ) -> Result<(k8s::ServiceSpec, Taken), String> {
        let mut service = written(spec);
        let taken = settle(&mut service, before, pool, &mut || 0).map_err(|refusal| refusal.to_string())?;
        Ok((service.spec, taken))
    }

    fn after(spec: &str, before: &str, pool: &mut Pool) -> Result<(k8s::ServiceSpec, Taken), String> {
        let mut old = written(before);
        settle(&mut old, None, pool, &mut || 0).unwrap();
        settled(spec, Some(&old), pool)
    }

    #[test]
    fn a_new_service_gets_what_it_does_not_ask_for() {
        let (spec, taken) = settled("{type: NodePort, ports: [{port: 80}]}", None, &mut v4()).unwrap();
        assert_eq!((spec.cluster_ip.as_str(), &*spec.cluster_ips), ("10.96.1.1", &["10.96.1.1".to_owned()][..]));
        assert_eq!(spec.ip_families, ["IPv4"]);
        assert_eq!(spec.ip_family_policy.as_deref(), Some("SingleStack"));
        assert_eq!(spec.ports[0].node_port, 30086);
        assert_eq!(taken.addresses, ["10.96.1.1".parse::<IpAddr>().unwrap()]);
        assert_eq!(taken.ports, [30086]);
    }

    #[test]
    fn families_follow_the_policy() {
        let families = |spec: &str, pool: &mut Pool| {
            settled(spec, None, pool).map(|(spec, _)| (spec.ip_families.join(","), spec.cluster_ips.join(",")))
        };
        let ports = "ports: [{port: 80}]";
        let prefer = format!("{{ipFamilyPolicy: PreferDualStack, {ports}}}");
        assert_eq!(families(&prefer, &mut v4()).unwrap(), ("IPv4".into(), "10.96.1.1".into()));
        assert_eq!(families(&prefer, &mut dual()).unwrap(), ("IPv4,IPv6".into(), "10.96.1.1,fd00:10:96::101".into()));
        let six = format!("{{ipFamilies: [IPv6], {ports}}}");
        assert_eq!(families(&six, &mut dual()).unwrap(), ("IPv6".into(), "fd00:10:96::101".into()));
        let asked = format!("{{clusterIP: 'fd00:10:96::7', {ports}}}");
        assert_eq!(families(&asked, &mut dual()).unwrap(), ("IPv6".into(), "fd00:10:96::7".into()));
        let headless = format!("{{clusterIP: None, {ports}}}");
        assert_eq!(families(&headless, &mut v4()).unwrap(), ("IPv4,IPv6".into(), "None".into()));
        let require = format!("{{ipFamilyPolicy: RequireDualStack, {ports}}}");
        assert_eq!(
            families(&require, &mut v4()).unwrap_err(),
            "spec.ipFamilyPolicy: Invalid value: \"RequireDualStack\": \
             this cluster is not configured for dual-stack services"
        );
        assert_eq!(
            families(&six, &mut v4()).unwrap_err(),
            "spec.ipFamilies[0]: Invalid value: \"IPv6\": not configured on this cluster"
        );
        let two = format!("{{ipFamilies: [IPv4, IPv6], {ports}}}");
        assert!(families(&two, &mut dual()).unwrap_err().contains("when multiple IP families are specified"));
    }

    #[test]
    fn an_update_keeps_what_was_given_and_gives_back_what_is_superfluous() {
        let before = "{type: NodePort, ports: [{name: a, port: 80}, {name: b, port: 81}]}";
        let mut pool = v4();
        let (spec, taken) = after("{type: NodePort, ports: [{name: b, port: 82}]}", before, &mut pool).unwrap();
        assert_eq!((spec.cluster_ip.as_str(), spec.ports[0].node_port), ("10.96.1.1", 30087));
        assert_eq!(taken, Taken { ports_back: vec![30086], ..Taken::default() });
        let (spec, taken) = after("{ports: [{name: a, port: 80}]}", before, &mut v4()).unwrap();
        assert_eq!((spec.cluster_ip.as_str(), spec.ports[0].node_port), ("10.96.1.1", 0));
        assert_eq!(taken.ports_back, [30086, 30087]);
        let (spec, taken) = after("{type: ExternalName, externalName: example.com}", before, &mut v4()).unwrap();
        assert_eq!((spec.cluster_ip.as_str(), spec.cluster_ips.len()), ("", 0));
        assert_eq!(taken.addresses_back, ["10.96.1.1".parse::<IpAddr>().unwrap()]);
        let refused = after("{clusterIP: 10.96.0.9, ports: [{port: 80}]}", "{ports: [{port: 80}]}", &mut v4());
        assert_eq!(refused.unwrap_err(), "spec.clusterIPs[0]: Invalid value: [\"10.96.0.9\"]: may not change once set");
    }

    #[test]
    fn a_second_family_comes_and_goes_with_the_policy() {
        let (single, ports) = ("{ports: [{port: 80}]}", "ports: [{port: 80}]");
        let (spec, taken) =
            after(&format!("{{ipFamilyPolicy: RequireDualStack, {ports}}}"), single, &mut dual()).unwrap();
        assert_eq!(spec.cluster_ips, ["10.96.1.1", "fd00:10:96::101"]);
        assert_eq!(taken.addresses.len(), 1);
        let both = format!("{{ipFamilyPolicy: PreferDualStack, {ports}}}");
        let (spec, taken) = after(&format!("{{ipFamilyPolicy: SingleStack, {ports}}}"), &both, &mut dual()).unwrap();
        assert_eq!((spec.cluster_ips.len(), spec.ip_families.len()), (1, 1));
        assert_eq!(taken.addresses_back, ["fd00:10:96::101".parse::<IpAddr>().unwrap()]);
        let (spec, _) = after(single, &both, &mut dual()).unwrap();
        assert_eq!(spec.ip_family_policy.as_deref(), Some("PreferDualStack"), "not mentioned, so kept");
        assert_eq!(spec.cluster_ips.len(), 2);
    }

    #[test]
    fn ports_of_one_number_share_a_node_port_and_health_checks_have_their_own() {
        let dns = "ports: [{name: u, port: 53, protocol: UDP}, {name: t, port: 53}]";
        let lb = format!("{{type: LoadBalancer, externalTrafficPolicy: Local, {dns}}}");
        let (spec, taken) = settled(&lb, None, &mut v4()).unwrap();
        assert_eq!((spec.ports[0].node_port, spec.ports[1].node_port), (30086, 30086));
        assert_eq!(spec.health_check_node_port, 30087);
        assert_eq!(taken.ports, [30086, 30087]);
        let none = format!("{{type: LoadBalancer, allocateLoadBalancerNodePorts: false, {dns}}}");
        let (spec, taken) = settled(&none, None, &mut v4()).unwrap();
        assert_eq!((spec.ports[0].node_port, taken.ports.len()), (0, 0));
        let (spec, taken) = after(&lb.replace("Local", "Cluster"), &lb, &mut v4()).unwrap();
        assert_eq!((spec.health_check_node_port, &*taken.ports_back), (0, &[30087][..]));
    }

    #[test]
    fn what_is_refused_takes_nothing() {
        let mut pool = v4();
        pool.ports.request(30080).unwrap();
        let refused = settled("{type: NodePort, ports: [{port: 80, nodePort: 30080}]}", None, &mut pool).unwrap_err();
        assert_eq!(refused, "spec.ports[0].nodePort: Invalid value: 30080: provided port is already allocated");
        let free = "10.96.1.1".parse().unwrap();
        assert_eq!(pool.addresses.request(free), Ok(()), "the address that was chosen before is free again");
        let refused = settled("{clusterIP: 10.96.1.1, ports: [{port: 80}]}", None, &mut pool).unwrap_err();
        assert_eq!(
            refused,
            "spec.clusterIPs: Invalid value: [\"10.96.1.1\"]: \
             failed to allocate IP 10.96.1.1: provided IP is already allocated"
        );
    }
}
