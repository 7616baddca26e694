//! Everything that is on disk: the directory of a member, its lock, and the two databases below it.
//!
//! ```text
//! <data-dir>/member/lock             held while the process lives
//!                   log/             Raft's entries and hard state, and whose directory this is  (disk/log.rs)
//!                   state-N/         everything applied                                         (disk/rocks.rs)
//!                   CURRENT-STATE    names the N that counts; its rename is a bootstrap or an install
//! ```
//!
//! Two databases, because RocksDB stalls writes a database at a time: a busy applier must never hold up an fsync of the
//! log. Opening refuses, without having touched anything, a directory that etcd wrote, one that a newer version wrote,
//! one that another process holds, and one whose two halves can't belong together.
//!
//! This folder alone names `rocksdb`. It decides nothing about Raft: what may be cut and when is handed in.

mod current;
mod owner;
pub mod rocks;

use std::fmt::Display;
use std::fs::{self, File};
use std::path::Path;

use kvstore_core::Fatal;

pub use owner::Owner;
pub use rocks::{Rocks, StateOptions, View};

/// The version of everything below `member/`. A higher one is from the future and is refused.
pub const FORMAT_VERSION: u32 = 1;

fn disk_error<E: Display>(path: &Path) -> impl Fn(E) -> Fatal + '_ {
    move |e| Fatal::Disk { path: path.display().to_string(), message: e.to_string() }
}

fn sync_dir(path: &Path) -> Result<(), Fatal> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(disk_error(path))
}

/// Bytes of the files directly in a directory. A file that a compaction removes meanwhile counts as nothing.
pub fn dir_size(path: &Path) -> Result<u64, Fatal> {
    let mut bytes = 0;
    for entry in fs::read_dir(path).map_err(disk_error(path))? {
        bytes += entry.and_then(|e| e.metadata()).map_or(0, |m| m.len());
    }
    Ok(bytes)
}
