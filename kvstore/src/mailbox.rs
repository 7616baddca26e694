//! A queue into one thread that takes everything at once.
//!
//! The threads of the shell live on batches: a thousand proposals want one Raft step, one fsync and one wake-up. So the
//! receiver swaps the whole queue out under one lock, and a sender wakes it only if it sleeps.
//!
//! What it does not do: it drops nothing by itself. A bounded sender asks [`Mailbox::try_push`] and decides.

use std::mem;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// The receiver has gone: the member is stopping.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Closed;

/// Why [`Mailbox::try_push`] took nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Refused {
    Full,
    Closed,
}

struct Queue<T> {
    items: Vec<T>,
    asleep: bool,
    closed: bool,
}

struct Shared<T> {
    queue: Mutex<Queue<T>>,
    filled: Condvar,
}

/// The sending side; cheap to clone.
pub(crate) struct Mailbox<T>(Arc<Shared<T>>);

impl<T> Clone for Mailbox<T> {
    fn clone(&self) -> Self {
        Mailbox(Arc::clone(&self.0))
    }
}

/// The receiving side. Dropping it closes the mailbox and drops what was left in it.
pub(crate) struct Receiver<T>(Arc<Shared<T>>);

pub(crate) fn mailbox<T>() -> (Mailbox<T>, Receiver<T>) {
    let queue = Queue { items: Vec::new(), asleep: false, closed: false };
    let shared = Arc::new(Shared { queue: Mutex::new(queue), filled: Condvar::new() });
    (Mailbox(Arc::clone(&shared)), Receiver(shared))
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, Queue<T>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Mailbox<T> {
    pub(crate) fn push(&self, item: T) -> Result<(), Closed> {
        self.try_push(item, usize::MAX).map_err(|_| Closed)
    }

    /// Takes all of `items`, with one wake-up.
    pub(crate) fn push_all(&self, items: &mut Vec<T>) -> Result<(), Closed> {
        let mut queue = self.0.lock();
        if queue.closed {
            return Err(Closed);
        }
        queue.items.append(items);
        self.wake(queue);
        Ok(())
    }

    /// Takes the item unless `limit` items already wait.
    pub(crate) fn try_push(&self, item: T, limit: usize) -> Result<(), Refused> {
        let mut queue = self.0.lock();
        if queue.closed {
            return Err(Refused::Closed);
        }
        if queue.items.len() >= limit {
            return Err(Refused::Full);
        }
        queue.items.push(item);
        self.wake(queue);
        Ok(())
    }

    fn wake(&self, mut queue: MutexGuard<'_, Queue<T>>) {
        let asleep = mem::take(&mut queue.asleep) && !queue.items.is_empty();
        drop(queue);
        if asleep {
            self.0.filled.notify_one();
        }
    }
}

impl<T> Receiver<T> {
    /// Moves everything that waits into `into`, which must be empty; sleeps until there is something or `deadline` has
    /// passed. Nothing moved means that the deadline has passed.
    pub(crate) fn take(&self, into: &mut Vec<T>, deadline: Option<Instant>) {
        debug_assert!(into.is_empty());
        let mut queue = self.0.lock();
        while queue.items.is_empty() {
            queue.asleep = true;
            queue = match deadline {
                None => self.0.filled.wait(queue).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        break;
                    }
                    self.0.filled.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        queue.asleep = false;
        mem::swap(&mut queue.items, into);
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        let mut queue = self.0.lock();
        queue.closed = true;
        // Dropped outside the lock: an item's own drop may push somewhere.
        let left = mem::take(&mut queue.items);
        drop(queue);
        drop(left);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn takes_everything_in_order() {
        let (sender, receiver) = mailbox();
        let consumer = std::thread::spawn(move || {
            let (mut all, mut batch) = (Vec::new(), Vec::new());
            while all.len() < 1000 {
                receiver.take(&mut batch, None);
                all.append(&mut batch);
            }
            all
        });
        for n in 0..500 {
            sender.push(n).unwrap();
        }
        sender.push_all(&mut (500..1000).collect()).unwrap();
        assert_eq!(consumer.join().unwrap(), (0..1000).collect::<Vec<_>>());
    }

    #[test]
    fn a_deadline_ends_the_sleep() {
        let (_sender, receiver) = mailbox::<u8>();
        let mut batch = Vec::new();
        receiver.take(&mut batch, Some(Instant::now() + Duration::from_millis(1)));
        assert!(batch.is_empty());
    }

    #[test]
    fn a_limit_refuses_and_a_dropped_receiver_closes() {
        let (sender, receiver) = mailbox();
        assert_eq!(sender.try_push(1, 1), Ok(()));
        assert_eq!(sender.try_push(2, 1), Err(Refused::Full));
        drop(receiver);
        assert_eq!(sender.push(3), Err(Closed));
    }
}
