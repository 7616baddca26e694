//! The command line as it was typed: etcd's flags in etcd's spelling, one dash or two, `=` or a space, and `ETCD_*` from
//! the environment. What it means is `config.rs`.
//!
//! The flags stand in one table ([`FLAGS`]); help, parsing and the environment's names all follow it. A flag that etcd
//! knows and this version does not is refused by name, never ignored: a setting that is silently not in force is worse
//! than a server that does not start.
//!
//! What it does not do: judge values (URLs, ranges, combinations).

use std::collections::BTreeMap;

use clap::{Arg, ArgAction, Command};
use thiserror::Error;

use crate::ETCD_VERSION;

/// Why the command line cannot be used; one line, naming the flag.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum CliError {
    #[error("flag provided but not defined: -{0}")]
    Unknown(String),
    #[error("\"{0}\" is not a valid flag")]
    Positional(String),
    #[error("flag needs an argument: -{0}")]
    NoValue(String),
    #[error("invalid value {value:?} for flag -{flag}: {reason}")]
    BadValue { flag: &'static str, value: String, reason: String },
    #[error(
        "conflicting environment variable {0} is shadowed by corresponding command-line flag (either unset environment variable or disable flag)"
    )]
    Shadowed(String),
    #[error("--{0}: TLS is not supported yet by this version of keelson; it is refused rather than ignored")]
    Tls(String),
    #[error(
        "--{0} is a flag of etcd that this version of keelson does not support yet; it is refused rather than ignored"
    )]
    NotYet(String),
}

/// What a flag's value looks like, for help and for booleans (which may stand alone, as in Go).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Text,
    Bool,
}

/// One flag of the table.
pub struct Flag {
    pub name: &'static str,
    pub kind: Kind,
    pub default: &'static str,
    pub help: &'static str,
}

const fn flag(name: &'static str, default: &'static str, help: &'static str) -> Flag {
    Flag { name, kind: Kind::Text, default, help }
}

/// Every flag that is understood. Defaults are shown in the help and applied by `config.rs`.
pub const FLAGS: &[Flag] = &[
    flag("name", "default", "Name of this member; its key in --initial-cluster."),
    flag("data-dir", "${name}.etcd", "Directory that holds all data of this member, below `member/`."),
    flag("snapshot-count", "10000", "Applied entries between flushes of the state and cuts of the Raft log."),
    flag("heartbeat-interval", "100", "Time between heartbeats, in milliseconds."),
    flag("election-timeout", "1000", "Time without a leader before an election, in milliseconds."),
    Flag {
        name: "initial-election-tick-advance",
        kind: Kind::Bool,
        default: "true",
        help: "Shorten the first election timeout once other members are reached.",
    },
    flag("listen-peer-urls", "http://localhost:2380", "Comma-separated URLs to listen on for peers."),
    flag(
        "listen-client-urls",
        "http://localhost:2379",
        "Comma-separated URLs to listen on for clients, gRPC and HTTP.",
    ),
    flag("listen-metrics-urls", "", "Comma-separated further URLs for /metrics and the health endpoints."),
    flag("quota-backend-bytes", "0", "Bytes at which the NOSPACE alarm is raised; 0 means 2 GiB, negative means none."),
    flag(
        "auto-compaction-mode",
        "periodic",
        "What --auto-compaction-retention means: `periodic`, a time, or `revision`, a number of revisions.",
    ),
    flag(
        "auto-compaction-retention",
        "0",
        "History to keep: hours or a duration such as 30m, or a number of revisions; 0 compacts nothing by itself.",
    ),
    flag("max-request-bytes", "1572864", "Largest client request, in bytes."),
    flag("max-txn-ops", "128", "Most operations in one transaction."),
    flag("initial-advertise-peer-urls", "http://localhost:2380", "Peer URLs that this member announces to the others."),
    flag("initial-cluster", "default=http://localhost:2380", "First members, as name=peerURL pairs."),
    flag("initial-cluster-state", "new", "`new` to found a cluster, `existing` to join one."),
    flag(
        "initial-cluster-token",
        "etcd-cluster",
        "Mixed into member and cluster ids, so that clusters can't be confused.",
    ),
    flag("advertise-client-urls", "http://localhost:2379", "Client URLs that this member announces to clients."),
    flag("watch-progress-notify-interval", "10m", "Time between progress notifications of idle watches."),
    flag("experimental-watch-progress-notify-interval", "", "Older spelling of --watch-progress-notify-interval."),
    flag("feature-gates", "", "Comma-separated Gate=true|false."),
    flag("logger", "zap", "Only `zap`, as etcd spells structured logs."),
    flag("log-level", "info", "debug, info, warn, error, panic or fatal."),
    flag("log-format", "json", "json or console."),
    Flag { name: "version", kind: Kind::Bool, default: "", help: "Print the version and exit." },
    Flag { name: "help", kind: Kind::Bool, default: "", help: "Print this help and exit." },
];

/// etcd's flags that bring TLS, a later issue.
const TLS_FLAGS: &[&str] = &[
    "cert-file",
    "key-file",
    "client-cert-auth",
    "client-cert-file",
    "client-key-file",
    "client-crl-file",
    "client-cert-allowed-hostname",
    "trusted-ca-file",
    "auto-tls",
    "peer-cert-file",
    "peer-key-file",
    "peer-client-cert-auth",
    "peer-client-cert-file",
    "peer-client-key-file",
    "peer-trusted-ca-file",
    "peer-cert-allowed-cn",
    "peer-cert-allowed-hostname",
    "peer-auto-tls",
    "self-signed-cert-validity",
    "peer-crl-file",
    "cipher-suites",
    "tls-min-version",
    "tls-max-version",
    "peer-skip-client-san-verification",
];

/// etcd's other flags, not built yet.
const LATER_FLAGS: &[&str] = &[
    "wal-dir",
    "listen-client-http-urls",
    "max-snapshots",
    "max-wals",
    "memory-mlock",
    "backend-bbolt-freelist-type",
    "backend-batch-interval",
    "backend-batch-limit",
    "max-concurrent-streams",
    "grpc-keepalive-min-time",
    "grpc-keepalive-interval",
    "grpc-keepalive-timeout",
    "socket-reuse-port",
    "socket-reuse-address",
    "enable-grpc-gateway",
    "raft-read-timeout",
    "raft-write-timeout",
    "discovery",
    "discovery-token",
    "discovery-endpoints",
    "discovery-dial-timeout",
    "discovery-request-timeout",
    "discovery-keepalive-time",
    "discovery-keepalive-timeout",
    "discovery-insecure-transport",
    "discovery-insecure-skip-tls-verify",
    "discovery-cert",
    "discovery-key",
    "discovery-cacert",
    "discovery-user",
    "discovery-password",
    "discovery-fallback",
    "discovery-proxy",
    "discovery-srv",
    "discovery-srv-name",
    "strict-reconfig-check",
    "pre-vote",
    "v2-deprecation",
    "cors",
    "host-whitelist",
    "auth-token",
    "bcrypt-cost",
    "auth-token-ttl",
    "enable-pprof",
    "metrics",
    "log-outputs",
    "enable-log-rotation",
    "log-rotation-config-json",
    "warning-unary-request-duration",
    "enable-distributed-tracing",
    "distributed-tracing-address",
    "distributed-tracing-service-name",
    "distributed-tracing-instance-id",
    "distributed-tracing-sampling-rate",
    "corrupt-check-time",
    "compact-hash-check-time",
    "compaction-batch-limit",
    "warning-apply-duration",
    "bootstrap-defrag-threshold-megabytes",
    "max-learners",
    "compaction-sleep-interval",
    "downgrade-check-time",
    "snapshot-catchup-entries",
    "force-new-cluster",
    "unsafe-no-fsync",
    "config-file",
];

/// The flags that were set, by flag or by environment; absent ones have their defaults.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Typed {
    values: BTreeMap<&'static str, String>,
    /// Environment variables that were used, for the log.
    pub used_environment: Vec<String>,
    /// `ETCD_*` variables that mean nothing here, for the log.
    pub unknown_environment: Vec<String>,
}

impl Typed {
    pub fn get(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(String::as_str)
    }

    pub fn is_set(&self, name: &str) -> bool {
        self.values.contains_key(name)
    }

    /// Whether a boolean flag was given and is not false.
    /// What was set, or the flag's default.
    pub fn text(&self, name: &str) -> &str {
        self.get(name).unwrap_or_else(|| FLAGS.iter().find(|flag| flag.name == name).map_or("", |flag| flag.default))
    }

    /// Whether a boolean is on, by what was set or by its default.
    pub fn is_true(&self, name: &str) -> bool {
        self.text(name) == "true"
    }
}

/// Parses the arguments after the program's name, then fills what they leave open from the environment.
pub fn parse(
    args: impl IntoIterator<Item = String>,
    environment: impl IntoIterator<Item = (String, String)>,
) -> Result<Typed, CliError> {
    let args: Vec<String> = args.into_iter().map(two_dashes).collect();
    refuse_unsupported(&args)?;
    let matches = command()
        .try_get_matches_from(std::iter::once("keelson".to_owned()).chain(args.iter().cloned()))
        .map_err(|e| explain(&e, &args))?;
    let mut typed = Typed::default();
    for flag in FLAGS {
        if let Some(value) = matches.get_one::<String>(flag.name) {
            typed.values.insert(flag.name, checked(flag, value)?);
        }
    }
    from_environment(&mut typed, environment)?;
    Ok(typed)
}

/// The text of `--help`.
pub fn help() -> String {
    let mut text = String::from(
        "Usage:\n\n  keelson [flags]\n    Start a member.\n\n  keelson --version\n    Show the version.\n\nFlags:\n",
    );
    for flag in FLAGS {
        let default = if flag.default.is_empty() { String::new() } else { format!(" '{}'", flag.default) };
        text.push_str(&format!("  --{}{default}\n    {}\n", flag.name, flag.help));
    }
    text
}

/// The text of `--version`: etcd's four lines, whose first tools parse, and Keelson's own beside them.
pub fn version() -> String {
    format!(
        "etcd Version: {ETCD_VERSION}\nGit SHA: keelson\nGo Version: none\nGo OS/Arch: {}/{}\nKeelson Version: {}\n",
        std::env::consts::OS,
        match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        },
        env!("CARGO_PKG_VERSION"),
    )
}

fn command() -> Command {
    let mut command =
        Command::new("keelson").disable_help_flag(true).disable_version_flag(true).args_override_self(true);
    for flag in FLAGS {
        let arg = Arg::new(flag.name).long(flag.name).action(ArgAction::Set).allow_hyphen_values(true);
        command = command.arg(match flag.kind {
            Kind::Text => arg,
            Kind::Bool => arg.num_args(0..=1).require_equals(true).default_missing_value("true"),
        });
    }
    command
}

/// Go's flag package takes one dash or two; the library takes two.
fn two_dashes(arg: String) -> String {
    let single = arg.starts_with('-') && !arg.starts_with("--") && arg.len() > 1;
    let names_a_flag = arg[usize::from(single)..].starts_with(|c: char| c.is_ascii_alphabetic());
    match arg.as_str() {
        "-h" => "--help".to_owned(),
        _ if single && names_a_flag => format!("-{arg}"),
        _ => arg,
    }
}

/// The name in `--name=value`, if the argument is one.
fn flag_name(arg: &str) -> Option<&str> {
    arg.strip_prefix("--").map(|rest| rest.split('=').next().unwrap_or(rest)).filter(|name| !name.is_empty())
}

fn refuse_unsupported(args: &[String]) -> Result<(), CliError> {
    for name in args.iter().filter_map(|a| flag_name(a)) {
        if TLS_FLAGS.contains(&name) {
            return Err(CliError::Tls(name.to_owned()));
        }
        if LATER_FLAGS.contains(&name) {
            return Err(CliError::NotYet(name.to_owned()));
        }
    }
    Ok(())
}

/// The library's error in the words of Go's flag package, which etcd's users know.
fn explain(error: &clap::Error, args: &[String]) -> CliError {
    use clap::error::{ContextKind, ContextValue, ErrorKind};
    let context = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(s)) => s.clone(),
        Some(ContextValue::Strings(s)) => s.first().cloned().unwrap_or_default(),
        _ => String::new(),
    };
    let name = flag_name(context.split_whitespace().next().unwrap_or_default()).map(str::to_owned);
    match (error.kind(), name) {
        (ErrorKind::UnknownArgument, Some(name)) => CliError::Unknown(name),
        (ErrorKind::InvalidValue | ErrorKind::NoEquals | ErrorKind::TooFewValues, Some(name)) => {
            CliError::NoValue(name)
        }
        _ => CliError::Positional(
            Some(context)
                .filter(|c| !c.is_empty())
                .or_else(|| args.iter().find(|a| !a.starts_with('-')).cloned())
                .unwrap_or_default(),
        ),
    }
}

fn checked(flag: &'static Flag, value: &str) -> Result<String, CliError> {
    if flag.kind == Kind::Text {
        return Ok(value.to_owned());
    }
    match boolean(value) {
        Some(on) => Ok(on.to_string()),
        None => Err(CliError::BadValue { flag: flag.name, value: value.to_owned(), reason: "parse error".to_owned() }),
    }
}

/// A boolean as Go spells it.
pub(crate) fn boolean(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// `ETCD_` and the flag's name, `-` as `_`, in capitals. A variable beside its own flag is an error in etcd, too.
fn from_environment(
    typed: &mut Typed,
    environment: impl IntoIterator<Item = (String, String)>,
) -> Result<(), CliError> {
    let mut variables: Vec<_> =
        environment.into_iter().filter(|(k, v)| k.starts_with("ETCD_") && !v.is_empty()).collect();
    variables.sort();
    for (variable, value) in variables {
        let name = variable["ETCD_".len()..].to_ascii_lowercase().replace('_', "-");
        if TLS_FLAGS.contains(&name.as_str()) {
            return Err(CliError::Tls(name));
        }
        if LATER_FLAGS.contains(&name.as_str()) {
            return Err(CliError::NotYet(name));
        }
        let Some(flag) = FLAGS.iter().find(|f| f.name == name && f.kind == Kind::Text) else {
            typed.unknown_environment.push(variable);
            continue;
        };
        if typed.is_set(flag.name) {
            return Err(CliError::Shadowed(variable));
        }
        typed.values.insert(flag.name, value);
        typed.used_environment.push(variable);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(line: &str) -> Result<Typed, CliError> {
        parse(line.split_whitespace().map(str::to_owned), [])
    }

    fn with_env(line: &str, env: &[(&str, &str)]) -> Result<Typed, CliError> {
        parse(line.split_whitespace().map(str::to_owned), env.iter().map(|(k, v)| (k.to_string(), v.to_string())))
    }

    #[test]
    fn one_dash_or_two_equals_or_space() {
        for line in ["--name=a", "-name=a", "--name a", "-name a"] {
            assert_eq!(args(line).unwrap().get("name"), Some("a"), "{line}");
        }
    }

    #[test]
    fn the_last_of_a_repeated_flag_counts() {
        assert_eq!(args("--name a --name b").unwrap().get("name"), Some("b"));
    }

    #[test]
    fn a_negative_number_is_a_value() {
        assert_eq!(args("--quota-backend-bytes -1").unwrap().get("quota-backend-bytes"), Some("-1"));
        assert_eq!(args("-quota-backend-bytes=-1").unwrap().get("quota-backend-bytes"), Some("-1"));
    }

    #[test]
    fn booleans_stand_alone_or_take_a_value() {
        assert!(args("--version").unwrap().is_true("version"));
        assert!(args("-version=true").unwrap().is_true("version"));
        assert!(!args("--version=false").unwrap().is_true("version"));
        assert!(args("--version=maybe").unwrap_err().to_string().contains("-version"));
    }

    #[test]
    fn errors_name_the_flag() {
        assert_eq!(args("--nonsense=1").unwrap_err().to_string(), "flag provided but not defined: -nonsense");
        assert_eq!(args("--nonsense").unwrap_err().to_string(), "flag provided but not defined: -nonsense");
        assert_eq!(args("-nonsense 1").unwrap_err().to_string(), "flag provided but not defined: -nonsense");
        assert_eq!(args("--name").unwrap_err().to_string(), "flag needs an argument: -name");
        assert_eq!(args("positional").unwrap_err().to_string(), "\"positional\" is not a valid flag");
    }

    #[test]
    fn tls_and_later_flags_are_refused_by_name() {
        assert!(args("--cert-file=x").unwrap_err().to_string().starts_with("--cert-file: TLS is not supported yet"));
        assert!(args("-peer-auto-tls").unwrap_err().to_string().starts_with("--peer-auto-tls: TLS"));
        assert!(args("--wal-dir=x").unwrap_err().to_string().contains("does not support yet"));
        assert!(with_env("", &[("ETCD_CERT_FILE", "x")]).unwrap_err().to_string().starts_with("--cert-file: TLS"));
    }

    #[test]
    fn the_environment_fills_what_flags_leave_open() {
        let typed = with_env("--name a", &[("ETCD_DATA_DIR", "/d"), ("ETCD_NOSUCH", "1"), ("HOME", "/")]).unwrap();
        assert_eq!(typed.get("data-dir"), Some("/d"));
        assert_eq!(typed.used_environment, ["ETCD_DATA_DIR"]);
        assert_eq!(typed.unknown_environment, ["ETCD_NOSUCH"]);
        let shadowed = with_env("--name a", &[("ETCD_NAME", "b")]).unwrap_err().to_string();
        assert!(shadowed.starts_with("conflicting environment variable ETCD_NAME is shadowed"), "{shadowed}");
    }

    #[test]
    fn version_begins_as_tools_expect() {
        assert!(version().starts_with("etcd Version: 3.7."));
        assert!(version().contains("Keelson Version: "));
    }
}
