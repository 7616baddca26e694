//! The layout of a record: the one value of the keyspace, the same bytes in `key` and in `rev`.
//!
//! ```text
//! previous main (8) · previous sub (4) · own sub (4) · depth (varint) · flags (1) · superseded (varint) · KeyValue
//! ```
//!
//! *previous* is the record that this one superseded, zero for none. *depth* counts the chain of such pointers from 1;
//! at every 4th a mark stands in `old`. *superseded* is the running sum, over all of history up to here, of the bytes
//! that a compaction to this revision may delete: each superseded record once, each tombstone once, from the revision
//! after its own (trap 9). The `KeyValue` bytes are etcd's, field order 1 to 6 and zeros left out, so that they can be
//! copied into an answer and hashed as etcd hashes them. A tombstone's `KeyValue` has key and mod revision, which is
//! what a watcher is sent; etcd stores and hashes the key alone, the first field of it.
//!
//! What it does not do: it reads no table.

use bytes::{BufMut, Bytes, BytesMut};
use keelson_proto::mvccpb;
use prost::encoding::{decode_varint, encode_varint, encoded_len_varint};

use crate::Fatal;
use crate::types::Revision;

/// Every how many records of a chain a mark stands in `old`.
pub(crate) const MARK_EVERY: u64 = 4;

/// What a record counts for beside its `KeyValue` bytes: keys of rows and header.
const OVERHEAD: u64 = 32;

const TOMBSTONE: u8 = 1;
const FIXED: usize = 16;

fn damaged(message: &str) -> Fatal {
    Fatal::Damaged { table: "rev", message: message.into() }
}

/// A `mvccpb.KeyValue` read in place, or about to be written.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Kv<'a> {
    pub(crate) key: &'a [u8],
    pub(crate) create_revision: i64,
    pub(crate) mod_revision: i64,
    pub(crate) version: i64,
    pub(crate) value: &'a [u8],
    pub(crate) lease: i64,
}

impl<'a> Kv<'a> {
    pub(crate) fn decode(mut bytes: &'a [u8]) -> Result<Kv<'a>, Fatal> {
        let mut kv = Kv::default();
        while let Some((&tag, rest)) = bytes.split_first() {
            bytes = rest;
            let number = decode_varint(&mut bytes).map_err(|_| damaged("a KeyValue is cut short"))?;
            match tag {
                0x0a => kv.key = split(&mut bytes, number)?,
                0x10 => kv.create_revision = number as i64,
                0x18 => kv.mod_revision = number as i64,
                0x20 => kv.version = number as i64,
                0x2a => kv.value = split(&mut bytes, number)?,
                0x30 => kv.lease = number as i64,
                _ => return Err(damaged("a KeyValue has an unknown field")),
            }
        }
        Ok(kv)
    }

    pub(crate) fn encoded_len(&self) -> usize {
        let number = |n: i64| if n == 0 { 0 } else { 1 + encoded_len_varint(n as u64) };
        let bytes = |b: &[u8]| if b.is_empty() { 0 } else { 1 + encoded_len_varint(b.len() as u64) + b.len() };
        bytes(self.key)
            + number(self.create_revision)
            + number(self.mod_revision)
            + number(self.version)
            + bytes(self.value)
            + number(self.lease)
    }

    pub(crate) fn encode(&self, out: &mut BytesMut) {
        fn number(tag: u8, n: i64, out: &mut BytesMut) {
            if n != 0 {
                out.put_u8(tag);
                encode_varint(n as u64, out);
            }
        }
        fn bytes(tag: u8, b: &[u8], out: &mut BytesMut) {
            if !b.is_empty() {
                out.put_u8(tag);
                encode_varint(b.len() as u64, out);
                out.put_slice(b);
            }
        }
        bytes(0x0a, self.key, out);
        number(0x10, self.create_revision, out);
        number(0x18, self.mod_revision, out);
        number(0x20, self.version, out);
        bytes(0x2a, self.value, out);
        number(0x30, self.lease, out);
    }
}

fn split<'a>(bytes: &mut &'a [u8], len: u64) -> Result<&'a [u8], Fatal> {
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    let (head, rest) = bytes.split_at_checked(len).ok_or_else(|| damaged("a KeyValue is cut short"))?;
    *bytes = rest;
    Ok(head)
}

/// The message of some stored `KeyValue` bytes; its fields share them.
pub(crate) fn message(kv: Bytes) -> Result<mvccpb::KeyValue, Fatal> {
    prost::Message::decode(kv).map_err(|_| damaged("a KeyValue does not decode"))
}

/// A record's header, and where its `KeyValue` begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Header {
    /// Main 0: none.
    pub(crate) previous: Revision,
    pub(crate) sub: i64,
    pub(crate) depth: u64,
    pub(crate) tombstone: bool,
    pub(crate) superseded: u64,
}

impl Header {
    /// Splits a record into its header and its `KeyValue` bytes.
    pub(crate) fn decode(record: &[u8]) -> Result<(Header, &[u8]), Fatal> {
        let short = || damaged("a record is cut short");
        let (fixed, mut rest) = record.split_first_chunk::<FIXED>().ok_or_else(short)?;
        let depth = decode_varint(&mut rest).map_err(|_| short())?;
        let (&flags, mut rest) = rest.split_first().ok_or_else(short)?;
        let superseded = decode_varint(&mut rest).map_err(|_| short())?;
        let number = |at: usize| u32::from_be_bytes([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]]);
        let main = i64::from(number(0)) << 32 | i64::from(number(4));
        let header = Header {
            previous: Revision::new(main, i64::from(number(8))),
            sub: i64::from(number(12)),
            depth,
            tombstone: flags & TOMBSTONE != 0,
            superseded,
        };
        Ok((header, rest))
    }

    /// The whole record, encoded once.
    pub(crate) fn encode(&self, kv: &Kv<'_>) -> Bytes {
        let len = FIXED + encoded_len_varint(self.depth) + 1 + encoded_len_varint(self.superseded) + kv.encoded_len();
        let mut out = BytesMut::with_capacity(len);
        out.put_i64(self.previous.main);
        out.put_u32(self.previous.sub as u32);
        out.put_u32(self.sub as u32);
        encode_varint(self.depth, &mut out);
        out.put_u8(if self.tombstone { TOMBSTONE } else { 0 });
        encode_varint(self.superseded, &mut out);
        kv.encode(&mut out);
        out.freeze()
    }
}

/// Whether a record is a tombstone, and its `KeyValue` bytes: all that a scan of the present needs, so it decodes
/// nothing else.
pub(crate) fn newest(record: &[u8]) -> Result<(bool, &[u8]), Fatal> {
    let skip_varint = |at: usize| record.get(at..)?.iter().position(|&byte| byte < 0x80).map(|len| at + len + 1);
    let split = || {
        let flags = skip_varint(FIXED)?;
        let kv = skip_varint(flags + 1)?;
        Some((record.get(flags)? & TOMBSTONE != 0, record.get(kv..)?))
    };
    split().ok_or_else(|| damaged("a record is cut short"))
}

/// The user key of a record: the first field of its `KeyValue`.
pub(crate) fn key(record: &[u8]) -> Option<&[u8]> {
    let (_, kv) = newest(record).ok()?;
    let mut rest = kv.strip_prefix(&[0x0a])?;
    let len = decode_varint(&mut rest).ok()?;
    rest.get(..usize::try_from(len).ok()?)
}

/// The `KeyValue` bytes of a record, shared.
pub(crate) fn kv_of(record: &Bytes) -> Result<Bytes, Fatal> {
    let (_, kv) = newest(record)?;
    Ok(record.slice(record.len() - kv.len()..))
}

/// What a record counts for in the quota.
pub(crate) fn size(kv_len: usize) -> u64 {
    kv_len as u64 + OVERHEAD
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use prost::Message;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_record_comes_back_and_its_bytes_are_those_of_the_wire(
            previous in (0..i64::MAX, 0..i64::from(u32::MAX)),
            (sub, depth, tombstone, superseded) in (0..i64::from(u32::MAX), any::<u64>(), any::<bool>(), any::<u64>()),
            (key, value) in (any::<Vec<u8>>(), any::<Vec<u8>>()),
            (create, modified, version, lease) in (any::<i64>(), any::<i64>(), any::<i64>(), any::<i64>()),
        ) {
            let previous = Revision::new(previous.0, previous.1);
            let header = Header { previous, sub, depth, tombstone, superseded };
            let kv = Kv {
                key: &key,
                create_revision: create,
                mod_revision: modified,
                version,
                value: &value,
                lease,
            };
            let bytes = header.encode(&kv);
            let (again, kv_bytes) = Header::decode(&bytes).unwrap();
            prop_assert_eq!(again, header);
            prop_assert_eq!(Kv::decode(kv_bytes).unwrap(), kv);
            prop_assert_eq!(newest(&bytes).unwrap(), (tombstone, kv_bytes));
            prop_assert_eq!(super::key(&bytes), (!key.is_empty()).then_some(key.as_slice()));
            prop_assert_eq!(message(kv_of(&bytes).unwrap()).unwrap().encode_to_vec(), kv_bytes);
            prop_assert_eq!(kv_bytes.len(), kv.encoded_len());
        }

        /// Whatever stands in a row, it is read or it is damage, and never a panic.
        #[test]
        fn foreign_bytes_are_damage_at_worst(bytes in any::<Vec<u8>>()) {
            if let Ok((_, kv)) = Header::decode(&bytes) {
                let _ = Kv::decode(kv);
                prop_assert!(newest(&bytes).is_ok());
            }
            let _ = (newest(&bytes), key(&bytes));
        }
    }
}
