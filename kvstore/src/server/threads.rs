//! The member's threads: named, watched, and joined in order.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::JoinHandle;

use kvstore_core::Fatal;
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use crate::inbox::Shared;

pub(super) struct Threads {
    threads: Vec<(String, JoinHandle<()>)>,
    failed: mpsc::UnboundedSender<Fatal>,
    failures: Option<mpsc::UnboundedReceiver<Fatal>>,
}

impl Threads {
    pub(super) fn new() -> Threads {
        let (failed, failures) = mpsc::unbounded_channel();
        Threads { threads: Vec::new(), failed, failures: Some(failures) }
    }

    /// What ends the member: a thread's error, or its panic.
    pub(super) fn failures(&mut self) -> mpsc::UnboundedReceiver<Fatal> {
        self.failures.take().expect("asked for once")
    }

    pub(super) fn spawn(
        &mut self,
        name: &str,
        body: impl FnOnce() -> Result<(), Fatal> + Send + 'static,
    ) -> Result<(), std::io::Error> {
        let failed = self.failed.clone();
        let of = name.to_owned();
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            let failure = match catch_unwind(AssertUnwindSafe(body)) {
                Ok(Ok(())) => return,
                Ok(Err(fatal)) => fatal,
                Err(_) => Fatal::Invariant(format!("thread {of} panicked")),
            };
            // Nobody listens any more: the member is going down already.
            let _ = failed.send(failure);
        })?;
        self.threads.push((name.to_owned(), thread));
        Ok(())
    }

    /// A current-thread runtime on a thread of its own, which ends with `main`.
    pub(super) fn runtime(
        &mut self,
        name: &str,
        main: impl Future<Output = Result<(), Fatal>> + Send + 'static,
    ) -> Result<Handle, std::io::Error> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .thread_name(format!("{name}-blocking"))
            .build()?;
        let handle = runtime.handle().clone();
        self.spawn(name, move || {
            let result = runtime.block_on(main);
            // A snapshot that is being written out stops at its next chunk; nothing waits for it.
            runtime.shutdown_background();
            result
        })?;
        Ok(handle)
    }

    pub(super) fn join(&mut self, name: &str) {
        if let Some(at) = self.threads.iter().position(|(of, _)| of == name) {
            let (_, thread) = self.threads.swap_remove(at);
            let _ = thread.join();
        }
    }
}

/// Brings watchers that are behind up to date, reading history outside the hub's lock.
pub(super) fn pump(shared: &Shared) -> Result<(), Fatal> {
    while shared.hub.wait_behind() {
        while let Some(mut slice) = shared.hub.with(|hub| hub.next_catch_up()) {
            // Published before the hub learned of it, so it holds all that the slice may reach.
            let published = shared.published.get();
            slice.read(&published.view, published.facts.bounds())?;
            let wakes = shared.hub.with(|hub| hub.finish(slice));
            shared.hub.wake(&wakes);
        }
    }
    Ok(())
}
