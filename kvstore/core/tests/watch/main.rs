//! The watch hub: golden stories, one for each row of contract 2.7 and each schedule of the traps, and random schedules
//! against a naive model.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "in a test a panic is the report, and a story says which one it is"
)]
#![allow(clippy::disallowed_methods, reason = "a test reads its stories from files")]

mod history;
mod property;
mod real;
mod stories;
#[path = "../story/mod.rs"]
mod story;
