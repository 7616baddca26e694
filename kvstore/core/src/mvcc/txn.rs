//! Txn: the compares choose a path, the path is checked, then it is executed.
//!
//! All compares, nested ones too, look at the state before the Txn; then everything that could fail along the chosen
//! path is looked for, and fails the Txn whole; what is left cannot fail. Ranges see what earlier operations wrote.
//! Nested answers carry no revision in the header of the Txn itself, as etcd 3.7.3 answers (seen).
//!
//! One thing etcd does not survive, and we do: a key that an earlier operation deletes and a later Put wants to keep
//! the value of (`ignore_value`). etcd panics there; here the Txn fails with "key not found".
//!
//! What it does not do: it checks no form and no count of operations (`check.rs`).

use std::cmp::Ordering;

use bytes::Bytes;
use keelson_proto::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use keelson_proto::etcdserverpb::request_op::Request;
use keelson_proto::etcdserverpb::response_op::Response;
use keelson_proto::etcdserverpb::{
    Compare, DeleteRangeRequest, DeleteRangeResponse, PutRequest, PutResponse, RangeRequest, RangeResponse, RequestOp,
    ResponseHeader, ResponseOp, TxnRequest, TxnResponse,
};

use super::record::{self, Kv};
use super::span::Span;
use super::versions::{self, Want};
use super::write::{Change, NewValue};
use super::{Bounds, Moment, ReadError, range};
use crate::backend::{Read, ReadView};
use crate::{Error, Fatal};

/// Serves a Txn that only reads ([`super::check::is_read_only`]) on a view.
pub fn read<R: Read>(moment: Moment<'_, R>, request: &TxnRequest) -> Result<TxnResponse, ReadError> {
    let Moment { read, bounds, .. } = moment;
    let mut succeeded = true;
    for compare in &request.compare {
        succeeded = succeeded && holds(read, bounds, compare)?;
    }
    let ops = if succeeded { &request.success } else { &request.failure };
    let mut responses = Vec::with_capacity(ops.len());
    for op in ops {
        if let Some(Request::RequestRange(range)) = &op.request {
            check_revision(bounds, range)?;
            responses.push(respond(Response::ResponseRange(ranged(moment, range)?)));
        }
    }
    Ok(TxnResponse { header: header(bounds.revision), succeeded, responses })
}

/// Applies a Txn. An `Err` with an answer has changed nothing.
pub(crate) fn apply<V: ReadView>(
    change: &mut Change<'_, V>,
    request: &TxnRequest,
    lease_exists: &dyn Fn(i64) -> bool,
) -> Result<TxnResponse, ReadError> {
    let mut path = Vec::new();
    choose(change, request, &mut path)?;
    let mut checked = Checked { lease_exists, touched: Vec::new() };
    check(change, request, &mut path.iter(), &mut checked)?;
    let mut response = execute(change, request, &mut path.iter())?;
    response.header = header(change.revision());
    Ok(response)
}

/// What a Put does, for a Txn and by itself.
pub(crate) fn put<V: ReadView>(change: &mut Change<'_, V>, request: &PutRequest) -> Result<PutResponse, Fatal> {
    let new = NewValue {
        key: &request.key,
        value: (!request.ignore_value).then_some(request.value.as_ref()),
        lease: (!request.ignore_lease).then_some(request.lease),
    };
    let prev = change.put(new)?.filter(|_| request.prev_kv);
    Ok(PutResponse { header: header(change.revision()), prev_kv: prev.map(record::message).transpose()? })
}

/// What a DeleteRange does, for a Txn and by itself.
pub(crate) fn delete_range<V: ReadView>(
    change: &mut Change<'_, V>,
    request: &DeleteRangeRequest,
) -> Result<DeleteRangeResponse, Fatal> {
    let deleted = change.delete_range(Span::new(&request.key, &request.range_end))?;
    let count = deleted.len() as i64;
    let prev_kvs =
        if request.prev_kv { deleted.into_iter().map(record::message).collect::<Result<_, _>>()? } else { Vec::new() };
    Ok(DeleteRangeResponse { header: header(change.revision()), deleted: count, prev_kvs })
}

/// Whether a Put can be done: etcd looks at the lease first, then at the key it should keep something of.
pub(crate) fn check_put<V: ReadView>(
    change: &mut Change<'_, V>,
    request: &PutRequest,
    lease_exists: &dyn Fn(i64) -> bool,
) -> Result<(), ReadError> {
    if request.lease != 0 && !lease_exists(request.lease) {
        return Err(Error::LeaseNotFound.into());
    }
    if (request.ignore_value || request.ignore_lease) && change.live(&request.key)?.is_none() {
        return Err(Error::KeyNotFound.into());
    }
    Ok(())
}

pub(crate) fn header(revision: i64) -> Option<ResponseHeader> {
    Some(ResponseHeader { revision, ..ResponseHeader::default() })
}

fn respond(response: Response) -> ResponseOp {
    ResponseOp { response: Some(response) }
}

fn branch(request: &TxnRequest, succeeded: bool) -> &[RequestOp] {
    if succeeded { &request.success } else { &request.failure }
}

/// Evaluates the compares of a Txn and of those on its path, in the order in which they will be executed.
fn choose<V: ReadView>(change: &mut Change<'_, V>, request: &TxnRequest, path: &mut Vec<bool>) -> Result<(), Fatal> {
    let mut succeeded = true;
    for compare in &request.compare {
        let held = if compare.range_end.is_empty() {
            // Through the cache: a guarded Put will want the same record.
            let kv = change.live(&compare.key)?;
            point_holds(compare, kv.as_deref())?
        } else {
            holds(&change.read(), change.bounds(), compare)?
        };
        succeeded = succeeded && held;
        if !succeeded {
            break;
        }
    }
    path.push(succeeded);
    for op in branch(request, succeeded) {
        if let Some(Request::RequestTxn(txn)) = &op.request {
            choose(change, txn, path)?;
        }
    }
    Ok(())
}

/// Whether a compare holds for every key of its span; for a missing key it is compared with zeros, except a value,
/// which is never equal nor unequal to nothing.
fn holds<R: Read>(read: &R, bounds: Bounds, compare: &Compare) -> Result<bool, Fatal> {
    let mut found = false;
    let mut held = true;
    let mut failed = None;
    let span = Span::new(&compare.key, &compare.range_end);
    versions::each(read, bounds, bounds.revision, span, Want::Bytes, &mut |kv| {
        found = true;
        held = Kv::decode(kv).map(|kv| kv_holds(compare, &kv)).unwrap_or_else(|error| {
            failed = Some(error);
            false
        });
        if held { Want::Bytes } else { Want::Nothing }
    })?;
    match failed {
        Some(error) => Err(error),
        None if found => Ok(held),
        None => point_holds(compare, None),
    }
}

fn point_holds(compare: &Compare, kv: Option<&[u8]>) -> Result<bool, Fatal> {
    match kv {
        Some(kv) => Ok(kv_holds(compare, &Kv::decode(kv)?)),
        None if compare.target == CompareTarget::Value as i32 => Ok(false),
        None => Ok(kv_holds(compare, &Kv::default())),
    }
}

/// An absent or foreign operand is zero; an unknown target compares equal and an unknown result holds, as in etcd.
fn kv_holds(compare: &Compare, kv: &Kv<'_>) -> bool {
    let operand = compare.target_union.as_ref();
    let ordering = match CompareTarget::try_from(compare.target) {
        Ok(CompareTarget::Version) => kv.version.cmp(&match operand {
            Some(TargetUnion::Version(n)) => *n,
            _ => 0,
        }),
        Ok(CompareTarget::Create) => kv.create_revision.cmp(&match operand {
            Some(TargetUnion::CreateRevision(n)) => *n,
            _ => 0,
        }),
        Ok(CompareTarget::Mod) => kv.mod_revision.cmp(&match operand {
            Some(TargetUnion::ModRevision(n)) => *n,
            _ => 0,
        }),
        Ok(CompareTarget::Lease) => kv.lease.cmp(&match operand {
            Some(TargetUnion::Lease(n)) => *n,
            _ => 0,
        }),
        Ok(CompareTarget::Value) => kv.value.cmp(match operand {
            Some(TargetUnion::Value(value)) => value.as_ref(),
            _ => &[],
        }),
        Err(_) => Ordering::Equal,
    };
    match CompareResult::try_from(compare.result) {
        Ok(CompareResult::Equal) => ordering.is_eq(),
        Ok(CompareResult::NotEqual) => ordering.is_ne(),
        Ok(CompareResult::Greater) => ordering.is_gt(),
        Ok(CompareResult::Less) => ordering.is_lt(),
        Err(_) => true,
    }
}

/// What the check of a path knows beside the state before it.
struct Checked<'a> {
    lease_exists: &'a dyn Fn(i64) -> bool,
    /// The deletes and puts of the path so far, in order, and whether the keys exist after them.
    touched: Vec<(Bytes, Bytes, bool)>,
}

impl Checked<'_> {
    fn deleted(&self, key: &[u8]) -> bool {
        let last = self.touched.iter().rev().find(|(first, end, _)| Span::new(first, end).contains(key));
        last.is_some_and(|(_, _, exists)| !exists)
    }
}

/// Looks for whatever would fail along the path.
fn check<'p, V: ReadView>(
    change: &mut Change<'_, V>,
    request: &TxnRequest,
    path: &mut impl Iterator<Item = &'p bool>,
    checked: &mut Checked<'_>,
) -> Result<(), ReadError> {
    for op in branch(request, path.next().copied().unwrap_or(true)) {
        match &op.request {
            Some(Request::RequestRange(range)) => check_revision(change.bounds(), range)?,
            Some(Request::RequestPut(put)) => {
                check_put(change, put, checked.lease_exists)?;
                if (put.ignore_value || put.ignore_lease) && checked.deleted(&put.key) {
                    return Err(Error::KeyNotFound.into());
                }
                checked.touched.push((put.key.clone(), Bytes::new(), true));
            }
            Some(Request::RequestDeleteRange(delete)) => {
                checked.touched.push((delete.key.clone(), delete.range_end.clone(), false));
            }
            Some(Request::RequestTxn(txn)) => check(change, txn, &mut *path, checked)?,
            None => {}
        }
    }
    Ok(())
}

/// Inside a Txn a negative revision is not "the current one" but below whatever was compacted, as in etcd (seen).
fn check_revision(bounds: Bounds, request: &RangeRequest) -> Result<(), Error> {
    match request.revision {
        0 => Ok(()),
        asked if asked > bounds.revision => Err(Error::FutureRevision),
        asked if asked < bounds.compacted => Err(Error::Compacted),
        _ => Ok(()),
    }
}

fn ranged<R: Read>(moment: Moment<'_, R>, request: &RangeRequest) -> Result<RangeResponse, ReadError> {
    Ok(range(moment, request)?.into_response(moment.bounds.revision)?)
}

/// Executes the path. Nothing on it can be refused any more.
fn execute<'p, V: ReadView>(
    change: &mut Change<'_, V>,
    request: &TxnRequest,
    path: &mut impl Iterator<Item = &'p bool>,
) -> Result<TxnResponse, ReadError> {
    let succeeded = path.next().copied().unwrap_or(true);
    let ops = branch(request, succeeded);
    let mut responses = Vec::with_capacity(ops.len());
    for op in ops {
        responses.push(ResponseOp {
            response: match &op.request {
                Some(Request::RequestRange(range)) => {
                    let read = change.read();
                    Some(Response::ResponseRange(ranged(change.moment(&read), range)?))
                }
                Some(Request::RequestPut(request)) => Some(Response::ResponsePut(put(change, request)?)),
                Some(Request::RequestDeleteRange(request)) => {
                    Some(Response::ResponseDeleteRange(delete_range(change, request)?))
                }
                Some(Request::RequestTxn(txn)) => Some(Response::ResponseTxn(execute(change, txn, &mut *path)?)),
                None => None,
            },
        });
    }
    Ok(TxnResponse { header: Some(ResponseHeader::default()), succeeded, responses })
}
