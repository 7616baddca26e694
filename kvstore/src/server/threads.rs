//! The member's threads: named, watched, and joined in order.

use std::net::TcpListener;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::JoinHandle;

use keelson_proto::peer::peer_server::PeerServer;
use kvstore_core::Fatal;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::TcpIncoming;

use crate::inbox::Shared;
use crate::peer::PeerService;

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

    /// The peers' runtime on its thread, with the server on `listeners`.
    pub(super) fn peers(
        &mut self,
        listeners: Vec<TcpListener>,
        service: PeerServer<PeerService>,
        stop: CancellationToken,
    ) -> Result<Handle, std::io::Error> {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().thread_name("peers-blocking").build()?;
        let handle = runtime.handle().clone();
        self.spawn("peers", move || {
            runtime.block_on(async {
                for listener in listeners {
                    let listener = tokio::net::TcpListener::from_std(listener)
                        .map_err(|e| Fatal::Invariant(format!("the peers' listener: {e}")))?;
                    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
                    let server = tonic::transport::Server::builder()
                        .initial_stream_window_size(4 << 20)
                        .initial_connection_window_size(16 << 20)
                        .add_service(service.clone());
                    let stop = stop.clone();
                    tokio::spawn(server.serve_with_incoming_shutdown(incoming, stop.cancelled_owned()));
                }
                stop.cancelled().await;
                Ok(())
            })?;
            // A snapshot that is being written out stops at its next chunk; nothing waits for it.
            runtime.shutdown_background();
            Ok(())
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
