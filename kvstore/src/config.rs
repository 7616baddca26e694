//! What the command line means: every value parsed and judged once, with an error that names the flag at fault. Nothing
//! below this file reads a flag, the environment or a default.
//!
//! The words of the errors are etcd's (contract 4.2). What it does not do: touch the disk or the network; a data
//! directory that belongs to somebody else is found out by `disk.rs`.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

use crate::cli::{FLAGS, Typed};

/// A value that can't be used; one line, naming the flag.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum ConfigError {
    #[error("invalid value {value:?} for flag -{flag}: {reason}")]
    BadValue { flag: &'static str, value: String, reason: String },
    #[error("--{flag}: {url}: TLS is not supported yet by this version of keelson; use http")]
    Tls { flag: &'static str, url: String },
    #[error("{0}")]
    Conflict(String),
}

/// An address to listen on or to announce: `http://host:port`, and nothing after it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Url {
    pub host: String,
    pub port: u16,
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "http://[{}]:{}", self.host, self.port)
        } else {
            write!(f, "http://{}:{}", self.host, self.port)
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ClusterState {
    New,
    Existing,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LogFormat {
    Json,
    Console,
}

/// A founder as `--initial-cluster` names it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Founder {
    pub name: String,
    pub peer_urls: Vec<String>,
}

/// Everything that a member needs to know before it binds a port.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    pub name: String,
    pub data_dir: PathBuf,
    pub listen_client_urls: Vec<Url>,
    pub advertise_client_urls: Vec<Url>,
    pub listen_peer_urls: Vec<Url>,
    pub advertise_peer_urls: Vec<Url>,
    pub listen_metrics_urls: Vec<Url>,
    pub founders: Vec<Founder>,
    pub cluster_state: ClusterState,
    pub cluster_token: String,
    /// Applied entries between flushes of the state.
    pub snapshot_count: u64,
    pub heartbeat_interval_ms: u64,
    pub election_timeout_ms: u64,
    /// Logical bytes; `None` is no quota.
    pub quota_backend_bytes: i64,
    pub max_request_bytes: usize,
    pub max_txn_ops: usize,
    pub watch_progress_notify_interval: Duration,
    pub log_level: tracing::Level,
    pub log_format: LogFormat,
}

/// Feature gates of etcd 3.7: name and whether a value other than the default is in force here.
const FEATURE_GATES: &[&str] = &[
    "AllAlpha",
    "AllBeta",
    "StopGRPCServiceOnDefrag",
    "InitialCorruptCheck",
    "CompactHashCheck",
    "TxnModeWriteWithSharedBuffer",
    "LeaseCheckpoint",
    "LeaseCheckpointPersist",
    "SetMemberLocalAddr",
    "FastLeaseKeepAlive",
    "PriorityRequest",
];

const MIB: i64 = 1024 * 1024;
const ELECTION_TIMEOUT_MAX_MS: u64 = 50_000;
const PROGRESS_INTERVAL_MIN: Duration = Duration::from_millis(100);

impl Config {
    pub fn from_typed(typed: &Typed) -> Result<Config, ConfigError> {
        let values = Values { typed };
        let name = values.text("name").to_owned();
        let advertise_peer_urls = values.urls("initial-advertise-peer-urls")?;
        let config = Config {
            data_dir: match typed.get("data-dir") {
                Some(dir) if !dir.is_empty() => PathBuf::from(dir),
                _ => PathBuf::from(format!("{name}.etcd")),
            },
            listen_client_urls: values.listen_urls("listen-client-urls")?,
            advertise_client_urls: values.urls("advertise-client-urls")?,
            listen_peer_urls: values.listen_urls("listen-peer-urls")?,
            listen_metrics_urls: values.listen_urls("listen-metrics-urls")?,
            founders: founders(&values, &name, &advertise_peer_urls)?,
            advertise_peer_urls,
            cluster_state: match values.text("initial-cluster-state") {
                "new" => ClusterState::New,
                "existing" => ClusterState::Existing,
                _ => return Err(values.bad("initial-cluster-state", "must be `new` or `existing`")),
            },
            cluster_token: values.text("initial-cluster-token").to_owned(),
            snapshot_count: values.number::<u64>("snapshot-count")?.max(1),
            heartbeat_interval_ms: values.number("heartbeat-interval")?,
            election_timeout_ms: values.number("election-timeout")?,
            quota_backend_bytes: match values.number::<i64>("quota-backend-bytes")? {
                0 => 2 * 1024 * MIB,
                bytes => bytes,
            },
            max_request_bytes: values.number("max-request-bytes")?,
            max_txn_ops: values.number("max-txn-ops")?,
            watch_progress_notify_interval: progress_interval(&values)?,
            log_level: log_level(&values)?,
            log_format: match values.text("log-format") {
                "json" => LogFormat::Json,
                "console" => LogFormat::Console,
                _ => return Err(values.bad("log-format", "must be `json` or `console`")),
            },
            name,
        };
        if values.text("logger") != "zap" {
            return Err(values.bad("logger", "only `zap` is known"));
        }
        feature_gates(&values)?;
        config.judge(typed)?;
        Ok(config)
    }

    /// The rules that bind several flags together.
    fn judge(&self, typed: &Typed) -> Result<(), ConfigError> {
        let conflict = |text: String| Err(ConfigError::Conflict(text));
        if typed.is_set("listen-client-urls") && !typed.is_set("advertise-client-urls") {
            return conflict(
                "--advertise-client-urls is required when --listen-client-urls is set explicitly".to_owned(),
            );
        }
        if self.heartbeat_interval_ms == 0 {
            return conflict(format!("--heartbeat-interval must be >0 (set to {}ms)", self.heartbeat_interval_ms));
        }
        if self.election_timeout_ms == 0 {
            return conflict(format!("--election-timeout must be >0 (set to {}ms)", self.election_timeout_ms));
        }
        if self.heartbeat_interval_ms.saturating_mul(5) > self.election_timeout_ms {
            return conflict(format!(
                "--election-timeout[{}ms] should be at least as 5 times as --heartbeat-interval[{}ms]",
                self.election_timeout_ms, self.heartbeat_interval_ms
            ));
        }
        if self.election_timeout_ms > ELECTION_TIMEOUT_MAX_MS {
            return conflict(format!(
                "--election-timeout[{}ms] is too long, and should be set less than {ELECTION_TIMEOUT_MAX_MS}ms",
                self.election_timeout_ms
            ));
        }
        if self.cluster_state == ClusterState::New {
            self.judge_founders()?;
        }
        Ok(())
    }

    /// The member must be among the founders, with the URLs that it announces.
    fn judge_founders(&self) -> Result<(), ConfigError> {
        let Some(own) = self.founders.iter().find(|f| f.name == self.name) else {
            return Err(ConfigError::Conflict(format!(
                "--initial-cluster: couldn't find local name {:?} in the initial cluster configuration",
                self.name
            )));
        };
        let mut announced: Vec<String> = self.advertise_peer_urls.iter().map(Url::to_string).collect();
        announced.sort();
        let mut listed = own.peer_urls.clone();
        listed.sort();
        if let Some(missing) = listed.iter().find(|url| !announced.contains(url)) {
            return Err(ConfigError::Conflict(format!(
                "--initial-cluster has {}={missing} but missing from --initial-advertise-peer-urls={}",
                self.name,
                announced.join(",")
            )));
        }
        if let Some(missing) = announced.iter().find(|url| !listed.contains(url)) {
            return Err(ConfigError::Conflict(format!(
                "--initial-advertise-peer-urls has {missing} but missing from --initial-cluster={}={}",
                self.name,
                listed.join(",")
            )));
        }
        Ok(())
    }
}

/// Flags with their defaults applied.
struct Values<'a> {
    typed: &'a Typed,
}

impl<'a> Values<'a> {
    fn text(&self, flag: &'static str) -> &'a str {
        self.typed.get(flag).unwrap_or_else(|| FLAGS.iter().find(|f| f.name == flag).map_or("", |f| f.default))
    }

    fn bad(&self, flag: &'static str, reason: impl Into<String>) -> ConfigError {
        ConfigError::BadValue { flag, value: self.text(flag).to_owned(), reason: reason.into() }
    }

    fn number<T: std::str::FromStr>(&self, flag: &'static str) -> Result<T, ConfigError> {
        self.text(flag).parse().map_err(|_| self.bad(flag, "parse error"))
    }

    fn urls(&self, flag: &'static str) -> Result<Vec<Url>, ConfigError> {
        let mut urls = Vec::new();
        for text in self.text(flag).split(',').map(str::trim).filter(|t| !t.is_empty()) {
            urls.push(parse_url(flag, text)?);
        }
        urls.sort();
        Ok(urls)
    }

    /// URLs to bind: the host must be an address, or `localhost`.
    fn listen_urls(&self, flag: &'static str) -> Result<Vec<Url>, ConfigError> {
        let urls = self.urls(flag)?;
        for url in &urls {
            if url.host != "localhost" && url.host.parse::<std::net::IpAddr>().is_err() {
                return Err(ConfigError::Conflict(format!("--{flag}: expected IP in URL for binding ({url})")));
            }
        }
        Ok(urls)
    }
}

fn parse_url(flag: &'static str, text: &str) -> Result<Url, ConfigError> {
    let bad = |reason: String| ConfigError::BadValue { flag, value: text.to_owned(), reason };
    let authority = match text.split_once("://") {
        Some(("http", rest)) => rest,
        Some(("https", _)) => return Err(ConfigError::Tls { flag, url: text.to_owned() }),
        Some(("unix" | "unixs", _)) => return Err(bad("unix sockets are not supported yet".to_owned())),
        _ => return Err(bad(format!("URL scheme must be http, https, unix, or unixs: {text}"))),
    };
    let (authority, path) = authority.split_once('/').map_or((authority, ""), |(a, p)| (a, p));
    if !path.is_empty() || text.ends_with('/') {
        return Err(bad(format!("URL must not contain a path: {text}")));
    }
    let form = || bad(format!("URL address does not have the form \"host:port\": {text}"));
    let (host, port) = authority.rsplit_once(':').ok_or_else(form)?;
    let host = match host.strip_prefix('[') {
        Some(inner) => inner.strip_suffix(']').ok_or_else(form)?,
        None if host.contains(':') => return Err(form()),
        None => host,
    };
    let port = port.parse().map_err(|_| form())?;
    Ok(Url { host: if host.is_empty() { "0.0.0.0".to_owned() } else { host.to_owned() }, port })
}

/// `--initial-cluster`; without it, this member alone under the URLs that it announces.
fn founders(values: &Values<'_>, name: &str, advertised: &[Url]) -> Result<Vec<Founder>, ConfigError> {
    const FLAG: &str = "initial-cluster";
    if !values.typed.is_set(FLAG) {
        return Ok(vec![Founder { name: name.to_owned(), peer_urls: advertised.iter().map(Url::to_string).collect() }]);
    }
    let mut founders: Vec<Founder> = Vec::new();
    for pair in values.text(FLAG).split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let Some((name, url)) = pair.split_once('=').filter(|(n, u)| !n.is_empty() && !u.is_empty()) else {
            return Err(values.bad(FLAG, format!("{pair:?} is not a name=peerURL pair")));
        };
        let url = parse_url(FLAG, url)?.to_string();
        match founders.iter_mut().find(|f| f.name == name) {
            Some(founder) => founder.peer_urls.push(url),
            None => founders.push(Founder { name: name.to_owned(), peer_urls: vec![url] }),
        }
    }
    for (i, founder) in founders.iter().enumerate() {
        if let Some(url) = founder.peer_urls.iter().find(|u| founders[..i].iter().any(|f| f.peer_urls.contains(u))) {
            return Err(values.bad(FLAG, format!("{url} belongs to two members")));
        }
    }
    Ok(founders)
}

fn progress_interval(values: &Values<'_>) -> Result<Duration, ConfigError> {
    const OLD: &str = "experimental-watch-progress-notify-interval";
    let flag = if values.typed.is_set(OLD) { OLD } else { "watch-progress-notify-interval" };
    let interval = go_duration(values.text(flag)).ok_or_else(|| values.bad(flag, "parse error"))?;
    Ok(interval.max(PROGRESS_INTERVAL_MIN))
}

fn log_level(values: &Values<'_>) -> Result<tracing::Level, ConfigError> {
    match values.text("log-level") {
        "debug" => Ok(tracing::Level::DEBUG),
        "info" => Ok(tracing::Level::INFO),
        "warn" => Ok(tracing::Level::WARN),
        "error" | "dpanic" | "panic" | "fatal" => Ok(tracing::Level::ERROR),
        other => Err(values.bad("log-level", format!("unrecognized level: {other:?}"))),
    }
}

/// Gates are checked for their names, so that a typing error is seen; none changes what this version does.
fn feature_gates(values: &Values<'_>) -> Result<(), ConfigError> {
    const FLAG: &str = "feature-gates";
    for pair in values.text(FLAG).split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let Some((gate, value)) = pair.split_once('=') else {
            return Err(values.bad(FLAG, format!("missing bool value for {pair}")));
        };
        if !FEATURE_GATES.contains(&gate.trim()) {
            return Err(values.bad(FLAG, format!("unrecognized feature gate: {}", gate.trim())));
        }
        if !matches!(value.trim(), "true" | "false" | "True" | "False" | "TRUE" | "FALSE" | "1" | "0" | "t" | "f") {
            return Err(values.bad(FLAG, format!("invalid value of {}={value}", gate.trim())));
        }
    }
    Ok(())
}

/// A duration as Go prints it: `1h30m`, `100ms`, `1.5s`. `None` if it isn't one.
pub fn go_duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    let mut seconds = 0f64;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let unit = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
        seconds += number
            * match &rest[..unit] {
                "ns" => 1e-9,
                "us" | "µs" => 1e-6,
                "ms" => 1e-3,
                "s" => 1.0,
                "m" => 60.0,
                "h" => 3600.0,
                _ => return None,
            };
        rest = &rest[unit..];
    }
    Duration::try_from_secs_f64(seconds).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(line: &str) -> Result<Config, ConfigError> {
        let typed = crate::cli::parse(line.split_whitespace().map(str::to_owned), []).unwrap();
        Config::from_typed(&typed)
    }

    fn error(line: &str) -> String {
        config(line).unwrap_err().to_string()
    }

    #[test]
    fn defaults_are_etcds() {
        let c = config("").unwrap();
        assert_eq!(c.data_dir, PathBuf::from("default.etcd"));
        assert_eq!(c.listen_client_urls, [Url { host: "localhost".into(), port: 2379 }]);
        assert_eq!(c.founders, [Founder { name: "default".into(), peer_urls: vec!["http://localhost:2380".into()] }]);
        assert_eq!(c.quota_backend_bytes, 2 << 30);
        assert_eq!(c.watch_progress_notify_interval, Duration::from_secs(600));
    }

    #[test]
    fn a_kubeadm_static_pod_without_tls() {
        let c = config(
            "--name=n1 --feature-gates=InitialCorruptCheck=true --listen-client-urls=http://127.0.0.1:2379,http://10.0.0.1:2379 \
             --advertise-client-urls=http://10.0.0.1:2379 --listen-peer-urls=http://10.0.0.1:2380 \
             --initial-advertise-peer-urls=http://10.0.0.1:2380 --data-dir=/var/lib/etcd --snapshot-count=10000 \
             --listen-metrics-urls=http://127.0.0.1:2381 --watch-progress-notify-interval=5s --initial-cluster=n1=http://10.0.0.1:2380",
        )
        .unwrap();
        assert_eq!(c.watch_progress_notify_interval, Duration::from_secs(5));
        assert_eq!(c.listen_metrics_urls.len(), 1);
        let old = config("--experimental-watch-progress-notify-interval=7s").unwrap();
        assert_eq!(old.watch_progress_notify_interval, Duration::from_secs(7));
    }

    #[test]
    fn bad_urls_are_named() {
        assert_eq!(
            error("--listen-client-urls=http://x:1"),
            "--listen-client-urls: expected IP in URL for binding (http://x:1)"
        );
        assert!(error("--listen-peer-urls=127.0.0.1:1").contains("URL scheme must be http"));
        assert!(error("--listen-peer-urls=http://127.0.0.1").contains("does not have the form \"host:port\""));
        assert!(error("--listen-peer-urls=http://127.0.0.1:1/x").contains("must not contain a path"));
        assert!(
            error("--listen-peer-urls=https://127.0.0.1:1").starts_with("--listen-peer-urls: https://127.0.0.1:1: TLS")
        );
        assert_eq!(
            config("--listen-peer-urls=http://[::1]:1").unwrap().listen_peer_urls[0].to_string(),
            "http://[::1]:1"
        );
    }

    #[test]
    fn combinations_are_judged_in_etcds_words() {
        assert_eq!(
            error("--listen-client-urls=http://127.0.0.1:1"),
            "--advertise-client-urls is required when --listen-client-urls is set explicitly"
        );
        assert_eq!(
            error("--election-timeout=100"),
            "--election-timeout[100ms] should be at least as 5 times as --heartbeat-interval[100ms]"
        );
        assert!(error("--election-timeout=60000").contains("is too long, and should be set less than 50000ms"));
        assert_eq!(
            error("--name=bar --initial-cluster=foo=http://localhost:2380"),
            "--initial-cluster: couldn't find local name \"bar\" in the initial cluster configuration"
        );
        assert!(
            error("--initial-cluster=default=http://localhost:1")
                .starts_with("--initial-cluster has default=http://localhost:1 but missing from")
        );
    }

    #[test]
    fn bad_values_name_the_flag() {
        assert_eq!(
            error("--quota-backend-bytes=abc"),
            "invalid value \"abc\" for flag -quota-backend-bytes: parse error"
        );
        assert!(error("--feature-gates=Foo=true").contains("unrecognized feature gate: Foo"));
        assert!(error("--log-level=loud").contains("unrecognized level"));
        assert!(error("--initial-cluster-state=maybe").contains("-initial-cluster-state"));
        assert!(error("--watch-progress-notify-interval=soon").contains("-watch-progress-notify-interval"));
    }

    #[test]
    fn durations_are_gos() {
        assert_eq!(go_duration("1h30m"), Some(Duration::from_secs(5400)));
        assert_eq!(go_duration("1.5s"), Some(Duration::from_millis(1500)));
        assert_eq!(go_duration("5"), None);
        assert_eq!(go_duration(""), None);
    }
}
