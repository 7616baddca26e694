//! RangeStream: a Range in chunks, each read for itself (contract 2.6.3).
//!
//! ```text
//! Chunks::new(request) ─▶ next(newest moment) ─▶ Chunk ─▶ next(newest moment) ─▶ … ─▶ the last, with header, more and count
//! ```
//!
//! The first chunk pins the revision, and each later one is read there from the moment that is the newest by then: a client
//! that takes minutes holds no view for minutes, and a compaction in between ends it. Chunks begin at ten keys, and double
//! or halve until one is about as large as a request may be. The limits and sizes are etcd's to the byte, so a
//! stream of etcd's and one of ours break at the same keys.
//!
//! etcd's quirks are kept: with an order of NONE a chunk is sorted by its target on its own, and the next begins behind
//! the last key of that; a negative revision is not pinned; a negative limit is no limit and no chunks.
//!
//! What it does not do: it checks no form (`check.rs`), and waits for nothing between two chunks.

use bytes::{Bytes, BytesMut};
use keelson_proto::etcdserverpb::RangeRequest;
use keelson_proto::etcdserverpb::range_request::SortTarget;
use prost::encoding::encoded_len_varint;

use super::range::{self, range};
use super::record::Kv;
use super::span::Span;
use super::versions::{self, Want};
use super::{Moment, ReadError};
use crate::Fatal;
use crate::backend::Read;

/// Keys in the first chunk.
const FIRST_LIMIT: i64 = 10;

/// One Range, as far as it was sent.
#[derive(Debug)]
pub struct Chunks {
    /// What is left to read: `key` and `limit` move with the chunks.
    request: RangeRequest,
    /// Keys that may be sent in all.
    total_limit: i64,
    /// Keys that were.
    sent: i64,
    /// The revision of the first chunk's moment.
    revision: Option<i64>,
    target_bytes: usize,
    finished: bool,
}

/// One message of the stream.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Chunk {
    /// Framed as in [`super::Ranged`].
    pub kvs: Bytes,
    /// What only the last chunk says.
    pub end: Option<End>,
}

/// What the last chunk says of all of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct End {
    /// For the header: the newest revision when the first chunk was read.
    pub revision: i64,
    /// The limit cut some off.
    pub more: bool,
    /// Keys sent, and those cut off.
    pub count: i64,
}

/// What one chunk's read found.
struct Found {
    kvs: Bytes,
    len: usize,
    /// The last key, if there are more behind it.
    last: Option<Bytes>,
    /// What etcd's response would take on the wire.
    size: usize,
}

impl Chunks {
    /// The request's own form is checked by [`super::check::validate_range_stream`]. `target_bytes` is what a chunk should
    /// come near to (`--max-request-bytes`).
    pub fn new(mut request: RangeRequest, target_bytes: usize) -> Chunks {
        let total_limit = if request.limit == 0 { i64::MAX } else { request.limit };
        request.limit = total_limit.min(FIRST_LIMIT);
        Chunks { request, total_limit, sent: 0, revision: None, target_bytes, finished: false }
    }

    /// The next chunk, read from `moment`, which should be the newest there is; `None` after the last.
    pub fn next<R: Read>(&mut self, moment: Moment<'_, R>) -> Result<Option<Chunk>, ReadError> {
        let bounds = moment.bounds;
        if self.finished {
            return Ok(None);
        }
        if self.request.count_only {
            self.finished = true;
            let count = range(moment, &self.request)?.count;
            let end = Some(End { revision: bounds.revision, more: false, count });
            return Ok(Some(Chunk { kvs: Bytes::new(), end }));
        }
        let at = range::readable(bounds, self.request.revision)?;
        let revision = *self.revision.get_or_insert(bounds.revision);
        if self.request.revision == 0 {
            self.request.revision = revision;
        }
        let found = find(moment, at, &self.request)?;
        self.sent += found.len as i64;
        let Some(mut next_key) = found.last.map(BytesMut::from) else {
            self.finished = true;
            return Ok(Some(Chunk { kvs: found.kvs, end: Some(End { revision, more: false, count: self.sent }) }));
        };
        next_key.extend_from_slice(&[0]);
        self.request.key = next_key.freeze();
        if self.sent == self.total_limit {
            self.finished = true;
            let rest = RangeRequest {
                key: self.request.key.clone(),
                range_end: self.request.range_end.clone(),
                revision: self.request.revision,
                count_only: true,
                ..RangeRequest::default()
            };
            let count = self.sent + range(moment, &rest)?.count;
            return Ok(Some(Chunk { kvs: found.kvs, end: Some(End { revision, more: true, count }) }));
        }
        let limit = adjusted(self.request.limit, found.size, self.target_bytes);
        self.request.limit = limit.min(self.total_limit - self.sent);
        Ok(Some(Chunk { kvs: found.kvs, end: None }))
    }
}

/// Twice as many keys after a chunk of less than half the target, half as many after one of more than twice.
fn adjusted(limit: i64, size: usize, target: usize) -> i64 {
    let limit = if size < target / 2 {
        limit.saturating_mul(2)
    } else if size > target.saturating_mul(2) {
        limit / 2
    } else {
        limit
    };
    limit.max(1)
}

/// One chunk: up to the limit, and whether there is one more key.
fn find<R: Read>(moment: Moment<'_, R>, at: i64, request: &RangeRequest) -> Result<Found, Fatal> {
    let limit = range::limit_of(request);
    let (kvs, found, last) = if request.sort_target == SortTarget::Key as i32 {
        in_order(moment, at, request, limit)?
    } else {
        sorted(moment, at, request, limit)?
    };
    let (len, more) = (found.min(limit), found > limit);
    let last = last.filter(|_| more);
    let size = response_size(moment.bounds.revision, kvs.len(), more, found);
    Ok(Found { kvs, len, last, size })
}

/// Stored bytes straight into the chunk.
fn in_order<R: Read>(
    moment: Moment<'_, R>,
    at: i64,
    request: &RangeRequest,
    limit: usize,
) -> Result<(Bytes, usize, Option<Bytes>), Fatal> {
    let (mut out, mut found, mut last) = (BytesMut::new(), 0, None);
    let mut failed = None;
    let mut show = |kv: &[u8]| -> Result<Want, Fatal> {
        found += 1;
        if found > limit {
            return Ok(Want::Nothing);
        }
        range::frame(kv, request, &mut out)?;
        if found == limit {
            last = Some(Bytes::copy_from_slice(Kv::decode(kv)?.key));
            return Ok(Want::Existence);
        }
        Ok(Want::Bytes)
    };
    let span = Span::new(&request.key, &request.range_end);
    versions::each(moment.read, moment.bounds, at, span, Want::Bytes, &mut |kv| {
        show(kv).unwrap_or_else(|error| {
            failed = Some(error);
            Want::Nothing
        })
    })?;
    failed.map_or(Ok((out.freeze(), found, last)), Err)
}

/// As etcd does it: one more than the limit, sorted by the target, and then cut.
fn sorted<R: Read>(
    moment: Moment<'_, R>,
    at: i64,
    request: &RangeRequest,
    limit: usize,
) -> Result<(Bytes, usize, Option<Bytes>), Fatal> {
    let mut stored = Vec::new();
    let span = Span::new(&request.key, &request.range_end);
    versions::each(moment.read, moment.bounds, at, span, Want::Bytes, &mut |kv| {
        stored.push(Bytes::copy_from_slice(kv));
        if stored.len() > limit { Want::Nothing } else { Want::Bytes }
    })?;
    let mut kvs = stored.iter().map(|kv| Kv::decode(kv)).collect::<Result<Vec<_>, _>>()?;
    let found = kvs.len();
    let framed = range::sorted_and_framed(&mut kvs, limit, request, &range::Plan::new(request));
    let last = kvs.last().map(|kv| Bytes::copy_from_slice(kv.key));
    Ok((framed, found, last))
}

/// A `RangeResponse` with a header that holds the revision alone, as etcd measures it.
fn response_size(revision: i64, kvs: usize, more: bool, count: usize) -> usize {
    let header = 2 + 1 + encoded_len_varint(revision as u64);
    let more = if more { 2 } else { 0 };
    let count = if count == 0 { 0 } else { 1 + encoded_len_varint(count as u64) };
    header + kvs + more + count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_doubles_and_halves_outside_of_half_and_twice_the_target() {
        assert_eq!(adjusted(10, 49, 100), 20);
        assert_eq!(adjusted(10, 50, 100), 10);
        assert_eq!(adjusted(10, 200, 100), 10);
        assert_eq!(adjusted(10, 201, 100), 5);
        assert_eq!(adjusted(1, 201, 100), 1);
        assert_eq!(adjusted(i64::MAX, 0, 100), i64::MAX);
    }

    #[test]
    fn the_size_is_that_of_the_encoded_message() {
        use keelson_proto::etcdserverpb::{RangeResponse, ResponseHeader};
        use prost::Message;
        for (revision, more, count) in [(1, false, 0), (300, true, 11), (1 << 40, false, 200)] {
            let header = Some(ResponseHeader { revision, ..Default::default() });
            let response = RangeResponse { header, more, count: count as i64, ..Default::default() };
            assert_eq!(response_size(revision, 0, more, count), response.encoded_len());
        }
    }
}
