//! An edge runtime's two queues: what its callers ask, and what they are answered, both in batches.
//!
//! On one core every wake-up of another thread is a switch of threads. So calls gather until the runtime has polled
//! everything that was ready, and then wake the raft thread once; answers come back the same way.

use std::mem;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use kvstore_core::Error;
use kvstore_core::store::Outcome;
use tokio::sync::{Notify, oneshot};

use super::hub::Bell;
use crate::driver::Input;
use crate::mailbox::{Closed, Mailbox};

/// One edge runtime's queues. [`Edge::run`] must run on that runtime, or nothing goes either way.
#[derive(Default)]
pub struct Edge {
    calls: Mutex<Vec<Input>>,
    finished: Mutex<Vec<Finished>>,
    filled: Notify,
    driver: OnceLock<Mailbox<Input>>,
    /// Nothing is gathered: for callers without a runtime of their own.
    direct: bool,
}

enum Finished {
    Outcome(oneshot::Sender<Result<Outcome, Error>>, Result<Outcome, Error>),
    Read(oneshot::Sender<Result<(), Error>>, Result<(), Error>),
    Ring(Arc<Bell>),
}

impl Finished {
    fn complete(self) {
        // A caller that has gone no longer wants to know.
        match self {
            Finished::Outcome(caller, outcome) => drop(caller.send(outcome)),
            Finished::Read(caller, result) => drop(caller.send(result)),
            Finished::Ring(bell) => bell.wake(),
        }
    }
}

impl Edge {
    pub fn new() -> Arc<Edge> {
        Arc::new(Edge::default())
    }

    pub fn direct() -> Arc<Edge> {
        Arc::new(Edge { direct: true, ..Edge::default() })
    }

    /// Where calls go.
    pub(super) fn attach(&self, driver: &Mailbox<Input>) {
        let _ = self.driver.set(driver.clone());
    }

    /// Carries calls and answers, for ever: to be spawned on the runtime whose callers these are.
    pub async fn run(self: Arc<Edge>) {
        let mut answers = Vec::new();
        loop {
            self.filled.notified().await;
            // Everything that is ready is polled before this goes on, and may have something to add.
            tokio::task::yield_now().await;
            mem::swap(&mut answers, &mut *self.finished.lock().unwrap_or_else(PoisonError::into_inner));
            answers.drain(..).for_each(Finished::complete);
            let mut calls = mem::take(&mut *self.calls.lock().unwrap_or_else(PoisonError::into_inner));
            if !calls.is_empty()
                && let Some(driver) = self.driver.get()
            {
                // A raft thread that has gone drops them, and their callers learn that the server stopped.
                let _ = driver.push_all(&mut calls);
            }
        }
    }

    /// Asks the raft thread something, together with what else is asked in this turn of the runtime.
    pub(super) fn call(&self, input: Input) -> Result<(), Closed> {
        if self.direct {
            return self.driver.get().map_or(Err(Closed), |driver| driver.push(input));
        }
        push(&self.calls, [input], &self.filled);
        Ok(())
    }

    /// Rings for streams that live on this runtime.
    pub(super) fn ring(&self, bells: Vec<Arc<Bell>>) {
        let rings = bells.into_iter().map(Finished::Ring);
        if self.direct { rings.for_each(Finished::complete) } else { push(&self.finished, rings, &self.filled) }
    }
}

/// Whoever finds the queue empty wakes the runtime; the others ride along.
fn push<T>(queue: &Mutex<Vec<T>>, items: impl IntoIterator<Item = T>, filled: &Notify) {
    let mut queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
    let was_empty = queue.is_empty();
    queue.extend(items);
    let filled_now = was_empty && !queue.is_empty();
    drop(queue);
    if filled_now {
        filled.notify_one();
    }
}

/// Answers that were found in one turn of the raft thread, sent with one wake-up for each runtime.
#[derive(Default)]
pub(crate) struct Answers(Vec<(Arc<Edge>, Vec<Finished>)>);

impl Answers {
    /// The outcome of a proposal, or why there is none.
    pub(crate) fn finish(&mut self, waiter: Waiter, result: Result<Outcome, Error>) {
        let finished = match waiter.answer {
            Answer::Outcome(caller) => Finished::Outcome(caller, result),
            Answer::Read(caller) => Finished::Read(caller, result.map(drop)),
        };
        self.add(waiter.edge, finished);
    }

    /// A read may go on.
    pub(crate) fn release(&mut self, waiter: Waiter) {
        match waiter.answer {
            Answer::Read(caller) => self.add(waiter.edge, Finished::Read(caller, Ok(()))),
            // Dropping the sender answers "stopped": an outcome can't be made up.
            Answer::Outcome(caller) => drop(caller),
        }
    }

    pub(crate) fn fail(&mut self, waiter: Waiter, error: Error) {
        self.finish(waiter, Err(error));
    }

    fn add(&mut self, edge: Arc<Edge>, finished: Finished) {
        if edge.direct {
            return finished.complete();
        }
        match self.0.iter_mut().find(|(of, _)| Arc::ptr_eq(of, &edge)) {
            Some((_, batch)) => batch.push(finished),
            None => self.0.push((edge, vec![finished])),
        }
    }

    pub(crate) fn send(&mut self) {
        for (edge, batch) in self.0.drain(..) {
            push(&edge.finished, batch, &edge.filled);
        }
    }
}

/// A caller that waits on an edge runtime.
pub(crate) struct Waiter {
    answer: Answer,
    edge: Arc<Edge>,
    /// Given back with the waiter, whether its caller still waits or not.
    _room: Option<Room>,
}

/// What a proposal takes of the bytes that may wait; given back when dropped.
pub(crate) struct Room {
    all: Arc<AtomicUsize>,
    bytes: usize,
}

/// What waits beside a proposal's bytes, roughly: its places in the queues and maps between here and its outcome.
const WAITING_OVERHEAD: usize = 512;

impl Room {
    /// `None`: with these bytes there would be more than `limit`.
    pub(super) fn take(all: &Arc<AtomicUsize>, bytes: usize, limit: usize) -> Option<Room> {
        let bytes = bytes + WAITING_OVERHEAD;
        let before = all.fetch_add(bytes, Ordering::Relaxed);
        // Dropped, it gives back what it took.
        let room = Room { all: Arc::clone(all), bytes };
        (before + bytes <= limit).then_some(room)
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.all.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

enum Answer {
    Outcome(oneshot::Sender<Result<Outcome, Error>>),
    Read(oneshot::Sender<Result<(), Error>>),
}

impl Waiter {
    pub(crate) fn outcome(edge: &Arc<Edge>, room: Room) -> (Waiter, oneshot::Receiver<Result<Outcome, Error>>) {
        let (answer, outcome) = oneshot::channel();
        (Waiter { answer: Answer::Outcome(answer), edge: Arc::clone(edge), _room: Some(room) }, outcome)
    }

    pub(crate) fn read(edge: &Arc<Edge>) -> (Waiter, oneshot::Receiver<Result<(), Error>>) {
        let (answer, done) = oneshot::channel();
        (Waiter { answer: Answer::Read(answer), edge: Arc::clone(edge), _room: None }, done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_taken_up_to_its_bound_and_given_back() {
        let all = Arc::new(AtomicUsize::new(0));
        let limit = 2 * (100 + WAITING_OVERHEAD);
        let first = Room::take(&all, 100, limit);
        let second = Room::take(&all, 100, limit);
        assert!(first.is_some() && second.is_some());
        assert!(Room::take(&all, 0, limit).is_none());
        drop(first);
        assert!(Room::take(&all, 101, limit).is_none());
        assert!(Room::take(&all, 100, limit).is_some(), "and given back at once");
        drop(second);
        assert_eq!(all.load(Ordering::Relaxed), 0);
    }
}
