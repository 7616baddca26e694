//! The nftables backend: renders a [`Dataplane`] as elements of flat maps, compares them with what the kernel holds, and
//! applies the difference as one transaction.
//!
//! ```text
//!  Dataplane + Changes ─▶ render ─▶ wants ─▶ diff against the picture ─▶ one batch ─▶ kernel
//!                                                 ▲                                    │ acknowledged
//!                        adopt: dump the kernel ──┴──────────── picture ◀──────────────┘
//! ```
//! A Service is set and map elements only; chains and rules are constant ([`skeleton`]). The *picture* is an exact copy
//! of the elements in the kernel. It changes only when the kernel has acknowledged a batch. After a refusal, or when
//! somebody else touched our tables ([`watch`]), it is not trusted any more: the next reconcile reads the kernel again and
//! writes what is missing. One change of one Service is rendered, compared and written without a look at the others.
//!
//! A table whose shape (masquerade mark, local detection, …) is not the wanted one is replaced whole, with all its
//! elements, in one transaction, so a packet meets either the old or the new.
//!
//! - [`object`]: sets, keys, elements, rules and changes as values; [`kernel`]: the seam;
//! - [`netlink`], [`fake`]: the real kernel and its twin; [`trace`] walks a packet through the twin's rules;
//! - [`render`], [`diff`], [`adopt`], [`listing`], [`watch`]: as their names say.
//!
//! What it does not do: it has no thread and no timer. The caller says what time it is and calls [`Nft::retire`] when
//! asked to. Stale UDP flows are named, not deleted: that is [`crate::conntrack`].

pub mod adopt;
pub mod diff;
pub mod fake;
pub mod kernel;
pub mod listing;
pub mod netlink;
pub mod object;
pub mod render;
pub mod skeleton;
pub mod trace;
pub mod watch;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::Instant;

use proxy_core::dataplane::{
    Changes, Dataplane, Frontend, NodePlan, NodePort, NodePortAddresses, Scope, ServicePortId, Target,
};
use proxy_core::model::{Family, Protocol};

use self::adopt::Adoption;
use self::diff::{Delta, Picture, Retired, Wants};
use self::kernel::{Kernel, KernelError, Receipt};
use self::listing::ListedFrontend;
use self::netlink::Netlink;
use self::object::{Data, Key, Op, SetId, key};
use self::render::{Pairs, Port, Rendered, Steps, Unserved};
use self::skeleton::Shape;
use crate::conntrack::Stale;

#[derive(Debug, thiserror::Error)]
pub enum NftError {
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// Somebody keeps changing our tables while they are read.
    #[error("table keelson did not stand still for {attempts} readings")]
    Restless { attempts: usize },
}

/// What was found in the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Adopted {
    /// Families whose table is as it should be and was taken over.
    pub tables: usize,
    /// Elements in them.
    pub elements: usize,
    /// Families whose table is to be replaced: another shape, or damaged.
    pub replaced: usize,
}

/// What a call changed in the kernel.
#[derive(Debug, Default)]
pub struct Applied {
    pub elements_added: usize,
    pub elements_deleted: usize,
    pub transactions: usize,
    pub messages: usize,
    pub bytes: usize,
    /// UDP flows that now lead nowhere: delete them now and again a second later.
    pub stale: Stale,
    /// What was asked for by this call and cannot be programmed, and why. It is refused as long as that is so.
    pub unserved: Vec<(ServicePortId, Unserved)>,
    /// When [`Nft::retire`] wants to be called.
    pub retire_at: Option<Instant>,
}

impl Applied {
    fn count(&mut self, receipt: Receipt) {
        if receipt.messages > 0 {
            self.transactions += 1;
            self.messages += receipt.messages;
            self.bytes += receipt.bytes;
        }
    }
}

/// The backend over one kernel.
#[derive(Debug)]
pub struct Nft<K> {
    kernel: K,
    node: NodePlan,
    frontends: HashMap<Frontend, Target>,
    node_ports: HashMap<NodePort, ServicePortId>,
    tables: [Table; 2],
    /// The picture is what the kernel holds, and the ports are what was last asked for.
    trusted: bool,
    /// Stale flows of a change that the kernel refused; whoever repeats the change deletes them too.
    owed: Stale,
}

/// One family's table.
#[derive(Debug)]
struct Table {
    family: Family,
    /// As the kernel has it; `None` if it is to be written anew.
    shape: Option<Shape>,
    /// There is a table of our name, of whatever shape.
    present: bool,
    picture: Picture,
    retired: Retired,
    steps: Steps,
    pairs: Pairs,
    ports: HashMap<ServicePortId, Port>,
}

impl Table {
    fn new(family: Family) -> Table {
        Table {
            family,
            shape: None,
            present: false,
            picture: Picture::default(),
            retired: Retired::default(),
            steps: Steps::at_start(),
            pairs: Pairs::default(),
            ports: HashMap::new(),
        }
    }
}

impl Nft<Netlink> {
    /// The backend in the network namespace of the calling thread.
    pub fn open() -> Result<Nft<Netlink>, NftError> {
        Ok(Nft::new(Netlink::open().map_err(KernelError::from)?))
    }

    /// What tells our own changes from others' in notifications.
    pub fn port(&self) -> u32 {
        self.kernel.port()
    }
}

impl<K: Kernel> Nft<K> {
    pub fn new(kernel: K) -> Nft<K> {
        Nft {
            kernel,
            node: NodePlan::default(),
            frontends: HashMap::new(),
            node_ports: HashMap::new(),
            tables: Family::BOTH.map(Table::new),
            trusted: false,
            owed: Stale::default(),
        }
    }

    pub fn kernel(&mut self) -> &mut K {
        &mut self.kernel
    }

    /// Takes over what the kernel holds of ours, if it has the shape that `node` asks for. Writes nothing but the claim of
    /// ownership; what is missing is written by the next [`Nft::reconcile`], in one transaction with the elements.
    pub fn adopt(&mut self, node: &NodePlan) -> Result<Adopted, NftError> {
        self.trusted = false;
        let mut adopted = Adopted::default();
        let shapes = self.tables.each_ref().map(|table| Shape::of(node, table.family));
        let read = adopt::read(&mut self.kernel, &shapes)?;
        for (table, (adoption, shape)) in self.tables.iter_mut().zip(read.into_iter().zip(shapes)) {
            table.retired.clear();
            match adoption {
                Adoption::Nothing => {
                    table.present = false;
                    table.forget();
                }
                Adoption::Other => {
                    table.present = true;
                    table.forget();
                    adopted.replaced += 1;
                }
                Adoption::Ours { picture, steps, last_pair } => {
                    adopted.tables += 1;
                    adopted.elements += picture.count();
                    table.present = true;
                    table.shape = Some(shape);
                    table.picture = *picture;
                    table.steps = steps;
                    table.pairs.after(last_pair);
                }
            }
        }
        self.trusted = true;
        Ok(adopted)
    }

    /// Says that the kernel may hold something else than it was given: the next reconcile reads it first.
    pub fn distrust(&mut self) {
        self.trusted = false;
    }

    /// Makes the kernel hold what `desired` says, whatever it held before.
    pub fn reconcile(&mut self, desired: &Dataplane, now: Instant) -> Result<Applied, NftError> {
        if !self.trusted {
            self.adopt(&desired.node)?;
        }
        self.node = desired.node.clone();
        self.frontends = desired.frontends.iter().map(|(frontend, target)| (*frontend, target.clone())).collect();
        self.node_ports = desired.node_ports.iter().map(|(port, id)| (*port, id.clone())).collect();
        let mut reached: HashMap<&ServicePortId, Reached> =
            desired.service_ports.keys().map(|id| (id, Reached::default())).collect();
        for (frontend, target) in &desired.frontends {
            reached.entry(&target.id).or_default().0.insert(*frontend, target.scope);
        }
        for (node_port, id) in &desired.node_ports {
            reached.entry(id).or_default().1.insert(*node_port);
        }
        let reached = reached.into_iter().map(|(id, reached)| (id.clone(), reached)).collect();
        self.apply(desired, reached, None, now)
    }

    /// Makes the kernel follow a change: `changes` names every key in which `desired` differs from what was given before.
    pub fn reconcile_changes(
        &mut self,
        desired: &Dataplane,
        changes: &Changes,
        now: Instant,
    ) -> Result<Applied, NftError> {
        let reshaped =
            self.tables.iter().any(|table| table.shape.as_ref() != Some(&Shape::of(&desired.node, table.family)));
        if !self.trusted || reshaped {
            return self.reconcile(desired, now);
        }
        let mut reached: BTreeMap<ServicePortId, Reached> = BTreeMap::new();
        let mut touch = |id: &ServicePortId, tables: &[Table; 2]| {
            if !reached.contains_key(id) {
                let port = tables[id.family as usize].ports.get(id);
                let held = port.map(|port| Reached(port.frontends.clone(), port.node_ports.clone()));
                reached.insert(id.clone(), held.unwrap_or_default());
            }
        };
        for id in &changes.service_ports {
            touch(id, &self.tables);
        }
        for frontend in &changes.frontends {
            let ids = [self.frontends.get(frontend), desired.frontends.get(frontend)];
            ids.into_iter().flatten().for_each(|target| touch(&target.id, &self.tables));
        }
        for node_port in &changes.node_ports {
            let ids = [self.node_ports.get(node_port), desired.node_ports.get(node_port)];
            ids.into_iter().flatten().for_each(|id| touch(id, &self.tables));
        }
        for frontend in &changes.frontends {
            if let Some(old) = self.frontends.remove(frontend) {
                reached.entry(old.id).or_default().0.remove(frontend);
            }
            if let Some(target) = desired.frontends.get(frontend) {
                reached.entry(target.id.clone()).or_default().0.insert(*frontend, target.scope);
                self.frontends.insert(*frontend, target.clone());
            }
        }
        for node_port in &changes.node_ports {
            if let Some(old) = self.node_ports.remove(node_port) {
                reached.entry(old).or_default().1.remove(node_port);
            }
            if let Some(id) = desired.node_ports.get(node_port) {
                reached.entry(id.clone()).or_default().1.insert(*node_port);
                self.node_ports.insert(*node_port, id.clone());
            }
        }
        self.node = desired.node.clone();
        self.apply(desired, reached, Some(changes), now)
    }

    /// Renders the ports in `reached`, and whatever else `changes` names (`None`: everything), and applies the difference.
    fn apply(
        &mut self,
        desired: &Dataplane,
        reached: BTreeMap<ServicePortId, Reached>,
        changes: Option<&Changes>,
        now: Instant,
    ) -> Result<Applied, NftError> {
        let mut applied = Applied { stale: std::mem::take(&mut self.owed), ..Applied::default() };
        applied.stale.node_addresses(match &desired.node.node_port_addresses {
            NodePortAddresses::AllLocal => None,
            NodePortAddresses::Only(addresses) => Some(addresses.clone()),
        });
        // Until the kernel has acknowledged, what is remembered of the ports is ahead of it.
        self.trusted = false;
        let mut ops = Vec::new();
        let mut deltas: Vec<Delta> = Vec::new();
        let mut by_family: [Vec<(ServicePortId, Reached)>; 2] = Default::default();
        for (id, reached) in reached {
            by_family[id.family as usize].push((id, reached));
        }
        for (table, reached) in self.tables.iter_mut().zip(by_family) {
            let owned = self.kernel.can_own();
            ops.extend(table.reshape(&Shape::of(&desired.node, table.family), owned));
            let mut wants = Wants::default();
            if changes.is_none() {
                table.forget_ports_except(&reached, &mut applied.stale);
            }
            for (id, reached) in reached {
                table.render_port(desired, &id, reached, &mut wants, &mut applied);
            }
            for (chain, step) in table.steps.take_fresh() {
                ops.extend(chain.ops(table.family, step));
            }
            table.want_shared(desired, changes, &mut wants);
            let delta = wants.resolve(&table.picture, &table.retired);
            ops.extend(delta.ops(table.family));
            applied.elements_added += delta.added();
            applied.elements_deleted += delta.deleted();
            deltas.push(delta);
        }
        match self.kernel.transact(&ops) {
            Ok(batch) => applied.count(batch),
            // The retry no longer knows which frontends have gone: their flows are still to be deleted then.
            Err(error) => {
                self.owed = applied.stale;
                return Err(error.into());
            }
        }
        for (table, delta) in self.tables.iter_mut().zip(deltas) {
            delta.commit(&mut table.picture, &mut table.retired, now);
        }
        self.trusted = true;
        applied.retire_at = self.next_retirement();
        Ok(applied)
    }

    fn next_retirement(&self) -> Option<Instant> {
        self.tables.iter().filter_map(|table| table.retired.next_due()).min()
    }

    /// Deletes the elements that were only kept for packets on their way, if it is time.
    pub fn retire(&mut self, now: Instant) -> Result<Applied, NftError> {
        let mut applied = Applied::default();
        if !self.trusted {
            return Ok(applied);
        }
        let deltas = self.tables.each_ref().map(|table| table.retired.due(now).resolve(&table.picture, &table.retired));
        let ops: Vec<Op> = self.tables.iter().zip(&deltas).flat_map(|(table, delta)| delta.ops(table.family)).collect();
        applied.elements_deleted = deltas.iter().map(Delta::deleted).sum();
        self.trusted = false;
        applied.count(self.kernel.transact(&ops)?);
        self.trusted = true;
        for (table, delta) in self.tables.iter_mut().zip(deltas) {
            delta.commit(&mut table.picture, &mut table.retired, now);
        }
        applied.retire_at = self.next_retirement();
        Ok(applied)
    }

    /// Removes every trace of us. It is no error if there is none; a living proxy's tables are not touched.
    pub fn cleanup(&mut self) -> Result<(), NftError> {
        self.trusted = false;
        let tables = self.kernel.tables()?;
        if let Some((family, owner)) = adopt::foreign_owner(&tables, self.kernel.owner_id()) {
            return Err(KernelError::Owned { family, owner }.into());
        }
        let mut ops = Vec::new();
        for table in &tables {
            // A table that a process left behind belongs to whoever claims it.
            if self.kernel.can_own() && table.owner.is_none() && table.persists {
                let comment = table.comment.clone().unwrap_or_default();
                ops.push(Op::AddTable { family: table.family, owned: true, comment });
            }
            ops.push(Op::DeleteTable { family: table.family });
        }
        self.kernel.transact(&ops)?;
        self.tables = Family::BOTH.map(Table::new);
        Ok(())
    }

    /// What the kernel has been given, by frontend, read from its elements.
    pub fn listing(&mut self) -> Result<Vec<ListedFrontend>, NftError> {
        listing::read(&mut self.kernel)
    }
}

/// By which addresses and ports a Service port is reached.
#[derive(Debug, Default)]
struct Reached(BTreeMap<Frontend, Scope>, BTreeSet<NodePort>);

impl Table {
    /// Nothing of ours is known in the kernel; pairs stay as they are, so that ports keep theirs.
    fn forget(&mut self) {
        self.shape = None;
        self.picture = Picture::default();
        self.retired.clear();
        self.steps = Steps::at_start();
    }

    /// What makes the table have `shape`, if it has not.
    fn reshape(&mut self, shape: &Shape, owned: bool) -> Vec<Op> {
        if self.shape.as_ref() == Some(shape) {
            return Vec::new();
        }
        let mut ops = Vec::new();
        if self.present {
            ops.push(Op::DeleteTable { family: self.family });
        }
        ops.extend(skeleton::table(self.family, shape, owned));
        self.forget();
        self.present = true;
        self.shape = Some(shape.clone());
        ops
    }

    /// Forgets the ports that are not among `reached`; their elements go as nobody's.
    fn forget_ports_except(&mut self, reached: &[(ServicePortId, Reached)], stale: &mut Stale) {
        let kept: HashSet<_> = reached.iter().map(|(id, _)| id).collect();
        let pairs = &mut self.pairs;
        self.ports.retain(|id, port| {
            let keep = kept.contains(id);
            if !keep {
                pairs.give_back(port.pair);
                note_stale(stale, id, port, std::iter::empty());
            }
            keep
        });
    }

    fn render_port(
        &mut self,
        desired: &Dataplane,
        id: &ServicePortId,
        Reached(frontends, node_ports): Reached,
        wants: &mut Wants,
        applied: &mut Applied,
    ) {
        let plan = desired.service_ports.get(id);
        let mut port = match self.ports.remove(id) {
            Some(port) => port,
            None if plan.is_none() => return,
            None => {
                let begun = Port::begin(id, frontends.clone(), node_ports.clone(), &self.picture, &mut self.pairs);
                match begun {
                    Ok(port) => port,
                    Err(reason) => return applied.unserved.push((id.clone(), reason)),
                }
            }
        };
        let gone: Vec<_> = port.frontends.keys().filter(|old| !frontends.contains_key(old)).copied().collect();
        let gone_ports: Vec<_> = port.node_ports.difference(&node_ports).copied().collect();
        port.frontends = frontends;
        port.node_ports = node_ports;
        let rendered = match plan.map(|plan| port.render(id, plan, &mut self.steps)) {
            Some(Ok(rendered)) => rendered,
            Some(Err(reason)) => {
                applied.unserved.push((id.clone(), reason));
                Rendered::new()
            }
            None => Rendered::new(),
        };
        let changed = id.protocol == Protocol::Udp && self.has_changed(&port, &rendered);
        want_port(&mut port, rendered, wants);
        if changed {
            let sets = plan.into_iter().flat_map(|plan| [&plan.cluster, &plan.local]).flatten();
            note_stale(&mut applied.stale, id, &port, sets.flat_map(|set| &set.list).map(|backend| backend.address));
            gone.into_iter().for_each(|frontend| applied.stale.frontend(frontend.address, frontend.port, []));
            gone_ports.into_iter().for_each(|port| applied.stale.node_port(port.family, port.port, []));
        }
        if plan.is_some() {
            self.ports.insert(id.clone(), port);
        } else {
            self.pairs.give_back(port.pair);
        }
    }

    /// Does the kernel hold anything else for this port than what was rendered?
    fn has_changed(&self, port: &Port, rendered: &Rendered) -> bool {
        let same_keys = port.keys.iter().copied().eq(rendered.iter().map(|(set, key, _)| (*set, *key)));
        let held = |(set, key, data): &(SetId, Key, Data)| self.picture.get(*set, key) == Some(data);
        (!port.keys.is_empty() && !same_keys) || !rendered.iter().all(held)
    }

    /// The elements that belong to no single port.
    fn want_shared(&self, desired: &Dataplane, changes: Option<&Changes>, wants: &mut Wants) {
        let own = |address: &&std::net::IpAddr| Family::of(**address) == self.family;
        let hairpin = |address: std::net::IpAddr| key().address(address).address(address);
        let Some(changes) = changes else {
            for address in desired.cluster_ips.iter().filter(own) {
                wants.hold(SetId::ClusterIps, key().address(*address), Data::None);
            }
            for address in desired.hairpin.iter().filter(own) {
                wants.hold(SetId::Hairpin, hairpin(*address), Data::None);
            }
            self.want_node(&desired.node, wants);
            wants.nothing_else();
            return;
        };
        let mut follow = |set, key, wanted: bool| {
            if wanted { wants.hold(set, key, Data::None) } else { wants.drop(set, key, false) }
        };
        for address in changes.cluster_ips.iter().filter(own) {
            follow(SetId::ClusterIps, key().address(*address), desired.cluster_ips.contains(address));
        }
        for address in changes.hairpin.iter().filter(own) {
            follow(SetId::Hairpin, hairpin(*address), desired.hairpin.contains(address));
        }
        if changes.node {
            self.want_node(&desired.node, wants);
        }
    }

    /// The elements that follow the node. Intervals are replaced all together: an edge alone means nothing to the kernel.
    fn want_node(&self, node: &NodePlan, wants: &mut Wants) {
        let elements = render::node_elements(self.family, node);
        for set in [SetId::ServiceCidrs, SetId::PodCidrs, SetId::NodePortIps] {
            let wanted: BTreeSet<Key> =
                elements.iter().filter(|element| element.0 == set).map(|(_, key, _)| *key).collect();
            let held: BTreeSet<Key> = self.picture.set(set).map(|(key, _)| *key).collect();
            let renew = set != SetId::NodePortIps && wanted != held;
            held.difference(&wanted).for_each(|key| wants.drop(set, *key, false));
            for key in wanted {
                if renew { wants.renew(set, key, Data::None) } else { wants.hold(set, key, Data::None) }
            }
        }
    }
}

/// Enters the elements of a port.
fn want_port(port: &mut Port, rendered: Rendered, wants: &mut Wants) {
    let old = std::mem::take(&mut port.keys);
    if !old.iter().copied().eq(rendered.iter().map(|(set, key, _)| (*set, *key))) {
        drop_old(&old, &rendered, wants);
    }
    port.keys.reserve(rendered.len());
    for (set, key, data) in rendered {
        port.keys.push((set, key));
        wants.hold(set, key, data);
    }
}

/// Drops the keys that a port had and has no more.
fn drop_old(old: &[(SetId, Key)], rendered: &Rendered, wants: &mut Wants) {
    let keys: BTreeSet<_> = rendered.iter().map(|(set, key, _)| (*set, *key)).collect();
    let serial = |set: SetId, key: &Key| Some((set, key.id_at(0)?.serial()));
    let kept: BTreeSet<_> = keys.iter().filter_map(|(set, key)| serial(*set, key)).collect();
    for (set, key) in old {
        if !keys.contains(&(*set, *key)) {
            // A set that only shrinks keeps index 0, where a packet lands that was overtaken; one that goes stays a while.
            let indexed = matches!(set, SetId::Endpoints | SetId::Picks | SetId::Slots);
            let shrinks = indexed && serial(*set, key).is_some_and(|serial| kept.contains(&serial));
            wants.drop(*set, *key, set.is_behind() && !shrinks);
        }
    }
}

fn note_stale(
    stale: &mut Stale,
    id: &ServicePortId,
    port: &Port,
    endpoints: impl Iterator<Item = std::net::SocketAddr>,
) {
    if id.protocol != Protocol::Udp {
        return;
    }
    let endpoints: BTreeSet<_> = endpoints.collect();
    for frontend in port.frontends.keys() {
        stale.frontend(frontend.address, frontend.port, endpoints.iter().copied());
    }
    for node_port in &port.node_ports {
        stale.node_port(node_port.family, node_port.port, endpoints.iter().copied());
    }
}
