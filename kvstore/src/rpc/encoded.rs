//! Response messages put together from stored bytes, in gRPC's frame.
//!
//! A Range response is a header, the pairs exactly as they are stored, and two numbers: nothing of the stored part is
//! decoded or encoded again. A message without stored parts is encoded by its generated code, into the same frame.
//!
//! What it does not do: compression.

use bytes::{BufMut, Bytes, BytesMut};
use keelson_proto::etcdserverpb::ResponseHeader;
use kvstore_core::mvcc::Ranged;
use kvstore_core::mvcc::chunks::Chunk;
use prost::Message;
use prost::encoding::{encode_varint, encoded_len_varint};

/// gRPC's message prefix: one byte of flags, four of length.
pub(crate) const PREFIX: usize = 5;

/// `RangeStreamResponse.range_response`.
const RANGE_RESPONSE_TAG: u8 = 1 << 3 | 2;
const HEADER_TAG: u8 = 1 << 3 | 2;
const MORE_TAG: u8 = 3 << 3;
const COUNT_TAG: u8 = 4 << 3;

/// A `RangeResponse` in one gRPC frame.
pub(crate) fn range(header: &ResponseHeader, ranged: &Ranged) -> Bytes {
    let header_len = header.encoded_len();
    let mut frame = BytesMut::with_capacity(PREFIX + header_len + ranged.kvs.len() + 24);
    frame.put_bytes(0, PREFIX);
    frame.put_u8(HEADER_TAG);
    encode_varint(header_len as u64, &mut frame);
    header.encode_raw(&mut frame);
    frame.extend_from_slice(&ranged.kvs);
    put_numbers(ranged.more, ranged.count, &mut frame);
    seal(frame)
}

/// A `RangeStreamResponse` in one gRPC frame, in up to three parts: the stored pairs are not copied. `header` is of the last
/// chunk, which alone has one.
pub(crate) fn chunk(header: Option<&ResponseHeader>, chunk: &Chunk) -> [Bytes; 3] {
    let mut inner = BytesMut::new();
    if let Some(header) = header {
        inner.put_u8(HEADER_TAG);
        encode_varint(header.encoded_len() as u64, &mut inner);
        header.encode_raw(&mut inner);
    }
    let mut tail = BytesMut::new();
    if let Some(end) = chunk.end {
        put_numbers(end.more, end.count, &mut tail);
    }
    let inner_len = inner.len() + chunk.kvs.len() + tail.len();
    let len = 1 + encoded_len_varint(inner_len as u64) + inner_len;
    let len = u32::try_from(len).expect("a chunk is below 4 GiB: it is near the size of a request");
    let mut head = BytesMut::with_capacity(PREFIX + 11 + inner.len());
    head.put_u8(0);
    head.put_u32(len);
    head.put_u8(RANGE_RESPONSE_TAG);
    encode_varint(inner_len as u64, &mut head);
    head.extend_from_slice(&inner);
    [head.freeze(), chunk.kvs.clone(), tail.freeze()]
}

fn put_numbers(more: bool, count: i64, out: &mut BytesMut) {
    if more {
        out.put_u8(MORE_TAG);
        out.put_u8(1);
    }
    if count != 0 {
        out.put_u8(COUNT_TAG);
        encode_varint(count as u64, out);
    }
}

/// Any message in one gRPC frame.
pub(crate) fn message(message: &impl Message) -> Bytes {
    let len = message.encoded_len();
    let mut frame = BytesMut::with_capacity(PREFIX + len + encoded_len_varint(len as u64));
    frame.put_bytes(0, PREFIX);
    message.encode_raw(&mut frame);
    seal(frame)
}

/// Writes the length into the prefix that was left free.
fn seal(mut frame: BytesMut) -> Bytes {
    let len = u32::try_from(frame.len() - PREFIX).expect("a response is below 4 GiB: the store's batches are");
    frame[1..PREFIX].copy_from_slice(&len.to_be_bytes());
    frame.freeze()
}

#[cfg(test)]
mod tests {
    use keelson_proto::etcdserverpb::{PutResponse, RangeResponse};
    use keelson_proto::mvccpb::KeyValue;

    use super::*;

    #[test]
    fn a_range_response_decodes_to_what_was_put_together() {
        let header = ResponseHeader { cluster_id: 1, member_id: u64::MAX, revision: 7, raft_term: 2 };
        let kv =
            KeyValue { key: "a".into(), value: "b".into(), create_revision: 2, mod_revision: 3, version: 2, lease: 0 };
        let expected = RangeResponse { header: Some(header), kvs: vec![kv; 2], more: true, count: 300 };
        let mut kvs = BytesMut::new();
        RangeResponse { kvs: expected.kvs.clone(), ..Default::default() }.encode_raw(&mut kvs);
        let frame = range(&header, &Ranged { kvs: kvs.freeze(), len: 2, more: true, count: 300 });
        assert_eq!(frame[0], 0);
        assert_eq!(frame[1..5], ((frame.len() - 5) as u32).to_be_bytes());
        assert_eq!(RangeResponse::decode(&frame[5..]).unwrap(), expected);
        assert_eq!(&frame[5..], expected.encode_to_vec());
    }

    #[test]
    fn a_chunk_decodes_to_what_was_put_together() {
        use keelson_proto::etcdserverpb::RangeStreamResponse;
        use kvstore_core::mvcc::chunks::End;
        let header = ResponseHeader { cluster_id: 1, member_id: u64::MAX, revision: 7, raft_term: 2 };
        let kv = KeyValue { key: "a".into(), value: vec![b'v'; 300].into(), ..Default::default() };
        let last = RangeResponse { header: Some(header), kvs: vec![kv.clone(); 2], more: true, count: 300 };
        let counted = RangeResponse { kvs: Vec::new(), more: false, ..last.clone() };
        let middle = RangeResponse { kvs: vec![kv], ..Default::default() };
        for response in [last, counted, middle] {
            let kvs = RangeResponse { kvs: response.kvs.clone(), ..Default::default() }.encode_to_vec().into();
            let end = response.header.map(|h| End { revision: h.revision, more: response.more, count: response.count });
            let frame = chunk(response.header.as_ref(), &Chunk { kvs, end }).concat();
            assert_eq!(frame[..5], [&[0], &((frame.len() - 5) as u32).to_be_bytes()[..]].concat());
            assert_eq!(&frame[5..], RangeStreamResponse { range_response: Some(response) }.encode_to_vec());
        }
    }

    #[test]
    fn any_message_is_framed() {
        let put = PutResponse { header: Some(ResponseHeader { revision: 5, ..Default::default() }), prev_kv: None };
        let frame = message(&put);
        assert_eq!(PutResponse::decode(&frame[5..]).unwrap(), put);
    }
}
