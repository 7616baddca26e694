//! The watch hub as the threads share it: one short lock, and a bell for each stream.
//!
//! The applier publishes into it, streams create watchers in it and take frames from it, and the pump brings watchers
//! that are behind up to date, reading outside the lock. Only streams that have something are woken.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::task::Waker;

use futures_util::task::AtomicWaker;
use kvstore_core::watch::{StreamId, WatchHub};

use super::edge::Edge;

/// Wakes the task of one stream, on the runtime where it lives.
pub(super) type Bell = AtomicWaker;

/// The hub, shared.
pub struct Hub {
    hub: Mutex<WatchHub>,
    bells: Mutex<HashMap<StreamId, Hung>>,
    behind: Behind,
}

/// A bell, and the runtime where it hangs.
type Hung = (Arc<Bell>, Arc<Edge>);

/// Tells the pump that some watcher is behind.
#[derive(Default)]
struct Behind {
    some: Mutex<bool>,
    rung: Condvar,
    stopped: AtomicBool,
}

impl Hub {
    pub(crate) fn new(hub: WatchHub) -> Hub {
        Hub { hub: Mutex::new(hub), bells: Mutex::default(), behind: Behind::default() }
    }

    /// Runs `f` under the hub's lock: short, never across an await.
    pub fn with<R>(&self, f: impl FnOnce(&mut WatchHub) -> R) -> R {
        f(&mut self.hub.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Rings the bells of these streams; each of their runtimes is woken once.
    pub fn wake(&self, streams: &[StreamId]) {
        let mut rung: Vec<(Arc<Edge>, Vec<Arc<Bell>>)> = Vec::new();
        if !streams.is_empty() {
            let bells = self.bells.lock().unwrap_or_else(PoisonError::into_inner);
            for (bell, edge) in streams.iter().filter_map(|stream| bells.get(stream)) {
                match rung.iter_mut().find(|(of, _)| Arc::ptr_eq(of, edge)) {
                    Some((_, bells)) => bells.push(Arc::clone(bell)),
                    None => rung.push((Arc::clone(edge), vec![Arc::clone(bell)])),
                }
            }
        }
        for (edge, bells) in rung {
            edge.ring(bells);
        }
    }

    /// Tells the pump to look whether some watcher is behind.
    pub fn nudge(&self) {
        *self.behind.some.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.behind.rung.notify_one();
    }

    /// The pump's sleep: until somebody is behind. `false`: the hub is stopping.
    pub(crate) fn wait_behind(&self) -> bool {
        let mut some = self.behind.some.lock().unwrap_or_else(PoisonError::into_inner);
        while !*some && !self.behind.stopped.load(Ordering::Acquire) {
            some = self.behind.rung.wait(some).unwrap_or_else(PoisonError::into_inner);
        }
        *some = false;
        !self.behind.stopped.load(Ordering::Acquire)
    }

    pub(crate) fn stop(&self) {
        self.behind.stopped.store(true, Ordering::Release);
        self.nudge();
    }

    fn open(&self, edge: &Arc<Edge>) -> (StreamId, Arc<Bell>) {
        let id = self.with(WatchHub::open);
        let bell = Arc::new(Bell::new());
        let held = (Arc::clone(&bell), Arc::clone(edge));
        self.bells.lock().unwrap_or_else(PoisonError::into_inner).insert(id, held);
        (id, bell)
    }

    fn close(&self, id: StreamId) {
        self.bells.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        self.with(|hub| hub.close(id));
    }
}

/// One gRPC watch stream's place in the hub; closed when dropped.
pub struct WatchStream {
    shared: Arc<super::Shared>,
    id: StreamId,
    bell: Arc<Bell>,
}

impl WatchStream {
    pub(super) fn open(shared: &Arc<super::Shared>, edge: &Arc<Edge>) -> WatchStream {
        let (id, bell) = shared.hub.open(edge);
        WatchStream { shared: Arc::clone(shared), id, bell }
    }

    pub fn id(&self) -> StreamId {
        self.id
    }

    /// Works on the hub under its lock: to create, cancel, ask for progress and take frames on this stream. The pump is told
    /// if that left somebody behind.
    pub fn with<R>(&self, work: impl FnOnce(&mut WatchHub, StreamId) -> R) -> R {
        let (done, behind) = self.shared.hub.with(|hub| (work(hub, self.id), hub.has_catch_up()));
        if behind {
            self.shared.hub.nudge();
        }
        done
    }

    /// From now on `waker` is woken, once, when there is something to take. What came before has to be looked for
    /// afterwards; a waking that has nothing behind it is possible.
    pub fn listen(&self, waker: &Waker) {
        self.bell.register(waker);
    }
}

impl Drop for WatchStream {
    fn drop(&mut self) {
        self.shared.hub.close(self.id);
    }
}
