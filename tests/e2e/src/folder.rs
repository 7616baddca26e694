//! Folders for a test's data: on the disk that the build is on, never in memory, because fsync has to mean something.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// A folder of its own, removed when dropped.
#[derive(Debug)]
pub struct Folder(PathBuf);

impl Folder {
    pub fn new(label: &str) -> Folder {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = scratch().join(format!("{label}-{}-{number}", std::process::id()));
        fs::create_dir_all(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Folder(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Every file and folder below `root` with its size, in order: equal listings mean that nothing was touched.
pub fn listing(root: &Path) -> Vec<(PathBuf, u64, std::time::SystemTime)> {
    let mut found = Vec::new();
    let mut open = vec![root.to_owned()];
    while let Some(folder) = open.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries {
            let entry = entry.unwrap();
            let facts = entry.metadata().unwrap();
            found.push((entry.path(), if facts.is_dir() { 0 } else { facts.len() }, facts.modified().unwrap()));
            if facts.is_dir() {
                open.push(entry.path());
            }
        }
    }
    found.sort();
    found
}

/// The folder that cargo put the programs of this build in.
pub fn release() -> PathBuf {
    let exe = std::env::current_exe().expect("a process knows its own program");
    let folder = exe.parent().expect("a program lies in a folder");
    if folder.ends_with("deps") {
        folder.parent().expect("deps lies in the profile's folder").to_owned()
    } else {
        folder.to_owned()
    }
}

fn scratch() -> PathBuf {
    release().join("scratch")
}
