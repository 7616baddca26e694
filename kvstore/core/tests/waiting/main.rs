//! Those who wait: golden stories for `Pending`, for the leader's lease clock, for keep-alives
//! that can't be answered at once, and for automatic compaction.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "in a test a panic is the report, and a story says which one it is"
)]
#![allow(clippy::disallowed_methods, reason = "a test reads its stories from files")]

mod compactor;
mod expiry;
mod pending;
#[path = "../story/mod.rs"]
#[allow(dead_code, reason = "each test binary uses its part of it")]
mod story;
