//! Keelson's store: the shell around [`kvstore_core`], and two thin binaries.

pub mod cli;
pub mod config;
pub mod disk;
mod driver;
pub mod inbox;
mod mailbox;
#[cfg(test)]
mod testing;

pub use inbox::{Identity, Inbox, Published, RaftStatus};
