//! Response messages put together from stored bytes, in gRPC's frame.
//!
//! A Range response is a header, the pairs exactly as they are stored, and two numbers: nothing of the stored part is
//! decoded or encoded again. A message without stored parts is encoded by its generated code, into the same frame.
//!
//! What it does not do: compression (a client that asks for it is served by tonic's routes).

use bytes::{BufMut, Bytes, BytesMut};
use keelson_proto::etcdserverpb::ResponseHeader;
use kvstore_core::mvcc::Ranged;
use prost::Message;
use prost::encoding::{encode_varint, encoded_len_varint};

/// gRPC's message prefix: one byte of flags, four of length.
pub(crate) const PREFIX: usize = 5;

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
    if ranged.more {
        frame.put_u8(MORE_TAG);
        frame.put_u8(1);
    }
    if ranged.count != 0 {
        frame.put_u8(COUNT_TAG);
        encode_varint(ranged.count as u64, &mut frame);
    }
    seal(frame)
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
    fn any_message_is_framed() {
        let put = PutResponse { header: Some(ResponseHeader { revision: 5, ..Default::default() }), prev_kv: None };
        let frame = message(&put);
        assert_eq!(PutResponse::decode(&frame[5..]).unwrap(), put);
    }
}
