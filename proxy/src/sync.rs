//! The loop between the source and the kernel: collect changes, plan, write, look after what comes later.
//!
//! ```text
//!  updates ─▶ State ─▶ Planner.update ─▶ Dataplane + Changes ─▶ Nft ─▶ kernel
//!                │                                               ├─▶ retire, about 100 ms later
//!             dirty?  first change: at once                      └─▶ stale UDP flows: now, and a second later
//!                     then: not before the window is over
//! ```
//! - **Nothing is written before the source has listed everything once.** Half a list looks like Services without
//!   endpoints. Until then the kernel keeps what it has, from before a restart, say.
//! - **The first change is written immediately**, and then none for a window of [`SHORTEST_WINDOW`] to [`LONGEST_WINDOW`], so that
//!   a burst costs few batches. The window is twice what the last sync took.
//! - **A refusal is retried** with longer and longer pauses; what changes meanwhile is collected. The backend reads the
//!   kernel anew after one. Nothing is verified periodically: the kernel tells who else touches our tables.
//!
//! The loop owns the state, the planner and the backend; nobody else touches them, so there is no lock. [`Syncer`] is
//! the loop's machine, a step at a time, without a clock of its own; [`run`] gives it one.
//!
//! What it does not do: it serves no health-check node ports yet.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use ipnet::IpNet;
use proxy_core::dataplane::{Changes, ServicePortId, ServicePortPlan, WhenEmpty};
use proxy_core::model::{NamespacedName, TrafficPolicy};
use proxy_core::plan::Planner;
use proxy_core::state::{Change, Kind, NodeConfig, State};
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;

use crate::addresses;
use crate::conntrack::{Conntrack, Stale};
use crate::health::Health;
use crate::metrics::{Extent, Metrics, Pending, family_index};
use crate::nft::kernel::Kernel;
use crate::nft::watch::{Foreign, Watch};
use crate::nft::{Applied, Nft, NftError};
use crate::source::{Listing, Update};

pub const SHORTEST_WINDOW: Duration = Duration::from_millis(10);
pub const LONGEST_WINDOW: Duration = Duration::from_millis(50);
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// How often the interfaces' addresses are read.
const ADDRESSES_EVERY: Duration = Duration::from_secs(2);
/// A sweep of connection tracking that failed is tried again after this.
const SWEEP_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// Whom the loop tells how it is doing.
#[derive(Clone, Debug)]
pub struct Told {
    pub health: Arc<Health>,
    pub metrics: Arc<Metrics>,
}

/// The loop's machine.
#[derive(Debug)]
pub struct Syncer<K> {
    state: State,
    planner: Planner,
    nft: Nft<K>,
    told: Told,
    /// As configured; what the cluster and the interfaces say is added at each sync.
    config: NodeConfig,
    listed: bool,
    service_cidrs: Vec<IpNet>,
    local_addresses: Vec<IpAddr>,
    /// There is something to write.
    dirty: bool,
    /// When writing is allowed again.
    not_before: Option<Instant>,
    retire_at: Option<Instant>,
    pause: Duration,
    /// Told of once, however often it is met in a row.
    last_error: Option<String>,
    first_done: bool,
    no_local: NoLocal,
}

/// Service ports whose traffic stays on this node and finds nobody here, though others have endpoints.
#[derive(Debug, Default)]
struct NoLocal {
    internal: [BTreeSet<ServicePortId>; 2],
    external: [BTreeSet<ServicePortId>; 2],
}

impl NoLocal {
    fn counts(&self) -> [[u64; 2]; 2] {
        [&self.internal, &self.external].map(|sets| [sets[0].len() as u64, sets[1].len() as u64])
    }
}

impl<K: Kernel> Syncer<K> {
    pub fn new(config: NodeConfig, nft: Nft<K>, told: Told) -> Syncer<K> {
        Syncer {
            state: State::new(),
            planner: Planner::new(config.clone()),
            nft,
            told,
            service_cidrs: config.service_cidrs.clone(),
            config,
            listed: false,
            local_addresses: Vec::new(),
            dirty: false,
            not_before: None,
            retire_at: None,
            pause: FIRST_PAUSE,
            last_error: None,
            first_done: false,
            no_local: NoLocal::default(),
        }
    }

    /// Takes in what the source reports.
    pub fn take(&mut self, update: Update) {
        let mut pending = Pending::default();
        match update {
            Update::Listed(listing) => self.take_listing(*listing, &mut pending),
            Update::Changed(changes) => changes.into_iter().for_each(|change| self.apply(change, &mut pending)),
            Update::ServiceCidrs(cidrs) => self.take_cidrs(cidrs),
            Update::Eligibility(eligibility) => return self.told.health.node(eligibility),
        }
        self.touch(pending);
    }

    fn take_listing(&mut self, listing: Listing, pending: &mut Pending) {
        let mut present: BTreeSet<_> = listing.unreadable.into_iter().collect();
        present.extend(listing.changes.iter().filter_map(set_by));
        for kind in [Kind::Service, Kind::EndpointSlice, Kind::Endpoints] {
            for name in self.state.names(kind) {
                if present.contains(&(kind, name.clone())) {
                    continue;
                }
                let gone = match kind {
                    Kind::Service => Change::ServiceGone(name),
                    Kind::EndpointSlice => Change::SliceGone(name),
                    _ => Change::EndpointsGone(name),
                };
                self.apply(gone, pending);
            }
        }
        if !present.iter().any(|(kind, _)| *kind == Kind::Node) {
            self.apply(Change::NodeGone, pending);
        }
        listing.changes.into_iter().for_each(|change| self.apply(change, pending));
        for kind in [Kind::Service, Kind::EndpointSlice, Kind::Endpoints, Kind::Node] {
            self.state.apply(Change::Synced(kind));
        }
        self.take_cidrs(listing.service_cidrs);
        self.told.health.node(listing.eligibility);
        self.listed = true;
    }

    fn apply(&mut self, change: Change, pending: &mut Pending) {
        match &change {
            Change::ServiceSet(_) | Change::ServiceGone(_) => pending.services += 1,
            Change::NodeSet(_) | Change::NodeGone | Change::Synced(_) => {}
            _ => pending.endpoints += 1,
        }
        self.state.apply(change);
    }

    fn take_cidrs(&mut self, cidrs: Vec<IpNet>) {
        // Where no API server keeps ServiceCIDRs, the flag says.
        self.service_cidrs = if cidrs.is_empty() { self.config.service_cidrs.clone() } else { cidrs };
    }

    fn touch(&mut self, pending: Pending) {
        self.dirty = true;
        let now = SystemTime::now();
        self.told.metrics.queued(pending, now);
        // Before the first listing nothing can be late: there is nothing to write yet.
        if self.listed {
            self.told.health.queued(now);
        }
    }

    /// Takes in the addresses of this node's interfaces.
    pub fn take_addresses(&mut self, addresses: Vec<IpAddr>) {
        if self.local_addresses != addresses {
            self.local_addresses = addresses;
            self.touch(Pending::default());
        }
    }

    /// Somebody else touched our tables, or may have.
    pub fn distrust(&mut self) {
        self.nft.distrust();
        self.touch(Pending::default());
    }

    /// When [`Syncer::step`] wants to be called, if nothing comes before.
    pub fn next_due(&self, now: Instant) -> Option<Instant> {
        let sync = (self.dirty && self.listed).then(|| self.not_before.unwrap_or(now));
        [sync, self.retire_at].into_iter().flatten().min()
    }

    /// Does what is due. Returns the UDP flows that lead nowhere any more.
    pub fn step(&mut self, now: Instant) -> Stale {
        if self.dirty && self.listed && self.not_before.is_none_or(|not_before| not_before <= now) {
            return self.sync(now);
        }
        if self.retire_at.is_some_and(|due| due <= now) {
            match self.nft.retire(now) {
                Ok(applied) => self.retire_at = applied.retire_at,
                Err(error) => {
                    self.told.metrics.cleanup_failed();
                    self.failed(&error);
                }
            }
        }
        Stale::default()
    }

    fn sync(&mut self, now: Instant) -> Stale {
        let config = self.node_config();
        self.planner.reconfigure(config);
        let changes = self.planner.update(&mut self.state);
        self.count_no_local(&changes);
        let extent = if self.first_done && self.last_error.is_none() { Extent::Partial } else { Extent::Full };
        let applied = match extent {
            Extent::Partial => self.nft.reconcile_changes(self.planner.dataplane(), &changes, now),
            Extent::Full => self.nft.reconcile(self.planner.dataplane(), now),
        };
        match applied {
            Ok(applied) => self.succeeded(extent, now, applied),
            Err(error) => {
                self.failed(&error);
                Stale::default()
            }
        }
    }

    /// The configuration, with what the cluster and the interfaces add to it.
    fn node_config(&self) -> NodeConfig {
        let mut config = self.config.clone();
        if self.state.node().is_none_or(|node| node.addresses.is_empty()) {
            config.node_ips = self.local_addresses.iter().copied().filter(|ip| addresses::is_global(*ip)).collect();
        }
        config.local_addresses.clone_from(&self.local_addresses);
        config.service_cidrs.clone_from(&self.service_cidrs);
        config
    }

    fn succeeded(&mut self, extent: Extent, began: Instant, applied: Applied) -> Stale {
        let took = began.elapsed();
        let now = SystemTime::now();
        let dataplane = self.planner.dataplane();
        self.told.metrics.synced(extent, took, now);
        let elements = applied.elements_added + applied.elements_deleted;
        self.told.metrics.written(dataplane.service_ports.len(), elements, applied.transactions);
        self.told.health.synced(now);
        for (id, reason) in &applied.unserved {
            tracing::warn!(service = %id, %reason, "not programmed");
        }
        let (added, deleted) = (applied.elements_added, applied.elements_deleted);
        let took_ms = took.as_secs_f64() * 1000.0;
        if !std::mem::replace(&mut self.first_done, true) {
            tracing::info!(
                services = self.state.services().count(),
                service_ports = dataplane.service_ports.len(),
                frontends = dataplane.frontends.len(),
                node_ports = dataplane.node_ports.len(),
                elements_added = added,
                elements_deleted = deleted,
                took_ms,
                "first sync done"
            );
        } else if self.last_error.is_some() {
            tracing::info!(elements_added = added, elements_deleted = deleted, took_ms, "synced again");
        } else if applied.transactions > 0 {
            tracing::debug!(
                elements_added = added,
                elements_deleted = deleted,
                bytes = applied.bytes,
                took_ms,
                "synced"
            );
        }
        self.dirty = false;
        self.last_error = None;
        self.pause = FIRST_PAUSE;
        self.retire_at = applied.retire_at;
        self.not_before = Some(Instant::now() + (took * 2).clamp(SHORTEST_WINDOW, LONGEST_WINDOW));
        applied.stale
    }

    fn failed(&mut self, error: &NftError) {
        self.told.metrics.sync_failed();
        let error = error.to_string();
        if self.last_error.as_ref() != Some(&error) {
            tracing::error!(%error, retry_in_ms = self.pause.as_millis(), "cannot write to the kernel");
        }
        self.last_error = Some(error);
        self.touch(Pending::default());
        self.retire_at = None;
        self.not_before = Some(Instant::now() + self.pause);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }

    fn count_no_local(&mut self, changes: &Changes) {
        for id in &changes.service_ports {
            let plan = self.planner.dataplane().service_ports.get(id);
            let alone = |policy: fn(&ServicePortPlan) -> TrafficPolicy| {
                plan.is_some_and(|plan| {
                    let local = plan.local.as_ref();
                    policy(plan) == TrafficPolicy::Local
                        && local.is_some_and(|set| set.list.is_empty() && set.when_empty == WhenEmpty::Drop)
                })
            };
            let family = family_index(id.family);
            for (set, is_alone) in [
                (&mut self.no_local.internal[family], alone(|plan| plan.internal_policy)),
                (&mut self.no_local.external[family], alone(|plan| plan.external_policy)),
            ] {
                if is_alone {
                    set.insert(id.clone());
                } else {
                    set.remove(id);
                }
            }
        }
        self.told.metrics.no_local_endpoints(self.no_local.counts());
    }
}

/// The object that a change sets.
fn set_by(change: &Change) -> Option<(Kind, NamespacedName)> {
    match change {
        Change::ServiceSet(service) => Some((Kind::Service, service.name.clone())),
        Change::SliceSet(slice) => Some((Kind::EndpointSlice, slice.name.clone())),
        Change::EndpointsSet(name, _) => Some((Kind::Endpoints, name.clone())),
        Change::NodeSet(node) => Some((Kind::Node, NamespacedName::new("", node.name.clone()))),
        _ => None,
    }
}

/// What the loop has of the kernel beside the backend; a test has neither.
#[derive(Debug, Default)]
pub struct Surroundings {
    pub watch: Option<AsyncFd<Watch>>,
    pub conntrack: Option<Conntrack>,
    /// When the next sweep may be, after one that failed.
    pub sweep_not_before: Option<Instant>,
}

impl Surroundings {
    fn next_sweep(&self) -> Option<Instant> {
        let due = self.conntrack.as_ref().and_then(Conntrack::next_due)?;
        Some(self.sweep_not_before.map_or(due, |not_before| due.max(not_before)))
    }

    fn sweep(&mut self, metrics: &Metrics) {
        let now = Instant::now();
        if self.next_sweep().is_none_or(|due| due > now) {
            return;
        }
        let Some(conntrack) = &mut self.conntrack else { return };
        self.sweep_not_before = None;
        match conntrack.sweep(now) {
            Ok(swept) => {
                metrics.conntrack_swept(now.elapsed(), swept.deleted);
                if swept.deleted > 0 {
                    tracing::debug!(seen = swept.seen, deleted = swept.deleted, "deleted stale UDP flows");
                }
            }
            Err(error) => {
                tracing::warn!(%error, "cannot look for stale UDP flows");
                self.sweep_not_before = Some(now + SWEEP_AGAIN_AFTER);
            }
        }
    }
}

/// Runs until the source's end of the queue is dropped. What is in the kernel stays there.
pub async fn run<K: Kernel>(
    mut syncer: Syncer<K>,
    mut surroundings: Surroundings,
    mut updates: mpsc::Receiver<Update>,
) -> io::Result<()> {
    let mut addresses_at = Instant::now();
    loop {
        let sweep_at = surroundings.next_sweep();
        let due = [syncer.next_due(Instant::now()), sweep_at, Some(addresses_at)]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or(addresses_at);
        tokio::select! {
            update = updates.recv() => {
                let Some(update) = update else { return Ok(()) };
                syncer.take(update);
                while let Ok(update) = updates.try_recv() {
                    syncer.take(update);
                }
            }
            foreign = heard(&mut surroundings.watch) => match foreign? {
                Foreign::Touched => {
                    tracing::warn!("somebody else changed our tables; reading them again");
                    syncer.distrust();
                }
                Foreign::Unknown => syncer.distrust(),
            },
            () = tokio::time::sleep_until(due.into()) => {}
        }
        let now = Instant::now();
        if addresses_at <= now {
            match addresses::local() {
                Ok(found) => syncer.take_addresses(found),
                Err(error) => tracing::warn!(%error, "cannot read the interfaces' addresses"),
            }
            addresses_at = now + ADDRESSES_EVERY;
        }
        if syncer.next_due(now).is_some_and(|due| due <= now) {
            let stale = syncer.step(now);
            if let Some(conntrack) = &mut surroundings.conntrack {
                conntrack.note(stale, now);
            }
        }
        surroundings.sweep(&syncer.told.metrics);
    }
}

/// Waits for news about our tables.
async fn heard(watch: &mut Option<AsyncFd<Watch>>) -> io::Result<Foreign> {
    let Some(watch) = watch else { return std::future::pending().await };
    loop {
        let mut ready = watch.readable_mut().await?;
        let found = ready.get_inner_mut().poll()?;
        ready.clear_ready();
        if let Some(foreign) = found {
            return Ok(foreign);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nft::fake::FakeKernel;
    use proxy_core::dataplane::Dataplane;
    use proxy_core::model::Family;
    use proxy_core::model::manifest::{self, Object};

    fn syncer() -> Syncer<FakeKernel> {
        let told = Told { health: Arc::new(Health::new(SystemTime::now())), metrics: Arc::new(Metrics::default()) };
        Syncer::new(NodeConfig::new("n1"), Nft::new(FakeKernel::default()), told)
    }

    fn changes(yaml: &str) -> Vec<Change> {
        let value: serde_norway::Value = serde_norway::from_str(yaml).unwrap();
        let objects = manifest::objects(1, &value).unwrap().into_iter();
        let change = |object| match object {
            Object::Service(service) => Change::ServiceSet(service.to_model(&mut Vec::new())),
            Object::EndpointSlice(slice) => Change::SliceSet(slice.to_model(&mut Vec::new()).unwrap()),
            Object::Node(node) => Change::NodeSet(node.to_model(&mut Vec::new())),
            other => panic!("{other:?}"),
        };
        objects.map(change).collect()
    }

    fn web(endpoint: &str) -> Vec<Change> {
        changes(&format!(
            "
apiVersion: v1
kind: List
items:
- {{apiVersion: v1, kind: Service, metadata: {{name: web}}, spec: {{clusterIP: 10.96.0.9, ports: [{{port: 80}}]}}}}
- apiVersion: discovery.k8s.io/v1
  kind: EndpointSlice
  metadata: {{name: web-1, labels: {{kubernetes.io/service-name: web}}}}
  addressType: IPv4
  ports: [{{port: 8080}}]
  endpoints: [{{addresses: [{endpoint}]}}]
"
        ))
    }

    fn listed(changes: Vec<Change>) -> Update {
        Update::Listed(Box::new(Listing { changes, ..Listing::default() }))
    }

    /// What packets would meet.
    fn serving(syncer: &mut Syncer<FakeKernel>) -> Vec<String> {
        let listing = syncer.nft.listing().unwrap().into_iter();
        listing.map(|listed| format!("{:?} {:?}", listed.address.unwrap(), listed.answer)).collect()
    }

    fn batches(syncer: &mut Syncer<FakeKernel>) -> usize {
        syncer.nft.kernel().batches.len()
    }

    #[test]
    fn nothing_is_written_before_everything_was_listed() {
        let mut syncer = syncer();
        syncer.take(Update::Changed(web("10.1.0.1")));
        syncer.take_addresses(vec!["192.0.2.1".parse().unwrap()]);
        let now = Instant::now();
        assert_eq!(syncer.next_due(now), None);
        assert!(syncer.step(now).is_empty());
        assert_eq!(batches(&mut syncer), 0);
        syncer.take(listed(web("10.1.0.1")));
        assert_eq!(syncer.next_due(now), Some(now), "the first change goes at once");
        syncer.step(now);
        assert_eq!(serving(&mut syncer), ["10.96.0.9 Endpoints([10.1.0.1:8080])"]);
    }

    #[test]
    fn changes_within_the_window_are_one_batch() {
        let mut syncer = syncer();
        syncer.take(listed(web("10.1.0.1")));
        syncer.step(Instant::now());
        let before = batches(&mut syncer);
        let now = Instant::now();
        for endpoint in ["10.1.0.2", "10.1.0.3"] {
            syncer.take(Update::Changed(web(endpoint)));
            syncer.step(now);
        }
        assert_eq!(batches(&mut syncer), before);
        let due = syncer.next_due(now).unwrap();
        assert!(due > now && due <= now + LONGEST_WINDOW, "{:?}", due - now);
        syncer.step(due);
        assert_eq!(batches(&mut syncer), before + 1);
        assert_eq!(serving(&mut syncer), ["10.96.0.9 Endpoints([10.1.0.3:8080])"]);
        assert_eq!(syncer.next_due(due).filter(|next| *next <= due), None, "all is done");
    }

    #[test]
    fn a_refusal_is_retried_and_loses_no_change() {
        let mut syncer = syncer();
        syncer.take(listed(web("10.1.0.1")));
        syncer.step(Instant::now());
        let owner = syncer.nft.kernel().owner_id();
        syncer.nft.kernel().tables.get_mut(&Family::V4).unwrap().own_by(owner + 7);
        syncer.take(Update::Changed(web("10.1.0.2")));
        let due = syncer.next_due(Instant::now()).unwrap();
        syncer.step(due);
        let again = syncer.next_due(due).expect("it is tried again");
        assert!(again > due);
        syncer.take(Update::Changed(web("10.1.0.3")));
        syncer.step(again);
        assert!(syncer.next_due(again).unwrap() > again, "still refused");
        syncer.nft.kernel().tables.get_mut(&Family::V4).unwrap().own_by(owner);
        let at_last = syncer.next_due(again).unwrap();
        syncer.step(at_last);
        assert_eq!(serving(&mut syncer), ["10.96.0.9 Endpoints([10.1.0.3:8080])"]);
        assert!(syncer.told.metrics.render().contains("nftables_sync_failures_total{ip_family=\"IPv4\"} 2\n"));
    }

    #[test]
    fn a_second_listing_removes_what_it_lacks_and_keeps_what_could_not_be_read() {
        let mut syncer = syncer();
        let mut all = web("10.1.0.1");
        let spec = "{clusterIP: 10.96.0.10, ports: [{port: 80}]}";
        all.extend(changes(&format!("{{apiVersion: v1, kind: Service, metadata: {{name: old}}, spec: {spec}}}")));
        syncer.take(listed(all));
        syncer.step(Instant::now());
        assert_eq!(serving(&mut syncer).len(), 2);
        let slice = web("10.1.0.1").pop().unwrap();
        let web = NamespacedName::new("default", "web");
        let unreadable = vec![(Kind::Service, web)];
        let listing = Listing { changes: vec![slice], unreadable, ..Listing::default() };
        syncer.take(Update::Listed(Box::new(listing)));
        let due = syncer.next_due(Instant::now()).unwrap();
        syncer.step(due);
        assert_eq!(serving(&mut syncer), ["10.96.0.9 Endpoints([10.1.0.1:8080])"]);
    }

    #[test]
    fn without_a_node_object_the_interfaces_tell_the_nodes_addresses() {
        let mut syncer = syncer();
        syncer.take_addresses(["127.0.0.1", "192.0.2.1", "fe80::1"].map(|ip| ip.parse().unwrap()).to_vec());
        syncer.take(listed(Vec::new()));
        syncer.step(Instant::now());
        let answering = |dataplane: &Dataplane| format!("{}", dataplane.node);
        assert!(answering(syncer.planner.dataplane()).contains("node ports: 192.0.2.1\n"));
        let node = "{apiVersion: v1, kind: Node, metadata: {name: n1}, \
                    status: {addresses: [{type: InternalIP, address: 192.0.2.7}]}}";
        syncer.take(Update::Changed(changes(node)));
        let due = syncer.next_due(Instant::now()).unwrap();
        syncer.step(due);
        assert!(answering(syncer.planner.dataplane()).contains("node ports: 192.0.2.7\n"));
    }
}
