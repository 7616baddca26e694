//! The store as a source: Kubernetes' objects under `/registry/`, by list and watch over the etcd API.
//!
//! ```text
//!  list all prefixes at one revision R ─▶ Listing        one stream, a watcher a prefix, from R + 1 ─▶ Changed
//!        ▲                                                      │ broken: the next endpoint, from where each watcher was
//!        └──────────── compacted, or another cluster ◀──────────┘
//! ```
//! Everything is listed at one revision, so no object is newer than another that it belongs to. The watchers ask for
//! progress, so that one that sees no events still moves on and does not fall behind a compaction, and for a leader, so that a
//! member that was cut off ends the stream instead of falling silent.
//!
//! A value that cannot be read is logged with its key and counted; what was known of the object still holds.
//!
//! What it does not do: it does not filter by labels (the planner does) and keeps no copy of what it has reported.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ipnet::IpNet;
use keelson_proto::etcdserverpb::watch_request::RequestUnion;
use keelson_proto::etcdserverpb::{RangeRequest, WatchCreateRequest, WatchRequest, WatchResponse};
use keelson_proto::mvccpb::KeyValue;
use keelson_proto::mvccpb::event::EventType;
use proxy_core::model::NamespacedName;
use proxy_core::model::convert::FieldError;
use proxy_core::state::{Change, Kind as StateKind};
use tokio::sync::mpsc;

use super::{Listing, Update};
use crate::etcd::{Bring, Etcd, EtcdError};
use crate::metrics::Metrics;
use crate::storage::decode::{self, Eligibility};
use crate::storage::{Keys, Kind, StorageError, prefix_end};

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// The kinds that are followed. The watcher of each has its place in here, counted from 1, as its id.
const KINDS: [Kind; 5] = [Kind::Service, Kind::EndpointSlice, Kind::Endpoints, Kind::Node, Kind::ServiceCidr];

/// Reports what the store holds for one node.
#[derive(Debug)]
pub struct StoreSource {
    etcd: Etcd,
    keys: Keys,
    node_name: Arc<str>,
    updates: mpsc::Sender<Update>,
    metrics: Arc<Metrics>,
    /// ServiceCIDR → its ranges.
    cidrs: BTreeMap<String, Vec<IpNet>>,
}

/// Nobody listens any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Closed;

/// From where each watcher goes on, and in which cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Position {
    next: [i64; KINDS.len()],
    cluster_id: u64,
}

/// Why following ended.
#[derive(Debug)]
enum Ended {
    Closed,
    /// The stream broke; another one can go on.
    Broken(String),
    /// What comes next cannot be had: list again.
    Relist(String),
}

impl From<Closed> for Ended {
    fn from(_: Closed) -> Ended {
        Ended::Closed
    }
}

/// What a stored value says.
enum Said {
    Changes(Vec<Change>),
    Cidrs(Vec<IpNet>),
    Node(Change, Eligibility),
}

impl StoreSource {
    pub fn new(
        etcd: Etcd,
        keys: Keys,
        node_name: Arc<str>,
        updates: mpsc::Sender<Update>,
        metrics: Arc<Metrics>,
    ) -> StoreSource {
        StoreSource { etcd, keys, node_name, updates, metrics, cidrs: BTreeMap::new() }
    }

    /// Lists and follows until nobody listens any more.
    pub async fn run(mut self) {
        let mut pause = FIRST_PAUSE;
        loop {
            let listed = self.list().await;
            let reason = match listed {
                Ok(Ok(position)) => {
                    pause = FIRST_PAUSE;
                    match self.follow(position).await {
                        Ended::Closed => return,
                        Ended::Broken(reason) | Ended::Relist(reason) => {
                            tracing::info!(%reason, "listing again");
                            continue;
                        }
                    }
                }
                Ok(Err(Closed)) => return,
                Err(error) => error.to_string(),
            };
            if self.updates.is_closed() {
                return;
            }
            tracing::warn!(%reason, "cannot list the store");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Reports everything, as of one revision.
    async fn list(&mut self) -> Result<Result<Position, Closed>, EtcdError> {
        let mut listing = Listing::default();
        let mut revision = 0;
        let mut cluster_id = 0;
        let mut cidrs = BTreeMap::new();
        for kind in KINDS {
            let kvs = if kind == Kind::Node {
                let key = self.keys.node(&self.node_name).into();
                self.etcd.range(RangeRequest { key, revision, ..Default::default() }).await?.kvs
            } else {
                let listed = self.etcd.list(&self.keys.all(kind), revision, Bring::Values).await?;
                revision = listed.revision;
                cluster_id = listed.cluster_id;
                listed.kvs
            };
            for kv in kvs {
                match self.read(kind, &kv) {
                    Some(Said::Changes(changes)) => listing.changes.extend(changes),
                    Some(Said::Cidrs(ranges)) => {
                        cidrs.insert(self.cidr_name(&kv.key), ranges);
                    }
                    Some(Said::Node(change, eligibility)) => {
                        listing.changes.push(change);
                        listing.eligibility = Some(eligibility);
                    }
                    None => listing.unreadable.extend(self.name_of(kind, &kv.key)),
                }
            }
        }
        self.cidrs = cidrs;
        listing.service_cidrs = self.all_cidrs();
        let position = Position { next: [revision + 1; KINDS.len()], cluster_id };
        Ok(self.send(Update::Listed(Box::new(listing))).await.map(|()| position))
    }

    async fn send(&self, update: Update) -> Result<(), Closed> {
        self.updates.send(update).await.map_err(|_| Closed)
    }

    /// Follows changes from `position`, over as many streams as it takes.
    async fn follow(&mut self, mut position: Position) -> Ended {
        let mut pause = FIRST_PAUSE;
        loop {
            let before = position;
            match self.stream(&mut position).await {
                Ended::Broken(reason) => {
                    tracing::warn!(%reason, "the watch broke; trying the next endpoint");
                    self.etcd.move_on();
                }
                ended => return ended,
            }
            // A stream that brought something ends a row of failures.
            if position != before {
                pause = FIRST_PAUSE;
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.updates.closed() => return Ended::Closed,
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// One stream, until it ends.
    async fn stream(&mut self, position: &mut Position) -> Ended {
        let mut stream = match self.etcd.watch(self.creates(position)).await {
            Ok(stream) => stream,
            Err(error) => return Ended::Broken(error.to_string()),
        };
        loop {
            let updates = self.updates.clone();
            let response = tokio::select! {
                response = stream.responses.message() => response,
                () = updates.closed() => return Ended::Closed,
            };
            let response = match response {
                Ok(Some(response)) => response,
                Ok(None) => return Ended::Broken("the store ended the stream".into()),
                Err(status) => return Ended::Broken(status.message().to_owned()),
            };
            if let Err(ended) = self.take(position, response).await {
                return ended;
            }
        }
    }

    fn creates(&self, position: &Position) -> Vec<WatchRequest> {
        let create = |(i, kind): (usize, &Kind)| {
            let (key, range_end) = match kind {
                Kind::Node => (self.keys.node(&self.node_name), Bytes::new()),
                kind => {
                    let prefix = self.keys.all(*kind);
                    let end = prefix_end(&prefix);
                    (prefix, end)
                }
            };
            let create = WatchCreateRequest {
                key: key.into(),
                range_end,
                start_revision: position.next[i],
                progress_notify: true,
                watch_id: i as i64 + 1,
                ..Default::default()
            };
            WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) }
        };
        KINDS.iter().enumerate().map(create).collect()
    }

    /// Takes in one response of a watch stream.
    async fn take(&mut self, position: &mut Position, response: WatchResponse) -> Result<(), Ended> {
        let header = response.header.unwrap_or_default();
        if header.cluster_id != position.cluster_id {
            return Err(Ended::Relist("the store is another cluster now".into()));
        }
        if response.canceled {
            return Err(if response.compact_revision > 0 {
                Ended::Relist(format!("the store has compacted up to {}", response.compact_revision))
            } else {
                Ended::Broken(format!("the store canceled the watch: {}", response.cancel_reason))
            });
        }
        let Some(i) = usize::try_from(response.watch_id - 1).ok().filter(|i| *i < KINDS.len()) else { return Ok(()) };
        if response.created {
            return self.check_not_in_the_future(position.next[i], header.revision).await;
        }
        let Some(last) = response.events.iter().filter_map(|event| event.kv.as_ref()).map(|kv| kv.mod_revision).max()
        else {
            // Progress: there was nothing for this watcher up to here.
            position.next[i] = position.next[i].max(header.revision + 1);
            return Ok(());
        };
        self.report(KINDS[i], response).await?;
        position.next[i] = last + 1;
        Ok(())
    }

    /// A watch that begins in the future waits there silently. A member that lags behind catches up; a store whose
    /// revisions went back (it was restored from a backup) has to be listed again.
    async fn check_not_in_the_future(&self, next: i64, revision: i64) -> Result<(), Ended> {
        if revision + 1 >= next {
            return Ok(());
        }
        let key = self.keys.node(&self.node_name).into();
        let newest = self.etcd.range(RangeRequest { key, keys_only: true, ..Default::default() }).await;
        let newest = newest.map_err(|error| Ended::Broken(error.to_string()))?.header.unwrap_or_default().revision;
        if newest + 1 >= next {
            return Ok(());
        }
        Err(Ended::Relist(format!("the store went back to revision {newest}")))
    }

    async fn report(&mut self, kind: Kind, response: WatchResponse) -> Result<(), Closed> {
        let mut changes = Vec::new();
        let mut eligibility = None;
        let mut cidrs_changed = false;
        for event in response.events {
            let deleted = event.r#type() == EventType::Delete;
            let Some(kv) = event.kv else { continue };
            if kind == Kind::ServiceCidr {
                let name = self.cidr_name(&kv.key);
                if deleted {
                    self.cidrs.remove(&name);
                } else if let Some(Said::Cidrs(ranges)) = self.read(kind, &kv) {
                    self.cidrs.insert(name, ranges);
                }
                cidrs_changed = true;
            } else if deleted {
                changes.extend(self.gone(kind, &kv.key));
                if kind == Kind::Node {
                    eligibility = Some(None);
                }
            } else {
                match self.read(kind, &kv) {
                    Some(Said::Changes(more)) => changes.extend(more),
                    Some(Said::Node(change, now)) => {
                        changes.push(change);
                        eligibility = Some(Some(now));
                    }
                    Some(Said::Cidrs(_)) | None => {}
                }
            }
        }
        if !changes.is_empty() {
            self.send(Update::Changed(changes)).await?;
        }
        if let Some(eligibility) = eligibility {
            self.send(Update::Eligibility(eligibility)).await?;
        }
        if cidrs_changed {
            self.send(Update::ServiceCidrs(self.all_cidrs())).await?;
        }
        Ok(())
    }

    fn all_cidrs(&self) -> Vec<IpNet> {
        self.cidrs.values().flatten().copied().collect()
    }

    fn cidr_name(&self, key: &[u8]) -> String {
        String::from_utf8_lossy(key).into_owned()
    }

    /// What a value says; `None` if it cannot be read, which is logged and counted.
    fn read(&self, kind: Kind, kv: &KeyValue) -> Option<Said> {
        let mut notes = Vec::new();
        let said = self.decode(kind, kv, &mut notes);
        for note in notes {
            tracing::warn!(key = %String::from_utf8_lossy(&kv.key), field = %note.field, reason = %note.reason, "ignored");
        }
        match said {
            Ok(said) => said,
            Err(error) => {
                tracing::error!(key = %String::from_utf8_lossy(&kv.key), %error, "not readable");
                self.metrics.unreadable_value(kind.name());
                None
            }
        }
    }

    /// An object goes by the name in its key: that is what its deletion will bring.
    fn decode(&self, kind: Kind, kv: &KeyValue, notes: &mut Vec<FieldError>) -> Result<Option<Said>, StorageError> {
        if kind == Kind::ServiceCidr {
            return decode::service_cidrs(&kv.value).map(|ranges| Some(Said::Cidrs(ranges)));
        }
        if kind == Kind::Node {
            let (mut node, eligibility) = decode::node(&kv.value, notes)?;
            node.name = self.node_name.clone();
            return Ok(Some(Said::Node(Change::NodeSet(node), eligibility)));
        }
        let Some((namespace, name)) = self.keys.split(kind, &kv.key) else {
            return Ok(Some(Said::Changes(Vec::new())));
        };
        let name = NamespacedName::new(namespace, name);
        let change = match kind {
            Kind::Service => {
                let mut service = decode::service(&kv.value, notes)?;
                service.name = name;
                Change::ServiceSet(service)
            }
            Kind::EndpointSlice => match decode::endpoint_slice(&kv.value, notes)? {
                Some(mut slice) => {
                    slice.name = name;
                    Change::SliceSet(slice)
                }
                None => Change::SliceGone(name),
            },
            _ => Change::EndpointsSet(name, decode::endpoints(&kv.value, notes)?),
        };
        Ok(Some(Said::Changes(vec![change])))
    }

    fn gone(&self, kind: Kind, key: &[u8]) -> Option<Change> {
        let (kind, name) = self.name_of(kind, key)?;
        Some(match kind {
            StateKind::Service => Change::ServiceGone(name),
            StateKind::EndpointSlice => Change::SliceGone(name),
            StateKind::Endpoints => Change::EndpointsGone(name),
            StateKind::Node => Change::NodeGone,
        })
    }

    fn name_of(&self, kind: Kind, key: &[u8]) -> Option<(StateKind, NamespacedName)> {
        let state_kind = match kind {
            Kind::Service => StateKind::Service,
            Kind::EndpointSlice => StateKind::EndpointSlice,
            Kind::Endpoints => StateKind::Endpoints,
            Kind::Node => return Some((StateKind::Node, NamespacedName::new("", self.node_name.clone()))),
            _ => return None,
        };
        let (namespace, name) = self.keys.split(kind, key)?;
        Some((state_kind, NamespacedName::new(namespace, name)))
    }
}
