//! What the command line means: every value parsed and judged once, with an error that names the flag at fault. Nothing
//! below this file reads a flag, the environment or a default.
//!
//! The words of the errors are etcd's (contract 4.2). What it does not do: touch the disk or the network; a data
//! directory that belongs to somebody else is found out by `disk.rs`.

mod duration;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use kvstore_core::compactor::Retention;
use thiserror::Error;

use crate::cli::{Typed, boolean};

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
    /// Whether the first election timeout is shortened once other members are reached.
    pub initial_election_tick_advance: bool,
    /// Logical bytes; `None` is no quota.
    pub quota_backend_bytes: i64,
    pub max_request_bytes: usize,
    pub max_txn_ops: usize,
    pub watch_progress_notify_interval: Duration,
    /// What automatic compaction keeps; `None`: there is none.
    pub auto_compaction: Option<Retention>,
    /// How often what is left of long leases is replicated; `None`: never (gate LeaseCheckpoint).
    pub lease_checkpoint_interval: Option<Duration>,
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
const LEASE_CHECKPOINT_INTERVAL: Duration = Duration::from_secs(300);
const PROGRESS_INTERVAL_MIN: Duration = Duration::from_millis(100);

impl Config {
    /// etcd's order of refusals, as far as one can see it: values, then what binds several flags, then compaction, gates.
    pub fn from_typed(typed: &Typed) -> Result<Config, ConfigError> {
        let values = Values { typed };
        let name = values.text("name").to_owned();
        let advertise_peer_urls = values.urls("initial-advertise-peer-urls")?;
        let mut config = Config {
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
            initial_election_tick_advance: typed.is_true("initial-election-tick-advance"),
            quota_backend_bytes: match values.number::<i64>("quota-backend-bytes")? {
                0 => 2 * 1024 * MIB,
                bytes => bytes,
            },
            max_request_bytes: values.number("max-request-bytes")?,
            max_txn_ops: values.number("max-txn-ops")?,
            watch_progress_notify_interval: progress_interval(&values)?,
            auto_compaction: None,
            lease_checkpoint_interval: None,
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
        let gates = feature_gates(&values)?;
        config.judge(typed)?;
        config.auto_compaction = auto_compaction(&values)?;
        config.lease_checkpoint_interval = lease_checkpoints(&gates)?;
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
        self.typed.text(flag)
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
    let interval_ns = duration::parse(values.text(flag)).map_err(|_| values.bad(flag, "parse error"))?;
    Ok(Duration::from_nanos(u64::try_from(interval_ns).unwrap_or(0)).max(PROGRESS_INTERVAL_MIN))
}

/// `--auto-compaction-mode` and `--auto-compaction-retention`: a bare number is hours or revisions, anything else has to
/// be a duration, whatever the mode (`embed/etcd.go`).
fn auto_compaction(values: &Values<'_>) -> Result<Option<Retention>, ConfigError> {
    const FLAG: &str = "auto-compaction-retention";
    const HOUR_NS: i64 = 3_600_000_000_000;
    let periodic = match values.text("auto-compaction-mode") {
        "periodic" => true,
        "revision" => false,
        "" => return Err(ConfigError::Conflict("undefined auto-compaction-mode".to_owned())),
        mode => return Err(ConfigError::Conflict(format!("unknown auto-compaction-mode {mode:?}"))),
    };
    let text = match values.text(FLAG) {
        "" => "0",
        text => text,
    };
    let kept = match text.parse::<i64>() {
        Ok(number) if number >= 0 => number.saturating_mul(if periodic { HOUR_NS } else { 1 }),
        _ => duration::parse(text)
            .map_err(|reason| values.bad(FLAG, format!("error parsing CompactionRetention: {reason}")))?,
    };
    if kept < 0 {
        return Err(values.bad(FLAG, "must not be negative"));
    }
    let retention = if periodic {
        // Less than what the clock tells apart is still a period.
        Retention::Time { ms: (kept.unsigned_abs() / 1_000_000).max(1) }
    } else {
        Retention::Revisions { count: kept }
    };
    Ok((kept > 0).then_some(retention))
}

fn lease_checkpoints(gates: &BTreeMap<&str, bool>) -> Result<Option<Duration>, ConfigError> {
    // Both are off and of stage alpha.
    let on = |gate| gates.get(gate).or(gates.get("AllAlpha")).copied().unwrap_or(false);
    if on("LeaseCheckpointPersist") && !on("LeaseCheckpoint") {
        return Err(ConfigError::Conflict(
            "enabling feature gate LeaseCheckpointPersist requires enabling feature gate LeaseCheckpoint".to_owned(),
        ));
    }
    Ok(on("LeaseCheckpoint").then_some(LEASE_CHECKPOINT_INTERVAL))
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

/// The gates that were set. All are checked for their names, so that a typing error is seen; what others than
/// LeaseCheckpoint do is not done here, or always.
fn feature_gates<'a>(values: &Values<'a>) -> Result<BTreeMap<&'a str, bool>, ConfigError> {
    const FLAG: &str = "feature-gates";
    let mut gates = BTreeMap::new();
    for pair in values.text(FLAG).split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let Some((gate, value)) = pair.split_once('=') else {
            return Err(values.bad(FLAG, format!("missing bool value for {pair}")));
        };
        let gate = gate.trim();
        if !FEATURE_GATES.contains(&gate) {
            return Err(values.bad(FLAG, format!("unrecognized feature gate: {gate}")));
        }
        let on = boolean(value.trim()).ok_or_else(|| values.bad(FLAG, format!("invalid value of {gate}={value}")))?;
        gates.insert(gate, on);
    }
    Ok(gates)
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
        assert!(c.initial_election_tick_advance);
        assert!(!config("--initial-election-tick-advance=false").unwrap().initial_election_tick_advance);
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
    fn automatic_compaction_is_spelled_as_in_etcd() {
        let kept = |line: &str| config(line).unwrap().auto_compaction;
        let hour = 3_600_000;
        assert_eq!(kept(""), None);
        assert_eq!(kept("--auto-compaction-retention="), None);
        assert_eq!(kept("--auto-compaction-retention=0"), None);
        assert_eq!(kept("--auto-compaction-retention=0s"), None);
        assert_eq!(kept("--auto-compaction-mode=revision --auto-compaction-retention=0"), None);
        let time = |ms| Some(Retention::Time { ms });
        assert_eq!(kept("--auto-compaction-retention=1"), time(hour));
        assert_eq!(kept("--auto-compaction-retention=+24"), time(24 * hour));
        assert_eq!(kept("--auto-compaction-retention=1h30m"), time(hour * 3 / 2));
        assert_eq!(kept("--auto-compaction-mode=periodic --auto-compaction-retention=10s"), time(10_000));
        let revisions = |count| Some(Retention::Revisions { count });
        assert_eq!(kept("--auto-compaction-mode=revision --auto-compaction-retention=1000"), revisions(1000));
        // Strange, and etcd's: a duration is nanoseconds, and each is a revision.
        assert_eq!(kept("--auto-compaction-mode=revision --auto-compaction-retention=1us"), revisions(1000));

        assert_eq!(error("--auto-compaction-mode=foo"), "unknown auto-compaction-mode \"foo\"");
        assert_eq!(error("--auto-compaction-mode="), "undefined auto-compaction-mode");
        let retention = |text: &str| error(&format!("--auto-compaction-retention={text}"));
        assert!(retention("abc").ends_with("error parsing CompactionRetention: time: invalid duration \"abc\""));
        assert!(retention("-1").ends_with("error parsing CompactionRetention: time: missing unit in duration \"-1\""));
        assert!(retention("abc").contains("-auto-compaction-retention"));
        // etcd takes this and crashes.
        assert!(retention("-5m").ends_with("must not be negative"));
    }

    #[test]
    fn lease_checkpoints_follow_their_gate() {
        let every = |line: &str| config(line).unwrap().lease_checkpoint_interval;
        let five_minutes = Some(Duration::from_secs(300));
        assert_eq!(every(""), None);
        assert_eq!(every("--feature-gates=LeaseCheckpoint=true"), five_minutes);
        assert_eq!(every("--feature-gates=LeaseCheckpoint=1,LeaseCheckpointPersist=t"), five_minutes);
        assert_eq!(every("--feature-gates=AllAlpha=true"), five_minutes);
        assert_eq!(every("--feature-gates=AllAlpha=true,LeaseCheckpointPersist=false,LeaseCheckpoint=false"), None);
        assert_eq!(
            error("--feature-gates=LeaseCheckpointPersist=true"),
            "enabling feature gate LeaseCheckpointPersist requires enabling feature gate LeaseCheckpoint"
        );
    }
}
