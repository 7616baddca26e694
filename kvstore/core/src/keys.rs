//! Every stored key's encoding, and nothing else encodes keys.
//!
//! | table | key | value |
//! |---|---|---|
//! | `key` | the user's key, as it is | a record (`mvcc/record.rs`) |
//! | `rev` | main (8), sub (4) | the same record |
//! | `old` | escaped user key, ¬main (8) | sub (4) |
//! | `lease` | `g`, lease (8) | `leasepb.Lease` |
//! | `lease` | `k`, lease (8), user key | nothing |
//! | `member` | `m`, member (8) | `membershippb.Member` |
//! | `member` | `r`, member (8) | nothing: the id was removed and never comes back |
//! | `alarm` | member (8), alarm (4) | nothing |
//! | `meta` | a name (the constants below) | see `store/view.rs` |
//!
//! Integers are big-endian, so that byte order is number order. In `old` a zero byte of the user key becomes `00 ff` and
//! `00 01` ends it: no key's rows stand between another's, whatever bytes users choose; ¬main puts the newest first.
//!
//! What it does not do: it reads no table, and it knows no record.

use bytes::{BufMut, Bytes, BytesMut};

use crate::Fatal;
use crate::types::{Index, LeaseId, MemberId, Revision, Term};

/// Applied index and term ([`Applied`]).
pub const META_APPLIED: &[u8] = b"applied";
/// Current revision and the sums of the quota.
pub const META_REVISION: &[u8] = b"revision";
/// Compacted revision and how far its deletion has come.
pub const META_COMPACTED: &[u8] = b"compacted";
/// Raft's `ConfState`, in raft's own encoding.
pub const META_CONF_STATE: &[u8] = b"conf_state";
/// The cluster's id.
pub const META_CLUSTER_ID: &[u8] = b"cluster_id";
/// The cluster's version, as the leader set it.
pub const META_CLUSTER_VERSION: &[u8] = b"cluster_version";
/// Which version of the row formats wrote this database.
pub const META_FORMAT: &[u8] = b"format";

/// The position of the last entry that the state holds.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Applied {
    pub index: Index,
    pub term: Term,
}

fn damaged(table: &'static str, message: &str) -> Fatal {
    Fatal::Damaged { table, message: message.into() }
}

/// Takes `N` bytes off the front.
fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (head, rest) = bytes.split_first_chunk::<N>()?;
    *bytes = rest;
    Some(*head)
}

pub fn encode_applied(applied: Applied) -> Bytes {
    let mut row = BytesMut::with_capacity(16);
    row.put_u64(applied.index);
    row.put_u64(applied.term);
    row.freeze()
}

pub fn decode_applied(mut row: &[u8]) -> Result<Applied, Fatal> {
    match (take(&mut row), take(&mut row), row) {
        (Some(index), Some(term), []) => {
            Ok(Applied { index: u64::from_be_bytes(index), term: u64::from_be_bytes(term) })
        }
        _ => Err(damaged("meta", "the applied index is not two integers")),
    }
}

/// `rev`: where a change stands in history.
pub fn rev(revision: Revision) -> [u8; 12] {
    let mut key = [0; 12];
    key[..8].copy_from_slice(&revision.main.to_be_bytes());
    key[8..].copy_from_slice(&(revision.sub as u32).to_be_bytes());
    key
}

pub fn decode_rev(mut key: &[u8]) -> Result<Revision, Fatal> {
    match (take(&mut key), take(&mut key), key) {
        (Some(main), Some(sub), []) => Ok(Revision::new(i64::from_be_bytes(main), i64::from(u32::from_be_bytes(sub)))),
        _ => Err(damaged("rev", "a key is not (main, sub)")),
    }
}

/// The part of an `old` key that all marks of one user key share.
fn escape(key: &[u8]) -> BytesMut {
    let mut escaped = BytesMut::with_capacity(key.len() + 16);
    for &byte in key {
        escaped.put_u8(byte);
        if byte == 0 {
            escaped.put_u8(0xff);
        }
    }
    escaped.put_slice(&[0, 1]);
    escaped
}

/// `old`: the mark at a record of `key`.
pub fn old(key: &[u8], main: i64) -> Bytes {
    let mut row = escape(key);
    row.put_u64(!main as u64);
    row.freeze()
}

/// The stretch of `old` with the marks of `key` at revisions above `main`, oldest last.
pub fn old_above(key: &[u8], main: i64) -> (Bytes, Bytes) {
    let mut first = escape(key);
    let mut end = first.clone();
    first.put_u64(0);
    end.put_u64(!main as u64);
    (first.freeze(), end.freeze())
}

/// The revision of an `old` row.
pub fn decode_old(key: &[u8], value: &[u8]) -> Result<Revision, Fatal> {
    match (key.last_chunk::<8>(), <[u8; 4]>::try_from(value)) {
        (Some(main), Ok(sub)) => {
            Ok(Revision::new(!u64::from_be_bytes(*main) as i64, i64::from(u32::from_be_bytes(sub))))
        }
        _ => Err(damaged("old", "a mark is not (key, main) → sub")),
    }
}

const LEASE_GRANT: u8 = b'g';
const LEASE_KEY: u8 = b'k';

/// `lease`: a grant.
pub fn lease(id: LeaseId) -> Bytes {
    tagged(LEASE_GRANT, id.0 as u64, &[])
}

/// `lease`: all grants, as a half-open stretch.
pub const LEASES: (&[u8], &[u8]) = (&[LEASE_GRANT], &[LEASE_GRANT + 1]);

/// `lease`: that `key` is attached to the lease.
pub fn lease_key(id: LeaseId, key: &[u8]) -> Bytes {
    tagged(LEASE_KEY, id.0 as u64, key)
}

/// `lease`: the first row that an attached key of this lease can have.
pub fn lease_keys(id: LeaseId) -> Bytes {
    tagged(LEASE_KEY, id.0 as u64, &[])
}

/// The user key of an attachment, or `None` if the row belongs to another lease.
pub fn decode_lease_key(id: LeaseId, row: &[u8]) -> Option<&[u8]> {
    row.strip_prefix(&[LEASE_KEY])?.strip_prefix(&id.0.to_be_bytes())
}

const MEMBER: u8 = b'm';
const REMOVED: u8 = b'r';

/// `member`: a member's record.
pub fn member(id: MemberId) -> Bytes {
    tagged(MEMBER, id.0, &[])
}

/// `member`: that an id was removed.
pub fn removed(id: MemberId) -> Bytes {
    tagged(REMOVED, id.0, &[])
}

/// What a row of `member` is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MemberRow {
    Member(MemberId),
    Removed(MemberId),
}

pub fn decode_member(mut key: &[u8]) -> Result<MemberRow, Fatal> {
    match (take::<1>(&mut key), take(&mut key), key) {
        (Some([MEMBER]), Some(id), []) => Ok(MemberRow::Member(MemberId(u64::from_be_bytes(id)))),
        (Some([REMOVED]), Some(id), []) => Ok(MemberRow::Removed(MemberId(u64::from_be_bytes(id)))),
        _ => Err(damaged("member", "a key is neither a member nor a removed one")),
    }
}

/// `alarm`: that a member raised an alarm.
pub fn alarm(member: MemberId, alarm: i32) -> Bytes {
    let mut row = BytesMut::with_capacity(12);
    row.put_u64(member.0);
    row.put_i32(alarm);
    row.freeze()
}

pub fn decode_alarm(mut key: &[u8]) -> Result<(MemberId, i32), Fatal> {
    match (take(&mut key), take(&mut key), key) {
        (Some(member), Some(alarm), []) => Ok((MemberId(u64::from_be_bytes(member)), i32::from_be_bytes(alarm))),
        _ => Err(damaged("alarm", "a key is not (member, alarm)")),
    }
}

fn tagged(tag: u8, id: u64, rest: &[u8]) -> Bytes {
    let mut row = BytesMut::with_capacity(9 + rest.len());
    row.put_u8(tag);
    row.put_u64(id);
    row.put_slice(rest);
    row.freeze()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn user_key() -> impl Strategy<Value = Vec<u8>> {
        proptest::collection::vec(prop_oneof![Just(0u8), Just(1), Just(0xfe), Just(0xff), any::<u8>()], 1..6)
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Marks stand in the order of (key, newest first), and no other key's between them.
        #[test]
        fn marks_stand_in_order(a in (user_key(), 1..4i64), b in (user_key(), 1..4i64), same in any::<bool>()) {
            let b = if same { (a.0.clone(), b.1) } else { b };
            let wanted = a.0.cmp(&b.0).then(b.1.cmp(&a.1));
            prop_assert_eq!(old(&a.0, a.1).cmp(&old(&b.0, b.1)), wanted);
            let (first, end) = old_above(&a.0, a.1);
            let row = old(&b.0, b.1);
            prop_assert_eq!(first <= row && row < end, a.0 == b.0 && b.1 > a.1);
            prop_assert_eq!(decode_old(&row, &7u32.to_be_bytes()).unwrap(), Revision::new(b.1, 7));
        }

        #[test]
        fn revisions_stand_in_order(
            a in (0..i64::MAX, 0..i64::from(u32::MAX)),
            b in (0..i64::MAX, 0..i64::from(u32::MAX)),
        ) {
            let (a, b) = (Revision::new(a.0, a.1), Revision::new(b.0, b.1));
            prop_assert_eq!(rev(a).cmp(&rev(b)), a.cmp(&b));
            prop_assert_eq!(decode_rev(&rev(a)).unwrap(), a);
        }
    }

    #[test]
    fn rows_of_leases_members_and_alarms_come_back() {
        let id = LeaseId(-3);
        assert_eq!(decode_lease_key(id, &lease_key(id, b"k\0")), Some(b"k\0".as_slice()));
        assert_eq!(decode_lease_key(LeaseId(4), &lease_key(id, b"k")), None);
        assert!(LEASES.0 < lease(id).as_ref() && lease(id).as_ref() < LEASES.1);
        assert!(lease_key(id, b"k").as_ref() >= LEASES.1, "grants can be read without the keys");
        assert_eq!(decode_member(&member(MemberId(9))).unwrap(), MemberRow::Member(MemberId(9)));
        assert_eq!(decode_member(&removed(MemberId(9))).unwrap(), MemberRow::Removed(MemberId(9)));
        assert_eq!(decode_alarm(&alarm(MemberId(9), 2)).unwrap(), (MemberId(9), 2));
        let applied = Applied { index: 5, term: 3 };
        assert_eq!(decode_applied(&encode_applied(applied)).unwrap(), applied);
    }

    #[test]
    fn damage_is_seen() {
        assert!(decode_rev(b"short").is_err());
        assert!(decode_member(b"x12345678").is_err());
        assert!(decode_alarm(b"").is_err());
        assert!(decode_applied(b"1234567").is_err());
        assert!(decode_old(b"k", b"").is_err());
    }
}
