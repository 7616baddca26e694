//! The plain HTTP pages: `/health`, `/livez`, `/readyz`, `/version`, `/metrics` (contract 3.1, 3.2).
//!
//! The client port serves all of them beside gRPC; the metrics port all but `/version`. Answers are etcd's to the byte,
//! so that probes and scripts can't tell the difference.

use std::convert::Infallible;
use std::fmt::Write;

use bytes::Bytes;
use http::header::{ALLOW, CONTENT_TYPE, HeaderName, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use keelson_proto::etcdserverpb::{AlarmType, RangeRequest};
use kvstore_core::Error;
use kvstore_core::mvcc::{self, ReadError};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use crate::ETCD_VERSION;
use crate::inbox::Inbox;
use crate::metrics::{self, Metrics};
use crate::rpc::Context;

/// How long a probe's linearizable read may take before it counts as failed.
const CHECK_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(5);

/// A page of the client port.
pub(crate) async fn client<B>(context: &Context, request: &Request<B>) -> Response<Bytes> {
    match request.uri().path() {
        "/version" => version(&context.inbox, request.method()),
        _ => metrics_page(&context.inbox, &context.metrics, request).await,
    }
}

/// Serves the metrics port's connections.
pub(crate) async fn serve_metrics_connection(
    stream: TcpStream,
    inbox: Inbox,
    metrics: std::sync::Arc<Metrics>,
    shutdown: CancellationToken,
) {
    let service = hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
        let (inbox, metrics) = (inbox.clone(), std::sync::Arc::clone(&metrics));
        async move {
            let response = metrics_page(&inbox, &metrics, &request).await;
            Ok::<_, Infallible>(response.map(http_body_util::Full::new))
        }
    });
    let io = hyper_util::rt::TokioIo::new(stream);
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(hyper_util::rt::TokioTimer::new())
        .serve_connection(io, service);
    tokio::pin!(connection);
    tokio::select! {
        result = connection.as_mut() => if let Err(error) = result {
            tracing::debug!(%error, "metrics connection ended");
        },
        () = shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            let _ = connection.await;
        }
    }
}

/// A page that both ports have.
async fn metrics_page<B>(inbox: &Inbox, counts: &Metrics, request: &Request<B>) -> Response<Bytes> {
    let path = request.uri().path();
    let query = Query::of(request);
    match path {
        "/metrics" => get_only(request.method(), || {
            page(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", metrics::render(counts, inbox))
        }),
        "/health" if request.method() != Method::GET => not_allowed(),
        "/health" => health(inbox, counts, &query).await,
        _ => match probe(path) {
            Some(_) if request.method() != Method::GET => not_allowed(),
            Some((checks, prefix)) => checked(inbox, checks, path, prefix, &query).await,
            None => page(StatusCode::NOT_FOUND, "text/plain; charset=utf-8", "404 page not found\n"),
        },
    }
}

fn version(inbox: &Inbox, method: &Method) -> Response<Bytes> {
    get_only(method, || {
        let published = inbox.published();
        let cluster = published.facts.cluster_version.as_deref().unwrap_or("not_decided");
        let storage = crate::rpc::maintenance::STORAGE_VERSION;
        let keelson = env!("CARGO_PKG_VERSION");
        let json = format!(
            r#"{{"etcdserver":"{ETCD_VERSION}","etcdcluster":"{cluster}","storage":"{storage}","keelson":"{keelson}"}}"#
        );
        page(StatusCode::OK, "application/json", json)
    })
}

/// `/health`: alarms, then the leader, then a read, in etcd's words.
async fn health(inbox: &Inbox, counts: &Metrics, query: &Query) -> Response<Bytes> {
    let serializable = query.has("serializable", "true");
    let reason = match alarm_reason(inbox, query) {
        Some(reason) => Some(reason),
        None if !serializable && inbox.raft().leader.is_none() => Some("RAFT NO LEADER".to_owned()),
        None => read_one(inbox, serializable).await.err().map(|e| format!("RANGE ERROR:{e}")),
    };
    match reason {
        None => {
            counts.health_success.add(1);
            page(StatusCode::OK, "application/json", r#"{"health":"true","reason":""}"#)
        }
        Some(reason) => {
            counts.health_failure.add(1);
            tracing::warn!(reason, "serving /health false");
            let json = format!("{{\"health\":\"false\",\"reason\":\"{reason}\"}}\n");
            page(StatusCode::SERVICE_UNAVAILABLE, "text/plain; charset=utf-8", json)
        }
    }
}

fn alarm_reason(inbox: &Inbox, query: &Query) -> Option<String> {
    let published = inbox.published();
    published.facts.alarms.iter().find_map(|alarm| {
        let name = AlarmType::try_from(alarm.alarm).map_or("UNKNOWN", |kind| kind.as_str_name());
        (!query.has("exclude", name)).then(|| format!("ALARM {name}"))
    })
}

/// A read of one key, as a client would do it.
async fn read_one(inbox: &Inbox, serializable: bool) -> Result<(), ReadError> {
    if !serializable {
        match tokio::time::timeout(CHECK_TIMEOUT, inbox.read_index()).await {
            Ok(result) => result?,
            Err(_) => return Err(Error::Timeout.into()),
        }
    }
    let published = inbox.published();
    let request = RangeRequest { key: "a".into(), limit: 1, keys_only: true, ..Default::default() };
    mvcc::range(published.moment(), &request).map(drop)
}

/// The checks of a Kubernetes-style probe.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Check {
    DataCorruption,
    SerializableRead,
    LinearizableRead,
    NonLearner,
}

impl Check {
    const fn name(self) -> &'static str {
        match self {
            Check::DataCorruption => "data_corruption",
            Check::SerializableRead => "serializable_read",
            Check::LinearizableRead => "linearizable_read",
            Check::NonLearner => "non_learner",
        }
    }

    async fn run(self, inbox: &Inbox) -> Result<(), String> {
        match self {
            Check::DataCorruption => {
                let corrupt = inbox.published().facts.alarms.iter().any(|a| a.alarm == AlarmType::Corrupt as i32);
                if corrupt { Err("alarm activated: CORRUPT".to_owned()) } else { Ok(()) }
            }
            Check::SerializableRead => read_one(inbox, true).await.map_err(|e| e.to_string()),
            Check::LinearizableRead => read_one(inbox, false).await.map_err(|e| e.to_string()),
            // Learners come with membership changes.
            Check::NonLearner => Ok(()),
        }
    }
}

const LIVEZ: &[Check] = &[Check::SerializableRead];
const READYZ: &[Check] = &[Check::DataCorruption, Check::SerializableRead, Check::LinearizableRead, Check::NonLearner];

fn probe(path: &str) -> Option<(&'static [Check], &'static str)> {
    [(LIVEZ, "/livez"), (READYZ, "/readyz")]
        .into_iter()
        .find(|(_, prefix)| path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')))
}

async fn checked(inbox: &Inbox, checks: &[Check], path: &str, prefix: &str, query: &Query) -> Response<Bytes> {
    let one = path[prefix.len()..].trim_start_matches('/');
    let chosen: Vec<Check> = checks
        .iter()
        .copied()
        .filter(|c| (one.is_empty() || c.name() == one) && !(one.is_empty() && query.has("exclude", c.name())))
        .collect();
    if !one.is_empty() && chosen.is_empty() {
        return page(StatusCode::NOT_FOUND, "text/plain; charset=utf-8", "404 page not found\n");
    }
    let (mut lines, mut failed) = (String::new(), false);
    for check in chosen {
        let line = match check.run(inbox).await {
            Ok(()) => format!("[+]{} ok\n", check.name()),
            Err(reason) => {
                failed = true;
                format!("[-]{} failed: {reason}\n", check.name())
            }
        };
        lines.push_str(&line);
    }
    const TEXT: &str = "text/plain; charset=utf-8";
    let mut response = match (failed, query.flag("verbose")) {
        (true, _) => page(StatusCode::SERVICE_UNAVAILABLE, TEXT, lines),
        (false, true) => {
            writeln!(lines, "ok").expect("a string takes any text");
            page(StatusCode::OK, TEXT, lines)
        }
        (false, false) => page(StatusCode::OK, TEXT, "ok\n"),
    };
    response
        .headers_mut()
        .insert(HeaderName::from_static("x-content-type-options"), HeaderValue::from_static("nosniff"));
    response
}

/// The few query parameters that pages know; no value of them needs unescaping.
struct Query {
    pairs: Vec<(String, String)>,
}

impl Query {
    fn of<B>(request: &Request<B>) -> Query {
        let text = request.uri().query().unwrap_or_default();
        let pairs = text
            .split('&')
            .filter(|p| !p.is_empty())
            .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .collect();
        Query { pairs }
    }

    fn has(&self, key: &str, value: &str) -> bool {
        self.pairs.iter().any(|(k, v)| k == key && v == value)
    }

    fn flag(&self, key: &str) -> bool {
        self.pairs.iter().any(|(k, _)| k == key)
    }
}

fn page(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Response<Bytes> {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

fn get_only(method: &Method, make: impl FnOnce() -> Response<Bytes>) -> Response<Bytes> {
    if matches!(*method, Method::GET | Method::HEAD) { make() } else { not_allowed() }
}

fn not_allowed() -> Response<Bytes> {
    let mut response = page(StatusCode::METHOD_NOT_ALLOWED, "text/plain; charset=utf-8", "Method Not Allowed\n");
    response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probes_are_found_by_path() {
        assert_eq!(probe("/livez").unwrap().0, LIVEZ);
        assert_eq!(probe("/readyz/linearizable_read").unwrap().0, READYZ);
        assert!(probe("/readyzz").is_none());
        assert!(probe("/").is_none());
    }

    #[test]
    fn queries_repeat_and_stand_alone() {
        let request = Request::builder().uri("/x?verbose&exclude=a&exclude=b").body(()).unwrap();
        let query = Query::of(&request);
        assert!(query.flag("verbose") && query.has("exclude", "a") && query.has("exclude", "b"));
        assert!(!query.has("exclude", "c"));
    }
}
