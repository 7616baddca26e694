//! What the command line means: validated once, with the flag at fault named.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use ipnet::IpNet;
use proxy_core::model::Family;
use proxy_core::model::convert::{parse_cidr, parse_ip};
use proxy_core::state::{DetectLocal, NodePortSelection};

use crate::apply;
use crate::cli::{Cli, FileFlags, ProxyFlags, ServicesFlags, StoreFlags, Verb};
use crate::storage::Keys;

/// A flag whose value cannot be used. One line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{flag}: {reason}")]
pub struct ConfigError {
    pub flag: &'static str,
    pub reason: String,
}

fn refuse(flag: &'static str, reason: impl Into<String>) -> ConfigError {
    ConfigError { flag, reason: reason.into() }
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    Proxy(Box<ProxyConfig>),
    Cleanup { verbosity: u8 },
    Version,
    File(FileConfig),
    Services { store: Option<StoreConfig> },
}

/// Where objects are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreConfig {
    /// At least one URL.
    pub endpoints: Vec<String>,
    pub keys: Keys,
}

/// The proxy, running.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProxyConfig {
    pub store: StoreConfig,
    pub node_name: Arc<str>,
    pub node_port_addresses: NodePortSelection,
    pub detect_local: DetectLocal,
    pub masquerade_all: bool,
    pub masquerade_bit: u8,
    /// Where ClusterIPs come from as long as the store has no ServiceCIDR.
    pub service_cidrs: Vec<IpNet>,
    pub healthz: Option<SocketAddr>,
    pub metrics: Option<SocketAddr>,
    pub verbosity: u8,
}

/// `apply` and `delete`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileConfig {
    pub verb: apply::Verb,
    /// `-` is standard input. At least one.
    pub files: Vec<String>,
    pub store: StoreConfig,
    pub cluster_ip_ranges: Vec<IpNet>,
    pub node_ports: (u16, u16),
}

impl Command {
    /// `host_name` is what the machine calls itself.
    pub fn of(cli: Cli, host_name: impl FnOnce() -> Option<String>) -> Result<Command, ConfigError> {
        match cli.verb {
            Some(Verb::Apply(flags)) => file(apply::Verb::Apply, &flags).map(Command::File),
            Some(Verb::Delete(flags)) => file(apply::Verb::Delete, &flags).map(Command::File),
            Some(Verb::Services(flags)) => services(&flags),
            None => proxy(&cli.proxy, host_name),
        }
    }
}

fn file(verb: apply::Verb, flags: &FileFlags) -> Result<FileConfig, ConfigError> {
    if flags.filename.is_empty() {
        return Err(refuse("--filename", "name a file (-f FILE), or - for standard input"));
    }
    const RANGE: &str = "--service-cluster-ip-range";
    let ranges = service_ranges(&flags.service_cluster_ip_range)?;
    if ranges.is_empty() {
        return Err(refuse(RANGE, "is empty"));
    }
    Ok(FileConfig {
        verb,
        files: flags.filename.clone(),
        store: store(&flags.store)?,
        cluster_ip_ranges: ranges,
        node_ports: port_range(&flags.service_node_port_range)?,
    })
}

fn services(flags: &ServicesFlags) -> Result<Command, ConfigError> {
    if flags.etcd_servers.is_empty() {
        return Ok(Command::Services { store: None });
    }
    let flags = StoreFlags { etcd_servers: flags.etcd_servers.clone(), etcd_prefix: flags.etcd_prefix.clone() };
    Ok(Command::Services { store: Some(store(&flags)?) })
}

fn proxy(flags: &ProxyFlags, host_name: impl FnOnce() -> Option<String>) -> Result<Command, ConfigError> {
    if truth("--version", &flags.version)? {
        return Ok(Command::Version);
    }
    let verbosity =
        flags.v.parse().map_err(|_| refuse("-v", format!("{:?} is not a number between 0 and 255", flags.v)))?;
    if truth("--cleanup", &flags.cleanup)? {
        return Ok(Command::Cleanup { verbosity });
    }
    match flags.source.as_str() {
        "store" => {}
        "kube" | "file" => return Err(refuse("--source", format!("{:?} comes later; use store", flags.source))),
        other => return Err(refuse("--source", format!("{other:?} is none of store"))),
    }
    match flags.proxy_mode.as_str() {
        "nftables" => {}
        "ebpf" => return Err(refuse("--proxy-mode", "\"ebpf\" comes later; use nftables")),
        mode @ ("iptables" | "ipvs" | "userspace") => {
            return Err(refuse("--proxy-mode", format!("{mode:?} is not supported; use nftables")));
        }
        other => return Err(refuse("--proxy-mode", format!("{other:?} is none of nftables"))),
    }
    port_range(&flags.service_node_port_range)?;
    Ok(Command::Proxy(Box::new(ProxyConfig {
        store: store(&flags.store)?,
        node_name: node_name(&flags.hostname_override, host_name)?,
        node_port_addresses: node_port_addresses(&flags.nodeport_addresses)?,
        detect_local: detect_local(flags)?,
        masquerade_all: truth("--masquerade-all", &flags.masquerade_all)?,
        masquerade_bit: masquerade_bit(&flags.iptables_masquerade_bit)?,
        service_cidrs: service_ranges(&flags.service_cluster_ip_range)?,
        healthz: bind_address("--healthz-bind-address", &flags.healthz_bind_address, 10256)?,
        metrics: bind_address("--metrics-bind-address", &flags.metrics_bind_address, 10249)?,
        verbosity,
    })))
}

fn truth(flag: &'static str, text: &str) -> Result<bool, ConfigError> {
    match text {
        "true" | "True" | "TRUE" | "t" | "T" | "1" => Ok(true),
        "false" | "False" | "FALSE" | "f" | "F" | "0" => Ok(false),
        _ => Err(refuse(flag, format!("{text:?} is neither true nor false"))),
    }
}

fn store(flags: &StoreFlags) -> Result<StoreConfig, ConfigError> {
    const SERVERS: &str = "--etcd-servers";
    let mut endpoints = Vec::new();
    for text in flags.etcd_servers.split(',').map(str::trim).filter(|text| !text.is_empty()) {
        let rest = match text.split_once("://") {
            None => text,
            Some(("http", rest)) => rest,
            Some(("https", _)) => {
                return Err(refuse(SERVERS, format!("{text}: TLS comes later; until then use http URLs")));
            }
            Some((scheme, _)) => return Err(refuse(SERVERS, format!("{text}: scheme {scheme:?} is not http"))),
        };
        let address = rest.trim_end_matches('/');
        let port = address.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse::<u16>().ok()?)));
        if port.is_none_or(|(host, port)| host.is_empty() || port == 0) || address.contains(['/', '?', '#', '@', ' ']) {
            return Err(refuse(SERVERS, format!("{text:?} is no URL like http://HOST:PORT")));
        }
        endpoints.push(format!("http://{address}"));
    }
    if endpoints.is_empty() {
        return Err(refuse(SERVERS, "name the store, such as http://127.0.0.1:2379"));
    }
    Ok(StoreConfig { endpoints, keys: Keys::new(&flags.etcd_prefix) })
}

fn node_name(text: &str, host_name: impl FnOnce() -> Option<String>) -> Result<Arc<str>, ConfigError> {
    const FLAG: &str = "--hostname-override";
    let typed = text.trim();
    let name = if typed.is_empty() { host_name().unwrap_or_default() } else { typed.to_owned() };
    let name = name.trim().to_lowercase();
    if name.is_empty() {
        return Err(refuse(FLAG, "the host has no name; give one"));
    }
    if name.contains(['/', ' ']) {
        return Err(refuse(FLAG, format!("{name:?} cannot be the name of a node")));
    }
    Ok(name.into())
}

fn items(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|item| !item.is_empty())
}

fn cidrs(flag: &'static str, text: &str) -> Result<Vec<IpNet>, ConfigError> {
    items(text).map(|item| parse_cidr(item).ok_or_else(|| refuse(flag, format!("{item:?} is not a CIDR")))).collect()
}

/// One, or one of each family.
fn cidrs_by_family(flag: &'static str, text: &str) -> Result<Vec<IpNet>, ConfigError> {
    let list = cidrs(flag, text)?;
    let same = |pair: &[IpNet]| Family::of_net(&pair[0]) == Family::of_net(&pair[1]);
    if list.len() > 2 || list.windows(2).any(same) {
        return Err(refuse(flag, format!("{text:?} is more than one CIDR of each family")));
    }
    Ok(list)
}

fn service_ranges(text: &str) -> Result<Vec<IpNet>, ConfigError> {
    const FLAG: &str = "--service-cluster-ip-range";
    let list = cidrs_by_family(FLAG, text)?;
    for net in &list {
        let widest = if net.addr().is_ipv4() { 8 } else { 64 };
        if net.prefix_len() < widest {
            return Err(refuse(FLAG, format!("{net} is too large: /{widest} is the shortest prefix allowed")));
        }
        if net.max_prefix_len() - net.prefix_len() < 2 {
            return Err(refuse(FLAG, format!("{net} is too small: it has no room for Services")));
        }
    }
    Ok(list)
}

fn port_range(text: &str) -> Result<(u16, u16), ConfigError> {
    const FLAG: &str = "--service-node-port-range";
    let wrong = || refuse(FLAG, format!("{text:?} is no range of ports like 30000-32767"));
    let (first, last) = text.trim().split_once('-').ok_or_else(wrong)?;
    let (first, last): (u16, u16) = (first.parse().map_err(|_| wrong())?, last.parse().map_err(|_| wrong())?);
    if first == 0 || first > last {
        return Err(wrong());
    }
    Ok((first, last))
}

fn node_port_addresses(text: &str) -> Result<NodePortSelection, ConfigError> {
    const FLAG: &str = "--nodeport-addresses";
    let list: Vec<&str> = items(text).collect();
    match list.as_slice() {
        [] | ["primary"] => return Ok(NodePortSelection::Primary),
        ["all"] => return Ok(NodePortSelection::All),
        _ => {}
    }
    if list.iter().any(|item| matches!(*item, "primary" | "all")) {
        return Err(refuse(FLAG, "a keyword stands alone, without CIDRs"));
    }
    let nets = cidrs(FLAG, text)?;
    // As kube-proxy: everything of a family means every local address, those to come too.
    let everything = nets.iter().all(|net| net.prefix_len() == 0);
    Ok(if everything { NodePortSelection::All } else { NodePortSelection::Cidrs(nets) })
}

fn detect_local(flags: &ProxyFlags) -> Result<DetectLocal, ConfigError> {
    let pods = cidrs_by_family("--cluster-cidr", &flags.cluster_cidr)?;
    let interface = |flag: &'static str, name: &str| {
        let name = name.trim();
        match name.len() {
            0 => Err(refuse(flag, format!("is needed by --detect-local-mode={}", flags.detect_local_mode))),
            1..=15 => Ok(name.to_owned()),
            _ => Err(refuse(flag, format!("{name:?} is longer than the name of an interface can be"))),
        }
    };
    match flags.detect_local_mode.as_str() {
        "ClusterCIDR" | "" if pods.is_empty() => Ok(DetectLocal::None),
        "ClusterCIDR" | "" => Ok(DetectLocal::ClusterCidrs(pods)),
        "NodeCIDR" => Ok(DetectLocal::NodeCidrs),
        "BridgeInterface" => {
            interface("--pod-bridge-interface", &flags.pod_bridge_interface).map(DetectLocal::Interface)
        }
        "InterfaceNamePrefix" => {
            interface("--pod-interface-name-prefix", &flags.pod_interface_name_prefix).map(DetectLocal::InterfacePrefix)
        }
        other => {
            let known = "ClusterCIDR, NodeCIDR, BridgeInterface, InterfaceNamePrefix";
            Err(refuse("--detect-local-mode", format!("{other:?} is none of {known}")))
        }
    }
}

fn masquerade_bit(text: &str) -> Result<u8, ConfigError> {
    match text.parse() {
        Ok(bit @ 0..=31) => Ok(bit),
        _ => Err(refuse("--iptables-masquerade-bit", format!("{text:?} is not a number between 0 and 31"))),
    }
}

/// An address and a port, or an address alone; empty is nowhere.
fn bind_address(flag: &'static str, text: &str, default_port: u16) -> Result<Option<SocketAddr>, ConfigError> {
    let text = text.trim();
    if text.is_empty() {
        return Ok(None);
    }
    let alone = text.trim_start_matches('[').trim_end_matches(']');
    if let Some(address) = parse_ip(alone) {
        return Ok(Some(SocketAddr::new(address, default_port)));
    }
    // ":10256" is every address.
    let with_host = if text.starts_with(':') { format!("0.0.0.0{text}") } else { text.to_owned() };
    match with_host.parse() {
        Ok(address) => Ok(Some(address)),
        Err(_) => Err(refuse(flag, format!("{text:?} is no IP:PORT"))),
    }
}

impl fmt::Display for StoreConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.endpoints.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli;
    use std::ffi::OsString;

    fn command(args: &str) -> Result<Command, String> {
        let args = ["keelson-proxy"].into_iter().chain(args.split_whitespace()).map(OsString::from);
        let cli = cli::parse(args).map_err(|error| format!("{error:?}"))?;
        Command::of(cli, || Some(" Host-1\n".into())).map_err(|error| error.to_string())
    }

    fn proxy(args: &str) -> ProxyConfig {
        match command(&format!("--etcd-servers=http://127.0.0.1:2379 {args}")) {
            Ok(Command::Proxy(config)) => *config,
            other => panic!("{args}: {other:?}"),
        }
    }

    fn wrong(args: &str) -> String {
        command(&format!("--etcd-servers=http://127.0.0.1:2379 {args}")).unwrap_err()
    }

    #[test]
    fn the_defaults_are_kube_proxys() {
        let config = proxy("");
        assert_eq!(&*config.node_name, "host-1");
        assert_eq!(config.node_port_addresses, NodePortSelection::Primary);
        assert_eq!(config.detect_local, DetectLocal::None);
        assert_eq!((config.masquerade_all, config.masquerade_bit), (false, 14));
        assert_eq!(config.healthz, Some("0.0.0.0:10256".parse().unwrap()));
        assert_eq!(config.metrics, Some("127.0.0.1:10249".parse().unwrap()));
        assert_eq!(config.store.endpoints, ["http://127.0.0.1:2379"]);
    }

    #[test]
    fn values_mean_what_they_mean_to_kube_proxy() {
        assert_eq!(&*proxy("--hostname-override=N1").node_name, "n1");
        assert_eq!(proxy("--nodeport-addresses=0.0.0.0/0,::/0").node_port_addresses, NodePortSelection::All);
        let nets = NodePortSelection::Cidrs(vec!["192.0.2.0/24".parse().unwrap()]);
        assert_eq!(proxy("--nodeport-addresses=192.0.2.7/24").node_port_addresses, nets);
        let pods = vec!["10.0.0.0/8".parse().unwrap(), "fd00::/64".parse().unwrap()];
        assert_eq!(proxy("--cluster-cidr=10.0.0.0/8,fd00::/64").detect_local, DetectLocal::ClusterCidrs(pods));
        let bridge = "--detect-local-mode=BridgeInterface --pod-bridge-interface=cbr0";
        assert_eq!(proxy(bridge).detect_local, DetectLocal::Interface("cbr0".into()));
        assert_eq!(proxy("--healthz-bind-address=127.0.0.1").healthz, Some("127.0.0.1:10256".parse().unwrap()));
        assert_eq!(proxy("--healthz-bind-address=[::]").healthz, Some("[::]:10256".parse().unwrap()));
        assert_eq!(proxy("--metrics-bind-address=").metrics, None);
        let two = command("apply -f - --etcd-servers=a:1,http://b:2/ --etcd-prefix=x").unwrap();
        let Command::File(two) = two else { panic!("{two:?}") };
        assert_eq!(two.store.endpoints, ["http://a:1", "http://b:2"]);
        assert_eq!(two.store.keys, Keys::new("/x"));
        assert_eq!(two.node_ports, (30000, 32767));
        assert_eq!(command("--version"), Ok(Command::Version));
        assert_eq!(command("--cleanup"), Ok(Command::Cleanup { verbosity: 2 }), "without a store");
        assert_eq!(command("services"), Ok(Command::Services { store: None }));
    }

    #[test]
    fn a_wrong_value_is_told_in_one_line_that_names_the_flag() {
        assert_eq!(command("").unwrap_err(), "--etcd-servers: name the store, such as http://127.0.0.1:2379");
        assert_eq!(
            command("--etcd-servers=https://a:2379").unwrap_err(),
            "--etcd-servers: https://a:2379: TLS comes later; until then use http URLs"
        );
        assert_eq!(command("--etcd-servers=a").unwrap_err(), "--etcd-servers: \"a\" is no URL like http://HOST:PORT");
        assert_eq!(wrong("--source=kube"), "--source: \"kube\" comes later; use store");
        assert_eq!(wrong("--proxy-mode=ipvs"), "--proxy-mode: \"ipvs\" is not supported; use nftables");
        assert_eq!(wrong("--proxy-mode=ebpf"), "--proxy-mode: \"ebpf\" comes later; use nftables");
        assert_eq!(wrong("--nodeport-addresses=eth0"), "--nodeport-addresses: \"eth0\" is not a CIDR");
        assert_eq!(
            wrong("--cluster-cidr=10.0.0.0/8,11.0.0.0/8"),
            "--cluster-cidr: \"10.0.0.0/8,11.0.0.0/8\" is more than one CIDR of each family"
        );
        assert_eq!(
            wrong("--detect-local-mode=InterfaceNamePrefix"),
            "--pod-interface-name-prefix: is needed by --detect-local-mode=InterfaceNamePrefix"
        );
        assert_eq!(
            wrong("--iptables-masquerade-bit=32"),
            "--iptables-masquerade-bit: \"32\" is not a number between 0 and 31"
        );
        assert_eq!(wrong("--masquerade-all=yes"), "--masquerade-all: \"yes\" is neither true nor false");
        assert_eq!(wrong("--healthz-bind-address=local"), "--healthz-bind-address: \"local\" is no IP:PORT");
        assert_eq!(
            wrong("--service-node-port-range=5-1"),
            "--service-node-port-range: \"5-1\" is no range of ports like 30000-32767"
        );
        assert_eq!(
            command("apply -f x --etcd-servers=a:1 --service-cluster-ip-range=10.0.0.0/31").unwrap_err(),
            "--service-cluster-ip-range: 10.0.0.0/31 is too small: it has no room for Services"
        );
        assert_eq!(
            command("apply --etcd-servers=a:1").unwrap_err(),
            "--filename: name a file (-f FILE), or - for standard input"
        );
    }
}
