//! Answers on their way back to an edge runtime, in batches.

use std::mem;
use std::sync::{Arc, Mutex, PoisonError};

use kvstore_core::Error;
use kvstore_core::store::Outcome;
use tokio::sync::{Notify, oneshot};

/// One edge runtime's queue of answers. [`Edge::run`] must run on that runtime, or nothing sent through it arrives.
#[derive(Default)]
pub struct Edge {
    finished: Mutex<Vec<Finished>>,
    filled: Notify,
    /// Answers are completed at once, by whoever has them: for callers without a runtime of their own.
    direct: bool,
}

enum Finished {
    Outcome(oneshot::Sender<Result<Outcome, Error>>, Result<Outcome, Error>),
    Read(oneshot::Sender<Result<(), Error>>, Result<(), Error>),
    Wake(Arc<Notify>),
}

impl Finished {
    fn complete(self) {
        // A caller that has gone no longer wants to know.
        match self {
            Finished::Outcome(caller, outcome) => drop(caller.send(outcome)),
            Finished::Read(caller, result) => drop(caller.send(result)),
            Finished::Wake(stream) => stream.notify_one(),
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

    /// Hands answers to their callers, for ever: to be spawned on the runtime whose callers these are.
    pub async fn run(self: Arc<Edge>) {
        let mut batch = Vec::new();
        loop {
            self.filled.notified().await;
            mem::swap(&mut batch, &mut *self.finished.lock().unwrap_or_else(PoisonError::into_inner));
            batch.drain(..).for_each(Finished::complete);
        }
    }

    fn finish(&self, finished: Finished) {
        if self.direct {
            return finished.complete();
        }
        let mut queue = self.finished.lock().unwrap_or_else(PoisonError::into_inner);
        queue.push(finished);
        let first = queue.len() == 1;
        drop(queue);
        // Whoever finds the queue empty wakes the runtime; the others ride along.
        if first {
            self.filled.notify_one();
        }
    }

    /// Wakes a stream that lives on this runtime.
    pub(crate) fn wake(&self, stream: Arc<Notify>) {
        self.finish(Finished::Wake(stream));
    }
}

/// A caller that waits on an edge runtime.
pub(crate) struct Waiter {
    answer: Answer,
    edge: Arc<Edge>,
}

enum Answer {
    Outcome(oneshot::Sender<Result<Outcome, Error>>),
    Read(oneshot::Sender<Result<(), Error>>),
}

impl Waiter {
    pub(crate) fn outcome(edge: &Arc<Edge>) -> (Waiter, oneshot::Receiver<Result<Outcome, Error>>) {
        let (answer, outcome) = oneshot::channel();
        (Waiter { answer: Answer::Outcome(answer), edge: Arc::clone(edge) }, outcome)
    }

    pub(crate) fn read(edge: &Arc<Edge>) -> (Waiter, oneshot::Receiver<Result<(), Error>>) {
        let (answer, done) = oneshot::channel();
        (Waiter { answer: Answer::Read(answer), edge: Arc::clone(edge) }, done)
    }

    /// The outcome of a proposal. A read that is given one was mixed up by its owner, and is failed.
    pub(crate) fn finish(self, result: Result<Outcome, Error>) {
        match self.answer {
            Answer::Outcome(caller) => self.edge.finish(Finished::Outcome(caller, result)),
            Answer::Read(caller) => self.edge.finish(Finished::Read(caller, result.map(drop))),
        }
    }

    /// A read may go on.
    pub(crate) fn release(self) {
        match self.answer {
            Answer::Read(caller) => self.edge.finish(Finished::Read(caller, Ok(()))),
            // Dropping the sender answers "stopped": an outcome can't be made up.
            Answer::Outcome(caller) => drop(caller),
        }
    }

    pub(crate) fn fail(self, error: Error) {
        self.finish(Err(error));
    }

    /// Whether the caller has gone away meanwhile.
    pub(crate) fn is_abandoned(&self) -> bool {
        match &self.answer {
            Answer::Outcome(caller) => caller.is_closed(),
            Answer::Read(caller) => caller.is_closed(),
        }
    }
}
