//! Whole answers against a naive model: any request, with any options, told as etcd's contract tells it (2.6).
//!
//! The model keeps every revision's keys whole, in a map of their own, and shares no code with the store. Requests are read
//! off a tape of bytes, so that a failing one shrinks to few and small choices. `model.rs` asks less of more: every key at
//! every revision, history, leases and tables.

use std::collections::{BTreeMap, BTreeSet};

use keelson_proto::etcdserverpb::compare::TargetUnion;
use keelson_proto::etcdserverpb::request_op::Request;
use keelson_proto::etcdserverpb::response_op::Response;
use keelson_proto::etcdserverpb::*;
use keelson_proto::mvccpb::KeyValue;
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::backend::Table;
use crate::mvcc::{EventKind, ReadError, check, history, range, txn};

const MAX_OPS: usize = 5;

/// Choices, one after the other; an empty tape chooses 0.
struct Tape<'a>(std::slice::Iter<'a, u8>);

impl Tape<'_> {
    fn next(&mut self) -> u8 {
        self.0.next().copied().unwrap_or(0)
    }

    fn below(&mut self, n: u8) -> u8 {
        self.next() % n
    }

    /// One of so many; rarely true.
    fn one_in(&mut self, n: u8) -> bool {
        self.below(n) == n - 1
    }

    fn key(&mut self) -> Bytes {
        const KEYS: [&[u8]; 7] = [b"b", b"a", b"a\0", b"a\x01", b"c", b"\0", b"\xff"];
        if self.one_in(60) { Bytes::new() } else { Bytes::from_static(KEYS[usize::from(self.below(7))]) }
    }

    fn end(&mut self) -> Bytes {
        match self.below(4) {
            0 => Bytes::new(),
            1 => Bytes::from_static(b"\0"),
            2 => Bytes::from_static(b"b\0"),
            _ => self.key(),
        }
    }

    fn value(&mut self) -> Bytes {
        const VALUES: [&[u8]; 4] = [b"x", b"", b"y", b"x\0"];
        Bytes::from_static(VALUES[usize::from(self.below(4))])
    }

    fn lease(&mut self) -> i64 {
        i64::from(self.below(6).saturating_sub(2))
    }

    /// A revision of the past, mostly; `seldom` of something else.
    fn past(&mut self, revision: i64) -> i64 {
        i64::from(self.next()) * revision / 255
    }

    fn revision(&mut self, revision: i64) -> i64 {
        match self.below(12) {
            0..6 => 0,
            6 => -1,
            7 => revision + 1,
            8 => revision,
            _ => self.past(revision),
        }
    }

    fn bound(&mut self, revision: i64) -> i64 {
        if self.below(4) == 3 { self.past(revision) - i64::from(self.one_in(20)) * 99 } else { 0 }
    }

    fn range(&mut self, revision: i64) -> RangeRequest {
        RangeRequest {
            key: self.key(),
            range_end: self.end(),
            revision: self.revision(revision),
            limit: i64::from(self.below(5)) - i64::from(self.one_in(9)) * 5,
            sort_order: i32::from(self.below(3)) + i32::from(self.one_in(60)) * 7,
            sort_target: i32::from(self.below(5)) + i32::from(self.one_in(60)) * 7,
            keys_only: self.one_in(4),
            count_only: self.one_in(5),
            min_mod_revision: self.bound(revision),
            max_mod_revision: self.bound(revision),
            min_create_revision: self.bound(revision),
            max_create_revision: self.bound(revision),
            serializable: false,
        }
    }

    fn put(&mut self) -> PutRequest {
        let mut put = PutRequest {
            key: self.key(),
            value: self.value(),
            lease: self.lease(),
            prev_kv: self.one_in(2),
            ignore_value: self.one_in(5),
            ignore_lease: self.one_in(5),
        };
        // Mostly in the form that is allowed.
        if put.ignore_value && !self.one_in(9) {
            put.value = Bytes::new();
        }
        if put.ignore_lease && !self.one_in(9) {
            put.lease = 0;
        }
        put
    }

    fn delete(&mut self) -> DeleteRangeRequest {
        DeleteRangeRequest { key: self.key(), range_end: self.end(), prev_kv: self.one_in(2) }
    }

    fn compare(&mut self, revision: i64) -> Compare {
        let target = self.below(5);
        let union = if self.one_in(12) { self.below(6) } else { target };
        let small = i64::from(self.below(4));
        let target_union = match union {
            0 => Some(TargetUnion::Version(small)),
            1 => Some(TargetUnion::CreateRevision(self.past(revision))),
            2 => Some(TargetUnion::ModRevision(self.past(revision))),
            3 => Some(TargetUnion::Value(self.value())),
            4 => Some(TargetUnion::Lease(small)),
            _ => None,
        };
        let range_end = if self.one_in(3) { self.end() } else { Bytes::new() };
        Compare {
            result: i32::from(self.below(4)),
            target: i32::from(target),
            key: self.key(),
            range_end,
            target_union,
        }
    }

    fn txn(&mut self, revision: i64, depth: u8) -> TxnRequest {
        let ops = |tape: &mut Self| (0..tape.below(4)).map(|_| tape.op(revision, depth)).collect();
        let (success, failure) = (ops(self), ops(self));
        TxnRequest { compare: (0..self.below(3)).map(|_| self.compare(revision)).collect(), success, failure }
    }

    fn op(&mut self, revision: i64, depth: u8) -> RequestOp {
        let request = match self.below(12) {
            0..3 => Some(Request::RequestRange(self.range(revision))),
            3..6 => Some(Request::RequestPut(self.put())),
            6..9 => Some(Request::RequestDeleteRange(self.delete())),
            _ if depth < 3 => Some(Request::RequestTxn(self.txn(revision, depth + 1))),
            _ if self.one_in(20) => None,
            _ => Some(Request::RequestPut(self.put())),
        };
        RequestOp { request }
    }
}

type Keys = BTreeMap<Bytes, KeyValue>;

/// A change as a watcher sees it: the pair, whether it is gone, and what stood there before the revision.
type Changed = (KeyValue, bool, Option<KeyValue>);

struct Model {
    revision: i64,
    compacted: i64,
    /// The keys as they were at each revision.
    at: BTreeMap<i64, Keys>,
    changes: BTreeMap<i64, Vec<Changed>>,
    leases: BTreeSet<i64>,
}

fn covers(key: &[u8], first: &[u8], end: &[u8]) -> bool {
    match end {
        b"" => key == first,
        b"\0" => key >= first,
        _ => key >= first && key < end,
    }
}

fn refuse(yes: bool, error: Error) -> Result<(), Error> {
    if yes { Err(error) } else { Ok(()) }
}

fn well_formed(request: &Request, room: usize) -> Result<(), Error> {
    match request {
        Request::RequestRange(range) => {
            refuse(range.key.is_empty(), Error::EmptyKey)?;
            refuse(range.sort_order > 2 || range.sort_target > 4, Error::InvalidSortOption)
        }
        Request::RequestPut(put) => {
            refuse(put.key.is_empty(), Error::EmptyKey)?;
            refuse(put.ignore_value && !put.value.is_empty(), Error::ValueProvided)?;
            refuse(put.ignore_lease && put.lease != 0, Error::LeaseProvided)
        }
        Request::RequestDeleteRange(delete) => refuse(delete.key.is_empty(), Error::EmptyKey),
        Request::RequestTxn(txn) => {
            let longest = [txn.compare.len(), txn.success.len(), txn.failure.len()].into_iter().max().unwrap();
            refuse(longest > room, Error::TooManyOps)?;
            refuse(txn.compare.iter().any(|compare| compare.key.is_empty()), Error::EmptyKey)?;
            for op in txn.success.iter().chain(&txn.failure) {
                well_formed(op.request.as_ref().ok_or(Error::KeyNotFound)?, room - longest)?;
            }
            Ok(())
        }
    }
}

/// The puts and the deletes of some operations, or that one key is changed twice, as etcd's check sees it.
fn twice(ops: &[RequestOp]) -> Result<(Vec<Bytes>, Vec<DeleteRangeRequest>), Error> {
    let hit = |deletes: &[DeleteRangeRequest], key: &Bytes| {
        // To etcd's check, an end of "\0" is an end like any other.
        let hits = |d: &DeleteRangeRequest| *d.range_end != *b"\0" && covers(key, &d.key, &d.range_end);
        deletes.iter().any(hits)
    };
    let requests = || ops.iter().filter_map(|op| op.request.as_ref());
    let (mut puts, mut deletes) = (Vec::new(), Vec::new());
    for request in requests() {
        if let Request::RequestDeleteRange(delete) = request {
            deletes.push(delete.clone());
        }
    }
    for request in requests() {
        if let Request::RequestTxn(txn) = request {
            let (then, otherwise) = (twice(&txn.success)?, twice(&txn.failure)?);
            let mut both = then.0;
            both.extend(otherwise.0);
            refuse(both.iter().any(|key| puts.contains(key) || hit(&deletes, key)), Error::DuplicateKey)?;
            puts.extend(both);
            deletes.extend(then.1);
            deletes.extend(otherwise.1);
        }
    }
    for request in requests() {
        if let Request::RequestPut(put) = request {
            refuse(puts.contains(&put.key) || hit(&deletes, &put.key), Error::DuplicateKey)?;
            puts.push(put.key.clone());
        }
    }
    Ok((puts, deletes))
}

fn head(revision: i64) -> Option<ResponseHeader> {
    Some(ResponseHeader { revision, ..ResponseHeader::default() })
}

fn answer_range(keys: &Keys, revision: i64, request: &RangeRequest) -> RangeResponse {
    let within = keys.values().filter(|kv| covers(&kv.key, &request.key, &request.range_end));
    let mut kvs: Vec<KeyValue> = within.cloned().collect();
    let count = kvs.len() as i64;
    if request.count_only {
        return RangeResponse { header: head(revision), count, ..RangeResponse::default() };
    }
    let limit = if request.limit > 0 { request.limit as usize } else { usize::MAX - 1 };
    let bounds = [
        (request.min_mod_revision, request.max_mod_revision),
        (request.min_create_revision, request.max_create_revision),
    ];
    let by_key_upwards = request.sort_order == 0 || (request.sort_order == 1 && request.sort_target == 0);
    if by_key_upwards && bounds == [(0, 0); 2] {
        kvs.truncate(limit + 1);
    }
    kvs.retain(|kv| {
        let of = [kv.mod_revision, kv.create_revision];
        of.iter().zip(bounds).all(|(n, (min, max))| (min == 0 || *n >= min) && (max == 0 || *n <= max))
    });
    let number = |kv: &KeyValue| [0, kv.version, kv.create_revision, kv.mod_revision, 0][request.sort_target as usize];
    match request.sort_target {
        0 => {} // they are in order
        4 => kvs.sort_by_key(|kv| kv.value.clone()),
        _ => kvs.sort_by_key(number),
    }
    if request.sort_order == 2 {
        // The order of equals is nobody's promise; that of the keys is kept.
        kvs.reverse();
        match request.sort_target {
            0 => {}
            4 => kvs.chunk_by_mut(|a, b| a.value == b.value).for_each(<[KeyValue]>::reverse),
            _ => kvs.chunk_by_mut(|a, b| number(a) == number(b)).for_each(<[KeyValue]>::reverse),
        }
    }
    let more = kvs.len() > limit;
    kvs.truncate(limit);
    if request.keys_only {
        for kv in &mut kvs {
            kv.value = Bytes::new();
            kv.lease = if request.sort_target == 4 { kv.lease } else { 0 };
        }
    }
    RangeResponse { header: head(revision), kvs, more, count }
}

fn holds(compare: &Compare, kv: Option<&KeyValue>) -> bool {
    let nothing = KeyValue::default();
    let of = kv.unwrap_or(&nothing);
    let order = match (compare.target, &compare.target_union) {
        (0, Some(TargetUnion::Version(n))) => of.version.cmp(n),
        (1, Some(TargetUnion::CreateRevision(n))) => of.create_revision.cmp(n),
        (2, Some(TargetUnion::ModRevision(n))) => of.mod_revision.cmp(n),
        (3, _) if kv.is_none() => return false,
        (3, Some(TargetUnion::Value(value))) => of.value.cmp(value),
        (4, Some(TargetUnion::Lease(n))) => of.lease.cmp(n),
        (3, _) => of.value.as_ref().cmp(b""),
        (target, _) => [of.version, of.create_revision, of.mod_revision, 0, of.lease][target as usize].cmp(&0),
    };
    [order.is_eq(), order.is_gt(), order.is_lt(), order.is_ne()][compare.result as usize]
}

/// A request on its way: the state it sees, and what it changed so far.
struct Doing<'a> {
    model: &'a Model,
    keys: Keys,
    changes: Vec<Changed>,
}

impl Doing<'_> {
    fn revision(&self) -> i64 {
        self.model.revision + i64::from(!self.changes.is_empty())
    }

    fn change(&mut self, kv: KeyValue, gone: bool) {
        let before = self.model.now().get(&kv.key).cloned();
        let create = !gone && kv.create_revision == kv.mod_revision;
        self.changes.push((kv, gone, before.filter(|_| !create)));
    }

    fn put(&mut self, put: &PutRequest) -> PutResponse {
        let main = self.model.revision + 1;
        let before = self.keys.get(&put.key).cloned();
        let old = before.clone().unwrap_or(KeyValue { create_revision: main, ..KeyValue::default() });
        let kv = KeyValue {
            key: put.key.clone(),
            create_revision: old.create_revision,
            mod_revision: main,
            version: old.version + 1,
            value: if put.ignore_value { old.value } else { put.value.clone() },
            lease: if put.ignore_lease { old.lease } else { put.lease },
        };
        self.keys.insert(put.key.clone(), kv.clone());
        self.change(kv, false);
        PutResponse { header: head(self.revision()), prev_kv: before.filter(|_| put.prev_kv) }
    }

    fn delete(&mut self, delete: &DeleteRangeRequest) -> DeleteRangeResponse {
        let doomed = |kv: &&KeyValue| covers(&kv.key, &delete.key, &delete.range_end);
        let doomed: Vec<KeyValue> = self.keys.values().filter(doomed).cloned().collect();
        for kv in &doomed {
            self.keys.remove(&kv.key);
            let gone = KeyValue { key: kv.key.clone(), mod_revision: self.model.revision + 1, ..KeyValue::default() };
            self.change(gone, true);
        }
        DeleteRangeResponse {
            header: head(self.revision()),
            deleted: doomed.len() as i64,
            prev_kvs: if delete.prev_kv { doomed } else { Vec::new() },
        }
    }

    fn range(&self, range: &RangeRequest) -> RangeResponse {
        let keys = if range.revision > 0 { &self.model.at[&range.revision] } else { &self.keys };
        answer_range(keys, self.revision(), range)
    }

    fn txn(&mut self, txn: &TxnRequest) -> TxnResponse {
        let succeeded = self.model.succeeds(txn);
        let ops = if succeeded { &txn.success } else { &txn.failure };
        let mut responses = Vec::new();
        for op in ops {
            let response = match op.request.as_ref().unwrap() {
                Request::RequestRange(range) => Response::ResponseRange(self.range(range)),
                Request::RequestPut(put) => Response::ResponsePut(self.put(put)),
                Request::RequestDeleteRange(delete) => Response::ResponseDeleteRange(self.delete(delete)),
                Request::RequestTxn(txn) => Response::ResponseTxn(self.txn(txn)),
            };
            responses.push(ResponseOp { response: Some(response) });
        }
        TxnResponse { header: head(0), succeeded, responses }
    }
}

impl Model {
    fn new() -> Self {
        let at = BTreeMap::from([(0, Keys::new()), (1, Keys::new())]);
        Model { revision: 1, compacted: -1, at, changes: BTreeMap::new(), leases: BTreeSet::new() }
    }

    fn now(&self) -> &Keys {
        &self.at[&self.revision]
    }

    fn doing(&self) -> Doing<'_> {
        Doing { model: self, keys: self.now().clone(), changes: Vec::new() }
    }

    fn done(&mut self, keys: Keys, changes: Vec<Changed>) {
        if !changes.is_empty() {
            self.revision += 1;
            self.at.insert(self.revision, keys);
            self.changes.insert(self.revision, changes);
        }
    }

    /// All compares look at the state before the request.
    fn succeeds(&self, txn: &TxnRequest) -> bool {
        txn.compare.iter().all(|compare| {
            let within = |kv: &&KeyValue| covers(&kv.key, &compare.key, &compare.range_end);
            let found: Vec<_> = self.now().values().filter(within).collect();
            if found.is_empty() { holds(compare, None) } else { found.iter().all(|kv| holds(compare, Some(kv))) }
        })
    }

    fn readable(&self, revision: i64) -> Result<(), Error> {
        refuse(revision > self.revision, Error::FutureRevision)?;
        refuse(revision < self.compacted && revision != 0, Error::Compacted)
    }

    /// What fails along the path; `left` are the keys that exist when an operation's turn comes.
    fn fails(&self, txn: &TxnRequest, left: &mut BTreeSet<Bytes>) -> Result<(), Error> {
        for op in if self.succeeds(txn) { &txn.success } else { &txn.failure } {
            match op.request.as_ref().unwrap() {
                Request::RequestRange(range) => self.readable(range.revision)?,
                Request::RequestPut(put) => {
                    self.may_put(put)?;
                    let keeps = put.ignore_value || put.ignore_lease;
                    refuse(keeps && !left.contains(&put.key), Error::KeyNotFound)?;
                    left.insert(put.key.clone());
                }
                Request::RequestDeleteRange(delete) => left.retain(|key| !covers(key, &delete.key, &delete.range_end)),
                Request::RequestTxn(txn) => self.fails(txn, left)?,
            }
        }
        Ok(())
    }

    fn may_put(&self, put: &PutRequest) -> Result<(), Error> {
        refuse(put.lease != 0 && !self.leases.contains(&put.lease), Error::LeaseNotFound)?;
        let keeps = put.ignore_value || put.ignore_lease;
        refuse(keeps && !self.now().contains_key(&put.key), Error::KeyNotFound)
    }

    fn answer(&mut self, request: &Request) -> Result<Response, Error> {
        well_formed(request, MAX_OPS)?;
        if let Request::RequestTxn(txn) = request {
            twice(&txn.success)?;
            twice(&txn.failure)?;
            self.fails(txn, &mut self.now().keys().cloned().collect())?;
        }
        let mut doing = self.doing();
        let response = match request {
            Request::RequestRange(range) => {
                self.readable(range.revision.max(0))?;
                Response::ResponseRange(doing.range(range))
            }
            Request::RequestPut(put) => {
                self.may_put(put)?;
                Response::ResponsePut(doing.put(put))
            }
            Request::RequestDeleteRange(delete) => Response::ResponseDeleteRange(doing.delete(delete)),
            Request::RequestTxn(txn) => {
                let response = doing.txn(txn);
                Response::ResponseTxn(TxnResponse { header: head(doing.revision()), ..response })
            }
        };
        let (keys, changes) = (doing.keys, doing.changes);
        self.done(keys, changes);
        Ok(response)
    }

    fn revoke(&mut self, lease: i64) -> Result<(), Error> {
        refuse(!self.leases.remove(&lease), Error::LeaseNotFound)?;
        let attached: Vec<_> = self.now().values().filter(|kv| kv.lease == lease).map(|kv| kv.key.clone()).collect();
        let mut doing = self.doing();
        for key in attached {
            doing.delete(&DeleteRangeRequest { key, ..DeleteRangeRequest::default() });
        }
        let (keys, changes) = (doing.keys, doing.changes);
        self.done(keys, changes);
        Ok(())
    }

    fn compact(&mut self, to: i64) -> Result<(), Error> {
        refuse(to <= self.compacted, Error::Compacted)?;
        refuse(to > self.revision, Error::FutureRevision)?;
        self.compacted = to;
        self.at.retain(|revision, _| *revision >= to);
        Ok(())
    }
}

/// What the store says to a request, from the check of its form to the answer; `Applied` has its events.
fn ask(member: &mut TestMember, request: &Request) -> (Result<Response, Error>, Applied) {
    let read = |answer: Result<Response, ReadError>| match answer {
        Ok(response) => (Ok(response), Applied::default()),
        Err(ReadError::Answer(error)) => (Err(error), Applied::default()),
        Err(ReadError::Fatal(fatal)) => panic!("{fatal}"),
    };
    let form = match request {
        Request::RequestRange(range) => check::validate_range(range),
        Request::RequestPut(put) => check::validate_put(put),
        Request::RequestDeleteRange(delete) => check::validate_delete_range(delete),
        Request::RequestTxn(txn) => check::validate_txn(txn, MAX_OPS),
    };
    if let Err(error) = form {
        return (Err(error), Applied::default());
    }
    let mut entry = InternalRaftRequest::default();
    match request.clone() {
        Request::RequestRange(request) => {
            let published = member.publish();
            let response =
                range(published.moment(), &request).map(|found| found.into_response(published.facts.revision).unwrap());
            return read(response.map(Response::ResponseRange));
        }
        Request::RequestTxn(txn) if check::is_read_only(&txn) => {
            return read(txn::read(member.publish().moment(), &txn).map(Response::ResponseTxn));
        }
        Request::RequestPut(put) => entry.put = Some(put),
        Request::RequestDeleteRange(delete) => entry.delete_range = Some(delete),
        Request::RequestTxn(txn) => entry.txn = Some(txn),
    }
    let (outcome, applied) = member.apply(&entry);
    let response = outcome.map(|outcome| match outcome {
        Outcome::Put(put) => Response::ResponsePut(put),
        Outcome::DeleteRange(delete) => Response::ResponseDeleteRange(delete),
        Outcome::Txn(txn) => Response::ResponseTxn(txn),
        other => panic!("{other:?}"),
    });
    (response, applied)
}

fn seen(events: &[RevisionEvents]) -> Vec<(i64, Vec<Changed>)> {
    let kv = |bytes: &Bytes| KeyValue::decode(bytes.clone()).unwrap();
    let one = |event: &crate::mvcc::Event| {
        let shown = kv(&event.kv);
        assert_eq!((&event.key, event.create), (&shown.key, shown.version == 1));
        (shown, event.kind == EventKind::Delete, event.prev.as_ref().map(kv))
    };
    events.iter().map(|revision| (revision.revision, revision.events.iter().map(one).collect())).collect()
}

/// All that is left to be caught up with, in slices of `max_rows`; then, the deletion done, what the tables hold.
fn check_at_the_end(member: &mut TestMember, model: &Model, max_rows: usize) {
    for _ in 0..2 {
        let (view, bounds) = (member.view(), member.store.facts().bounds());
        let (mut found, mut from) = (Vec::new(), model.compacted.max(0) + 1);
        while from <= model.revision {
            let slice = history::events(&view, bounds, from, model.revision, max_rows, &|_| true, true).unwrap();
            found.extend(seen(&slice.0));
            from = slice.1;
        }
        let expected = model.changes.range(model.compacted.max(0) + 1..).map(|(r, changes)| (*r, changes.clone()));
        assert_eq!(found, expected.collect::<Vec<_>>());
        while member.slice(3).is_some() {}
    }
    let rows = member.view().rows(Table::Rev);
    let in_use: u64 = rows.iter().map(|(_, row)| crate::mvcc::logical_size(row).unwrap()).sum();
    let leases = model.leases.len() as i64 * quota::LEASE_COST;
    assert_eq!(member.store.facts().size_in_use, in_use as i64 + leases, "the sums are what the rows are");
    for lease in 1..4 {
        let attached = model.now().values().filter(|kv| kv.lease == lease).map(|kv| kv.key.clone());
        assert_eq!(crate::lease::keys(&member.view(), LeaseId(lease)).unwrap(), attached.collect::<Vec<_>>());
    }
}

fn step(member: &mut TestMember, model: &mut Model, tape: &mut Tape<'_>) {
    let before = model.revision;
    let applied = match tape.below(32) {
        kind @ 0..28 => {
            let request = match kind {
                0..7 => Request::RequestPut(tape.put()),
                7..11 => Request::RequestDeleteRange(tape.delete()),
                11..19 => Request::RequestRange(tape.range(model.revision)),
                _ => Request::RequestTxn(tape.txn(model.revision, 0)),
            };
            let expected = model.answer(&request);
            let (answer, applied) = ask(member, &request);
            assert_eq!(answer, expected, "{request:?}");
            applied
        }
        28 => {
            let to = if tape.one_in(2) { model.revision } else { tape.past(model.revision + 1) };
            let (outcome, applied) = member.apply(&make::compact(to));
            assert_eq!(outcome.map(|_| ()), model.compact(to));
            applied
        }
        29 => {
            let lease = i64::from(tape.below(3)) + 1;
            let (outcome, applied) = member.apply(&make::grant(lease, 60));
            assert_eq!(outcome.is_ok(), model.leases.insert(lease));
            applied
        }
        30 => {
            let lease = i64::from(tape.below(3)) + 1;
            let (outcome, applied) = member.apply(&make::revoke(lease));
            assert_eq!(outcome.map(|_| ()), model.revoke(lease));
            applied
        }
        _ => {
            let _ = member.slice(usize::from(tape.below(8)));
            if tape.one_in(3) {
                member.reopen(config());
            }
            Applied::default()
        }
    };
    let changed = model.changes.range(before + 1..).map(|(revision, changes)| (*revision, changes.clone()));
    assert_eq!(seen(&applied.events), changed.collect::<Vec<_>>());
    let facts = member.store.facts();
    assert_eq!((facts.revision, facts.compacted), (model.revision, model.compacted));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_answer_is_the_models(tapes in vec(vec(any::<u8>(), 0..60), 1..60), max_rows in 1..9usize) {
        let (mut model, mut member) = (Model::new(), TestMember::new(config()));
        for lease in 1..3 {
            let _ = member.apply(&make::grant(lease, 60));
            model.leases.insert(lease);
        }
        for tape in &tapes {
            step(&mut member, &mut model, &mut Tape(tape.iter()));
        }
        check_at_the_end(&mut member, &model, max_rows);
    }
}
