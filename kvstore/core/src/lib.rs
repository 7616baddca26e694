//! The deciding half of the store: replication, MVCC, leases, watch, as values that take inputs and give effects.
//!
//! Nothing here reads a clock, a file, a socket or a random number, and nothing here starts a thread or awaits: the
//! shell (crate `kvstore`) does all of that and hands in what it saw. That is why every rule in this crate can be tested
//! in microseconds, and why `tests/sim` can run a whole cluster from one seed.
//!
//! | module | machine | driven by |
//! |---|---|---|
//! | [`replica`] | `Replica`: `Input` → `Effects` (Raft) | the raft thread |
//! | [`pending`] | who waits for which outcome, which read for which applied index | the raft thread |
//! | [`lease`]   | the replicated lease table; `lease::expiry`, the leader's deadlines | apply thread; raft thread |
//! | [`store`]   | `Store`: committed entries → `Applied` | the apply thread |
//! | [`mvcc`]    | the keyspace at a revision | the store, and readers on a view |
//! | [`compactor`] | `Compactor`: when to compact by itself, and to which revision | the server |
//! | [`watch`]   | `WatchHub`, `Session`: who is told what, in which order | apply thread and the streams |
//!
//! What this crate does not do: encode gRPC, know RocksDB, keep time, or authenticate (a later room).

pub mod backend;
pub mod compactor;
pub mod error;
pub mod keys;
pub mod lease;
pub mod mvcc;
pub mod pending;
pub mod replica;
pub mod store;
#[cfg(test)]
mod testing;
pub mod types;
pub mod watch;

pub use error::{Error, Fatal};
