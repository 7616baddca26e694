//! Clients: each does one thing after the other at a member of its choice and writes down what it saw. Reads, writes,
//! deletions and swaps on a few keys are judged; leases and compactions go along with them, and are judged by all members
//! ending up the same.
//!
//! What it does not do: retry. What was not answered stays unknown.

use bytes::Bytes;
use check::history::{Action, Answer, Ended, Operation, Version};
use keelson_proto::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use keelson_proto::etcdserverpb::request_op::Request;
use keelson_proto::etcdserverpb::response_op::Response;
use keelson_proto::etcdserverpb::{
    CompactionRequest, Compare, DeleteRangeRequest, InternalRaftRequest, LeaseGrantRequest, LeaseRevokeRequest,
    PutRequest, RangeRequest, RangeResponse, RequestOp, TxnRequest,
};
use keelson_proto::mvccpb::KeyValue;
use kvstore_core::Error;
use kvstore_core::store::Outcome;

use crate::model::text;
use crate::rng::Rng;

/// One call of one client; the waiter that `Pending` holds.
pub type CallId = usize;

const KEYS: [&str; 4] = ["k0", "k1", "k2", "k3"];
const LEASES: i64 = 5;

/// What a member is asked.
#[derive(Clone, Debug)]
pub enum Call {
    Read(RangeRequest),
    Write(Box<InternalRaftRequest>),
}

#[derive(Debug, Default)]
pub struct Workload {
    calls: Vec<Made>,
    pub history: Vec<Operation>,
    moment: u64,
    values: u64,
    pub revision: i64,
}

#[derive(Debug)]
struct Made {
    client: u64,
    /// In the history, if it is judged.
    operation: Option<usize>,
    open: bool,
}

impl Workload {
    /// What this client does next.
    pub fn call(&mut self, rng: &mut Rng, client: u64) -> (CallId, Call) {
        let key = (*rng.pick(&KEYS)).to_owned();
        match rng.below(100) {
            0..40 => {
                let request = RangeRequest { key: key.clone().into(), ..RangeRequest::default() };
                (self.judged(client, key, Action::Get), Call::Read(request))
            }
            40..65 => {
                let value = self.value();
                let put = PutRequest { key: key.clone().into(), value: value.clone().into(), ..PutRequest::default() };
                let request = InternalRaftRequest { put: Some(put), ..InternalRaftRequest::default() };
                (self.judged(client, key, Action::Put { value }), write(request))
            }
            65..73 => {
                let delete = DeleteRangeRequest { key: key.clone().into(), ..DeleteRangeRequest::default() };
                let request = InternalRaftRequest { delete_range: Some(delete), ..InternalRaftRequest::default() };
                (self.judged(client, key, Action::Delete), write(request))
            }
            73..90 => {
                let expected = self.last_seen(&key);
                let value = self.value();
                let request = swap(&key, expected.as_deref(), &value);
                (self.judged(client, key, Action::Swap { expected, value }), write(request))
            }
            _ => (self.made(client, None), write(self.other(rng))),
        }
    }

    /// Leases and compactions. Their keys are not judged: leases delete them behind their writers' backs.
    fn other(&mut self, rng: &mut Rng) -> InternalRaftRequest {
        let id = 1 + rng.below(LEASES as u64) as i64;
        let mut request = InternalRaftRequest::default();
        match rng.below(10) {
            0..3 => request.lease_grant = Some(LeaseGrantRequest { id, ttl: 60 }),
            3..7 => {
                let key = format!("leased/{}", rng.below(8)).into();
                let value = self.value().into();
                request.put = Some(PutRequest { key, value, lease: id, ..PutRequest::default() });
            }
            7..9 => request.lease_revoke = Some(LeaseRevokeRequest { id }),
            _ => {
                let revision = self.revision - rng.below(30) as i64;
                request.compaction = Some(CompactionRequest { revision, ..CompactionRequest::default() });
            }
        }
        request
    }

    /// The state machine's answer; whose it was, so that it goes on.
    pub fn answered(&mut self, call: CallId, outcome: Result<Outcome, Error>) -> Option<u64> {
        let ended = match &outcome {
            Ok(outcome) => answer(outcome).map(|(revision, answer)| {
                self.moment += 1;
                Ended::Answered { at: self.moment, revision, answer }
            }),
            // The same on every member, and nothing was done.
            Err(_) => Some(Ended::Refused),
        };
        if let Some(Ended::Answered { revision, .. }) = ended {
            self.revision = self.revision.max(revision);
        }
        self.end(call, ended)
    }

    pub fn read(&mut self, call: CallId, revision: i64, response: &RangeResponse) -> Option<u64> {
        self.moment += 1;
        let answer = Answer::Got(response.kvs.first().map(version));
        self.end(call, Some(Ended::Answered { at: self.moment, revision, answer }))
    }

    /// It certainly was not done.
    pub fn refused(&mut self, call: CallId) -> Option<u64> {
        self.end(call, Some(Ended::Refused))
    }

    /// Nobody will ever say.
    pub fn lost(&mut self, call: CallId) -> Option<u64> {
        self.end(call, None)
    }

    pub fn was_answered(&self, call: CallId) -> bool {
        match self.calls[call].operation {
            Some(at) => matches!(self.history[at].ended, Ended::Answered { .. }),
            None => !self.calls[call].open,
        }
    }

    fn end(&mut self, call: CallId, ended: Option<Ended>) -> Option<u64> {
        let made = &mut self.calls[call];
        if !std::mem::take(&mut made.open) {
            return None;
        }
        if let (Some(at), Some(ended)) = (made.operation, ended) {
            self.history[at].ended = ended;
        }
        Some(made.client)
    }

    fn judged(&mut self, client: u64, key: String, action: Action) -> CallId {
        self.moment += 1;
        self.history.push(Operation { client, key, action, called: self.moment, ended: Ended::Unknown });
        self.made(client, Some(self.history.len() - 1))
    }

    fn made(&mut self, client: u64, operation: Option<usize>) -> CallId {
        self.calls.push(Made { client, operation, open: true });
        self.calls.len() - 1
    }

    fn value(&mut self) -> String {
        self.values += 1;
        format!("v{}", self.values)
    }

    /// What somebody last saw or wrote under the key: a guess that is often right.
    fn last_seen(&self, key: &str) -> Option<String> {
        let seen = self.history.iter().rev().filter(|operation| operation.key == key).find_map(|operation| {
            let Ended::Answered { answer, .. } = &operation.ended else { return None };
            match (&operation.action, answer) {
                (_, Answer::Got(seen) | Answer::NotSwapped(seen)) => Some(seen.as_ref().map(|seen| seen.value.clone())),
                (Action::Put { value } | Action::Swap { value, .. }, _) => Some(Some(value.clone())),
                (_, Answer::Deleted { .. }) => Some(None),
                _ => None,
            }
        });
        seen.flatten()
    }
}

fn write(request: InternalRaftRequest) -> Call {
    Call::Write(Box::new(request))
}

fn swap(key: &str, expected: Option<&str>, value: &str) -> InternalRaftRequest {
    let key = Bytes::copy_from_slice(key.as_bytes());
    let mut compare = Compare { result: CompareResult::Equal.into(), key: key.clone(), ..Compare::default() };
    let (target, union) = match expected {
        Some(value) => (CompareTarget::Value, TargetUnion::Value(Bytes::copy_from_slice(value.as_bytes()))),
        None => (CompareTarget::Version, TargetUnion::Version(0)),
    };
    compare.target = target.into();
    compare.target_union = Some(union);
    let put = PutRequest { key: key.clone(), value: Bytes::copy_from_slice(value.as_bytes()), ..PutRequest::default() };
    let get = RangeRequest { key, ..RangeRequest::default() };
    let txn = TxnRequest {
        compare: vec![compare],
        success: vec![RequestOp { request: Some(Request::RequestPut(put)) }],
        failure: vec![RequestOp { request: Some(Request::RequestRange(get)) }],
    };
    InternalRaftRequest { txn: Some(txn), ..InternalRaftRequest::default() }
}

fn version(kv: &KeyValue) -> Version {
    Version { value: text(&kv.value), mod_revision: kv.mod_revision, version: kv.version }
}

/// The header's revision and the answer, of what is judged.
fn answer(outcome: &Outcome) -> Option<(i64, Answer)> {
    match outcome {
        Outcome::Put(put) => Some((put.header.as_ref()?.revision, Answer::Put)),
        Outcome::DeleteRange(deleted) => {
            Some((deleted.header.as_ref()?.revision, Answer::Deleted { count: deleted.deleted }))
        }
        Outcome::Txn(txn) => {
            let revision = txn.header.as_ref()?.revision;
            let answer = match txn.responses.first().and_then(|response| response.response.as_ref()) {
                Some(Response::ResponsePut(_)) => Answer::Swapped,
                Some(Response::ResponseRange(range)) => Answer::NotSwapped(range.kvs.first().map(version)),
                _ => return None,
            };
            Some((revision, answer))
        }
        _ => None,
    }
}
