//! Whose directory this is: one small text file that is read before either database is opened.
//!
//! It is written once, when the member is founded, so that a directory of another member, or of a newer version, is
//! refused without anything having been touched.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;

use kvstore_core::Fatal;
use kvstore_core::types::{ClusterId, MemberId};

use super::{FORMAT_VERSION, disk_error, sync_dir};

const OWNER: &str = "OWNER";
const OWNER_NEW: &str = "OWNER.new";

/// The member that a directory belongs to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Owner {
    pub cluster_id: ClusterId,
    pub member_id: MemberId,
    /// As it was founded. A member may be renamed, and may move to other URLs, but not both at once.
    pub name: String,
    pub peer_urls: Vec<String>,
}

impl Owner {
    /// `None`: nobody's yet.
    pub(super) fn read(member_dir: &Path) -> Result<Option<Owner>, Fatal> {
        let path = member_dir.join(OWNER);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(disk_error(&path)(e)),
        };
        parse(&text).map(Some).map_err(disk_error(&path))
    }

    pub(super) fn write(&self, member_dir: &Path) -> Result<(), Fatal> {
        let mut text = format!(
            "format {FORMAT_VERSION}\ncluster {}\nmember {}\nname {}\n",
            self.cluster_id, self.member_id, self.name
        );
        for url in &self.peer_urls {
            let _ = writeln!(text, "peer-url {url}");
        }
        let new = member_dir.join(OWNER_NEW);
        let write = || -> std::io::Result<()> {
            let mut file = File::create(&new)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&new, member_dir.join(OWNER))
        };
        write().map_err(disk_error(&new))?;
        sync_dir(member_dir)
    }
}

fn parse(text: &str) -> Result<Owner, String> {
    let mut lines = text.lines();
    let format = lines.next().and_then(|line| line.strip_prefix("format ")).and_then(|n| n.parse::<u32>().ok());
    match format {
        None => return Err("does not say which format this directory has".into()),
        Some(format) if format > FORMAT_VERSION => {
            return Err(format!(
                "this data directory has format {format}, written by a newer version; this one reads up to {FORMAT_VERSION}"
            ));
        }
        Some(_) => {}
    }
    let (mut cluster, mut member, mut name, mut peer_urls) = (None, None, None, Vec::new());
    for line in lines {
        match line.split_once(' ') {
            Some(("cluster", id)) => cluster = u64::from_str_radix(id, 16).ok(),
            Some(("member", id)) => member = u64::from_str_radix(id, 16).ok(),
            Some(("name", text)) => name = Some(text.to_owned()),
            Some(("peer-url", url)) => peer_urls.push(url.to_owned()),
            _ => return Err(format!("unknown line {line:?}")),
        }
    }
    match (cluster, member, name) {
        (Some(cluster), Some(member), Some(name)) => {
            Ok(Owner { cluster_id: ClusterId(cluster), member_id: MemberId(member), name, peer_urls })
        }
        _ => Err("names no cluster, member or name".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_wrote_and_refuses_the_future() {
        let dir = crate::testing::TempDir::new("owner");
        assert_eq!(Owner::read(dir.path()).unwrap(), None);
        let owner = Owner {
            cluster_id: ClusterId(0xcdf8_181e_3de5_1ef0),
            member_id: MemberId(7),
            name: "a name with spaces".into(),
            peer_urls: vec!["http://127.0.0.1:2380".into()],
        };
        owner.write(dir.path()).unwrap();
        assert_eq!(Owner::read(dir.path()).unwrap(), Some(owner));
        fs::write(dir.path().join(OWNER), "format 2\nwho knows\n").unwrap();
        let error = Owner::read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("written by a newer version"), "{error}");
    }
}
