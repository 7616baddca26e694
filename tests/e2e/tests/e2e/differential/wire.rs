//! A gRPC client that hides nothing: HTTP/2 with the bytes, headers, trailers and resets as they came.
//!
//! What it does not do: it knows no message.

use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use h2::client::SendRequest;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, Request};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// Room for whatever a server sends, so that no step waits for flow control.
const WINDOW_BYTES: u32 = 256 * 1024 * 1024;

/// A connection to one member.
#[derive(Clone)]
pub(super) struct Client {
    authority: String,
    requests: SendRequest<Bytes>,
}

/// One call: its requests go in, what the server does comes out.
pub(super) struct Call {
    requests: Option<SendStream<Bytes>>,
    happened: mpsc::UnboundedReceiver<Happened>,
}

/// What a server does on a call.
#[derive(Clone, Debug)]
pub(super) enum Happened {
    Message { compressed: bool, message: Bytes },
    End(End),
}

/// How a call ended. Header and trailer lines are `name: value`, sorted.
#[derive(Clone, Debug, Default)]
pub(super) struct End {
    pub(super) http_status: u16,
    pub(super) headers: Vec<(String, String)>,
    /// `None`: the headers were the trailers.
    pub(super) trailers: Option<Vec<(String, String)>>,
    /// Not ended but broken off.
    pub(super) broken: Option<String>,
}

impl Client {
    /// Connects to a server on loopback.
    pub(super) async fn connect(port: u16) -> Result<Client, String> {
        let stream = TcpStream::connect(("127.0.0.1", port)).await.map_err(|error| error.to_string())?;
        stream.set_nodelay(true).map_err(|error| error.to_string())?;
        let (requests, connection) = h2::client::Builder::new()
            .initial_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES)
            .handshake(stream)
            .await
            .map_err(|error| error.to_string())?;
        tokio::spawn(connection);
        Ok(Client { authority: format!("127.0.0.1:{port}"), requests })
    }

    /// Opens a call; `path` is `/package.Service/Method`.
    pub(super) async fn open(&self, path: &str, metadata: &[(String, String)]) -> Result<Call, String> {
        let mut request = Request::post(format!("http://{}{path}", self.authority));
        let given = |name: &str| metadata.iter().any(|(own, _)| own == name);
        for (name, value) in [("content-type", "application/grpc"), ("te", "trailers")] {
            if !given(name) {
                request = request.header(name, value);
            }
        }
        for (name, value) in metadata {
            let value: Vec<u8> = match value.strip_prefix("hex ") {
                Some(digits) => (0..digits.len() / 2)
                    .map(|place| u8::from_str_radix(&digits[2 * place..2 * place + 2], 16).unwrap())
                    .collect(),
                None => value.clone().into_bytes(),
            };
            request = request.header(name, http::HeaderValue::from_bytes(&value).map_err(|error| error.to_string())?);
        }
        let request = request.body(()).map_err(|error| error.to_string())?;
        let mut ready = self.requests.clone().ready().await.map_err(|error| error.to_string())?;
        let (response, requests) = ready.send_request(request, false).map_err(|error| error.to_string())?;
        let (sender, happened) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            let mut end = End::default();
            match response.await {
                Ok(response) => {
                    let (head, mut body) = response.into_parts();
                    end.http_status = head.status.as_u16();
                    end.headers = lines(&head.headers);
                    if let Err(error) = read(&mut body, &sender, &mut end).await {
                        end.broken = Some(error);
                    }
                }
                Err(error) => end.broken = Some(broken(&error)),
            }
            let _ = sender.send(Happened::End(end));
        });
        Ok(Call { requests: Some(requests), happened })
    }
}

async fn read(body: &mut RecvStream, sender: &mpsc::UnboundedSender<Happened>, end: &mut End) -> Result<(), String> {
    let mut buffer = BytesMut::new();
    while let Some(data) = body.data().await {
        let data = data.map_err(|error| broken(&error))?;
        let _ = body.flow_control().release_capacity(data.len());
        buffer.extend_from_slice(&data);
        while buffer.len() >= 5 {
            let length = u32::from_be_bytes([buffer[1], buffer[2], buffer[3], buffer[4]]) as usize;
            if buffer.len() < 5 + length {
                break;
            }
            let compressed = buffer[0] != 0;
            buffer.advance(5);
            let _ = sender.send(Happened::Message { compressed, message: buffer.split_to(length).freeze() });
        }
    }
    let trailers = body.trailers().await.map_err(|error| broken(&error))?;
    end.trailers = trailers.as_ref().map(lines);
    if buffer.is_empty() { Ok(()) } else { Err(format!("{} bytes of an unfinished message", buffer.len())) }
}

/// A reset by its reason; what else went wrong as it is said.
fn broken(error: &h2::Error) -> String {
    match error.reason() {
        Some(reason) => format!("reset {reason:?}"),
        None => error.to_string(),
    }
}

fn lines(fields: &HeaderMap) -> Vec<(String, String)> {
    let mut lines: Vec<(String, String)> = fields
        .iter()
        .map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned()))
        .collect();
    lines.sort();
    lines
}

impl Call {
    /// Sends one message.
    pub(super) fn send(&mut self, message: &[u8]) -> Result<(), String> {
        let mut framed = BytesMut::with_capacity(5 + message.len());
        framed.extend_from_slice(&[0]);
        framed.extend_from_slice(&u32::try_from(message.len()).expect("a test's message").to_be_bytes());
        framed.extend_from_slice(message);
        self.send_raw(framed.freeze())
    }

    /// Sends bytes as they are.
    pub(super) fn send_raw(&mut self, bytes: Bytes) -> Result<(), String> {
        let stream = self.requests.as_mut().ok_or("closed")?;
        stream.send_data(bytes, false).map_err(|error| error.to_string())
    }

    /// No more requests. A server that is done already does not mind.
    pub(super) fn close(&mut self) {
        if let Some(mut stream) = self.requests.take() {
            let _ = stream.send_data(Bytes::new(), true);
        }
    }

    /// Breaks the call off.
    pub(super) fn reset(&mut self) {
        if let Some(mut stream) = self.requests.take() {
            stream.send_reset(Reason::CANCEL);
        }
    }

    /// What happens next; `None` if nothing does until `deadline`, or the end was seen already.
    pub(super) async fn next(&mut self, deadline: Instant) -> Option<Happened> {
        tokio::time::timeout_at(deadline, self.happened.recv()).await.ok().flatten()
    }

    /// What has happened already, or happens within `limit`.
    pub(super) async fn within(&mut self, limit: Duration) -> Option<Happened> {
        self.next(Instant::now() + limit).await
    }
}

impl End {
    fn field(&self, name: &str) -> Option<&str> {
        let all = self.trailers.as_ref().unwrap_or(&self.headers);
        all.iter().find(|(own, _)| own == name).map(|(_, value)| value.as_str())
    }

    /// The gRPC status, if one came.
    pub(super) fn status(&self) -> Option<i32> {
        self.field("grpc-status")?.parse().ok()
    }

    /// Its text, decoded.
    pub(super) fn text(&self) -> String {
        decode_percent(self.field("grpc-message").unwrap_or_default()).replace('\u{a0}', " ")
    }
}

/// gRPC sends texts with `%xx` for what is not plain ASCII.
pub(super) fn decode_percent(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut place = 0;
    while place < bytes.len() {
        let digits = (bytes[place] == b'%').then(|| text.get(place + 1..place + 3)).flatten();
        match digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => {
                out.push(byte);
                place += 3;
            }
            None => {
                out.push(bytes[place]);
                place += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}
