//! The threads that clients meet: one current-thread runtime a core, connections dealt to them in turn, each living on one
//! runtime for good (design 4.5: a connection's requests never change cores, and nothing is shared but the inbox).
//!
//! The first runtime accepts and deals; it serves its share too. All listeners are bound before any thread starts, so
//! that an address in use is found before anything is promised. Clients that connect before the member is ready wait in
//! the listen queue.
//!
//! What it does not do: TLS (its issue), and sharing one port between processes.

use std::io;
use std::net::TcpStream as StdTcpStream;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::LocalSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::http;
use crate::inbox::{Edge, Inbox};
use crate::metrics::Metrics;
use crate::rpc::{Rpc, RpcLimits};

/// What a listener's connections speak.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Port {
    /// gRPC and HTTP.
    Client,
    /// `/metrics` and the probes.
    Metrics,
}

/// A bound listener, not yet accepting.
pub struct Bound {
    pub listener: std::net::TcpListener,
    pub port: Port,
}

/// What every runtime needs to serve.
#[derive(Clone)]
pub struct Serving {
    pub inbox: Inbox,
    pub limits: RpcLimits,
    pub metrics: Arc<Metrics>,
}

/// The running edge.
pub struct EdgeThreads {
    threads: Vec<JoinHandle<()>>,
}

/// A connection on its way to its runtime.
type Dealt = (StdTcpStream, Port);

/// Starts `runtimes` threads (at least one), accepting on all of `bound`, until `shutdown` is cancelled; then every
/// connection finishes the requests it has.
pub fn start(
    bound: Vec<Bound>,
    serving: &Serving,
    runtimes: usize,
    shutdown: &CancellationToken,
) -> io::Result<EdgeThreads> {
    let mut hands = Vec::new();
    let mut threads = Vec::new();
    let mut bound = Some(bound);
    // The dealer starts last, when all the others have their hands open.
    for number in (0..runtimes.max(1)).rev() {
        let (hand, dealt) = mpsc::unbounded_channel();
        hands.push(hand);
        let dealer = if number == 0 { bound.take().map(|bound| (bound, hands.clone())) } else { None };
        let (serving, shutdown) = (serving.clone(), shutdown.clone());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(8)
            .thread_name(format!("edge-{number}-read"))
            .build()?;
        threads.push(
            thread::Builder::new()
                .name(format!("edge-{number}"))
                .spawn(move || LocalSet::new().block_on(&runtime, run(serving, dealer, dealt, shutdown)))?,
        );
    }
    Ok(EdgeThreads { threads })
}

impl EdgeThreads {
    /// Waits until every connection is done. An `Err` names a thread that panicked.
    pub fn join(self) -> Result<(), String> {
        for thread in self.threads {
            let name = thread.thread().name().unwrap_or("edge").to_owned();
            thread.join().map_err(|_| format!("thread {name} panicked"))?;
        }
        Ok(())
    }
}

/// One runtime's life.
async fn run(
    serving: Serving,
    dealer: Option<(Vec<Bound>, Vec<mpsc::UnboundedSender<Dealt>>)>,
    mut dealt: mpsc::UnboundedReceiver<Dealt>,
    shutdown: CancellationToken,
) {
    let answers = Edge::new();
    let inbox = serving.inbox.for_edge(Arc::clone(&answers));
    let answering = tokio::task::spawn_local(answers.run());
    let rpc = Rpc::new(inbox.clone(), serving.limits, Arc::clone(&serving.metrics), &shutdown);
    let connections = TaskTracker::new();
    if let Some((bound, hands)) = dealer {
        for Bound { listener, port } in bound {
            tokio::task::spawn_local(accept(listener, port, hands.clone(), shutdown.clone()));
        }
    }
    loop {
        let (stream, port) = tokio::select! {
            Some(dealt) = dealt.recv() => dealt,
            () = shutdown.cancelled() => break,
            else => break,
        };
        let stream = match TcpStream::from_std(stream) {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(%error, "a connection was lost on its way to its runtime");
                continue;
            }
        };
        match port {
            Port::Client => {
                connections.spawn_local(rpc.clone().serve_connection(stream, shutdown.clone()));
            }
            Port::Metrics => {
                let (inbox, metrics) = (inbox.clone(), Arc::clone(&serving.metrics));
                connections.spawn_local(http::serve_metrics_connection(stream, inbox, metrics, shutdown.clone()));
            }
        }
    }
    connections.close();
    connections.wait().await;
    answering.abort();
}

/// Accepts on one listener and deals the connections in turn.
async fn accept(
    listener: std::net::TcpListener,
    port: Port,
    hands: Vec<mpsc::UnboundedSender<Dealt>>,
    shutdown: CancellationToken,
) {
    let listener = match listener.set_nonblocking(true).and_then(|()| TcpListener::from_std(listener)) {
        Ok(listener) => listener,
        Err(error) => return tracing::error!(%error, "a listener can't be used"),
    };
    for hand in hands.iter().cycle() {
        let stream = loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => break stream,
                    Err(error) => backoff(&error).await,
                },
                () = shutdown.cancelled() => return,
            }
        };
        // A runtime that has ended takes its hand with it; the shutdown is on its way here too.
        if let Ok(stream) = stream.into_std() {
            let _ = hand.send((stream, port));
        }
    }
}

/// Out of file descriptors, mostly: accepting again at once would only burn the core that could free some.
async fn backoff(error: &io::Error) {
    tracing::warn!(%error, "accepting a connection failed");
    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
}
