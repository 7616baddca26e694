//! Everything that is on disk: the directory of a member, its lock, and the two databases below it.
//!
//! ```text
//! <data-dir>/member/lock             held while the process lives
//!                   OWNER            whose directory this is, and its format           (disk/owner.rs)
//!                   log/             Raft's entries and hard state                     (disk/log.rs)
//!                   state-N/         everything applied                                (disk/rocks.rs)
//!                   CURRENT-STATE    names the N that counts; its rename is a bootstrap or an install
//! ```
//!
//! Two databases, because RocksDB stalls writes a database at a time: a busy applier must never hold up an fsync of the
//! log. Opening refuses, without having touched anything, a directory that etcd wrote, one that a newer version wrote,
//! one that another process holds, and one whose two halves can't belong together.
//!
//! This folder alone names `rocksdb`. It decides nothing about Raft: what may be cut and when is handed in.

mod current;
mod log;
mod owner;
pub mod rocks;
pub mod snapshot;
#[cfg(test)]
mod tests;

use std::fmt::Display;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};

use kvstore_core::Fatal;
use kvstore_core::backend::WriteBatch;

pub use log::{Log, Recovered};
pub use owner::Owner;
pub use rocks::{NewState, Nursery, Rocks, StateOptions, View};

/// The version of everything below `member/`. A higher one is from the future and is refused.
pub const FORMAT_VERSION: u32 = 1;

fn disk_error<E: Display>(path: &Path) -> impl Fn(E) -> Fatal + '_ {
    move |e| Fatal::Disk { path: path.display().to_string(), message: e.to_string() }
}

fn sync_dir(path: &Path) -> Result<(), Fatal> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(disk_error(path))
}

/// Makes a directory and those above it that are missing, so that a loss of power can't take them away again with
/// everything that is synced inside.
fn create_durably(path: &Path) -> Result<(), Fatal> {
    let missing: Vec<&Path> = path.ancestors().take_while(|dir| !dir.as_os_str().is_empty() && !dir.exists()).collect();
    fs::create_dir_all(path).map_err(disk_error(path))?;
    for made in missing {
        let above = made.parent().filter(|above| !above.as_os_str().is_empty()).unwrap_or(Path::new("."));
        sync_dir(above)?;
    }
    Ok(())
}

/// Bytes of the files directly in a directory. A file that a compaction removes meanwhile counts as nothing.
pub fn dir_size(path: &Path) -> Result<u64, Fatal> {
    let mut bytes = 0;
    for entry in fs::read_dir(path).map_err(disk_error(path))? {
        bytes += entry.and_then(|e| e.metadata()).map_or(0, |m| m.len());
    }
    Ok(bytes)
}

/// A member's directory, locked for this process.
pub struct MemberDir {
    path: PathBuf,
    owner: Option<Owner>,
    _lock: File,
}

impl MemberDir {
    /// Whether nobody has lived here yet.
    pub fn is_fresh(data_dir: &Path) -> bool {
        let member = data_dir.join("member");
        !member.exists() || matches!(current::read(&member), Ok(None))
    }

    /// Looks before it touches: a directory that is not ours to open is left as it was found. `allowed` judges whose
    /// it is.
    pub fn lock(data_dir: &Path, allowed: impl FnOnce(&Owner) -> Result<(), String>) -> Result<MemberDir, Fatal> {
        let path = data_dir.join("member");
        refuse_etcd(&path)?;
        let owner = if path.exists() { Owner::read(&path)? } else { None };
        if let Some(owner) = &owner {
            allowed(owner).map_err(disk_error(&path))?;
        } else if !path.exists() {
            create_durably(&path)?;
            // For the owner's eyes, as etcd has it.
            set_private(data_dir)?;
        }
        let lock_path = path.join("lock");
        let lock = OpenOptions::new().create(true).write(true).truncate(false).open(&lock_path);
        let lock = lock.map_err(disk_error(&lock_path))?;
        match lock.try_lock() {
            Ok(()) => Ok(MemberDir { path, owner, _lock: lock }),
            Err(TryLockError::WouldBlock) => Err(disk_error(&lock_path)("another process runs on this data directory")),
            Err(TryLockError::Error(e)) => Err(disk_error(&lock_path)(e)),
        }
    }

    /// Opens what is there. A log without a pointer is a bootstrap that a crash cut short if it is empty, and damage
    /// otherwise (trap 2).
    pub fn open(self, options: StateOptions) -> Result<Opened, Fatal> {
        let opener = rocks::Opener::new(options);
        let log_path = self.log_path();
        let Some(current) = current::read(&self.path)? else {
            if log_path.exists() && !Log::open(&log_path)?.is_empty()? {
                return Err(disk_error(&log_path)(
                    "a log with entries, but no state beside it (CURRENT-STATE is missing)",
                ));
            }
            return Ok(Opened::Fresh(Fresh { dir: self, opener }));
        };
        let Some(owner) = self.owner.clone() else {
            return Err(disk_error(&self.path)("a state, but no file OWNER that says whose it is"));
        };
        if !log_path.exists() {
            return Err(disk_error(&log_path)("the log is missing"));
        }
        let log = Log::open(&log_path)?;
        current::remove_strays(&self.path, current.number)?;
        let state = Rocks::open(opener, &self.path, current)?;
        Ok(Opened::Member(Box::new(Disk { owner, log, state, dir: self })))
    }

    fn log_path(&self) -> PathBuf {
        self.path.join("log")
    }
}

/// etcd's own files are never touched, and neither is the directory around them.
fn refuse_etcd(member: &Path) -> Result<(), Fatal> {
    for (part, is_dir) in [("snap/db", false), ("wal", true)] {
        let path = member.join(part);
        let found = if is_dir { path.is_dir() } else { path.is_file() };
        if found {
            return Err(disk_error(&path)(
                "this data directory was written by etcd and is left untouched; \
                 `keelsonctl migrate --from-etcd <data-dir> --data-dir <new-dir>` imports it",
            ));
        }
    }
    Ok(())
}

fn set_private(data_dir: &Path) -> Result<(), Fatal> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(data_dir, fs::Permissions::from_mode(0o700)).map_err(disk_error(data_dir))
}

/// What a member's directory held.
pub enum Opened {
    Fresh(Fresh),
    Member(Box<Disk>),
}

/// A directory without a member: to be founded.
pub struct Fresh {
    dir: MemberDir,
    opener: rocks::Opener,
}

impl Fresh {
    /// Founds the member: `rows` hold index 1, term 1 and are the same on all founders (trap 2); `owner` is not. The log
    /// stays empty: Raft begins it where the state was founded. The pointer's rename is the last step, so that a crash
    /// before it leaves a directory that is founded anew.
    pub fn found(mut self, owner: Owner, rows: WriteBatch) -> Result<Disk, Fatal> {
        owner.write(&self.dir.path)?;
        self.dir.owner = Some(owner.clone());
        let log = Log::open(&self.dir.log_path())?;
        sync_dir(&self.dir.log_path())?;
        let state = Rocks::found(self.opener, &self.dir.path, rows)?;
        Ok(Disk { owner, log, state, dir: self.dir })
    }
}

/// A member's two databases, and its lock.
pub struct Disk {
    pub owner: Owner,
    pub log: Log,
    pub state: Rocks,
    pub dir: MemberDir,
}
