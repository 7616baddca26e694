//! Keelson's store: the shell around [`kvstore_core`], and two thin binaries.

mod applier;
pub mod cli;
mod clock;
pub mod config;
pub mod counts;
pub mod disk;
mod driver;
pub mod edge;
mod http;
pub mod inbox;
mod logger;
mod mailbox;
pub mod metrics;
mod peer;
pub mod rpc;
pub mod server;
pub mod telemetry;
#[cfg(test)]
mod testing;

pub use inbox::{Identity, Inbox, Published, RaftStatus};

/// Which version of etcd's API this speaks, on the wire and to tools that parse `--version`.
pub const ETCD_VERSION: &str = "3.7.3";
