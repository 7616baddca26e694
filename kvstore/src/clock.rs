//! The one place that reads the machine's clock. What a core decides by is a [`Timestamp`], made by the [`Clock`] that the
//! server starts and hands down; what a thread waits for is an [`Instant`], from [`now`].
//!
//! What it does not do: wall-clock time. Nothing that is replicated or decided depends on it.

use std::time::Instant;

use kvstore_core::types::Timestamp;

/// Milliseconds since the process started it.
#[derive(Clone, Copy)]
pub(crate) struct Clock(Instant);

impl Clock {
    pub(crate) fn start() -> Clock {
        Clock(now())
    }

    pub(crate) fn now(&self) -> Timestamp {
        Timestamp(u64::try_from(self.0.elapsed().as_millis()).unwrap_or(u64::MAX))
    }
}

/// The moment, for deadlines and for measuring.
pub(crate) fn now() -> Instant {
    Instant::now()
}
