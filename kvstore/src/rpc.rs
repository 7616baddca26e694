//! The client edge: one port that speaks gRPC and HTTP/1, on one runtime for good.
//!
//! A connection is handed to an [`Rpc`] and stays there. Its gRPC requests pass `intercept` and are dispatched by path: the
//! few unary RPCs that carry the load go to a thin handler (`unary`), which frames, decodes, calls and answers from
//! stored bytes; Watch and RangeStream are response bodies of their own (`watch`, `range_stream`); every other RPC goes to
//! tonic's routes. All read through `framing`, so that a bad message is refused in the same words everywhere. What is not
//! gRPC goes to `http`.
//!
//! The services do not import each other: they stand on the leaves (`status`, `framing`, `recipe` and the like), and
//! `unary` calls `kv`.

pub(crate) mod authority;
mod cluster;
mod election;
pub(crate) mod encoded;
mod framing;
pub(crate) mod health;
mod intercept;
pub(crate) mod kv;
mod leader;
mod lease;
mod lock;
pub(crate) mod maintenance;
mod range_stream;
mod recipe;
pub mod status;
mod unary;
mod watch;

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body::{Body as _, Frame};
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use keelson_proto::etcdserverpb::ResponseHeader;
use keelson_proto::etcdserverpb::cluster_server::ClusterServer;
use keelson_proto::etcdserverpb::kv_server::KvServer;
use keelson_proto::etcdserverpb::lease_server::LeaseServer;
use keelson_proto::etcdserverpb::maintenance_server::MaintenanceServer;
use keelson_proto::grpc_health_v1::health_server::HealthServer;
use keelson_proto::v3electionpb::election_server::ElectionServer;
use keelson_proto::v3lockpb::lock_server::LockServer;
use tokio::net::TcpStream;
use tokio::time::Sleep;
use tokio_util::sync::CancellationToken;
use tonic::server::NamedService;
use tonic::service::Routes;
use tonic::{Code, Status};
use tower_service::Service as _;

pub(crate) use status::status;

use authority::Mended;
use framing::{Measured, Shape};
use leader::LeaderMonitor;
use lease::{LeaseConfig, LeaseService};
use recipe::Recipe;
use watch::{WatchConfig, WatchService};

use crate::http as web;
use crate::inbox::Inbox;
use crate::metrics::Metrics;

/// The services that are registered, for what is said of an unknown method.
const SERVICES: [&str; 8] = [
    KvServer::<kv::KvService>::NAME,
    WatchService::NAME,
    LeaseServer::<LeaseService>::NAME,
    ClusterServer::<cluster::ClusterService>::NAME,
    MaintenanceServer::<maintenance::MaintenanceService>::NAME,
    LockServer::<lock::LockService>::NAME,
    ElectionServer::<election::ElectionService>::NAME,
    HealthServer::<health::HealthService>::NAME,
];

/// How much a gRPC message may exceed `max_request_bytes`, as in etcd: room for what surrounds the request.
pub(crate) const GRPC_OVERHEAD_BYTES: usize = 512 * 1024;
/// Flow control: a put of the largest size fits into a connection's window.
const CONNECTION_WINDOW_BYTES: u32 = 4 * 1024 * 1024;
const STREAM_WINDOW_BYTES: u32 = 1024 * 1024;
/// etcd's `--grpc-keepalive-interval` and `-timeout`.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2 * 3600);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);

/// Bounds of the edge.
#[derive(Clone, Copy, Debug)]
pub struct RpcLimits {
    pub max_request_bytes: usize,
    pub max_txn_ops: usize,
    pub heartbeat_interval_ms: u64,
    pub election_timeout_ms: u64,
    pub watch_progress_notify_interval: Duration,
}

/// What every service of one runtime shares.
pub(crate) struct Context {
    pub(crate) inbox: Inbox,
    pub(crate) limits: RpcLimits,
    pub(crate) metrics: Arc<Metrics>,
    monitor: LeaderMonitor,
}

impl Context {
    /// The largest gRPC message that is read at all.
    pub(crate) fn max_message_bytes(&self) -> usize {
        self.limits.max_request_bytes + GRPC_OVERHEAD_BYTES
    }
}

/// The edge of one runtime. Cheap to clone; not to be sent to another runtime.
#[derive(Clone)]
pub struct Rpc {
    context: Arc<Context>,
    routes: Rc<Routes>,
    watch: Rc<WatchService>,
}

impl Rpc {
    /// `inbox` must answer on the runtime where this lives. Cancelling `shutdown` ends the streams, which would not end by
    /// themselves.
    pub fn new(inbox: Inbox, limits: RpcLimits, metrics: Arc<Metrics>, shutdown: &CancellationToken) -> Rpc {
        let election_timeout = Duration::from_millis(limits.election_timeout_ms);
        let monitor = LeaderMonitor::start(inbox.clone(), election_timeout);
        let context = Arc::new(Context { inbox, limits, metrics, monitor });
        let routes = routes(&context, shutdown);
        let watch = WatchConfig {
            progress_notify_interval: limits.watch_progress_notify_interval,
            max_request_bytes: context.max_message_bytes(),
        };
        let watch = WatchService::new(context.inbox.clone(), context.monitor.clone(), watch, shutdown.clone());
        Rpc { context, routes: Rc::new(routes), watch: Rc::new(watch) }
    }

    /// Serves a connection until the peer closes it, or, once `shutdown` is cancelled, until its requests are done. Must
    /// run inside a `LocalSet` or a local runtime.
    pub async fn serve_connection(self, stream: TcpStream, shutdown: CancellationToken) {
        let _ = stream.set_nodelay(true);
        let mut builder = auto::Builder::new(LocalExec);
        builder
            .http2()
            .timer(TokioTimer::new())
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .max_concurrent_streams(None)
            .keep_alive_interval(Some(KEEPALIVE_INTERVAL))
            .keep_alive_timeout(KEEPALIVE_TIMEOUT);
        builder.http1().timer(TokioTimer::new()).header_read_timeout(Duration::from_secs(300));
        let connection = builder.serve_connection(TokioIo::new(Mended::new(stream)), self);
        tokio::pin!(connection);
        tokio::select! {
            result = connection.as_mut() => if let Err(error) = result {
                tracing::debug!(%error, "client connection ended");
            },
            () = shutdown.cancelled() => {
                connection.as_mut().graceful_shutdown();
                let _ = connection.await;
            }
        }
    }

    async fn dispatch(self, request: Request<Incoming>) -> Response<Body> {
        if !is_grpc(&request) {
            return web::client(&self.context, &request).await.map(Body::Full);
        }
        let call = match intercept::admit(request.headers(), || self.context.inbox.raft().leader.is_some()) {
            Ok(call) => call,
            Err(status) => return refused(&status),
        };
        match unary::Method::of(request.uri().path()).filter(|_| request.method() == Method::POST) {
            Some(method) => unary::serve(&self.context, method, request.into_body(), call.timeout).await,
            None => self.route(request, call.timeout).await,
        }
    }

    /// Whatever the thin handler does not serve.
    async fn route(&self, request: Request<Incoming>, timeout: Option<Duration>) -> Response<Body> {
        let path = request.uri().path().to_owned();
        let shape = Shape::of(&path);
        let mut ended = Ended::new(&self.context.metrics, &path);
        let deadline = timeout.map(|timeout| Box::pin(tokio::time::sleep(timeout)));
        match intercept::within(timeout, self.answer(request, shape)).await {
            Ok(response) if is_unheard_of(&response) => {
                ended.forget();
                refused(&Status::unimplemented(unheard_of(&path)))
            }
            Ok(response) => {
                let (mut head, body) = response.into_parts();
                mend(&mut head.headers, shape);
                ended.started();
                ended.see(&head.headers);
                Response::from_parts(head, Body::Stream(Streamed { body, shape, ended, deadline, over: false }))
            }
            Err(status) => {
                ended.code = status.code();
                refused(&status)
            }
        }
    }

    async fn answer(&self, request: Request<Incoming>, shape: Shape) -> Result<Response<tonic::body::Body>, Status> {
        match request.uri().path() {
            range_stream::PATH => return range_stream::serve(Arc::clone(&self.context), request).await,
            watch::PATH => return self.watch.serve(request),
            _ => {}
        }
        let max = self.context.max_message_bytes();
        let mut routes = Routes::clone(&self.routes);
        match routes.call(request.map(|body| tonic::body::Body::new(Measured::new(body, max, shape)))).await {
            Ok(response) => Ok(response),
            Err(never) => match never {},
        }
    }
}

/// Every service but what is served beside them.
fn routes(context: &Arc<Context>, shutdown: &CancellationToken) -> Routes {
    let (inbox, limits, monitor) = (&context.inbox, &context.limits, &context.monitor);
    let config = LeaseConfig::new(limits.heartbeat_interval_ms, limits.election_timeout_ms);
    let recipe = Recipe::new(inbox.clone(), limits.max_txn_ops, config.min_ttl_s, shutdown.clone());
    let election = election::ElectionService::new(recipe.clone(), monitor.clone());
    let lease = LeaseService::new(inbox.clone(), monitor.clone(), config, shutdown.clone());
    let maintenance = maintenance::MaintenanceService(Arc::clone(context));
    let max = context.max_message_bytes();
    Routes::new(KvServer::new(kv::KvService(Arc::clone(context))).max_decoding_message_size(max))
        .add_service(LeaseServer::new(lease).max_decoding_message_size(max))
        .add_service(ClusterServer::new(cluster::ClusterService(Arc::clone(context))).max_decoding_message_size(max))
        .add_service(MaintenanceServer::new(maintenance).max_decoding_message_size(max))
        .add_service(LockServer::new(lock::LockService::new(recipe)).max_decoding_message_size(max))
        .add_service(ElectionServer::new(election).max_decoding_message_size(max))
        .add_service(HealthServer::new(health::HealthService).max_decoding_message_size(max))
        .prepare()
}

impl hyper::service::Service<Request<Incoming>> for Rpc {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>>>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let rpc = self.clone();
        Box::pin(async move { Ok(rpc.dispatch(request).await) })
    }
}

/// The header of an answer at `revision`.
pub(crate) fn header(inbox: &Inbox, revision: i64) -> ResponseHeader {
    let identity = inbox.identity();
    ResponseHeader {
        cluster_id: identity.cluster_id.0,
        member_id: identity.member_id.0,
        revision,
        raft_term: inbox.raft().term,
    }
}

/// Fills what the store leaves open in a header: everything but the revision.
pub(crate) fn complete(inbox: &Inbox, slot: &mut Option<ResponseHeader>) {
    *slot = Some(header(inbox, slot.as_ref().map_or(0, |h| h.revision)));
}

/// The store answered a question that was not asked.
pub(crate) fn unexpected() -> Status {
    tracing::error!("the store's outcome does not fit the request");
    Status::internal("keelson: the outcome does not fit the request")
}

fn is_grpc(request: &Request<Incoming>) -> bool {
    request.version() == http::Version::HTTP_2
        && request
            .headers()
            .get(http::header::CONTENT_TYPE)
            .is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"))
}

/// What a later issue brings.
pub(crate) fn later<T>(what: &str) -> Result<tonic::Response<T>, Status> {
    Err(Status::unimplemented(format!("keelson: {what} is not supported yet")))
}

/// tonic's own answer to a path that nobody registered has no text; one of ours has.
fn is_unheard_of(response: &Response<tonic::body::Body>) -> bool {
    let field = |name| response.headers().get(name).map(http::HeaderValue::as_bytes);
    field("grpc-status") == Some(b"12") && field("grpc-message").is_none_or(<[u8]>::is_empty)
}

/// What gRPC says of such a path.
fn unheard_of(path: &str) -> String {
    let Some((service, method)) = path.strip_prefix('/').unwrap_or(path).rsplit_once('/') else {
        return format!("malformed method name: {path:?}");
    };
    if SERVICES.contains(&service) {
        format!("unknown method {method} for service {service}")
    } else {
        format!("unknown service {service}")
    }
}

/// Says in gRPC's words what tonic says in its own.
fn mend(fields: &mut HeaderMap, shape: Shape) {
    if fields.get("grpc-status").is_some_and(|code| code.as_bytes() == b"13")
        && let Some(status) = Status::from_header_map(fields)
        && framing::mended(status, shape).add_header(fields).is_err()
    {
        tracing::error!("a status can't be sent");
    }
}

/// Counts how a routed RPC began and ended, at the latest when its body is dropped.
pub struct Ended {
    metrics: Arc<Metrics>,
    path: String,
    state: Counted,
    /// A stream that is dropped before it has a status was cancelled by its client.
    code: Code,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Counted {
    Nothing,
    Start,
    /// There is no such RPC.
    Never,
}

impl Ended {
    fn new(metrics: &Arc<Metrics>, path: &str) -> Ended {
        Ended { metrics: Arc::clone(metrics), path: path.to_owned(), state: Counted::Nothing, code: Code::Cancelled }
    }

    fn started(&mut self) {
        if self.state == Counted::Nothing {
            self.state = Counted::Start;
            self.metrics.routed_started(&self.path);
        }
    }

    fn forget(&mut self) {
        self.state = Counted::Never;
    }

    /// Notes a status in headers or trailers.
    fn see(&mut self, fields: &HeaderMap) {
        if let Some(status) = fields.get("grpc-status") {
            self.code = Code::from_bytes(status.as_bytes());
        }
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        if self.state != Counted::Never {
            self.started();
            self.metrics.routed_handled(&self.path, self.code as usize);
        }
    }
}

/// A response that is nothing but a status.
fn refused(status: &Status) -> Response<Body> {
    let mut response = Response::new(Body::Unary { message: None, trailers: None });
    *response.status_mut() = StatusCode::OK;
    response.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static("application/grpc"));
    if status.add_header(response.headers_mut()).is_err() {
        tracing::error!(%status, "a status can't be sent");
    }
    response
}

/// A response's body: one message with its trailers, a page, or whatever the routes made.
pub enum Body {
    Unary { message: Option<Bytes>, trailers: Option<HeaderMap> },
    Full(Bytes),
    Stream(Streamed),
}

/// The body of a routed RPC, which the client's deadline may end.
pub struct Streamed {
    body: tonic::body::Body,
    shape: Shape,
    ended: Ended,
    deadline: Option<Pin<Box<Sleep>>>,
    over: bool,
}

impl Streamed {
    fn poll_frame(&mut self, cx: &mut std::task::Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.over {
            return Poll::Ready(None);
        }
        let Poll::Ready(mut frame) = Pin::new(&mut self.body).poll_frame(cx) else {
            let Some(deadline) = &mut self.deadline else { return Poll::Pending };
            ready!(deadline.as_mut().poll(cx));
            self.over = true;
            self.ended.code = Code::DeadlineExceeded;
            let trailers = framing::trailers(&intercept::deadline_exceeded());
            return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
        };
        if let Some(Ok(frame)) = &mut frame
            && let Some(trailers) = frame.trailers_mut()
        {
            mend(trailers, self.shape);
            self.ended.see(trailers);
        }
        Poll::Ready(frame)
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut std::task::Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        match self.get_mut() {
            Body::Unary { message, trailers } => {
                Poll::Ready(message.take().map(Frame::data).or_else(|| trailers.take().map(Frame::trailers)).map(Ok))
            }
            Body::Full(page) if page.is_empty() => Poll::Ready(None),
            Body::Full(page) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(page))))),
            Body::Stream(streamed) => streamed.poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Body::Unary { message, trailers } => message.is_none() && trailers.is_none(),
            Body::Full(page) => page.is_empty(),
            Body::Stream(streamed) => streamed.over || streamed.body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> http_body::SizeHint {
        match self {
            // Trailers follow: a length would end the body with the data.
            Body::Unary { .. } => http_body::SizeHint::default(),
            Body::Full(page) => http_body::SizeHint::with_exact(page.len() as u64),
            Body::Stream(streamed) if streamed.deadline.is_none() => streamed.body.size_hint(),
            // The deadline may come in between.
            Body::Stream(_) => http_body::SizeHint::default(),
        }
    }
}

/// Runs what a connection spawns on the connection's own runtime.
#[derive(Clone, Copy)]
struct LocalExec;

impl<F> hyper::rt::Executor<F> for LocalExec
where
    F: Future + 'static,
    F::Output: 'static,
{
    fn execute(&self, future: F) {
        tokio::task::spawn_local(future);
    }
}
