//! Events on the wire: each encoded at most twice (without and with the previous value), whoever watches; and their packing
//! into frames.
//!
//! What this module does not do: it encodes no response; `rpc/watch.rs` in the shell puts the header before the events.

use std::sync::{Arc, OnceLock};

use bytes::{BufMut, Bytes, BytesMut};
use prost::encoding::{encode_varint, encoded_len_varint};

use super::{Frame, WatchLimits};
use crate::mvcc::{Event, EventKind, RevisionEvents};

/// All that a `WatchResponse` may hold beside its events: a header of four varints, the id, flags.
const RESPONSE_BYTES: usize = 64;

/// Tags of `mvccpb.Event`.
const TYPE: u8 = 0x08;
const KV: u8 = 0x12;
const PREV_KV: u8 = 0x1a;

/// A revision with its encoded events, shared by all who are still to get it.
#[derive(Debug)]
pub(super) struct Encoded {
    pub(super) revision: i64,
    pub(super) events: Vec<EncodedEvent>,
    /// Roughly what it holds in memory.
    pub(super) bytes: usize,
}

#[derive(Debug)]
pub(super) struct EncodedEvent {
    event: Event,
    plain: OnceLock<Bytes>,
    with_prev: OnceLock<Bytes>,
}

impl Encoded {
    pub(super) fn new(revision: RevisionEvents) -> Arc<Encoded> {
        let bytes =
            revision.events.iter().map(|e| 128 + 2 * (e.kv.len() + e.prev.as_ref().map_or(0, Bytes::len))).sum();
        let events = revision.events.into_iter().map(EncodedEvent::new).collect();
        Arc::new(Encoded { revision: revision.revision, events, bytes })
    }
}

impl EncodedEvent {
    fn new(event: Event) -> Self {
        EncodedEvent { event, plain: OnceLock::new(), with_prev: OnceLock::new() }
    }

    pub(super) fn key(&self) -> &[u8] {
        &self.event.key
    }

    pub(super) fn kind(&self) -> EventKind {
        self.event.kind
    }

    /// The encoded `mvccpb.Event`; encoded when first asked for.
    pub(super) fn bytes(&self, want_prev: bool) -> &Bytes {
        match &self.event.prev {
            Some(prev) if want_prev && !self.event.create => {
                self.with_prev.get_or_init(|| encode(self.event.kind, &self.event.kv, Some(prev)))
            }
            _ => self.plain.get_or_init(|| encode(self.event.kind, &self.event.kv, None)),
        }
    }
}

fn encode(kind: EventKind, kv: &Bytes, prev: Option<&Bytes>) -> Bytes {
    let field = |message: &Bytes| 1 + encoded_len_varint(message.len() as u64) + message.len();
    let mut out = BytesMut::with_capacity(2 + field(kv) + prev.map_or(0, field));
    if kind == EventKind::Delete {
        out.put_slice(&[TYPE, 1]);
    }
    for (tag, message) in [(KV, Some(kv)), (PREV_KV, prev)] {
        if let Some(message) = message {
            out.put_u8(tag);
            encode_varint(message.len() as u64, &mut out);
            out.put_slice(message);
        }
    }
    out.freeze()
}

/// Bytes of an event as a field of the response.
pub(super) fn field_len(event: &Bytes) -> usize {
    1 + encoded_len_varint(event.len() as u64) + event.len()
}

/// The frames of one batch of events: one, unless the watcher asked for fragments and it is too large for one.
pub(super) fn frames(
    watch_id: i64,
    revision: i64,
    events: Vec<Bytes>,
    fragment: bool,
    limits: &WatchLimits,
) -> Vec<Frame> {
    let frame = |events, fragment| Frame { watch_id, revision, events, fragment, ..Frame::default() };
    let size = RESPONSE_BYTES + events.iter().map(field_len).sum::<usize>();
    if !fragment || size < limits.fragment_bytes || events.len() < 2 {
        return vec![frame(events, false)];
    }
    let mut frames = Vec::new();
    let mut part: Vec<Bytes> = Vec::new();
    let mut size = RESPONSE_BYTES;
    for event in events {
        let len = field_len(&event);
        if !part.is_empty() && size + len >= limits.fragment_bytes {
            frames.push(frame(std::mem::take(&mut part), true));
            size = RESPONSE_BYTES;
        }
        size += len;
        part.push(event);
    }
    frames.push(frame(part, false));
    frames
}
