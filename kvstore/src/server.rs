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

mod identity;
mod monitor;
#[cfg(test)]
mod tests;
mod threads;

use std::net::TcpListener;
use std::sync::atomic::AtomicI64;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use keelson_proto::peer::peer_server::PeerServer;
use kvstore_core::Fatal;
use kvstore_core::backend::Backend;
use kvstore_core::replica::{Boot, Position, Replica, ReplicaConfig, wire};
use kvstore_core::store::{Store, StoreConfig, view};
use kvstore_core::types::Index;
use kvstore_core::watch::{WatchHub, WatchLimits};
use thiserror::Error;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::applier::{self, Applier, ApplierConfig};
use crate::config::{Config, Url};
use crate::disk::{Disk, MemberDir, Opened, StateOptions};
use crate::driver::{Clock, Driver, DriverConfig, Input, Outlets};
use crate::edge::{self, EdgeThreads, Port, Serving};
use crate::inbox::{Edge, Hub, Identity, Inbox, InboxLimits, Published, PublishedCell, RaftCell, RequestIds, Shared};
use crate::logger;
use crate::mailbox::mailbox;
use crate::metrics::Metrics;
use crate::peer::{Ids, PeerService, Peers};
use crate::rpc::RpcLimits;

use threads::Threads;

/// Why a member does not start, or stopped.
#[derive(Debug, Error)]
pub enum ServerError {
    #[error("{flag}: can't listen on {url}: {error}")]
    Listen { flag: &'static str, url: String, error: std::io::Error },
    #[error("{0}")]
    Cluster(String),
    #[error(transparent)]
    Fatal(#[from] Fatal),
    #[error("{0}")]
    Io(#[from] std::io::Error),
}

/// How long a graceful stop may take before what is left is cut.
const GRACE: Duration = Duration::from_secs(1);
/// A proposal may wait so long, and two election timeouts more (etcd).
const REQUEST_TIMEOUT_MS: u64 = 5_000;
/// The records that the applier keeps at hand, in bytes.
const RECORD_CACHE_BYTES: usize = 32 << 20;
const FLUSH_INTERVAL: Duration = Duration::from_secs(2);
const POLL_INTERVAL: Duration = Duration::from_millis(200);
const SLICE_ROWS: usize = 400;
const BATCH_ENTRIES: usize = 4_096;

/// A member that holds its ports and its directory, and has not started.
pub struct Bound {
    config: Config,
    listeners: Listeners,
    disk: Disk,
}

struct Listeners {
    clients: Vec<edge::Bound>,
    peers: Vec<TcpListener>,
}

/// Takes ports and directory, or says in one line why not.
pub fn bind(config: Config) -> Result<Bound, ServerError> {
    let mut clients = Vec::new();
    for (flag, urls, port) in [
        ("listen-client-urls", &config.listen_client_urls, Port::Client),
        ("listen-metrics-urls", &config.listen_metrics_urls, Port::Metrics),
    ] {
        clients.extend(listen(flag, urls)?.into_iter().map(|listener| edge::Bound { listener, port }));
    }
    let listeners = Listeners { clients, peers: listen("listen-peer-urls", &config.listen_peer_urls)? };
    let dir = MemberDir::lock(&config.data_dir, |owner| identity::may_open(&config, owner))?;
    let disk = match dir.open(StateOptions::default())? {
        Opened::Member(disk) => *disk,
        Opened::Fresh(fresh) => {
            let cluster = identity::found(&config).map_err(ServerError::Cluster)?;
            fresh.found(cluster.owner, Store::bootstrap(&cluster.founders, cluster.id))?
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
            listen().map_err(|error| ServerError::Listen { flag, url: url.to_string(), error })
        })
        .collect()
}

impl Bound {
    /// Serves until SIGTERM or SIGINT; an error means that this member is broken.
    pub fn run(self) -> Result<(), ServerError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let Bound { config, listeners, disk } = self;
        let shutdown = CancellationToken::new();
        {
            let _runtime = runtime.enter();
            let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
            let shutdown = shutdown.clone();
            runtime.spawn(async move {
                let name = tokio::select! {
                    _ = terminate.recv() => "terminated",
                    _ = interrupt.recv() => "interrupt",
                };
                tracing::info!(signal = name, "received signal; shutting down");
                shutdown.cancel();
            });
        }
        let mut member = Member::start(&config, listeners.peers, disk)?;
        // An error means broken: what is durable is durable, and nothing more may be done to the disk.
        let clients = runtime.block_on(serve(&config, &mut member, listeners.clients, shutdown))?;
        member.stop(clients);
        Ok(())
    }
}

/// From the running threads to the running edge, and on until the end.
async fn serve(
    config: &Config,
    member: &mut Member,
    listeners: Vec<edge::Bound>,
    shutdown: CancellationToken,
) -> Result<Option<Clients>, ServerError> {
    let mut failures = member.threads.failures();
    let ready = async {
        monitor::publish(&member.inbox, config).await;
        member.wait_applied().await;
    };
    tokio::select! {
        () = ready => {}
        () = shutdown.cancelled() => return Ok(None),
        failure = failures.recv() => return Err(failed(failure)),
    }
    let serving = Serving {
        inbox: member.inbox.clone(),
        limits: RpcLimits {
            max_request_bytes: config.max_request_bytes,
            max_txn_ops: config.max_txn_ops,
            heartbeat_interval_ms: config.heartbeat_interval_ms,
            election_timeout_ms: config.election_timeout_ms,
            watch_progress_notify_interval: config.watch_progress_notify_interval,
        },
        metrics: Arc::new(Metrics::default()),
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let stop = CancellationToken::new();
    let threads = edge::start(listeners, &serving, cores, &stop)?;
    tracing::info!("ready to serve client requests");
    for url in &config.listen_client_urls {
        tracing::info!(address = %url, "serving client traffic insecurely; this is strongly discouraged!");
    }
    tokio::select! {
        () = monitor::keep_version(&member.inbox, member.shared.peers().clone()) => {}
        () = shutdown.cancelled() => {}
        failure = failures.recv() => return Err(failed(failure)),
    }
    member.hand_over_leadership().await;
    Ok(Some(Clients { threads, stop }))
}

/// The running client edge.
struct Clients {
    threads: EdgeThreads,
    stop: CancellationToken,
}

impl Clients {
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

/// A member's machines, running.
pub(crate) struct Member {
    pub(crate) inbox: Inbox,
    shared: Arc<Shared>,
    threads: Threads,
    applier: crate::mailbox::Mailbox<applier::Job>,
    logger: crate::mailbox::Mailbox<logger::Job>,
    stop_peers: CancellationToken,
    /// The commit that the log knew at the start: served is only what has applied it.
    committed: Index,
    election_ms: u64,
}

impl Member {
    pub(crate) fn start(config: &Config, peers: Vec<TcpListener>, disk: Disk) -> Result<Member, ServerError> {
        let Disk { owner, log, state, dir } = disk;
        let clock = Clock::start();
        let view = state.view();
        let store_config = StoreConfig {
            member_id: owner.member_id,
            quota_backend_bytes: config.quota_backend_bytes,
            record_cache_bytes: RECORD_CACHE_BYTES,
        };
        let store = Store::open(&view, store_config.clone())?;
        let facts = store.facts();
        let replica_config =
            ReplicaConfig::new(owner.member_id, config.heartbeat_interval_ms, config.election_timeout_ms);
        let applied = Position { index: facts.applied_index, term: facts.applied_term };
        let recovered = log.recover(applied.index, replica_config.tail_bytes)?;
        let committed = recovered.hard_state.as_ref().map_or(Ok(0), |stored| wire::hard_state(stored).map(|h| h.2))?;
        let ids = Ids { cluster: owner.cluster_id, member: owner.member_id };
        let boot = Boot {
            nonce: identity::random(),
            hard_state: recovered.hard_state,
            log_start: recovered.start,
            terms: recovered.terms,
            entries: recovered.entries,
            applied,
            installed: Some(state.installed()),
            conf_state: view::conf_state_bytes(&view)?.unwrap_or_else(|| wire::conf_state(&[], &[])),
        };
        let replica = Replica::new(replica_config.clone(), boot, identity::random())?;

        let (driver, driver_inputs) = mailbox();
        let (applier, applier_jobs) = mailbox();
        let (logger, logger_jobs) = mailbox();
        let request_timeout_ms = REQUEST_TIMEOUT_MS + 2 * config.election_timeout_ms;
        let shared = Arc::new(Shared {
            identity: Identity {
                cluster_id: owner.cluster_id,
                member_id: owner.member_id,
                name: config.name.clone(),
                peer_urls: config.advertise_peer_urls.iter().map(Url::to_string).collect(),
                client_urls: config.advertise_client_urls.iter().map(Url::to_string).collect(),
            },
            limits: InboxLimits {
                max_request_bytes: config.max_request_bytes,
                max_commit_to_apply_gap: 5_000,
                request_timeout: Duration::from_millis(request_timeout_ms),
            },
            driver: driver.clone(),
            hub: Hub::new(WatchHub::new(WatchLimits::default(), facts.revision, facts.compacted)),
            raft: RaftCell::default(),
            ids: RequestIds::new(owner.member_id),
            disk_size: AtomicI64::new(0),
            counts: Arc::default(),
            peers: OnceLock::new(),
            published: PublishedCell::new(Published { view: view.clone(), facts: facts.clone() }),
        });
        shared.raft.set_applied(applied.index);
        let inbox = Inbox::new(Arc::clone(&shared), Edge::direct());

        let mut threads = Threads::new();
        let stop_peers = CancellationToken::new();
        let service = PeerService::new(ids, driver.clone(), inbox.clone(), state.nursery());
        let service = PeerServer::new(service)
            .max_decoding_message_size(PeerService::MAX_MESSAGE_BYTES)
            .max_encoding_message_size(usize::MAX);
        let runtime = threads.peers(peers, service, stop_peers.clone())?;
        let links = Peers::connect(ids, &facts.members, driver.clone(), clock, runtime, &stop_peers);
        let _ = shared.peers.set(links.clone());

        let driver_config = DriverConfig {
            replica: replica_config,
            heartbeat_ms: config.heartbeat_interval_ms,
            election_ms: config.election_timeout_ms,
            request_timeout_ms,
            alone: facts.members.len() == 1,
        };
        let outlets = Outlets { logger: logger.clone(), applier: applier.clone(), peers: links };
        let machine = Driver::new(driver_config, replica, Arc::clone(&shared), outlets, clock);
        let applier_config = ApplierConfig {
            store: store_config,
            flush_entries: config.snapshot_count,
            flush_interval: FLUSH_INTERVAL,
            poll_interval: POLL_INTERVAL,
            slice_rows: SLICE_ROWS,
            batch_entries: BATCH_ENTRIES,
        };
        let writer = Applier::new(applier_config, state, store, view, Arc::clone(&shared));
        let counts = Arc::clone(&shared.counts);
        threads.spawn("raft-log", move || logger::run(log, &logger_jobs, &driver, &counts.log_fsync))?;
        threads.spawn("apply", move || {
            // The directory stays locked as long as its writer lives.
            let _dir = dir;
            writer.run(&applier_jobs)
        })?;
        let pumped = Arc::clone(&shared);
        threads.spawn("watch-pump", move || threads::pump(&pumped))?;
        threads.spawn("raft", move || machine.run(&driver_inputs))?;
        let election_ms = config.election_timeout_ms;
        Ok(Member { inbox, shared, threads, applier, logger, stop_peers, committed, election_ms })
    }

    /// Until this member has applied what its own log knew to be committed: before that, a serializable read could go
    /// back in time across a restart.
    pub(crate) async fn wait_applied(&self) {
        while self.shared.raft.applied() < self.committed {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// A leader that stops gives leadership to the peer that it has known for the longest time: one election, no timeout.
    async fn hand_over_leadership(&self) {
        let Some(successor) = self.shared.peers().longest_active() else { return };
        if !self.shared.raft.get().is_leader {
            return;
        }
        tracing::info!(to = %successor, "leadership transfer starting");
        let _ = self.shared.driver.push(Input::TransferLeader(successor));
        let moved = async {
            while self.shared.raft.get().is_leader {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let _ = tokio::time::timeout(Duration::from_millis(self.election_ms), moved).await;
    }

    /// The drain order; see the module.
    fn stop(mut self, clients: Option<Clients>) {
        if let Some(clients) = clients {
            clients.stop(GRACE);
        }
        self.stop_machines();
    }

    pub(crate) fn stop_machines(&mut self) {
        let _ = self.shared.driver.push(Input::Stop);
        self.threads.join("raft");
        let _ = self.applier.push(applier::Job::Stop);
        self.threads.join("apply");
        let _ = self.logger.push(logger::Job::Stop);
        self.threads.join("raft-log");
        self.shared.hub.stop();
        self.threads.join("watch-pump");
        self.stop_peers.cancel();
        self.threads.join("peers");
        tracing::info!("stopped");
    }
}
