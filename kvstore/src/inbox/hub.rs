//! The watch hub as the threads share it: one short lock, and a bell for each stream.
//!
//! The applier publishes into it, streams create watchers in it and take frames from it, and the pump brings watchers
//! that are behind up to date, reading outside the lock. Only streams that have something are woken.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use kvstore_core::watch::{StreamId, WatchHub};
use tokio::sync::Notify;

use super::edge::Edge;

/// The hub, shared.
pub struct Hub {
    hub: Mutex<WatchHub>,
    bells: Mutex<HashMap<StreamId, Bell>>,
    behind: Behind,
}

struct Bell {
    stream: Arc<Notify>,
    edge: Arc<Edge>,
}

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

    /// Rings the bells of these streams.
    pub fn wake(&self, streams: &[StreamId]) {
        if streams.is_empty() {
            return;
        }
        let bells = self.bells.lock().unwrap_or_else(PoisonError::into_inner);
        for bell in streams.iter().filter_map(|stream| bells.get(stream)) {
            bell.edge.wake(Arc::clone(&bell.stream));
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

    fn open(&self, edge: &Arc<Edge>) -> (StreamId, Arc<Notify>) {
        let id = self.with(WatchHub::open);
        let stream = Arc::new(Notify::new());
        let bell = Bell { stream: Arc::clone(&stream), edge: Arc::clone(edge) };
        self.bells.lock().unwrap_or_else(PoisonError::into_inner).insert(id, bell);
        (id, stream)
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
    bell: Arc<Notify>,
}

impl WatchStream {
    pub(super) fn open(shared: &Arc<super::Shared>, edge: &Arc<Edge>) -> WatchStream {
        let (id, bell) = shared.hub.open(edge);
        WatchStream { shared: Arc::clone(shared), id, bell }
    }

    pub fn id(&self) -> StreamId {
        self.id
    }

    /// The hub, to create, cancel, ask for progress and take frames on this stream's [`id`](WatchStream::id). A call
    /// that may leave a watcher behind is followed by [`Hub::nudge`].
    pub fn hub(&self) -> &Hub {
        &self.shared.hub
    }

    /// Returns once there may be something to take. A ring that came before the call is not lost; one that has nothing
    /// behind it is possible.
    pub async fn wait(&self) {
        self.bell.notified().await;
    }
}

impl Drop for WatchStream {
    fn drop(&mut self) {
        self.shared.hub.close(self.id);
    }
}
