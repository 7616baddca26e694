//! Keelson's store: the shell around [`kvstore_core`], and two thin binaries.

pub mod cli;
pub mod config;
pub mod disk;
mod driver;
pub mod edge;
mod http;
pub mod inbox;
mod mailbox;
pub mod metrics;
pub mod rpc;
pub mod telemetry;
#[cfg(test)]
mod testing;

pub use inbox::{Identity, Inbox, Published, RaftStatus};
