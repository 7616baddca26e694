//! A state as a stream of rows, and back: what members send each other when the log does not reach back far enough.
//!
//! A stream is a head, chunks of rows in the order of table and key, and a tail that says how many there were. Every chunk
//! has a checksum, and the tail one over all checksums, so that neither a flipped bit nor a lost chunk goes unnoticed.
//!
//! What it does not do: it sends nothing, and it knows nothing of what the rows mean.

use std::ops::{Bound, ControlFlow};

use bytes::Bytes;
use keelson_proto::peer::{SnapshotRow, SnapshotRows, SnapshotTail};
use kvstore_core::Fatal;
use kvstore_core::backend::{Direction, Install, Installed, ReadView, Table};

/// The version of the rows' encoding on the wire.
pub const ROWS_VERSION: u32 = 1;

const CHUNK_BYTES: usize = 256 << 10;

fn checksum(rows: &[SnapshotRow]) -> u32 {
    let mut crc = 0;
    for row in rows {
        crc = crc32c::crc32c_append(crc, &row.table.to_le_bytes());
        for field in [&row.key, &row.value] {
            let length = u32::try_from(field.len()).unwrap_or(u32::MAX);
            crc = crc32c::crc32c_append(crc, &length.to_le_bytes());
            crc = crc32c::crc32c_append(crc, field);
        }
    }
    crc
}

/// Reads every row of a view and hands it out in chunks, until `send` no longer wants any.
pub fn read_out<V: ReadView>(
    view: &V,
    send: &mut dyn FnMut(SnapshotRows) -> bool,
) -> Result<Option<SnapshotTail>, Fatal> {
    let (mut total, mut crc_of_crcs) = (0_u64, 0_u32);
    let mut wanted = true;
    let mut rows = Vec::new();
    let mut bytes = 0;
    let mut flush = |rows: &mut Vec<SnapshotRow>| {
        let rows = std::mem::take(rows);
        total += rows.len() as u64;
        let crc32c = checksum(&rows);
        crc_of_crcs = crc32c::crc32c_append(crc_of_crcs, &crc32c.to_le_bytes());
        send(SnapshotRows { rows, crc32c })
    };
    for table in Table::ALL {
        view.scan(table, (Bound::Unbounded, Bound::Unbounded), Direction::Forward, &mut |key, value| {
            bytes += key.len() + value.len();
            let (key, value) = (Bytes::copy_from_slice(key), Bytes::copy_from_slice(value));
            rows.push(SnapshotRow { table: table as u32, key, value });
            if bytes >= CHUNK_BYTES {
                bytes = 0;
                wanted = flush(&mut rows);
            }
            if wanted { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
    }
    if wanted && !rows.is_empty() {
        wanted = flush(&mut rows);
    }
    Ok(wanted.then_some(SnapshotTail { rows: total, crc32c: crc_of_crcs }))
}

/// Puts chunks into a state under construction, checking them.
pub struct ReadIn<I> {
    into: I,
    rows: u64,
    crc_of_crcs: u32,
}

impl<I: Install> ReadIn<I> {
    pub fn new(into: I) -> Self {
        ReadIn { into, rows: 0, crc_of_crcs: 0 }
    }

    pub fn rows(&mut self, chunk: &SnapshotRows) -> Result<(), Fatal> {
        if checksum(&chunk.rows) != chunk.crc32c {
            return Err(damaged("a chunk's checksum is wrong"));
        }
        self.crc_of_crcs = crc32c::crc32c_append(self.crc_of_crcs, &chunk.crc32c.to_le_bytes());
        for row in &chunk.rows {
            let table = u8::try_from(row.table).ok().and_then(Table::from_u8);
            let table = table.ok_or_else(|| damaged("a row of a table that this version does not know"))?;
            self.into.put(table, &row.key, &row.value)?;
            self.rows += 1;
        }
        Ok(())
    }

    /// The end has come: everything that was sent is here, complete and on disk.
    pub fn finish(mut self, tail: &SnapshotTail) -> Result<(I, Installed, u64), Fatal> {
        if (tail.rows, tail.crc32c) != (self.rows, self.crc_of_crcs) {
            return Err(damaged("rows are missing"));
        }
        let installed = self.into.finish()?;
        Ok((self.into, installed, self.rows))
    }
}

fn damaged(message: &str) -> Fatal {
    Fatal::Damaged { table: "snapshot", message: message.into() }
}
