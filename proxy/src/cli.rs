//! What was typed: the flags and verbs of `keelson-proxy`, spelled as kube-proxy and kube-apiserver spell them.
//!
//! Nothing is judged here but spelling; [`crate::config`] says what it means. Values stay text, so that every complaint
//! about one is ours: a line, naming the flag. A flag that kube-proxy or kube-apiserver has and this program does not is told
//! from a typo.

use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{ArgAction, Args, Parser, Subcommand};

/// Programs the kernel for Kubernetes Services: a drop-in for kube-proxy.
#[derive(Debug, Parser)]
#[command(
    name = "keelson-proxy",
    args_conflicts_with_subcommands = true,
    args_override_self = true,
    disable_help_subcommand = true,
    disable_version_flag = true,
    max_term_width = 120
)]
pub struct Cli {
    #[command(subcommand)]
    pub verb: Option<Verb>,
    #[command(flatten)]
    pub proxy: ProxyFlags,
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Writes Services, EndpointSlices and Endpoints into the store, as an API server would.
    Apply(FileFlags),
    /// Deletes what a file names from the store.
    Delete(FileFlags),
    /// Lists what the kernel has been given, as a table.
    Services(ServicesFlags),
}

#[derive(Debug, Args)]
pub struct StoreFlags {
    /// The store, ours or etcd: URLs, comma-separated.
    #[arg(long, value_name = "URL,…", default_value = "")]
    pub etcd_servers: String,
    /// What all keys begin with.
    #[arg(long, value_name = "PREFIX", default_value = "/registry")]
    pub etcd_prefix: String,
}

#[derive(Debug, Args)]
#[command(args_override_self = true)]
pub struct FileFlags {
    /// The file, `-` for standard input. May be given several times.
    #[arg(short = 'f', long, value_name = "FILE", action = ArgAction::Append)]
    pub filename: Vec<String>,
    #[command(flatten)]
    pub store: StoreFlags,
    /// Where ClusterIPs come from: a CIDR, or one of each family, comma-separated.
    #[arg(long, value_name = "CIDR,…", default_value = "10.96.0.0/12")]
    pub service_cluster_ip_range: String,
    /// Where node ports come from.
    #[arg(long, value_name = "FROM-TO", default_value = "30000-32767")]
    pub service_node_port_range: String,
}

#[derive(Debug, Args)]
#[command(args_override_self = true)]
pub struct ServicesFlags {
    /// The store, for the names of Services: URLs, comma-separated.
    #[arg(long, value_name = "URL,…", default_value = "")]
    pub etcd_servers: String,
    /// What all keys begin with.
    #[arg(long, value_name = "PREFIX", default_value = "/registry")]
    pub etcd_prefix: String,
}

#[derive(Debug, Args)]
pub struct ProxyFlags {
    /// Where Services are read from: store.
    #[arg(long, value_name = "SOURCE", default_value = "store")]
    pub source: String,
    #[command(flatten)]
    pub store: StoreFlags,
    /// The name of this node; the host's name if not given.
    #[arg(long, value_name = "NODE", default_value = "")]
    pub hostname_override: String,
    /// nftables.
    #[arg(long, value_name = "MODE", default_value = "nftables")]
    pub proxy_mode: String,
    /// On which of this node's addresses node ports answer: `primary`, or CIDRs, comma-separated.
    #[arg(long, value_name = "CIDR,…", default_value = "primary")]
    pub nodeport_addresses: String,
    /// Where pods' addresses come from: a CIDR, or one of each family, comma-separated.
    #[arg(long, value_name = "CIDR,…", default_value = "")]
    pub cluster_cidr: String,
    /// How this node's pods are known: ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix.
    #[arg(long, value_name = "MODE", default_value = "ClusterCIDR")]
    pub detect_local_mode: String,
    /// The bridge that pods hang on, for BridgeInterface.
    #[arg(long, value_name = "NAME", default_value = "")]
    pub pod_bridge_interface: String,
    /// How the names of pods' interfaces begin, for InterfaceNamePrefix.
    #[arg(long, value_name = "PREFIX", default_value = "")]
    pub pod_interface_name_prefix: String,
    /// Masquerade everything that comes by a ClusterIP.
    #[arg(
        long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value = "false",
        default_missing_value = "true"
    )]
    pub masquerade_all: String,
    /// Which bit of the packet mark asks for masquerade, 0 to 31.
    #[arg(long, value_name = "BIT", default_value = "14")]
    pub iptables_masquerade_bit: String,
    /// Where /healthz and /livez are served; empty: nowhere.
    #[arg(long, value_name = "IP:PORT", default_value = "0.0.0.0:10256")]
    pub healthz_bind_address: String,
    /// Where /metrics and /proxyMode are served; empty: nowhere.
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:10249")]
    pub metrics_bind_address: String,
    /// Where ClusterIPs come from, if the store has no ServiceCIDR: what is in here and no Service's is dropped.
    #[arg(long, value_name = "CIDR,…", default_value = "")]
    pub service_cluster_ip_range: String,
    /// Where node ports come from. Checked, and otherwise of no use to a proxy.
    #[arg(long, value_name = "FROM-TO", default_value = "30000-32767")]
    pub service_node_port_range: String,
    /// Remove every trace from the kernel and exit.
    #[arg(
        long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value = "false",
        default_missing_value = "true"
    )]
    pub cleanup: String,
    /// How much is logged: 0 to 10.
    #[arg(short, long, value_name = "LEVEL", default_value = "2")]
    pub v: String,
    /// Print the version and exit.
    #[arg(
        long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value = "false",
        default_missing_value = "true"
    )]
    pub version: String,
}

/// What the command line could not be read as.
#[derive(Debug, PartialEq, Eq)]
pub enum CliError {
    /// It asked for help: the text.
    Help(String),
    /// One line.
    Wrong(String),
}

/// Flags that kube-proxy has, and kube-apiserver for its etcd, and we do not yet.
const LATER: &[(&str, &str)] = &[
    ("etcd-cafile", "TLS to the store comes later; until then use http URLs"),
    ("etcd-certfile", "TLS to the store comes later; until then use http URLs"),
    ("etcd-keyfile", "TLS to the store comes later; until then use http URLs"),
    ("config", "configuration files come later; use flags"),
    ("write-config-to", "configuration files come later"),
    ("kubeconfig", "reading from a kube-apiserver comes later; use --source=store"),
    ("master", "reading from a kube-apiserver comes later; use --source=store"),
    ("feature-gates", "there are no feature gates yet"),
];

/// Flags of kube-proxy without a counterpart here so far.
const NOT_YET: &[&str] = &[
    "bind-address",
    "bind-address-hard-fail",
    "config-sync-period",
    "conntrack-max-per-core",
    "conntrack-min",
    "conntrack-tcp-be-liberal",
    "conntrack-tcp-timeout-close-wait",
    "conntrack-tcp-timeout-established",
    "conntrack-udp-timeout",
    "conntrack-udp-timeout-stream",
    "healthz-port",
    "init-only",
    "iptables-localhost-nodeports",
    "iptables-min-sync-period",
    "iptables-sync-period",
    "ipvs-exclude-cidrs",
    "ipvs-min-sync-period",
    "ipvs-scheduler",
    "ipvs-strict-arp",
    "ipvs-sync-period",
    "ipvs-tcp-timeout",
    "ipvs-tcpfin-timeout",
    "ipvs-udp-timeout",
    "kube-api-burst",
    "kube-api-content-type",
    "kube-api-qps",
    "log-flush-frequency",
    "logging-format",
    "metrics-port",
    "oom-score-adj",
    "profiling",
    "show-hidden-metrics-for-version",
    "vmodule",
];

pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Cli, CliError> {
    Cli::try_parse_from(args).map_err(|error| match error.kind() {
        ErrorKind::DisplayHelp => CliError::Help(error.render().to_string()),
        _ => CliError::Wrong(line(&error)),
    })
}

fn line(error: &clap::Error) -> String {
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => text.clone(),
        _ => String::new(),
    };
    // Shown with its value's name behind it: "--etcd-prefix <PREFIX>".
    let flag = context(ContextKind::InvalidArg);
    let flag = flag.split([' ', '=', '[']).next().unwrap_or_default().to_owned();
    match error.kind() {
        ErrorKind::UnknownArgument if !flag.starts_with('-') => format!("unknown argument {flag:?}"),
        ErrorKind::UnknownArgument => {
            let name = flag.trim_start_matches('-');
            match LATER.iter().find(|(later, _)| *later == name) {
                Some((_, reason)) => format!("--{name} is not supported yet: {reason}"),
                None if NOT_YET.contains(&name) => format!("--{name} is a flag of kube-proxy, not supported yet"),
                None => format!("unknown flag: {flag}"),
            }
        }
        ErrorKind::InvalidSubcommand => format!("unknown verb {:?}", context(ContextKind::InvalidSubcommand)),
        ErrorKind::InvalidValue | ErrorKind::WrongNumberOfValues | ErrorKind::TooFewValues => {
            format!("flag needs an argument: {flag}")
        }
        ErrorKind::ArgumentConflict => "flags of the proxy do not go with a verb; put the verb first".into(),
        _ => {
            let rendered = error.to_string();
            rendered.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(args: &str) -> Result<Cli, CliError> {
        parse(["keelson-proxy"].into_iter().chain(args.split_whitespace()).map(OsString::from))
    }

    fn wrong(args: &str) -> String {
        match typed(args) {
            Err(CliError::Wrong(line)) => line,
            other => panic!("{args}: {other:?}"),
        }
    }

    #[test]
    fn flags_are_spelled_as_kubernetes_spells_them() {
        let cli = typed(
            "--source=store --etcd-servers http://a:1,http://b:2 --hostname-override=N1 --proxy-mode=nftables \
             --masquerade-all --cleanup=false -v 4",
        )
        .unwrap();
        assert!(cli.verb.is_none());
        assert_eq!(cli.proxy.store.etcd_servers, "http://a:1,http://b:2");
        assert_eq!((cli.proxy.masquerade_all.as_str(), cli.proxy.cleanup.as_str()), ("true", "false"));
        assert_eq!(cli.proxy.v, "4");
        assert_eq!(typed("--v=6 --v=7").unwrap().proxy.v, "7", "the last one counts, as for kube-proxy");
        let cli = typed("apply -f a.yaml -f - --etcd-servers=http://a:1").unwrap();
        let Some(Verb::Apply(flags)) = cli.verb else { panic!("{cli:?}") };
        assert_eq!(flags.filename, ["a.yaml", "-"]);
        assert_eq!(flags.store.etcd_servers, "http://a:1");
        assert!(matches!(typed("delete -f a.yaml").unwrap().verb, Some(Verb::Delete(_))));
        assert!(matches!(typed("services").unwrap().verb, Some(Verb::Services(_))));
    }

    #[test]
    fn a_wrong_line_is_told_in_one_line_that_names_the_flag() {
        assert_eq!(wrong("--etcd-server=http://a:1"), "unknown flag: --etcd-server");
        assert_eq!(wrong("--etcd-prefix"), "flag needs an argument: --etcd-prefix");
        assert_eq!(
            wrong("--etcd-cafile=/ca.pem"),
            "--etcd-cafile is not supported yet: TLS to the store comes later; until then use http URLs"
        );
        assert_eq!(wrong("--ipvs-scheduler=rr"), "--ipvs-scheduler is a flag of kube-proxy, not supported yet");
        assert_eq!(wrong("start"), "unknown verb \"start\"");
        assert_eq!(wrong("apply -f a.yaml extra"), "unknown argument \"extra\"");
        assert_eq!(wrong("apply --kubeconfig=x").split(':').next(), Some("--kubeconfig is not supported yet"));
    }

    #[test]
    fn help_names_the_flags() {
        let Err(CliError::Help(text)) = typed("--help") else { panic!("help") };
        for flag in ["--etcd-servers", "--hostname-override", "--nodeport-addresses", "apply", "services"] {
            assert!(text.contains(flag), "{flag} in {text}");
        }
    }
}
