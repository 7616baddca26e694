//! Time that only moves when something happens: a queue of what is to come. Two things at the same moment happen in the
//! order in which they were planned.
//!
//! What it does not do: run anything.

use std::collections::BTreeMap;

/// Microseconds of the simulation.
pub type Micros = u64;

pub const MS: Micros = 1_000;

#[derive(Debug)]
pub struct Clock<E> {
    now: Micros,
    planned: u64,
    queue: BTreeMap<(Micros, u64), E>,
}

impl<E> Clock<E> {
    pub fn new() -> Self {
        Clock { now: 0, planned: 0, queue: BTreeMap::new() }
    }

    pub fn now(&self) -> Micros {
        self.now
    }

    pub fn after(&mut self, delay: Micros, event: E) {
        self.planned += 1;
        self.queue.insert((self.now + delay, self.planned), event);
    }

    /// The next event; time moves to it.
    pub fn advance(&mut self) -> Option<E> {
        let ((at, _), event) = self.queue.pop_first()?;
        self.now = at;
        Some(event)
    }
}

impl<E> Default for Clock<E> {
    fn default() -> Self {
        Self::new()
    }
}
