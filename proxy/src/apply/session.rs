//! Jobs on their way into the store: what each is decided upon, the Txns that carry them, and what to do when one fails.
//!
//! One task decides, so choices of one run never meet; only the Txns are under way at once. What a Txn was to take is taken
//! in the pool from the moment it is planned, and freed if it fails. The guards, and why they suffice, are told in `apply.rs`.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures_util::stream::{FuturesUnordered, StreamExt};
use keelson_proto::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use keelson_proto::etcdserverpb::request_op::Request;
use keelson_proto::etcdserverpb::response_op::Response;
use keelson_proto::etcdserverpb::{
    Compare, DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, ResponseOp, TxnRequest, TxnResponse,
};
use keelson_proto::k8s::core_v1::RangeAllocation;
use keelson_proto::mvccpb::KeyValue;
use proxy_core::model::manifest::Object;
use proxy_core::model::{NamespacedName, k8s};

use super::allocate::{AddressBlock, Addresses, Ports};
use super::service::{self, Pool, Refusal, Taken};
use super::write::{self, Birth};
use super::{ApplyError, Outcome, Target, Verb, plural, singular};
use crate::etcd::{Bring, Etcd, EtcdError};
use crate::random::Random;
use crate::storage::{self, Kind, decode};

/// Txns under way at once.
const IN_FLIGHT: usize = 64;
/// etcd takes 128 operations a Txn (`--max-txn-ops`) unless it is told otherwise.
const MOST_OPS: usize = 120;
/// How often an object is looked at again because somebody else moved it.
const MOST_ATTEMPTS: u32 = 100;

/// What a key held when it was last seen.
#[derive(Clone, Debug)]
struct Seen {
    mod_revision: i64,
    value: Bytes,
}

impl Seen {
    fn of(kvs: &[KeyValue]) -> Option<Seen> {
        kvs.first().map(|kv| Seen { mod_revision: kv.mod_revision, value: kv.value.clone() })
    }
}

fn revision_of(seen: Option<&Seen>) -> i64 {
    seen.map_or(0, |seen| seen.mod_revision)
}

/// One object on its way into the store, or out of it.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) kind: Kind,
    pub(super) name: NamespacedName,
    pub(super) key: String,
    wish: Wish,
    birth: Birth,
    seen: Option<Seen>,
    attempts: u32,
    pub(super) result: Option<Result<Outcome, String>>,
}

#[derive(Debug)]
enum Wish {
    Store(Box<Object>),
    Delete,
}

/// What is to be written for one job.
#[derive(Debug)]
struct Write {
    job: usize,
    /// The new value; `None` deletes the key.
    value: Option<Bytes>,
    taken: Taken,
    outcome: Outcome,
}

/// A key that a Txn is guarded by.
#[derive(Debug)]
enum Guard {
    Object(usize),
    Address(IpAddr),
    Ports,
}

/// A Txn under way.
#[derive(Debug)]
struct Group {
    writes: Vec<Write>,
    guards: Vec<Guard>,
    /// The bitmap it writes, if it writes it.
    ports: Option<Bytes>,
}

#[derive(Debug)]
pub(super) struct Session {
    target: Target,
    pool: Pool,
    /// The stored bitmap of node ports.
    ports: Option<Seen>,
    /// Node ports of Services that the stored bitmap does not know.
    strays: Vec<u16>,
    random: Random,
    now: i64,
}

impl Session {
    /// Reads what is taken already, if there are Services among the objects.
    pub(super) async fn open(target: Target, objects: &[Object]) -> Result<Session, ApplyError> {
        let blocks = target.cluster_ip_ranges.iter().map(|net| AddressBlock::new(*net)).collect();
        let (first, last) = target.node_ports;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64);
        let mut session = Session {
            pool: Pool { addresses: Addresses::new(blocks), ports: Ports::new(first, last) },
            ports: None,
            strays: Vec::new(),
            random: Random::open().map_err(ApplyError::Random)?,
            now,
            target,
        };
        if objects.iter().any(|object| matches!(object, Object::Service(_))) {
            session.read_taken().await?;
        }
        Ok(session)
    }

    async fn read_taken(&mut self) -> Result<(), ApplyError> {
        let Target { etcd, keys, .. } = &self.target;
        let services = etcd.list(&keys.all(Kind::Service), 0, Bring::Values).await?;
        let addresses = etcd.list(&keys.all(Kind::IpAddress), services.revision, Bring::Keys).await?;
        let range_key = keys.node_port_range();
        // Of the same moment as the Services: a port that was freed in between would look like one that nobody wrote down.
        let range = RangeRequest { key: range_key.into(), revision: services.revision, ..Default::default() };
        let range = etcd.range(range).await?;
        let prefix = keys.all(Kind::IpAddress).len();
        for kv in &addresses.kvs {
            let name = kv.key.get(prefix..).and_then(|name| std::str::from_utf8(name).ok());
            if let Some(address) = name.and_then(|name| name.parse().ok()) {
                self.pool.addresses.note(address);
            }
        }
        let mut ports = Vec::new();
        for kv in &services.kvs {
            match decode::service_shape(&kv.value) {
                Ok(service) => {
                    service::addresses_of(&service.spec).into_iter().for_each(|ip| self.pool.addresses.note(ip));
                    ports.extend(service::ports_of(&service.spec));
                }
                Err(error) => tracing::warn!(key = %String::from_utf8_lossy(&kv.key), %error, "not readable"),
            }
        }
        self.set_ports(Seen::of(&range.kvs))?;
        let mut known = self.pool.ports.clone();
        self.strays = ports.into_iter().filter(|port| known.request(*port).is_ok()).collect();
        self.strays.iter().for_each(|port| self.pool.ports.note(*port));
        Ok(())
    }

    /// Takes over the stored bitmap of node ports.
    fn set_ports(&mut self, seen: Option<Seen>) -> Result<(), ApplyError> {
        let allocation = match &seen {
            None => RangeAllocation::default(),
            Some(seen) => storage::message::<RangeAllocation>(Kind::RangeAllocation, &seen.value)
                .map_err(|error| ApplyError::Stored { key: self.target.keys.node_port_range(), error })?,
        };
        let ours = self.pool.ports.range();
        if !allocation.range().is_empty() && allocation.range() != ours {
            let stored = allocation.range().to_owned();
            return Err(ApplyError::OtherRange { ours, stored, key: self.target.keys.node_port_range() });
        }
        self.pool.ports.set_bits(allocation.data());
        self.strays.iter().for_each(|port| self.pool.ports.note(*port));
        self.ports = seen;
        Ok(())
    }

    pub(super) fn job(&mut self, verb: Verb, object: Object) -> Job {
        let kind = match &object {
            Object::Service(_) => Kind::Service,
            Object::EndpointSlice(_) => Kind::EndpointSlice,
            Object::Endpoints(_) | Object::Node(_) => Kind::Endpoints,
        };
        let meta = object.metadata();
        let name = NamespacedName::new(meta.namespace.as_str(), meta.name.as_str());
        Job {
            kind,
            key: self.target.keys.namespaced(kind, &name.namespace, &name.name),
            name,
            wish: match verb {
                Verb::Apply => Wish::Store(Box::new(object)),
                Verb::Delete => Wish::Delete,
            },
            birth: Birth { uid: self.random.uid(), time: self.now },
            seen: None,
            attempts: 0,
            result: None,
        }
    }

    /// Reads what the store holds of these jobs' objects: many keys a request.
    pub(super) async fn load(&self, jobs: &mut [Job], wave: &[usize]) -> Result<(), ApplyError> {
        let mut reads = FuturesUnordered::new();
        for chunk in wave.chunks(MOST_OPS) {
            let success = chunk.iter().map(|job| read_op(jobs[*job].key.as_bytes())).collect();
            let read = self.target.etcd.txn(TxnRequest { success, ..Default::default() });
            reads.push(async move { (chunk, read.await) });
        }
        while let Some((chunk, response)) = reads.next().await {
            for (job, op) in chunk.iter().zip(response?.responses) {
                jobs[*job].seen = seen_in(&op);
            }
        }
        Ok(())
    }

    /// Carries all jobs of a wave to their end.
    pub(super) async fn drive(&mut self, jobs: &mut [Job], wave: Vec<usize>) -> Result<(), ApplyError> {
        let mut ready: VecDeque<usize> = wave.into();
        let mut of_ports: VecDeque<usize> = VecDeque::new();
        let mut ports_under_way = false;
        let mut under_way = FuturesUnordered::new();
        let etcd = self.target.etcd.clone();
        loop {
            while under_way.len() < IN_FLIGHT
                && let Some(job) = ready.pop_front()
            {
                if self.may_touch_ports(&jobs[job]) {
                    of_ports.push_back(job);
                } else if let Some(write) = self.plan(jobs, job) {
                    let (group, txn) = self.group(jobs, vec![write])?;
                    under_way.push(send(etcd.clone(), group, txn, false));
                }
            }
            while !ports_under_way && !of_ports.is_empty() {
                let writes = self.plan_many(jobs, &mut of_ports);
                if !writes.is_empty() {
                    let (group, txn) = self.group(jobs, writes)?;
                    ports_under_way = true;
                    under_way.push(send(etcd.clone(), group, txn, true));
                }
            }
            let Some((group, of_ports_queue, response)) = under_way.next().await else { return Ok(()) };
            ports_under_way &= !of_ports_queue;
            ready.extend(self.finish(jobs, group, response?)?);
        }
    }

    fn may_touch_ports(&self, job: &Job) -> bool {
        let after = match &job.wish {
            Wish::Store(object) => match object.as_ref() {
                Object::Service(service) => Some(service.as_ref()),
                _ => return false,
            },
            Wish::Delete if job.kind == Kind::Service => None,
            Wish::Delete => return false,
        };
        service::may_touch_ports(after, before(job).as_ref())
    }

    /// As many as fit into one Txn.
    fn plan_many(&mut self, jobs: &mut [Job], queue: &mut VecDeque<usize>) -> Vec<Write> {
        let mut writes = Vec::new();
        // One for the bitmap.
        let mut ops = 1;
        // A dual-stack Service that is written anew takes two addresses and gives back two at most.
        const MOST_A_WRITE: usize = 5;
        while ops + MOST_A_WRITE <= MOST_OPS
            && let Some(job) = queue.pop_front()
        {
            if let Some(write) = self.plan(jobs, job) {
                ops += 1 + write.taken.addresses.len() + write.taken.addresses_back.len();
                writes.push(write);
            }
        }
        writes
    }

    /// What to write for a job, after what was last seen; `None` if it is at its end.
    fn plan(&mut self, jobs: &mut [Job], index: usize) -> Option<Write> {
        let job = &mut jobs[index];
        job.attempts += 1;
        let planned = if job.attempts > MOST_ATTEMPTS {
            Err(format!("{}/{}: changed by others {MOST_ATTEMPTS} times in a row", singular(job.kind), job.name.name))
        } else {
            match &job.wish {
                Wish::Store(object) => self.plan_store(job, object, index),
                Wish::Delete => self.plan_delete(job, index),
            }
        };
        match planned {
            Ok(Some(write)) => {
                write.taken.ports_back.iter().for_each(|port| self.pool.ports.release(*port));
                return Some(write);
            }
            Ok(None) => job.result = Some(Ok(Outcome::Unchanged)),
            Err(reason) => job.result = Some(Err(reason)),
        }
        None
    }

    fn plan_store(&mut self, job: &Job, object: &Object, index: usize) -> Result<Option<Write>, String> {
        let old = job.seen.as_ref().map(|seen| &seen.value);
        let unreadable = |error: storage::StorageError| format!("{}: {error}", job.key);
        let mut taken = Taken::default();
        let value = match object {
            Object::Service(service) => {
                let mut service = service.as_ref().clone();
                let stored = old.map(decode::service_shape).transpose().map_err(unreadable)?;
                let mut draw = || self.random.number();
                taken = service::settle(&mut service, stored.as_ref(), &mut self.pool, &mut draw)
                    .map_err(|refusal| refused(job, &refusal))?;
                // The API server leaves out a policy that means nothing without an address from outside.
                service.set_defaults();
                write::service(&service, old, &job.birth)
            }
            Object::EndpointSlice(slice) => {
                let stored = old.map(write::address_type).transpose().map_err(unreadable)?;
                if stored.is_some_and(|stored| stored != slice.address_type) {
                    let refusal = Refusal::Invalid {
                        field: "addressType".into(),
                        value: format!("{:?}", slice.address_type),
                        reason: "field is immutable".into(),
                    };
                    return Err(refused(job, &refusal));
                }
                write::endpoint_slice(slice, old, &job.birth)
            }
            Object::Endpoints(endpoints) => write::endpoints(endpoints, old, &job.birth),
            Object::Node(_) => unreachable!("`read` refuses Nodes"),
        };
        match value {
            Ok(Some(value)) => {
                let outcome = if old.is_some() { Outcome::Configured } else { Outcome::Created };
                Ok(Some(Write { job: index, value: Some(value), taken, outcome }))
            }
            Ok(None) => Ok(None),
            Err(error) => {
                taken.undo(&mut self.pool);
                Err(unreadable(error))
            }
        }
    }

    fn plan_delete(&self, job: &Job, index: usize) -> Result<Option<Write>, String> {
        let Some(seen) = &job.seen else {
            return Err(format!("Error from server (NotFound): {} \"{}\" not found", plural(job.kind), job.name.name));
        };
        if let Some(value) = write::marked_for_deletion(job.kind, &seen.value, self.now) {
            let taken = Taken::default();
            return Ok(Some(Write { job: index, value: Some(value), taken, outcome: Outcome::Deleted }));
        }
        let mut taken = Taken::default();
        if let Some(before) = before(job) {
            taken.addresses_back = service::addresses_of(&before.spec).into_iter().collect();
            taken.ports_back = service::ports_of(&before.spec).into_iter().collect();
        }
        Ok(Some(Write { job: index, value: None, taken, outcome: Outcome::Deleted }))
    }

    /// One Txn for these writes.
    fn group(&mut self, jobs: &[Job], writes: Vec<Write>) -> Result<(Group, TxnRequest), ApplyError> {
        let keys = &self.target.keys;
        let mut txn = TxnRequest::default();
        let mut guards = Vec::new();
        let mut guard = |txn: &mut TxnRequest, key: &str, revision: i64, guard: Guard| {
            txn.compare.push(is_at(key, revision));
            txn.failure.push(read_op(key.as_bytes()));
            guards.push(guard);
        };
        for write in &writes {
            let job = &jobs[write.job];
            guard(&mut txn, &job.key, revision_of(job.seen.as_ref()), Guard::Object(write.job));
            txn.success.push(match &write.value {
                Some(value) => put_op(&job.key, value.clone()),
                None => delete_op(&job.key),
            });
            for address in &write.taken.addresses {
                let key = keys.ip_address(*address);
                guard(&mut txn, &key, 0, Guard::Address(*address));
                let birth = Birth { uid: self.random.uid(), time: self.now };
                txn.success.push(put_op(&key, write::ip_address(*address, &job.name, &birth)));
            }
            txn.success.extend(write.taken.addresses_back.iter().map(|ip| delete_op(&keys.ip_address(*ip))));
        }
        let mut ports = None;
        if writes.iter().any(|write| write.taken.touches_ports()) {
            let key = keys.node_port_range();
            guard(&mut txn, &key, revision_of(self.ports.as_ref()), Guard::Ports);
            let old = self.ports.as_ref().map(|seen| &seen.value);
            let value = write::node_ports(&self.pool.ports.range(), self.pool.ports.to_bits(), old)
                .map_err(|error| ApplyError::Stored { key: key.clone(), error })?;
            txn.success.push(put_op(&key, value.clone()));
            ports = Some(value);
        }
        Ok((Group { writes, guards, ports }, txn))
    }

    /// Takes in how a Txn went; returns the jobs to look at again.
    fn finish(&mut self, jobs: &mut [Job], group: Group, response: TxnResponse) -> Result<Vec<usize>, ApplyError> {
        if response.succeeded {
            if let Some(value) = group.ports {
                let mod_revision = response.header.unwrap_or_default().revision;
                self.ports = Some(Seen { mod_revision, value });
                self.strays.clear();
            }
            for write in group.writes {
                write.taken.settle(&mut self.pool);
                jobs[write.job].result = Some(Ok(write.outcome));
            }
            return Ok(Vec::new());
        }
        group.writes.iter().for_each(|write| write.taken.undo(&mut self.pool));
        for (guard, op) in group.guards.iter().zip(&response.responses) {
            let seen = seen_in(op);
            match guard {
                Guard::Object(job) => jobs[*job].seen = seen,
                Guard::Address(address) => {
                    if seen.is_some() {
                        self.pool.addresses.note(*address);
                    }
                }
                Guard::Ports => self.set_ports(seen)?,
            }
        }
        let mut again = Vec::new();
        for write in group.writes {
            let job = &mut jobs[write.job];
            // It was written after all, and only the answer was lost.
            if job.seen.as_ref().map(|seen| &seen.value) == write.value.as_ref() {
                job.result = Some(Ok(write.outcome));
            } else {
                again.push(write.job);
            }
        }
        Ok(again)
    }
}

/// Sends a Txn; `of_ports` comes back with the answer, to tell which queue goes on.
async fn send(
    etcd: Etcd,
    group: Group,
    txn: TxnRequest,
    of_ports: bool,
) -> (Group, bool, Result<TxnResponse, EtcdError>) {
    let response = etcd.txn(txn).await;
    (group, of_ports, response)
}

/// The Service that is stored, if it can be read.
fn before(job: &Job) -> Option<k8s::Service> {
    let seen = job.seen.as_ref().filter(|_| job.kind == Kind::Service)?;
    decode::service_shape(&seen.value).ok()
}

fn refused(job: &Job, refusal: &Refusal) -> String {
    match refusal {
        Refusal::Invalid { .. } => format!("The {} \"{}\" is invalid: {refusal}", job.kind.name(), job.name.name),
        Refusal::Exhausted { .. } => {
            format!("Error from server (InternalError): Internal error occurred: {refusal}")
        }
    }
}

fn is_at(key: &str, mod_revision: i64) -> Compare {
    Compare {
        result: CompareResult::Equal.into(),
        target: CompareTarget::Mod.into(),
        key: Bytes::copy_from_slice(key.as_bytes()),
        target_union: Some(TargetUnion::ModRevision(mod_revision)),
        ..Default::default()
    }
}

fn put_op(key: &str, value: Bytes) -> RequestOp {
    let key = Bytes::copy_from_slice(key.as_bytes());
    RequestOp { request: Some(Request::RequestPut(PutRequest { key, value, ..Default::default() })) }
}

fn delete_op(key: &str) -> RequestOp {
    let key = Bytes::copy_from_slice(key.as_bytes());
    RequestOp { request: Some(Request::RequestDeleteRange(DeleteRangeRequest { key, ..Default::default() })) }
}

fn read_op(key: &[u8]) -> RequestOp {
    let key = Bytes::copy_from_slice(key);
    RequestOp { request: Some(Request::RequestRange(RangeRequest { key, ..Default::default() })) }
}

fn seen_in(op: &ResponseOp) -> Option<Seen> {
    match &op.response {
        Some(Response::ResponseRange(range)) => Seen::of(&range.kvs),
        _ => None,
    }
}
