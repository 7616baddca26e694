//! Range: every option of the contract (2.6.2), over the present and the past.
//!
//! The plain question, keys in order and perhaps a limit, is one scan that copies stored bytes into the framed answer, up
//! to the limit; what comes after it is counted by the index. A single key is one `get` and one copy. Filters and other orders gather first, as etcd does. etcd's own quirks are kept:
//! `count` ignores limit and filters; an order of NONE with a target other than KEY sorts only what the limit let
//! through; `keys_only` answers lease 0, except when the target is VALUE (3.7's fast path).
//!
//! What it does not do: it checks no form (`check.rs`) and waits for no revision.

use std::cmp::Ordering;

use bytes::{BufMut, Bytes, BytesMut};
use keelson_proto::etcdserverpb::range_request::{SortOrder, SortTarget};
use keelson_proto::etcdserverpb::{RangeRequest, RangeResponse, ResponseHeader};
use prost::Message;
use prost::encoding::{encode_varint, encoded_len_varint};

use super::count::count;
use super::record::{self, Kv};
use super::span::Span;
use super::versions::{self, Version, Want};
use super::{Bounds, Moment, Ranged, ReadError};
use crate::backend::{Read, Table};
use crate::{Error, Fatal};

/// `repeated KeyValue kvs = 2`.
const KVS_TAG: u8 = 0x12;

/// What is reserved for an answer before its size is known; 64 KiB for one that may have few keys.
const MAX_RESERVED_BYTES: usize = 4 << 20;
const WELL_KNOWN: usize = 2_048;

/// One Range on a moment. The request's own form is checked by [`super::check::validate_range`].
pub fn range<R: Read>(moment: Moment<'_, R>, request: &RangeRequest) -> Result<Ranged, ReadError> {
    let at = readable(moment.bounds, request.revision)?;
    let span = Span::new(&request.key, &request.range_end);
    let plan = Plan::new(request);
    if let Span::Point(key) = span
        && !plan.gathers
    {
        return Ok(point(moment, at, key, request)?);
    }
    if request.count_only {
        return Ok(Ranged { count: count(moment, at, span)?, ..Ranged::default() });
    }
    if plan.gathers { Ok(gather(moment, at, span, request, &plan)?) } else { Ok(stream(moment, at, span, request)?) }
}

/// Rows that a Range may look at, about: said without looking at any, so that a caller knows where to run it.
pub fn rows<R>(moment: Moment<'_, R>, request: &RangeRequest) -> u64 {
    let plan = Plan::new(request);
    let shown = match () {
        () if request.count_only => 0,
        () if plan.gathers && !plan.scan_limited => u64::MAX,
        () => limit_of(request) as u64,
    };
    let at = if request.revision <= 0 { moment.bounds.revision } else { request.revision };
    super::count::rows(moment, at, Span::new(&request.key, &request.range_end), shown)
}

/// The revision to read at: the one asked for, or the current one.
pub(super) fn readable(bounds: Bounds, asked: i64) -> Result<i64, Error> {
    if asked > bounds.revision {
        return Err(Error::FutureRevision);
    }
    let at = if asked <= 0 { bounds.revision } else { asked };
    if at < bounds.compacted {
        return Err(Error::Compacted);
    }
    Ok(at)
}

/// How a request is served.
pub(super) struct Plan {
    order: SortOrder,
    target: SortTarget,
    /// The keys must be gathered, decoded and perhaps sorted before they are framed.
    gathers: bool,
    /// The limit holds already for the scan.
    scan_limited: bool,
}

impl Plan {
    pub(super) fn new(request: &RangeRequest) -> Plan {
        let order = SortOrder::try_from(request.sort_order).unwrap_or_default();
        let target = SortTarget::try_from(request.sort_target).unwrap_or_default();
        let filtered = request.min_mod_revision != 0
            || request.max_mod_revision != 0
            || request.min_create_revision != 0
            || request.max_create_revision != 0;
        let by_key = target == SortTarget::Key && order != SortOrder::Descend;
        Plan {
            order: if order == SortOrder::None { SortOrder::Ascend } else { order },
            target,
            gathers: !request.count_only && (filtered || !by_key),
            scan_limited: !filtered && (by_key || order == SortOrder::None),
        }
    }
}

pub(super) fn limit_of(request: &RangeRequest) -> usize {
    if request.limit <= 0 { usize::MAX } else { usize::try_from(request.limit).unwrap_or(usize::MAX) }
}

/// A single key: one `get`, and one copy if it is newest.
fn point<R: Read>(moment: Moment<'_, R>, at: i64, key: &[u8], request: &RangeRequest) -> Result<Ranged, Fatal> {
    let Moment { read, bounds, .. } = moment;
    let Some(newest) = read.get(Table::Key, key)? else {
        return Ok(Ranged::default());
    };
    let found = if at >= bounds.revision {
        if record::newest(&newest)?.0 { None } else { Some(newest) }
    } else {
        match versions::version_at(read, bounds, at, &newest)? {
            Version::Shown => Some(newest),
            Version::Older(record) => Some(record),
            Version::Absent => None,
        }
    };
    let Some(record) = found else {
        return Ok(Ranged::default());
    };
    if request.count_only {
        return Ok(Ranged { count: 1, ..Ranged::default() });
    }
    let (_, kv) = record::newest(&record)?;
    let mut out = BytesMut::with_capacity(kv.len() + 11);
    frame(kv, request, &mut out)?;
    Ok(Ranged { kvs: out.freeze(), len: 1, more: false, count: 1 })
}

/// Keys in order: stored bytes go straight into the answer until the limit; the rest is counted.
fn stream<R: Read>(moment: Moment<'_, R>, at: i64, span: Span<'_>, request: &RangeRequest) -> Result<Ranged, Fatal> {
    let limit = limit_of(request);
    let mut out = BytesMut::new();
    let mut failed = None;
    let expected = (rows(moment, request) as usize).min(limit);
    let (len, rest) = shown_and_rest(moment, at, span, limit, &mut |kv| {
        if out.is_empty() {
            // Pairs of a range are mostly alike. How many there are is known well only of a large range.
            let most = if expected > WELL_KNOWN { MAX_RESERVED_BYTES } else { MAX_RESERVED_BYTES / 64 };
            out.reserve(expected.saturating_mul(kv.len() + 8).min(most));
        }
        if let Err(error) = frame(kv, request, &mut out) {
            failed = Some(error);
        }
        failed.is_none()
    })?;
    if let Some(error) = failed {
        return Err(error);
    }
    Ok(Ranged { kvs: out.freeze(), len, more: rest > 0, count: len as i64 + rest })
}

/// Shows the first `limit` keys of a span to `visit`, until it has had enough, and counts those after them.
fn shown_and_rest<R: Read>(
    moment: Moment<'_, R>,
    at: i64,
    span: Span<'_>,
    limit: usize,
    visit: &mut dyn FnMut(&[u8]) -> bool,
) -> Result<(usize, i64), Fatal> {
    let mut len = 0;
    let mut after = Vec::new();
    let mut failed = None;
    versions::each(moment.read, moment.bounds, at, span, Want::Bytes, &mut |kv| {
        len += 1;
        if !visit(kv) {
            return Want::Nothing;
        }
        if len < limit {
            return Want::Bytes;
        }
        match Kv::decode(kv) {
            // The least key after this one.
            Ok(kv) => after = [kv.key, &[0]].concat(),
            Err(error) => failed = Some(error),
        }
        Want::Nothing
    })?;
    match failed {
        Some(error) => Err(error),
        None if after.is_empty() => Ok((len, 0)),
        None => Ok((len, count(moment, at, span.starting(&after))?)),
    }
}

/// Filters and orders that are not the stored one: gather, filter, sort, cut.
fn gather<R: Read>(
    moment: Moment<'_, R>,
    at: i64,
    span: Span<'_>,
    request: &RangeRequest,
    plan: &Plan,
) -> Result<Ranged, Fatal> {
    let limit = limit_of(request);
    // etcd fetches one more than the limit, to know whether there are more, and sorts that one too.
    let fetch = if plan.scan_limited { limit.saturating_add(1) } else { usize::MAX };
    let mut stored: Vec<Bytes> = Vec::new();
    let (len, rest) = shown_and_rest(moment, at, span, fetch, &mut |kv| {
        stored.push(Bytes::copy_from_slice(kv));
        true
    })?;
    let mut kvs = stored.iter().map(|kv| Kv::decode(kv)).collect::<Result<Vec<_>, _>>()?;
    kvs.retain(|kv| passes(kv, request));
    let more = kvs.len() > limit;
    let framed = sorted_and_framed(&mut kvs, limit, request, plan);
    Ok(Ranged { kvs: framed, len: kvs.len(), more, count: len as i64 + rest })
}

/// Sorts what was gathered, cuts it at the limit, and frames what is left of it.
pub(super) fn sorted_and_framed(kvs: &mut Vec<Kv<'_>>, limit: usize, request: &RangeRequest, plan: &Plan) -> Bytes {
    sort(kvs, plan);
    kvs.truncate(limit);
    let mut out = BytesMut::new();
    for kv in kvs.iter() {
        put_framed(&shown(*kv, request), &mut out);
    }
    out.freeze()
}

fn passes(kv: &Kv<'_>, request: &RangeRequest) -> bool {
    let within = |n: i64, min: i64, max: i64| (min == 0 || n >= min) && (max == 0 || n <= max);
    within(kv.mod_revision, request.min_mod_revision, request.max_mod_revision)
        && within(kv.create_revision, request.min_create_revision, request.max_create_revision)
}

fn sort(kvs: &mut [Kv<'_>], plan: &Plan) {
    let compare = |a: &Kv<'_>, b: &Kv<'_>| match plan.target {
        SortTarget::Key => a.key.cmp(b.key),
        SortTarget::Version => a.version.cmp(&b.version),
        SortTarget::Create => a.create_revision.cmp(&b.create_revision),
        SortTarget::Mod => a.mod_revision.cmp(&b.mod_revision),
        SortTarget::Value => a.value.cmp(b.value),
    };
    let directed = |a: &Kv<'_>, b: &Kv<'_>| -> Ordering {
        if plan.order == SortOrder::Descend { compare(b, a) } else { compare(a, b) }
    };
    kvs.sort_by(directed);
}

/// The pair as the request wants to see it.
fn shown<'a>(mut kv: Kv<'a>, request: &RangeRequest) -> Kv<'a> {
    if request.keys_only {
        kv.value = &[];
        if request.sort_target != SortTarget::Value as i32 {
            kv.lease = 0;
        }
    }
    kv
}

/// Appends stored `KeyValue` bytes to the answer.
pub(super) fn frame(kv: &[u8], request: &RangeRequest, out: &mut BytesMut) -> Result<(), Fatal> {
    if request.keys_only {
        put_framed(&shown(Kv::decode(kv)?, request), out);
        return Ok(());
    }
    out.reserve(1 + encoded_len_varint(kv.len() as u64) + kv.len());
    out.put_u8(KVS_TAG);
    encode_varint(kv.len() as u64, out);
    out.put_slice(kv);
    Ok(())
}

fn put_framed(kv: &Kv<'_>, out: &mut BytesMut) {
    out.put_u8(KVS_TAG);
    encode_varint(kv.encoded_len() as u64, out);
    kv.encode(out);
}

impl Ranged {
    /// The whole answer as a message that shares the bytes; `revision` is the header's.
    pub fn into_response(self, revision: i64) -> Result<RangeResponse, Fatal> {
        let mut response = RangeResponse::decode(self.kvs)
            .map_err(|_| Fatal::Damaged { table: "key", message: "a KeyValue does not decode".into() })?;
        response.header = Some(ResponseHeader { revision, ..ResponseHeader::default() });
        response.more = self.more;
        response.count = self.count;
        Ok(response)
    }
}
