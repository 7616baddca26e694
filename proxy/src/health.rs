//! Is this proxy well? Answers for load balancers, kubelets and clusters' own checks, and the two HTTP servers that give them.
//!
//! | port | path | answer |
//! |---|---|---|
//! | 10256 | `/healthz` | 503 if a change has waited too long for its sync, or this node is going away |
//! | 10256 | `/livez` | the same without the node |
//! | 10249 | `/metrics` | Prometheus' text |
//! | 10249 | `/proxyMode` | `nftables` |
//! | 10249 | `/healthz` | `ok` |
//!
//! Deadlines and JSON are kube-proxy's. Unlike there, a node without a Node object is eligible: without an API server nobody
//! makes one. Once there was one, its loss counts as it does for kube-proxy.
//!
//! A port that is taken is tried again every few seconds, as kube-proxy does; the proxy itself goes on.
//!
//! What it does not do: the servers of `healthCheckNodePort`, which come later.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use tokio::net::TcpListener;

use crate::metrics::{Check, Metrics};
use crate::storage::decode::Eligibility;

/// A change that is not in the kernel after twice kube-proxy's sync period.
const LATE_AFTER: Duration = Duration::from_secs(60);
const BIND_AGAIN_AFTER: Duration = Duration::from_secs(5);
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// What the sync loop tells and the servers answer from.
#[derive(Debug)]
pub struct Health {
    state: Mutex<State>,
}

#[derive(Clone, Copy, Debug)]
struct State {
    last_synced: SystemTime,
    /// The oldest change that is not in the kernel.
    waiting_since: Option<SystemTime>,
    eligibility: Option<Eligibility>,
    had_node: bool,
}

impl Health {
    /// Well from the start: nothing waits yet.
    pub fn new(now: SystemTime) -> Health {
        let state = State { last_synced: now, waiting_since: None, eligibility: None, had_node: false };
        Health { state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A change has come.
    pub fn queued(&self, now: SystemTime) {
        self.state().waiting_since.get_or_insert(now);
    }

    /// The kernel has everything.
    pub fn synced(&self, now: SystemTime) {
        let mut state = self.state();
        state.waiting_since = None;
        state.last_synced = now;
    }

    /// What the Node object says; `None` if there is none.
    pub fn node(&self, eligibility: Option<Eligibility>) {
        let mut state = self.state();
        state.eligibility = eligibility;
        state.had_node |= eligibility.is_some();
    }

    fn report(&self, check: Check, now: SystemTime) -> (StatusCode, Report) {
        let state = *self.state();
        let waited = state.waiting_since.and_then(|since| now.duration_since(since).ok()).unwrap_or_default();
        let healthy = waited < LATE_AFTER;
        let eligible = match state.eligibility {
            Some(eligibility) => eligibility == Eligibility::Eligible,
            None => !state.had_node,
        };
        let ok = healthy && (eligible || check == Check::Livez);
        let of_family = FamilyReport { last_updated: rfc3339(state.last_synced), healthy };
        let report = Report {
            // As kube-proxy: "recent" as long as all is well.
            last_updated: rfc3339(if ok { now } else { state.last_synced }),
            current_time: rfc3339(now),
            node_eligible: (check == Check::Healthz).then_some(eligible),
            healthy,
            status: Families { v4: of_family.clone(), v6: of_family },
        };
        (if ok { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, report)
    }
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    last_updated: String,
    current_time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_eligible: Option<bool>,
    healthy: bool,
    status: Families,
}

#[derive(Debug, Serialize)]
struct Families {
    #[serde(rename = "IPv4")]
    v4: FamilyReport,
    #[serde(rename = "IPv6")]
    v6: FamilyReport,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct FamilyReport {
    last_updated: String,
    healthy: bool,
}

/// A moment as Kubernetes writes it, such as `2026-01-31T12:00:00.5Z`.
fn rfc3339(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = civil(days);
    let nanos = since.subsec_nanos();
    let fraction = if nanos == 0 { String::new() } else { format!(".{nanos:09}").trim_end_matches('0').to_owned() };
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}{fraction}Z")
}

/// Year, month and day of a day counted from 1970-01-01.
fn civil(days: u64) -> (u64, u64, u64) {
    // Counted from 0000-03-01, so that a leap day ends a year: 719,468 days earlier.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year_of_era = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day_of_year = day - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day_of_year - (153 * shifted + 2) / 5 + 1)
}

/// Which of the two servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    /// For load balancers and kubelets.
    Health,
    /// For Prometheus and clusters' checks.
    Metrics,
}

/// What the servers answer from.
#[derive(Clone, Debug)]
pub struct Answers {
    pub health: Arc<Health>,
    pub metrics: Arc<Metrics>,
}

impl Answers {
    fn answer(&self, server: Server, method: &Method, path: &str, now: SystemTime) -> Response<Full<Bytes>> {
        if method != Method::GET && method != Method::HEAD {
            return text(StatusCode::METHOD_NOT_ALLOWED, "method not allowed\n");
        }
        match (server, path) {
            (Server::Health, "/healthz") => self.checked(Check::Healthz, now),
            (Server::Health, "/livez") => self.checked(Check::Livez, now),
            (Server::Metrics, "/metrics") => {
                let mut response = text(StatusCode::OK, self.metrics.render());
                let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
                response.headers_mut().insert(CONTENT_TYPE, kind);
                response
            }
            (Server::Metrics, "/proxyMode") => text(StatusCode::OK, "nftables"),
            (Server::Metrics, "/healthz") => text(StatusCode::OK, "ok"),
            _ => text(StatusCode::NOT_FOUND, "404 page not found\n"),
        }
    }

    fn checked(&self, check: Check, now: SystemTime) -> Response<Full<Bytes>> {
        let (status, report) = self.health.report(check, now);
        self.metrics.checked(check, status.as_u16());
        let json = serde_json::to_string(&report).expect("texts and booleans");
        let mut response = text(status, json);
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        response
    }
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert("x-content-type-options", HeaderValue::from_static("nosniff"));
    response
}

/// Serves for ever.
pub async fn serve(server: Server, address: SocketAddr, answers: Answers) {
    let listener = bind(server, address).await;
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, most likely: give others the time to close some.
                tracing::warn!(?server, %error, "cannot accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let answers = answers.clone();
        tokio::spawn(async move {
            let service = service_fn(|request: Request<hyper::body::Incoming>| {
                let response = answers.answer(server, request.method(), request.uri().path(), SystemTime::now());
                async { Ok::<_, Infallible>(response) }
            });
            let mut http = http1::Builder::new();
            http.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
            // A client that hangs up is no concern of ours.
            let _ = http.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

async fn bind(server: Server, address: SocketAddr) -> TcpListener {
    let mut told = false;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return listener,
            Err(error) => {
                if !std::mem::replace(&mut told, true) {
                    tracing::error!(?server, %address, %error, "cannot listen; trying again");
                }
                tokio::time::sleep(BIND_AGAIN_AFTER).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn answers() -> Answers {
        Answers { health: Arc::new(Health::new(at(1000))), metrics: Arc::new(Metrics::default()) }
    }

    fn get(answers: &Answers, server: Server, path: &str, now: u64) -> (u16, String) {
        let response = answers.answer(server, &Method::GET, path, at(now));
        let status = response.status().as_u16();
        let body = futures_util::FutureExt::now_or_never(response.into_body().collect()).unwrap().unwrap();
        (status, String::from_utf8(body.to_bytes().to_vec()).unwrap())
    }

    #[test]
    fn times_are_written_as_kubernetes_writes_them() {
        assert_eq!(rfc3339(UNIX_EPOCH), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(at(951_782_400)), "2000-02-29T00:00:00Z");
        assert_eq!(rfc3339(at(1_798_761_599) + Duration::from_millis(50)), "2026-12-31T23:59:59.05Z");
    }

    #[test]
    fn a_change_that_waits_a_minute_is_unhealthy_until_it_is_synced() {
        let answers = answers();
        let (status, body) = get(&answers, Server::Health, "/healthz", 1001);
        assert_eq!(status, 200);
        assert_eq!(
            body,
            r#"{"lastUpdated":"1970-01-01T00:16:41Z","currentTime":"1970-01-01T00:16:41Z","nodeEligible":true,"healthy":true,"status":{"IPv4":{"lastUpdated":"1970-01-01T00:16:40Z","healthy":true},"IPv6":{"lastUpdated":"1970-01-01T00:16:40Z","healthy":true}}}"#
        );
        answers.health.queued(at(1010));
        answers.health.queued(at(1060));
        assert_eq!(get(&answers, Server::Health, "/healthz", 1069).0, 200);
        assert_eq!(get(&answers, Server::Health, "/healthz", 1070).0, 503, "the oldest change counts");
        assert_eq!(get(&answers, Server::Health, "/livez", 1070).0, 503);
        answers.health.synced(at(1071));
        assert_eq!(get(&answers, Server::Health, "/livez", 1071).0, 200);
    }

    #[test]
    fn a_node_that_leaves_is_unhealthy_but_alive() {
        let answers = answers();
        answers.health.node(Some(Eligibility::GoingAway));
        let (status, body) = get(&answers, Server::Health, "/healthz", 1001);
        assert_eq!(status, 503);
        assert!(body.contains(r#""nodeEligible":false,"healthy":true"#), "{body}");
        assert_eq!(get(&answers, Server::Health, "/livez", 1001).0, 200);
        answers.health.node(Some(Eligibility::Eligible));
        assert_eq!(get(&answers, Server::Health, "/healthz", 1001).0, 200);
        answers.health.node(None);
        assert_eq!(get(&answers, Server::Health, "/healthz", 1001).0, 503, "its Node was deleted");
    }

    #[test]
    fn the_paths_are_kube_proxys() {
        let answers = answers();
        assert_eq!(get(&answers, Server::Metrics, "/proxyMode", 1), (200, "nftables".into()));
        assert_eq!(get(&answers, Server::Metrics, "/healthz", 1), (200, "ok".into()));
        assert!(
            get(&answers, Server::Metrics, "/metrics", 1).1.contains("kubeproxy_sync_proxy_rules_duration_seconds")
        );
        assert_eq!(get(&answers, Server::Metrics, "/livez", 1).0, 404);
        assert_eq!(get(&answers, Server::Health, "/metrics", 1).0, 404);
        let posted = answers.answer(Server::Health, &Method::POST, "/healthz", at(1));
        assert_eq!(posted.status(), StatusCode::METHOD_NOT_ALLOWED);
    }
}
