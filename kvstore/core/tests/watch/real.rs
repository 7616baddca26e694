//! The real store on the memory backend, told the same as the model.

use bytes::Bytes;
use keelson_proto::etcdserverpb::{
    CompactionRequest, DeleteRangeRequest, InternalRaftRequest, PutRequest, RequestHeader, RequestOp, TxnRequest,
    request_op,
};
use kvstore_core::backend::memory::{MemoryBackend, MemoryView};
use kvstore_core::backend::{Backend, WriteBatch};
use kvstore_core::mvcc::{Bounds, RevisionEvents};
use kvstore_core::store::{Applied, Store, StoreConfig};
use kvstore_core::types::{ClusterId, Entry, EntryKind, MemberId};
use prost::Message;

use crate::history::Change;

pub(crate) struct RealStore {
    backend: MemoryBackend,
    store: Store,
    index: u64,
}

impl Default for RealStore {
    fn default() -> Self {
        let mut backend = MemoryBackend::new();
        backend.write(Store::bootstrap(&[], ClusterId(1))).unwrap();
        let config = StoreConfig { member_id: MemberId(1), quota_backend_bytes: -1, record_cache_bytes: 200 };
        let store = Store::open(&backend.view(), config).unwrap();
        RealStore { backend, store, index: 1 }
    }
}

impl RealStore {
    pub(crate) fn view(&self) -> MemoryView {
        self.backend.view()
    }

    pub(crate) fn bounds(&self) -> Bounds {
        self.store.facts().bounds()
    }

    /// Applies changes as one transaction.
    pub(crate) fn apply(&mut self, changes: &[Change]) -> Vec<RevisionEvents> {
        let success = changes.iter().map(|change| RequestOp { request: Some(op(change)) }).collect();
        let txn = Some(TxnRequest { success, ..TxnRequest::default() });
        self.enter(InternalRaftRequest { txn, ..InternalRaftRequest::default() }).events
    }

    /// Compacts, and deletes all that this leaves behind.
    pub(crate) fn compact(&mut self, revision: i64) -> i64 {
        let compaction = Some(CompactionRequest { revision, physical: false });
        let applied = self.enter(InternalRaftRequest { compaction, ..InternalRaftRequest::default() });
        loop {
            let mut batch = WriteBatch::new();
            let slice = self.store.compact_slice(&self.backend.view(), 3, &mut batch).unwrap();
            self.backend.write(batch).unwrap();
            if slice.is_none() {
                return applied.compacted.unwrap();
            }
        }
    }

    fn enter(&mut self, mut request: InternalRaftRequest) -> Applied {
        self.index += 1;
        request.header = Some(RequestHeader { id: self.index, ..RequestHeader::default() });
        let data = Bytes::from(request.encode_to_vec());
        let entry = Entry { index: self.index, term: 1, kind: EntryKind::Normal, data };
        let mut batch = WriteBatch::new();
        let applied = self.store.apply(&self.backend.view(), &[entry], &mut batch).unwrap();
        self.backend.write(batch).unwrap();
        applied.outcomes.iter().for_each(|(_, outcome)| assert!(outcome.is_ok(), "{outcome:?}"));
        applied
    }
}

fn op(change: &Change) -> request_op::Request {
    match change {
        Change::Put(key, value) => request_op::Request::RequestPut(PutRequest {
            key: key.clone().into(),
            value: value.clone().into(),
            ..PutRequest::default()
        }),
        Change::Delete(key) => request_op::Request::RequestDeleteRange(DeleteRangeRequest {
            key: key.clone().into(),
            ..DeleteRangeRequest::default()
        }),
    }
}
