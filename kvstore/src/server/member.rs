//! A member's machines: made from what the disk holds, started in one order and stopped in another.

use std::net::TcpListener;
use std::sync::atomic::AtomicI64;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use kvstore_core::Fatal;
use kvstore_core::backend::Backend;
use kvstore_core::replica::{Boot, Position, Replica, ReplicaConfig, wire};
use kvstore_core::store::{Store, StoreConfig, view};
use kvstore_core::types::Index;
use kvstore_core::watch::{WatchHub, WatchLimits};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::threads::{self, Threads};
use super::{ServerError, identity};
use crate::applier::{self, Applier, ApplierConfig};
use crate::clock::Clock;
use crate::config::{Config, Url};
use crate::disk::{Disk, Log, Owner, Rocks, View};
use crate::driver::{Driver, DriverConfig, Input, Outlets};
use crate::inbox::{Edge, Hub, Identity, Inbox, InboxLimits, PublishedCell, RaftCell, RequestIds, Shared};
use crate::logger;
use crate::mailbox::{Mailbox, mailbox};
use crate::peer::{self, Ids, PeerService, Peers};
use crate::rpc::GRPC_OVERHEAD_BYTES;

/// A proposal may wait so long, and two election timeouts more (etcd).
const REQUEST_TIMEOUT_MS: u64 = 5_000;
/// How far the commit may run ahead of the apply (etcd).
const MAX_COMMIT_TO_APPLY_GAP: u64 = 5_000;
/// Bytes of proposals that may wait for their outcomes: some hundreds of the largest.
const MAX_WAITING_BYTES: usize = 512 << 20;
/// The records that the applier keeps at hand, in bytes.
const RECORD_CACHE_BYTES: usize = 32 << 20;
const FLUSH_INTERVAL: Duration = Duration::from_secs(2);
const POLL_INTERVAL: Duration = Duration::from_millis(200);
const SLICE_ROWS: usize = 400;
const BATCH_ENTRIES: usize = 4_096;
/// The same, in bytes.
const BATCH_BYTES: usize = 8 << 20;

/// A member's machines, running.
pub(super) struct Member {
    pub(super) inbox: Inbox,
    pub(super) shared: Arc<Shared>,
    threads: Threads,
    applier: Mailbox<applier::Job>,
    logger: Mailbox<logger::Job>,
    stop_peers: CancellationToken,
    pub(super) clock: Clock,
    /// The commit that the log knew at the start: served is only what has applied it.
    committed: Index,
    election_ms: u64,
}

impl Member {
    pub(super) fn start(config: &Config, listeners: Vec<TcpListener>, disk: Disk) -> Result<Member, ServerError> {
        let Disk { owner, log, state, dir } = disk;
        let clock = Clock::start();
        let Recovered { store, view, replica, committed } = recover(config, &owner, &log, &state)?;
        let (driver, driver_inputs) = mailbox();
        let (applier, applier_jobs) = mailbox();
        let (logger, logger_jobs) = mailbox();
        let shared = shared(config, &owner, &store, &view, driver.clone());
        let inbox = Inbox::new(Arc::clone(&shared), Edge::direct());

        let mut threads = Threads::new();
        let stop_peers = CancellationToken::new();
        let ids = Ids { cluster: owner.cluster_id, member: owner.member_id };
        let service = PeerService::new(ids, driver.clone(), inbox.clone(), state.nursery());
        let runtime = threads.runtime("peers", peer::serve(listeners, service, stop_peers.clone()))?;
        let members = store.facts().members;
        let links = Peers::connect(ids, &members, driver.clone(), clock, runtime, &stop_peers);
        let _ = shared.peers.set(links.clone());

        let outlets = Outlets { logger: logger.clone(), applier: applier.clone(), peers: links };
        let driver_config = driver_config(config, &owner, members.len() == 1);
        let raft = Driver::new(driver_config, replica, Arc::clone(&shared), outlets, clock);
        let writer = Applier::new(applier_config(config, &owner), state, store, view, Arc::clone(&shared));
        let counts = Arc::clone(&shared.counts);
        threads.spawn("raft-log", move || logger::run(log, &logger_jobs, &driver, &counts.log_fsync))?;
        threads.spawn("apply", move || {
            // The directory stays locked as long as its writer lives.
            let _dir = dir;
            writer.run(&applier_jobs)
        })?;
        let pumped = Arc::clone(&shared);
        threads.spawn("watch-pump", move || threads::pump(&pumped))?;
        threads.spawn("raft", move || raft.run(&driver_inputs))?;
        let election_ms = config.election_timeout_ms;
        Ok(Member { inbox, shared, threads, applier, logger, stop_peers, clock, committed, election_ms })
    }

    /// What ends this member early. To be asked for once.
    pub(super) fn failures(&mut self) -> mpsc::UnboundedReceiver<Fatal> {
        self.threads.failures()
    }

    pub(super) fn peers(&self) -> Peers {
        self.shared.peers().clone()
    }

    /// Until this member has applied what its own log knew to be committed: before that, a serializable read could go
    /// back in time across a restart.
    pub(super) async fn wait_applied(&self) {
        while self.shared.raft.applied() < self.committed {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// A leader that stops gives leadership to the peer that it has known for the longest time: one election, no timeout.
    pub(super) async fn hand_over_leadership(&self) {
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

    /// The rest of the drain order (see `server.rs`): nobody asks any more.
    pub(super) fn stop(&mut self) {
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

/// What the disk held, as machines.
struct Recovered {
    store: Store,
    view: View,
    replica: Replica,
    committed: Index,
}

fn recover(config: &Config, owner: &Owner, log: &Log, state: &Rocks) -> Result<Recovered, Fatal> {
    let view = state.view();
    let store = Store::open(&view, store_config(config, owner))?;
    let facts = store.facts();
    let replica_config = replica_config(config, owner);
    let applied = Position { index: facts.applied_index, term: facts.applied_term };
    let recovered = log.recover(applied.index, replica_config.tail_bytes)?;
    let committed = match &recovered.hard_state {
        Some(stored) => wire::hard_state(stored)?.2,
        None => 0,
    };
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
    let replica = Replica::new(replica_config, boot, identity::random())?;
    Ok(Recovered { store, view, replica, committed })
}

/// What the threads and the edge share.
fn shared(config: &Config, owner: &Owner, store: &Store, view: &View, driver: Mailbox<Input>) -> Arc<Shared> {
    let facts = store.facts();
    let fragment_bytes = config.max_request_bytes + GRPC_OVERHEAD_BYTES;
    let watch_limits = WatchLimits { fragment_bytes, ..WatchLimits::default() };
    let urls = |urls: &[Url]| urls.iter().map(Url::to_string).collect();
    let shared = Shared {
        identity: Identity {
            cluster_id: owner.cluster_id,
            member_id: owner.member_id,
            name: config.name.clone(),
            peer_urls: urls(&config.advertise_peer_urls),
            client_urls: urls(&config.advertise_client_urls),
        },
        limits: InboxLimits {
            max_request_bytes: config.max_request_bytes,
            max_commit_to_apply_gap: MAX_COMMIT_TO_APPLY_GAP,
            max_waiting_bytes: MAX_WAITING_BYTES,
            request_timeout: Duration::from_millis(request_timeout_ms(config)),
        },
        driver,
        hub: Hub::new(WatchHub::new(watch_limits, facts.revision, facts.compacted)),
        raft: RaftCell::default(),
        ids: RequestIds::new(owner.member_id),
        waiting_bytes: Arc::default(),
        disk_size: AtomicI64::new(0),
        counts: Arc::default(),
        peers: OnceLock::new(),
        published: PublishedCell::new(store.publish(view.clone())),
    };
    shared.raft.set_applied(store.facts().applied_index);
    Arc::new(shared)
}

fn request_timeout_ms(config: &Config) -> u64 {
    REQUEST_TIMEOUT_MS + 2 * config.election_timeout_ms
}

fn store_config(config: &Config, owner: &Owner) -> StoreConfig {
    StoreConfig {
        member_id: owner.member_id,
        quota_backend_bytes: config.quota_backend_bytes,
        record_cache_bytes: RECORD_CACHE_BYTES,
    }
}

fn replica_config(config: &Config, owner: &Owner) -> ReplicaConfig {
    ReplicaConfig::new(owner.member_id, config.heartbeat_interval_ms, config.election_timeout_ms)
}

fn driver_config(config: &Config, owner: &Owner, alone: bool) -> DriverConfig {
    DriverConfig {
        replica: replica_config(config, owner),
        heartbeat_ms: config.heartbeat_interval_ms,
        election_ms: config.election_timeout_ms,
        request_timeout_ms: request_timeout_ms(config),
        lease_checkpoint_ms: config.lease_checkpoint_interval.map(|interval| interval.as_millis() as u64),
        alone,
        shorten_first_election: config.initial_election_tick_advance,
    }
}

fn applier_config(config: &Config, owner: &Owner) -> ApplierConfig {
    ApplierConfig {
        store: store_config(config, owner),
        flush_entries: config.snapshot_count,
        flush_interval: FLUSH_INTERVAL,
        poll_interval: POLL_INTERVAL,
        slice_rows: SLICE_ROWS,
        batch_entries: BATCH_ENTRIES,
        batch_bytes: BATCH_BYTES,
    }
}
