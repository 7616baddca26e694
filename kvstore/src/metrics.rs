//! What `/metrics` says: facts of the machines, read when asked, and a few counts of the edge, in Prometheus' text form
//! and under etcd's names (contract 3.5).
//!
//! There is no registry: the machines publish facts anyway, and a gauge is one line made from one of them. What it does
//! not do: histograms, and the rest of etcd's list; they belong to the operator's issue.

use std::fmt::{Display, Write};
use std::sync::atomic::{AtomicU64, Ordering};

use kvstore_core::types::MemberId;

use crate::ETCD_VERSION;
use crate::inbox::Inbox;

/// A count that only rises.
#[derive(Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What the edge counts.
#[derive(Default)]
pub struct Metrics {
    /// gRPC requests begun.
    pub started: Counter,
    /// KV requests of the thin handler, by whether the status was OK.
    pub handled_ok: Counter,
    pub handled_error: Counter,
    pub health_success: Counter,
    pub health_failure: Counter,
}

/// The page.
pub fn render(metrics: &Metrics, inbox: &Inbox) -> String {
    let mut page = Page::default();
    let (raft, identity, published) = (inbox.raft(), inbox.identity(), inbox.published());
    let facts = &published.facts;
    let flag = u64::from;
    page.gauge("etcd_server_has_leader", "Whether a leader exists.", flag(raft.leader.is_some()));
    page.gauge("etcd_server_is_leader", "Whether this member is the leader.", flag(raft.is_leader));
    page.gauge("etcd_server_is_learner", "Whether this member is a learner.", 0);
    page.gauge("etcd_server_proposals_committed_total", "Raft's commit index here.", raft.committed);
    page.gauge("etcd_server_proposals_applied_total", "Entries applied here.", raft.applied);
    page.gauge("etcd_server_quota_backend_bytes", "The quota, in bytes.", facts.quota);
    page.gauge("etcd_mvcc_db_total_size_in_bytes", "Bytes that the state takes on disk.", inbox.disk_size());
    page.gauge("etcd_mvcc_db_total_size_in_use_in_bytes", "Logical bytes in use.", facts.size_in_use);
    page.gauge("etcd_debugging_mvcc_current_revision", "The current revision.", facts.revision);
    page.gauge("etcd_debugging_mvcc_compact_revision", "The compacted revision.", facts.compacted);
    page.counter("etcd_server_health_success", "Successful health checks.", metrics.health_success.get());
    page.counter("etcd_server_health_failures", "Failed health checks.", metrics.health_failure.get());
    page.counter("keelson_grpc_started_total", "gRPC requests begun.", metrics.started.get());
    page.counter("keelson_kv_ok_total", "KV requests answered with OK.", metrics.handled_ok.get());
    page.counter("keelson_kv_error_total", "KV requests answered with an error.", metrics.handled_error.get());
    page.labelled("etcd_server_id", "This member's id.", "server_id", identity.member_id);
    page.labelled("etcd_server_version", "The version of etcd's API.", "server_version", ETCD_VERSION);
    page.labelled("keelson_version", "Keelson's own version.", "version", env!("CARGO_PKG_VERSION"));
    if let Some(version) = &facts.cluster_version {
        let minor: Vec<&str> = version.split('.').take(2).collect();
        page.labelled("etcd_cluster_version", "The cluster's version.", "cluster_version", minor.join("."));
    }
    for alarm in facts.alarms.iter() {
        let kind = keelson_proto::etcdserverpb::AlarmType::try_from(alarm.alarm).map_or("UNKNOWN", |k| k.as_str_name());
        let member = MemberId(alarm.member_id);
        page.line("etcd_debugging_server_alarms", format_args!("{{alarm_type=\"{kind}\",server_id=\"{member}\"}} 1"));
    }
    if let Some(bytes) = resident_bytes() {
        page.gauge("process_resident_memory_bytes", "Resident memory, in bytes.", bytes);
    }
    page.text
}

#[derive(Default)]
struct Page {
    text: String,
}

impl Page {
    fn head(&mut self, name: &str, help: &str, kind: &str) {
        self.text.push_str(&format!("# HELP {name} {help}\n# TYPE {name} {kind}\n"));
    }

    fn line(&mut self, name: &str, rest: impl Display) {
        writeln!(self.text, "{name}{rest}").expect("a string takes any text");
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.head(name, help, "gauge");
        self.line(name, format_args!(" {value}"));
    }

    fn counter(&mut self, name: &str, help: &str, value: impl Display) {
        self.head(name, help, "counter");
        self.line(name, format_args!(" {value}"));
    }

    fn labelled(&mut self, name: &str, help: &str, label: &str, value: impl Display) {
        self.head(name, help, "gauge");
        self.line(name, format_args!("{{{label}=\"{value}\"}} 1"));
    }
}

/// Resident memory from `/proc`, in bytes.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
