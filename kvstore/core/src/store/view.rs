//! What the rows of `meta` hold, and how the store's values are read back from a view.
//!
//! | row | value |
//! |---|---|
//! | `format` | version of the row formats (4) |
//! | `applied` | index (8), term (8) |
//! | `revision` | revision, written, superseded, tombstones (8 each) |
//! | `compacted` | compacted, freed (8 each); where its deletion stands: main (8), sub (4), or nothing if it is done |
//! | `conf_state`, `cluster_id`, `cluster_version` | `store/members.rs` |
//!
//! A format from the future is refused before anything else is read.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;

use super::members::ConfState;
use crate::Fatal;
use crate::backend::{Read, Table, WriteBatch};
use crate::keys::{self, Applied};
use crate::mvcc::write::Numbers;
use crate::types::ClusterId;

/// The version of the row formats that this program reads and writes.
pub const FORMAT: u32 = 1;

fn damaged(message: &str) -> Fatal {
    Fatal::Damaged { table: Table::Meta.name(), message: message.into() }
}

pub(crate) fn write_format(batch: &mut WriteBatch) {
    batch.put(Table::Meta, keys::META_FORMAT, Bytes::copy_from_slice(&FORMAT.to_be_bytes()));
}

/// Whether this program can read the database; `false`: it is empty.
pub(crate) fn check_format<R: Read>(read: &R) -> Result<bool, Fatal> {
    let Some(row) = read.get(Table::Meta, keys::META_FORMAT)? else {
        if read.get(Table::Meta, keys::META_APPLIED)?.is_some() {
            return Err(damaged("there is data but no format version"));
        }
        return Ok(false);
    };
    let format = <[u8; 4]>::try_from(row.as_ref()).map_err(|_| damaged("the format version is not a number"))?;
    let format = u32::from_be_bytes(format);
    if format > FORMAT {
        return Err(damaged(&format!(
            "written by a newer version of this program (format {format}; this one reads up to {FORMAT})"
        )));
    }
    Ok(true)
}

pub(crate) fn write_applied(applied: Applied, batch: &mut WriteBatch) {
    batch.put(Table::Meta, keys::META_APPLIED, keys::encode_applied(applied));
}

/// How far the state has come: (0, 0) for an empty one.
pub fn applied<R: Read>(read: &R) -> Result<Applied, Fatal> {
    match read.get(Table::Meta, keys::META_APPLIED)? {
        Some(row) => keys::decode_applied(&row),
        None => Ok(Applied::default()),
    }
}

/// Raft's configuration as of the applied index, in raft's encoding; `None` for an empty state.
pub fn conf_state_bytes<R: Read>(read: &R) -> Result<Option<Bytes>, Fatal> {
    read.get(Table::Meta, keys::META_CONF_STATE)
}

/// Raft's configuration as of the applied index.
pub fn conf_state<R: Read>(read: &R) -> Result<Option<ConfState>, Fatal> {
    let row = conf_state_bytes(read)?;
    row.map(|row| ConfState::decode(row).map_err(|_| damaged("the configuration does not decode"))).transpose()
}

/// The cluster that the state belongs to; `None` for an empty state.
pub fn cluster_id<R: Read>(read: &R) -> Result<Option<ClusterId>, Fatal> {
    let Some(row) = read.get(Table::Meta, keys::META_CLUSTER_ID)? else {
        return Ok(None);
    };
    let id = <[u8; 8]>::try_from(row.as_ref()).map_err(|_| damaged("the cluster id is not a number"))?;
    Ok(Some(ClusterId(u64::from_be_bytes(id))))
}

pub(crate) fn write_numbers(numbers: &Numbers, batch: &mut WriteBatch) {
    let mut row = BytesMut::with_capacity(32);
    row.put_i64(numbers.revision);
    row.put_u64(numbers.written);
    row.put_u64(numbers.superseded);
    row.put_u64(numbers.tombstones);
    batch.put(Table::Meta, keys::META_REVISION, row);
    let mut row = BytesMut::with_capacity(28);
    row.put_i64(numbers.compacted);
    row.put_u64(numbers.freed);
    if let Some(cursor) = numbers.cursor {
        row.put_slice(&keys::rev(cursor));
    }
    batch.put(Table::Meta, keys::META_COMPACTED, row);
}

pub(crate) fn read_numbers<R: Read>(read: &R) -> Result<Numbers, Fatal> {
    let mut revision = read.get(Table::Meta, keys::META_REVISION)?.unwrap_or_default();
    let mut compacted = read.get(Table::Meta, keys::META_COMPACTED)?.unwrap_or_default();
    if revision.len() != 32 || !matches!(compacted.len(), 16 | 28) {
        return Err(damaged("the revisions are not complete"));
    }
    Ok(Numbers {
        revision: revision.get_i64(),
        written: revision.get_u64(),
        superseded: revision.get_u64(),
        tombstones: revision.get_u64(),
        compacted: compacted.get_i64(),
        freed: compacted.get_u64(),
        cursor: if compacted.is_empty() { None } else { Some(keys::decode_rev(&compacted)?) },
    })
}
