//! gRPC as bytes: requests that no client library would send, and what is answered to the letter.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tonic::{Code, Status};

use crate::Member;

/// How long an answer may take.
const LIMIT: Duration = Duration::from_secs(20);

/// Where to ask. Each call has a connection of its own, and nothing between it and the bytes.
#[derive(Clone, Debug)]
pub struct Raw {
    port: u16,
}

/// What came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub code: Code,
    pub message: String,
    /// The frames before the status.
    pub data: Bytes,
}

impl Raw {
    pub fn new(member: &Member) -> Raw {
        Raw { port: member.client_port }
    }

    /// Sends `body` as it is, and ends the client's side.
    pub async fn call(&self, path: &str, body: Vec<u8>, metadata: &[(&'static str, &[u8])]) -> Answer {
        let uri = format!("http://127.0.0.1:{}{path}", self.port);
        let mut request = http::Request::post(uri).header("content-type", "application/grpc").header("te", "trailers");
        for (name, value) in metadata {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(Bytes::from(body))).expect("a request");
        tokio::time::timeout(LIMIT, self.answer(request)).await.unwrap_or_else(|_| panic!("{path}: no answer"))
    }

    async fn answer(&self, request: http::Request<Full<Bytes>>) -> Answer {
        let stream = TcpStream::connect(("127.0.0.1", self.port)).await.expect("a connection");
        let handshake = http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
        let (mut sender, connection) = handshake.await.expect("HTTP/2");
        // Ends when the sender is dropped.
        tokio::spawn(connection);
        let failed = |status: Status| {
            let message = status.message().to_owned();
            Answer { code: status.code(), message, data: Bytes::new() }
        };
        let response = match sender.send_request(request).await {
            Ok(response) => response,
            Err(error) => return failed(Status::from_error(Box::new(error))),
        };
        let (head, body) = response.into_parts();
        let body = match body.collect().await {
            Ok(body) => body,
            Err(error) => return failed(Status::from_error(Box::new(error))),
        };
        let status = body.trailers().and_then(Status::from_header_map).or(Status::from_header_map(&head.headers));
        Answer { data: body.to_bytes(), ..failed(status.expect("a status")) }
    }
}

/// A message in gRPC's frame.
pub fn frame(message: &[u8]) -> Vec<u8> {
    announced(0, message.len(), message)
}

/// A frame whose prefix says what it likes.
pub fn announced(flag: u8, length: usize, message: &[u8]) -> Vec<u8> {
    [&[flag][..], &u32::try_from(length).expect("gRPC's lengths").to_be_bytes(), message].concat()
}
