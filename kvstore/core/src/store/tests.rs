//! The store's stories, and its properties.

mod chunks;
mod count;
mod model;
mod requests;
mod script;
mod traps;

use bytes::Bytes;
use keelson_proto::etcdserverpb::{InternalRaftRequest, RequestHeader};
use prost::Message;

use super::*;
use crate::backend::Backend;
use crate::backend::memory::{MemoryBackend, MemoryView};
use crate::types::{EntryKind, LeaseId};

/// One member: a store and its database, with entries made as they are applied.
pub(crate) struct TestMember {
    pub(crate) backend: MemoryBackend,
    pub(crate) store: Store,
}

pub(crate) fn config() -> StoreConfig {
    StoreConfig { member_id: MemberId(1), quota_backend_bytes: -1, record_cache_bytes: 4096 }
}

pub(crate) fn founders() -> Vec<Founder> {
    let founder = |id, name: &str| Founder {
        id: MemberId(id),
        name: name.into(),
        peer_urls: vec![format!("http://10.0.0.{id}:2380")],
    };
    vec![founder(2, "beta"), founder(1, "alpha")]
}

impl TestMember {
    pub(crate) fn new(config: StoreConfig) -> Self {
        let mut backend = MemoryBackend::new();
        backend.write(Store::bootstrap(&founders(), ClusterId(7))).unwrap();
        let store = Store::open(&backend.view(), config).unwrap();
        TestMember { backend, store }
    }

    pub(crate) fn view(&self) -> MemoryView {
        self.backend.view()
    }

    pub(crate) fn publish(&self) -> Published<MemoryView> {
        self.store.publish(self.backend.view())
    }

    pub(crate) fn entry(index: Index, request: &InternalRaftRequest) -> Entry {
        let mut request = request.clone();
        request.header = Some(RequestHeader { id: index, ..RequestHeader::default() });
        Entry { index, term: 2, kind: EntryKind::Normal, data: request.encode_to_vec().into() }
    }

    pub(crate) fn apply_entries(&mut self, entries: &[Entry]) -> Applied {
        let mut batch = WriteBatch::new();
        let applied = self.store.apply(&self.backend.view(), entries, &mut batch).unwrap();
        self.backend.write(batch).unwrap();
        applied
    }

    /// Applies one request and gives its outcome and all consequences.
    pub(crate) fn apply(&mut self, request: &InternalRaftRequest) -> (Result<Outcome, Error>, Applied) {
        let entry = Self::entry(self.store.facts().applied_index + 1, request);
        let mut applied = self.apply_entries(&[entry]);
        let (_, outcome) = applied.outcomes.pop().expect("one outcome an entry");
        (outcome, applied)
    }

    pub(crate) fn slice(&mut self, max_rows: usize) -> Option<SliceDone> {
        let mut batch = WriteBatch::new();
        let done = self.store.compact_slice(&self.backend.view(), max_rows, &mut batch).unwrap();
        self.backend.write(batch).unwrap();
        done
    }

    pub(crate) fn reopen(&mut self, config: StoreConfig) {
        self.store = Store::open(&self.backend.view(), config).unwrap();
    }
}

pub(crate) mod make {
    //! Requests, short.
    use keelson_proto::etcdserverpb::*;

    use super::*;

    pub(crate) fn key(text: &str) -> Bytes {
        Bytes::copy_from_slice(text.as_bytes())
    }

    pub(crate) fn put(k: &str, v: &str) -> InternalRaftRequest {
        put_leased(k, v, 0)
    }

    pub(crate) fn put_leased(k: &str, v: &str, lease: i64) -> InternalRaftRequest {
        let put = PutRequest { key: key(k), value: key(v), lease, ..PutRequest::default() };
        InternalRaftRequest { put: Some(put), ..InternalRaftRequest::default() }
    }

    pub(crate) fn delete(k: &str, end: &str) -> InternalRaftRequest {
        let delete = DeleteRangeRequest { key: key(k), range_end: key(end), prev_kv: true };
        InternalRaftRequest { delete_range: Some(delete), ..InternalRaftRequest::default() }
    }

    pub(crate) fn compact(revision: i64) -> InternalRaftRequest {
        let compaction = CompactionRequest { revision, physical: false };
        InternalRaftRequest { compaction: Some(compaction), ..InternalRaftRequest::default() }
    }

    pub(crate) fn grant(id: i64, ttl: i64) -> InternalRaftRequest {
        let grant = LeaseGrantRequest { id, ttl };
        InternalRaftRequest { lease_grant: Some(grant), ..InternalRaftRequest::default() }
    }

    pub(crate) fn revoke(id: i64) -> InternalRaftRequest {
        let revoke = LeaseRevokeRequest { id };
        InternalRaftRequest { lease_revoke: Some(revoke), ..InternalRaftRequest::default() }
    }

    pub(crate) fn txn(txn: TxnRequest) -> InternalRaftRequest {
        InternalRaftRequest { txn: Some(txn), ..InternalRaftRequest::default() }
    }

    pub(crate) fn alarm(action: alarm_request::AlarmAction, member_id: u64, alarm: AlarmType) -> InternalRaftRequest {
        let alarm = AlarmRequest { action: action as i32, member_id, alarm: alarm as i32 };
        InternalRaftRequest { alarm: Some(alarm), ..InternalRaftRequest::default() }
    }

    pub(crate) fn range(k: &str, end: &str, revision: i64) -> RangeRequest {
        RangeRequest { key: key(k), range_end: key(end), revision, ..RangeRequest::default() }
    }
}

#[test]
fn stories_of_the_keyspace() {
    crate::testing::stories("mvcc", script::start);
}

#[test]
fn stories_of_leases() {
    crate::testing::stories("lease", script::start);
}

#[test]
fn stories_of_the_store() {
    crate::testing::stories("store", script::start);
}
