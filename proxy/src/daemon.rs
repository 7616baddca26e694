//! The proxy, running: opens the kernel, starts the source, the sync loop and the two HTTP servers, and waits for a signal.
//!
//! The sync loop has a thread and a runtime of its own, because writing to the kernel blocks it; everything else shares the
//! main thread. On SIGTERM or SIGINT the source stops, the loop finishes the batch it is at, and the process ends; the
//! rules stay in the kernel, as kube-proxy's do, and the next start adopts them.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, SystemTime};

use proxy_core::state::NodeConfig;
use tokio::io::unix::AsyncFd;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};

use crate::config::ProxyConfig;
use crate::conntrack::Conntrack;
use crate::etcd::{Etcd, EtcdError};
use crate::health::{self, Answers, Health, Server};
use crate::metrics::Metrics;
use crate::nft::watch::Watch;
use crate::nft::{Nft, NftError};
use crate::source::{self, Update, store::StoreSource};
use crate::sync::{self, Surroundings, Syncer, Told};

/// How long a call to the store goes from endpoint to endpoint before the source says so and begins again.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    #[error("nftables: {0}")]
    Nft(#[from] NftError),
    #[error("{what}: {error}")]
    Io { what: &'static str, error: io::Error },
    #[error(transparent)]
    Etcd(#[from] EtcdError),
    #[error("the sync loop ended early")]
    SyncPanicked,
}

fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> DaemonError {
    move |error| DaemonError::Io { what, error }
}

/// Runs until a signal, or until something without which there is no proxy has failed.
pub async fn run(config: ProxyConfig) -> Result<(), DaemonError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(io_error("signals"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(io_error("signals"))?;
    let etcd = Etcd::new(&config.store.endpoints, PATIENCE)?;
    let told = Told { health: Arc::new(Health::new(SystemTime::now())), metrics: Arc::new(Metrics::default()) };
    tracing::info!(node = %config.node_name, store = %config.store, version = env!("CARGO_PKG_VERSION"), "starting");

    let (updates, receiver) = mpsc::channel(source::QUEUE);
    let (ended, mut sync_ended) = oneshot::channel();
    let (node, sync_told) = (node_config(&config), told.clone());
    let sync_thread = thread::Builder::new().name("sync".into()).spawn(move || {
        // Nobody listens any more: the process is ending anyway.
        let _ = ended.send(sync_loop(node, sync_told, receiver));
    });
    let sync_thread = sync_thread.map_err(io_error("thread"))?;

    let keys = config.store.keys.clone();
    let source = StoreSource::new(etcd, keys, config.node_name.clone(), updates, told.metrics.clone());
    let source = tokio::spawn(source.run());
    let answers = Answers { health: told.health, metrics: told.metrics };
    for (server, address) in [(Server::Health, config.healthz), (Server::Metrics, config.metrics)] {
        if let Some(address) = address {
            tokio::spawn(health::serve(server, address, answers.clone()));
        }
    }

    let result = tokio::select! {
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
        ended = &mut sync_ended => Some(ended.unwrap_or(Err(DaemonError::SyncPanicked))),
    };
    if let Some(result) = result {
        return result;
    }
    tracing::info!("stopping; the rules stay");
    // With the source goes the sender of updates, and with that the sync loop, after the batch it is at.
    source.abort();
    let _ = source.await;
    let result = sync_ended.await.unwrap_or(Err(DaemonError::SyncPanicked));
    let _ = sync_thread.join();
    result
}

fn node_config(config: &ProxyConfig) -> NodeConfig {
    let mut node = NodeConfig::new(config.node_name.clone());
    node.node_port_addresses = config.node_port_addresses.clone();
    node.detect_local = config.detect_local.clone();
    node.masquerade_all = config.masquerade_all;
    node.masquerade_bit = config.masquerade_bit;
    node.service_cidrs = config.service_cidrs.clone();
    node
}

/// The thread of the sync loop: opens the kernel, and runs.
fn sync_loop(node: NodeConfig, told: Told, updates: mpsc::Receiver<Update>) -> Result<(), DaemonError> {
    let nft = Nft::open()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(io_error("runtime"))?;
    runtime.block_on(async {
        let watch = Watch::open(nft.port()).map_err(io_error("nftables notifications"))?;
        // SAFETY: a Watch owns its socket, never replaces it, and names no other descriptor.
        let watch = unsafe { AsyncFd::register(watch) }
            .map_err(|error| io_error("nftables notifications")(error.into_parts().1))?;
        let conntrack = match Conntrack::open() {
            Ok(conntrack) => Some(conntrack),
            Err(error) => {
                tracing::warn!(%error, "no connection tracking: stale UDP flows will stay");
                None
            }
        };
        let surroundings = Surroundings { watch: Some(watch), conntrack, sweep_not_before: None };
        sync::run(Syncer::new(node, nft, told), surroundings, updates).await.map_err(io_error("nftables notifications"))
    })
}
