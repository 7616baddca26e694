//! One member: from its configuration to its last byte on disk.
//!
//! ```text
//! bind: listeners ─▶ directory, lock, databases       every refusal happens here
//! run:  threads ─▶ peers ─▶ (log re-applied, attributes published) ─▶ "ready to serve client requests" ─▶ clients
//! ```
//!
//! | thread | name | does |
//! |---|---|---|
//! | raft | `raft` | `driver.rs` |
//! | log | `raft-log` | `logger.rs` |
//! | apply | `apply` | `applier.rs` |
//! | flush | `state-flush` | `disk/rocks.rs` |
//! | catch-up | `watch-pump` | history for watchers that are behind |
//! | peers | `peers` | `peer.rs`, a runtime of its own |
//! | edge, one a core | `edge-N` | `edge.rs`: clients' connections, each on one of them for good |
//!
//! The drain order at a stop, under one grace timeout: leadership is handed over; no new connections; streams end and
//! requests finish; the raft thread answers the rest "stopped"; the apply thread makes its state durable; the log
//! thread syncs; the peers' links close. A thread that ends early takes the process down with its error.

mod compaction;
mod identity;
mod member;
mod monitor;
#[cfg(test)]
mod tests;
mod threads;

use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use kvstore_core::Fatal;
use kvstore_core::store::Store;
use thiserror::Error;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::config::{Config, Url};
use crate::disk::{Disk, MemberDir, Opened, StateOptions};
use crate::edge::{self, EdgeThreads, Port, Serving};
use crate::inbox::Inbox;
use crate::metrics::Metrics;
use crate::rpc::RpcLimits;

use member::Member;

/// Why a member does not start, or stopped.
#[derive(Debug, Error)]
pub enum ServerError {
    /// In etcd's words, which scripts look for.
    #[error("listen tcp {address}: bind: {reason} (--{flag})")]
    Listen { flag: &'static str, address: String, reason: String },
    #[error("{0}")]
    Cluster(String),
    #[error(transparent)]
    Fatal(#[from] Fatal),
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// How long a graceful stop may take before what is left is cut.
const GRACE: Duration = Duration::from_secs(1);
/// A member that holds its ports and its directory, and has not started.
pub struct Bound {
    config: Config,
    listeners: Listeners,
    disk: Disk,
}

struct Listeners {
    clients: Vec<edge::Bound>,
    metrics: Vec<edge::Bound>,
    peers: Vec<TcpListener>,
}

/// Takes ports and directory, or says in one line why not, having touched nothing.
pub fn bind(config: Config) -> Result<Bound, ServerError> {
    let edge = |port| move |listener| edge::Bound { listener, port };
    let clients = listen("listen-client-urls", &config.listen_client_urls)?;
    let metrics = listen("listen-metrics-urls", &config.listen_metrics_urls)?;
    let listeners = Listeners {
        clients: clients.into_iter().map(edge(Port::Client)).collect(),
        metrics: metrics.into_iter().map(edge(Port::Metrics)).collect(),
        peers: listen("listen-peer-urls", &config.listen_peer_urls)?,
    };
    let found = identity::found(&config).map_err(ServerError::Cluster);
    // What `--initial-cluster` says matters to a new member only.
    let (found, unusable) = match found {
        Ok(cluster) => (Some(cluster), None),
        Err(error) if MemberDir::is_fresh(&config.data_dir) => return Err(error),
        Err(error) => (None, Some(error)),
    };
    let dir = MemberDir::lock(&config.data_dir, |owner| identity::may_open(&config, owner))?;
    let disk = match (dir.open(StateOptions::default())?, found, unusable) {
        (Opened::Member(disk), ..) => *disk,
        (Opened::Fresh(fresh), Some(cluster), _) => {
            fresh.found(cluster.owner, Store::bootstrap(&cluster.founders, cluster.id))?
        }
        (Opened::Fresh(_), None, error) => {
            return Err(error.unwrap_or_else(|| ServerError::Cluster("no cluster to found".into())));
        }
    };
    Ok(Bound { config, listeners, disk })
}

fn listen(flag: &'static str, urls: &[Url]) -> Result<Vec<TcpListener>, ServerError> {
    urls.iter()
        .map(|url| {
            let listen = || {
                let listener = TcpListener::bind((url.host.as_str(), url.port))?;
                listener.set_nonblocking(true)?;
                Ok(listener)
            };
            listen().map_err(|error| {
                let address = url.to_string().trim_start_matches("http://").to_owned();
                ServerError::Listen { flag, address, reason: reason(&error) }
            })
        })
        .collect()
}

/// The operating system's words as Go writes them.
fn reason(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::AddrInUse => "address already in use".into(),
        io::ErrorKind::AddrNotAvailable => "cannot assign requested address".into(),
        io::ErrorKind::PermissionDenied => "permission denied".into(),
        _ => error.to_string(),
    }
}

impl Bound {
    /// Serves until SIGTERM or SIGINT; an error means that this member is broken.
    pub fn run(self) -> Result<(), ServerError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let Bound { config, listeners, disk } = self;
        let shutdown = CancellationToken::new();
        runtime.block_on(async { on_signal(shutdown.clone()) })?;
        let mut member = Member::start(&config, listeners.peers, disk)?;
        let serving = serving(&config, member.inbox.clone());
        let metrics = Clients::start(listeners.metrics, &serving, 1)?;
        // An error means broken: what is durable is durable, and nothing more may be done to the disk.
        let clients = runtime.block_on(serve(&config, &mut member, &serving, listeners.clients, shutdown))?;
        if let Some(clients) = clients {
            clients.stop(GRACE);
        }
        member.stop();
        metrics.stop(GRACE);
        Ok(())
    }
}

fn on_signal(shutdown: CancellationToken) -> io::Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::spawn(async move {
        let name = tokio::select! {
            _ = terminate.recv() => "terminated",
            _ = interrupt.recv() => "interrupt",
        };
        tracing::info!(signal = name, "received signal; shutting down");
        shutdown.cancel();
    });
    Ok(())
}

fn serving(config: &Config, inbox: Inbox) -> Serving {
    let limits = RpcLimits {
        max_request_bytes: config.max_request_bytes,
        max_txn_ops: config.max_txn_ops,
        heartbeat_interval_ms: config.heartbeat_interval_ms,
        election_timeout_ms: config.election_timeout_ms,
        watch_progress_notify_interval: config.watch_progress_notify_interval,
    };
    Serving { inbox, limits, metrics: Arc::new(Metrics::default()) }
}

/// From the running threads to the running edge, and on until the end. `None`: it never came to that.
async fn serve(
    config: &Config,
    member: &mut Member,
    serving: &Serving,
    listeners: Vec<edge::Bound>,
    shutdown: CancellationToken,
) -> Result<Option<Clients>, ServerError> {
    let mut failures = member.failures();
    let ready = async {
        monitor::publish(&member.inbox, config).await;
        member.wait_applied().await;
    };
    tokio::select! {
        () = ready => {}
        () = shutdown.cancelled() => return Ok(None),
        failure = failures.recv() => return Err(failed(failure)),
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let clients = Clients::start(listeners, serving, cores)?;
    tracing::info!("ready to serve client requests");
    for url in &config.listen_client_urls {
        tracing::info!(address = %url, "serving client traffic insecurely; this is strongly discouraged!");
    }
    tokio::select! {
        () = monitor::keep_version(&member.inbox, member.peers()) => {}
        () = compaction::run(&member.inbox, config.auto_compaction, member.clock) => {}
        () = shutdown.cancelled() => {}
        failure = failures.recv() => return Err(failed(failure)),
    }
    member.hand_over_leadership().await;
    Ok(Some(clients))
}

/// Running edge threads.
struct Clients {
    threads: EdgeThreads,
    stop: CancellationToken,
}

impl Clients {
    fn start(listeners: Vec<edge::Bound>, serving: &Serving, cores: usize) -> io::Result<Clients> {
        let stop = CancellationToken::new();
        Ok(Clients { threads: edge::start(listeners, serving, cores, &stop)?, stop })
    }

    /// Streams end, requests finish; what is not done after `grace` is left to its fate.
    fn stop(self, grace: Duration) {
        self.stop.cancel();
        let (done, ended) = std::sync::mpsc::channel();
        std::thread::spawn(move || done.send(self.threads.join()));
        match ended.recv_timeout(grace) {
            Ok(Ok(())) => {}
            Ok(Err(panicked)) => tracing::error!("{panicked}"),
            Err(_) => tracing::warn!("client requests were still running at the end of the grace period"),
        }
    }
}

fn failed(failure: Option<Fatal>) -> ServerError {
    failure.unwrap_or_else(|| Fatal::Invariant("every thread has ended".into())).into()
}
