//! A small client of an apiserver's JSON API: HTTPS, HTTP/2, one connection for calls and one for watches.
//!
//! The `kube` crate would do as well, with a hundred crates more to compile, and it hides what is at stake here: continue tokens,
//! remaining item counts, resource versions of bookmarks. A call is one request. This file retries nothing: a test that expects
//! trouble says itself what it tries again ([`Refusal::passes`] tells what any client would).

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http2::{self, SendRequest};
use hyper::{Method, Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio_rustls::TlsConnector;

/// The apiserver itself gives up after a minute.
const CALL_LIMIT: Duration = Duration::from_secs(70);
/// Lets a watch of many small events fill while its reader looks at others.
const WINDOW_BYTES: u32 = 4 << 20;

/// A client that belongs to the runtime it is first used on.
#[derive(Debug)]
pub struct Client {
    port: u16,
    token: String,
    tls: Arc<ClientConfig>,
    calls: Line,
    watches: Line,
}

/// A connection that is made when it is needed.
#[derive(Debug, Default)]
struct Line(Mutex<Option<SendRequest<Full<Bytes>>>>);

/// Why a call came to nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// HTTP's, or 0 if there was no answer.
    pub status: u16,
    /// Kubernetes' word, `Conflict` for one.
    pub reason: String,
    pub message: String,
    /// The answer's own continue token: a list that expired offers one that goes on at a newer revision.
    pub token: String,
}

impl Refusal {
    /// Whether it may pass by itself, so that any client tries again: a busy, broken or unreachable server.
    pub fn passes(&self) -> bool {
        matches!(self.status, 0 | 429 | 500 | 502 | 503 | 504)
    }

    fn unanswered(error: &dyn std::fmt::Display) -> Refusal {
        Refusal { status: 0, reason: String::new(), message: error.to_string(), token: String::new() }
    }

    fn from_status(status: u16, object: &Value) -> Refusal {
        Refusal {
            status,
            reason: text(object, "/reason").to_owned(),
            message: text(object, "/message").to_owned(),
            token: text(object, "/metadata/continue").to_owned(),
        }
    }
}

/// A part of a list, or the whole of it.
#[derive(Clone, Debug, Default)]
pub struct Page {
    pub items: Vec<Value>,
    pub version: u64,
    /// For the next part; empty at the end.
    pub token: String,
    pub remaining: u64,
}

type Answer<T> = Result<T, Refusal>;

impl Client {
    /// A client of the apiserver on 127.0.0.1:`port`, whose certificate `certificate` holds or vouches for.
    pub fn new(port: u16, token: &str, certificate: &Path) -> Client {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_file_iter(certificate).expect("the apiserver made itself a certificate")
        {
            roots.add(certificate.expect("PEM")).expect("a certificate");
        }
        let mut tls = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        tls.alpn_protocols = vec![b"h2".to_vec()];
        Client { port, token: token.to_owned(), tls: Arc::new(tls), calls: Line::default(), watches: Line::default() }
    }

    pub async fn get(&self, path: &str) -> Answer<Value> {
        self.call(Method::GET, path, "", Bytes::new()).await
    }

    pub async fn create(&self, collection: &str, object: &Value) -> Answer<Value> {
        self.call(Method::POST, collection, "application/json", object.to_string().into()).await
    }

    /// Writes the whole object, guarded by the resource version it carries.
    pub async fn replace(&self, path: &str, object: &Value) -> Answer<Value> {
        self.call(Method::PUT, path, "application/json", object.to_string().into()).await
    }

    /// A merge patch.
    pub async fn merge(&self, path: &str, patch: &Value) -> Answer<Value> {
        self.call(Method::PATCH, path, "application/merge-patch+json", patch.to_string().into()).await
    }

    /// A server-side apply in the name of `owner`. JSON is YAML too.
    pub async fn apply(&self, path: &str, owner: &str, object: &Value) -> Answer<Value> {
        let path = format!("{path}?fieldManager={owner}");
        self.call(Method::PATCH, &path, "application/apply-patch+yaml", object.to_string().into()).await
    }

    /// Deletes, with `DeleteOptions` (or `null`).
    pub async fn delete(&self, path: &str, options: &Value) -> Answer<Value> {
        let body = if options.is_null() { Bytes::new() } else { options.to_string().into() };
        self.call(Method::DELETE, path, "application/json", body).await
    }

    /// One list request; `query` is what follows the question mark.
    pub async fn list(&self, collection: &str, query: &str) -> Answer<Page> {
        let mut list = self.get(&format!("{collection}?{query}")).await?;
        Ok(Page {
            version: number(&list, "/metadata/resourceVersion"),
            token: text(&list, "/metadata/continue").to_owned(),
            remaining: list.pointer("/metadata/remainingItemCount").and_then(Value::as_u64).unwrap_or(0),
            items: match list.get_mut("items").map(Value::take) {
                Some(Value::Array(items)) => items,
                _ => Vec::new(),
            },
        })
    }

    /// Opens a watch; `query` as in [`Client::list`].
    pub async fn watch(&self, collection: &str, query: &str) -> Answer<Changes> {
        let path = format!("{collection}?watch=true&{query}");
        let response = self.send(&self.watches, self.request(Method::GET, &path, "", Bytes::new())).await?;
        let status = response.status().as_u16();
        if status == 200 {
            return Ok(Changes { body: response.into_body(), buffer: Vec::new(), scanned: 0 });
        }
        Err(Refusal::from_status(status, &parse(&read(response).await?)))
    }

    /// The text of a page that is no object, `/metrics` for one.
    pub async fn text(&self, path: &str) -> Answer<String> {
        let response = self.send(&self.calls, self.request(Method::GET, path, "", Bytes::new())).await?;
        Ok(String::from_utf8_lossy(&read(response).await?).into_owned())
    }

    async fn call(&self, method: Method, path: &str, kind: &str, body: Bytes) -> Answer<Value> {
        let request = self.request(method, path, kind, body);
        let exchange = async {
            let response = self.send(&self.calls, request).await?;
            let status = response.status().as_u16();
            let object = parse(&read(response).await?);
            if (200..300).contains(&status) { Ok(object) } else { Err(Refusal::from_status(status, &object)) }
        };
        tokio::time::timeout(CALL_LIMIT, exchange).await.unwrap_or_else(|elapsed| Err(Refusal::unanswered(&elapsed)))
    }

    fn request(&self, method: Method, path: &str, kind: &str, body: Bytes) -> Request<Full<Bytes>> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("https://127.0.0.1:{}{path}", self.port))
            .header("authorization", format!("Bearer {}", self.token))
            .header("accept", "application/json");
        if !kind.is_empty() {
            request = request.header("content-type", kind);
        }
        request.body(Full::new(body)).expect("a path and headers of ours")
    }

    async fn send(&self, line: &Line, request: Request<Full<Bytes>>) -> Answer<Response<Incoming>> {
        let mut sender = self.sender(line).await?;
        sender.send_request(request).await.map_err(|error| Refusal::unanswered(&error))
    }

    async fn sender(&self, line: &Line) -> Answer<SendRequest<Full<Bytes>>> {
        let mut slot = line.0.lock().await;
        if let Some(sender) = slot.as_ref().filter(|sender| !sender.is_closed()) {
            return Ok(sender.clone());
        }
        let unanswered = |error: &dyn std::fmt::Display| Refusal::unanswered(error);
        let stream = TcpStream::connect(("127.0.0.1", self.port)).await.map_err(|error| unanswered(&error))?;
        stream.set_nodelay(true).map_err(|error| unanswered(&error))?;
        let name = ServerName::try_from("127.0.0.1").expect("an address");
        let connector = TlsConnector::from(Arc::clone(&self.tls));
        let stream = connector.connect(name, stream).await.map_err(|error| unanswered(&error))?;
        let (sender, connection) = http2::Builder::new(TokioExecutor::new())
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(4 * WINDOW_BYTES)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|error| unanswered(&error))?;
        // Its end shows in the sender.
        tokio::spawn(connection);
        *slot = Some(sender.clone());
        Ok(sender)
    }
}

/// What a watch tells: one JSON object a line.
#[derive(Debug)]
pub struct Changes {
    body: Incoming,
    buffer: Vec<u8>,
    /// How much of the buffer has no end of line.
    scanned: usize,
}

/// One event of a watch.
#[derive(Clone, Debug)]
pub struct Change {
    /// `ADDED`, `MODIFIED`, `DELETED`, `BOOKMARK` or `ERROR`.
    pub kind: String,
    pub object: Value,
}

impl Changes {
    /// The next event; `None` when the watch ended, for whatever reason.
    pub async fn next(&mut self) -> Option<Change> {
        loop {
            if let Some(at) = self.buffer[self.scanned..].iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=self.scanned + at).collect();
                self.scanned = 0;
                let mut event = parse(&line);
                let kind = text(&event, "/type").to_owned();
                return Some(Change { kind, object: event["object"].take() });
            }
            self.scanned = self.buffer.len();
            let frame = self.body.frame().await?.ok()?;
            if let Ok(data) = frame.into_data() {
                self.buffer.extend_from_slice(&data);
            }
        }
    }
}

impl Change {
    /// What an `ERROR` says.
    pub fn refusal(&self) -> Refusal {
        let code = self.object.get("code").and_then(Value::as_u64).unwrap_or(0);
        Refusal::from_status(u16::try_from(code).unwrap_or(0), &self.object)
    }
}

/// The string at a JSON pointer, or nothing.
pub fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or("")
}

/// The number in the string at a JSON pointer (resource versions are such), or 0.
pub fn number(object: &Value, pointer: &str) -> u64 {
    text(object, pointer).parse().unwrap_or(0)
}

/// `namespace/name`.
pub fn name(object: &Value) -> String {
    format!("{}/{}", text(object, "/metadata/namespace"), text(object, "/metadata/name"))
}

pub fn version(object: &Value) -> u64 {
    number(object, "/metadata/resourceVersion")
}

async fn read(response: Response<Incoming>) -> Answer<Bytes> {
    let body = response.into_body().collect().await.map_err(|error| Refusal::unanswered(&error))?;
    Ok(body.to_bytes())
}

/// What is no JSON (a proxy's or a panicking handler's words) is a string.
fn parse(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).unwrap_or_else(|_| Value::String(String::from_utf8_lossy(bytes).into_owned()))
}
