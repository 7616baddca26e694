//! The harness of the end-to-end tests and of the benches: real servers, ours and real etcd, as processes on loopback.
//!
//! [`Cluster`] starts one or three members of a [`Kind`] and stops them by their process ids. Nothing here sleeps to wait: a server
//! is ready when its log says so, a process is gone when its output ends. [`peers`] finds the programs that ours are held
//! against; one that is missing is a loud skip on a user's machine and a failure in CI.
//!
//! What it does not do: it knows nothing of what a test asserts, and it starts nothing on another machine.

#![allow(clippy::unwrap_used, reason = "a test's panic is its report")]

pub mod cluster;
pub mod crowd;
pub mod ctl;
pub mod folder;
pub mod http;
pub mod kube;
pub mod net;
pub mod peers;
pub mod ports;
pub mod process;
pub mod raw;
pub mod rpc;
pub mod watcher;

pub use cluster::{Cluster, Kind, Member};
pub use ctl::Ctl;
pub use folder::Folder;
pub use net::Net;
pub use process::Process;
pub use watcher::Watcher;

use std::time::{Duration, Instant};

/// How long anything may take that should take a moment. Generous: two cores share a compiler, a disk and other tests.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Tries until the answer is `Some`, a little apart, and panics after `limit` with the name of what was awaited.
///
/// For states that nothing announces (a follower has caught up, a rule is in the kernel); what is announced is waited for.
pub fn eventually<T>(what: &str, limit: Duration, mut attempt: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(answer) = attempt() {
            return answer;
        }
        assert!(Instant::now() < deadline, "{what}: not within {limit:?}");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}
