//! What clients saw, and whether a correct store could have shown it to them.
//!
//! | module | judges |
//! |---|---|
//! | [`history`]  | nothing: it is what was called when, and what was answered |
//! | [`linear`]   | whether the operations on each key have an order that explains all answers |
//! | [`revision`] | whether revisions rise with time, and whether every acknowledged write is in the store's own history, once |
//! | [`watch`]    | whether a watcher was told everything, once, in order, revision by revision |
//! | [`lease`]    | whether a lease lived as long as it was promised |
//!
//! The simulator and the end-to-end tests record; this crate decides. It knows nothing of our store, so that a real etcd
//! can be judged by the same code.
//!
//! What it does not do: run anything, or know a clock. Times are whatever the recorder counts, as long as they rise.

pub mod history;
pub mod lease;
pub mod linear;
pub mod revision;
pub mod watch;
