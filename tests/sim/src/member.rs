//! One member: its disks, and while it runs the same machines that the real shell drives, with what their threads have in
//! hand.
//!
//! What it does not do: decide when anything happens ([`crate::cluster`] does).

use std::collections::{BTreeMap, VecDeque};

use kvstore_core::Fatal;
use kvstore_core::backend::memory::{MemoryInstall, MemoryView};
use kvstore_core::backend::{Backend, Install as _, Table, WriteBatch};
use kvstore_core::pending::Pending;
use kvstore_core::replica::{Fetch, Install, Position, Replica, ReplicaConfig, SnapshotTicket};
use kvstore_core::store::{Applied, Facts, Founder, Published, Store, StoreConfig};
use kvstore_core::types::{ClusterId, Entry, MemberId, RequestId, Ticks};
use kvstore_core::watch::{CatchUp, WatchHub};

use crate::clock::Micros;
use crate::cluster::leases::Leases;
use crate::disk::{Disk, LogDisk};
use crate::rng::Rng;
use crate::watcher;
use crate::workload::CallId;

pub const ELECTION_TICKS: Ticks = 10;
/// A client is answered after so long at the latest, in ticks: etcd's 5 s and two election timeouts.
pub const TIMEOUT_TICKS: Ticks = 50 + 2 * ELECTION_TICKS;
pub const FOUNDED: Position = Position { index: 1, term: 1 };

pub struct Member {
    pub id: MemberId,
    /// Counts starts; what was planned for an earlier life does not happen.
    pub life: u64,
    pub disk: Disk,
    pub running: Option<Running>,
    pub slow_disk: bool,
    /// The whole process stands still until then.
    pub paused_until: Micros,
}

pub struct Running {
    pub replica: Replica,
    pub store: Store,
    pub published: Published<MemoryView>,
    pub pending: Pending<CallId>,
    /// Reads by their number, as the client asked them.
    pub reads: BTreeMap<CallId, keelson_proto::etcdserverpb::RangeRequest>,
    pub ticks: Ticks,
    /// The apply thread's queue.
    pub jobs: VecDeque<Job>,
    pub applying: bool,
    pub since_flush: u64,
    pub fetches: VecDeque<Fetch>,
    pub received: BTreeMap<SnapshotTicket, MemoryInstall>,
    pub hub: WatchHub,
    /// A slice of history that was read outside the hub's lock, not handed in yet.
    pub catching_up: Option<CatchUp>,
    pub leases: Leases,
    pub requests: u64,
    pub rounds: u64,
    pub tickets: u64,
}

#[derive(Debug)]
pub enum Job {
    Apply(Vec<Entry>),
    Install(Install),
}

impl Member {
    /// A founder that never ran.
    pub fn founded(id: MemberId, ids: &[MemberId]) -> Result<Member, Fatal> {
        let founders: Vec<Founder> = ids
            .iter()
            .map(|id| Founder {
                id: *id,
                name: format!("member-{id}"),
                peer_urls: vec![format!("http://10.0.0.{id}:2380")],
            })
            .collect();
        let mut disk = Disk { log: LogDisk::default(), state: Default::default(), installed: Some(FOUNDED) };
        disk.state.write(Store::bootstrap(&founders, ClusterId(7)))?;
        disk.state.start_flush()?;
        disk.state.complete_flush();
        Ok(Member { id, life: 0, disk, running: None, slow_disk: false, paused_until: 0 })
    }

    pub fn start(&mut self, rng: &mut Rng, seed: u64) -> Result<(), Fatal> {
        self.life += 1;
        let boot = self.disk.boot(rng.draw(), rng.below(20))?;
        let config = ReplicaConfig {
            max_size_per_msg: 400,
            max_inflight_msgs: 8,
            max_committed_size: 1_000,
            tail_bytes: 1_500,
            catch_up_entries: 20,
            cut_step: 5,
            ..ReplicaConfig::new(self.id, 100, 1_000)
        };
        let replica = Replica::new(config, boot, seed)?;
        let view = self.disk.state.view();
        let store = Store::open(&view, store_config(self.id))?;
        let facts = store.facts();
        let hub = WatchHub::new(watcher::limits(), facts.revision, facts.compacted);
        self.running = Some(Running {
            replica,
            published: store.publish(view),
            store,
            pending: Pending::new(ELECTION_TICKS),
            reads: BTreeMap::new(),
            ticks: 0,
            jobs: VecDeque::new(),
            applying: false,
            since_flush: 0,
            fetches: VecDeque::new(),
            received: BTreeMap::new(),
            hub,
            catching_up: None,
            leases: Leases::default(),
            requests: 0,
            rounds: 0,
            tickets: 0,
        });
        Ok(())
    }

    /// The next job of the apply thread, done: applied, written and published.
    pub fn apply(&mut self, entries: &[Entry]) -> Result<(Applied, Facts), Fatal> {
        let running = self.running.as_mut().expect("it runs: its apply thread does");
        let mut batch = WriteBatch::new();
        let applied = running.store.apply(&self.disk.state.view(), entries, &mut batch)?;
        self.disk.state.write(batch)?;
        running.published = running.store.publish(self.disk.state.view());
        running.hub.publish(running.published.facts.revision, applied.events.clone());
        if let Some(compacted) = applied.compacted {
            running.hub.compacted(compacted);
        }
        Ok((applied, running.published.facts.clone()))
    }

    /// Watchers that lag get a slice of history: read now, or handed in if it was read before.
    pub fn catch_up(&mut self) -> Result<(), Fatal> {
        let running = self.running.as_mut().expect("it runs: it has watchers");
        match running.catching_up.take() {
            Some(slice) => {
                running.hub.finish(slice);
            }
            None => {
                running.catching_up = running.hub.next_catch_up();
                if let Some(slice) = &mut running.catching_up {
                    slice.read(&running.published.view, running.published.facts.bounds())?;
                }
            }
        }
        Ok(())
    }

    /// A part of a compaction's deletion, between applies.
    pub fn compact(&mut self) -> Result<(), Fatal> {
        let running = self.running.as_mut().expect("it runs: its apply thread does");
        let mut batch = WriteBatch::new();
        if running.store.compact_slice(&self.disk.state.view(), 3, &mut batch)?.is_some() {
            self.disk.state.write(batch)?;
            running.published = running.store.publish(self.disk.state.view());
        }
        Ok(())
    }

    /// Makes a received snapshot the state. Durable at once, as the rename is.
    pub fn install(&mut self, install: Install) -> Result<(), Fatal> {
        let running = self.running.as_mut().expect("it runs: its apply thread does");
        let new = running.received.remove(&install.ticket).expect("only what was received is installed");
        self.disk.state.install(new)?;
        self.disk.installed = Some(install.at);
        let view = self.disk.state.view();
        running.store = Store::open(&view, store_config(self.id))?;
        running.published = running.store.publish(view);
        running.hub.installed(running.published.facts.revision, running.published.facts.compacted);
        running.since_flush = 0;
        Ok(())
    }

    /// Takes in the rows of a checkpoint, beside the present state.
    pub fn receive(&mut self, rows: &MemoryView) -> Result<SnapshotTicket, Fatal> {
        let mut new = self.disk.state.begin_install()?;
        for table in Table::ALL {
            for (key, value) in rows.rows(table) {
                new.put(table, &key, &value)?;
            }
        }
        new.finish()?;
        let running = self.running.as_mut().expect("it runs: it received something");
        running.tickets += 1;
        let ticket = SnapshotTicket(running.tickets);
        running.received.insert(ticket, new);
        Ok(ticket)
    }

    /// A number that no request of any life of any member has.
    pub fn next_request(&mut self) -> RequestId {
        let running = self.running.as_mut().expect("it runs: it was asked something");
        running.requests += 1;
        RequestId(self.id.0 << 48 | self.life << 32 | running.requests)
    }
}

fn store_config(member_id: MemberId) -> StoreConfig {
    StoreConfig { member_id, quota_backend_bytes: -1, record_cache_bytes: 2_000 }
}
