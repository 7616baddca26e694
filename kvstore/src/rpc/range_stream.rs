//! RangeStream: a Range in chunks, served beside tonic's routes because its chunks are framed from stored bytes.
//!
//! A chunk is read when HTTP/2 has room for it, from the moment that is the newest by then, so a client that does not read
//! costs one chunk and no view ([`kvstore_core::mvcc::chunks`]). The first one is read before anything is answered: a
//! request that is refused is refused without a body.
//!
//! What it does not do: a Range's form and revision (the core), and its metadata (`intercept`).

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{FutureExt, Stream, stream};
use http::{HeaderValue, Request, Response};
use http_body::Frame;
use http_body_util::StreamBody;
use hyper::body::Incoming;
use keelson_proto::etcdserverpb::RangeRequest;
use kvstore_core::Error;
use kvstore_core::mvcc::chunks::{Chunk, Chunks};
use kvstore_core::mvcc::{ReadError, check};
use tonic::Status;
use tonic::body::Body;

use super::framing::{Shape, decode, one_message, trailers};
use super::leader::LeaderGuard;
use super::status::{read_status, status};
use super::{Context, encoded, header};

/// Where it is served.
pub(super) const PATH: &str = "/etcdserverpb.KV/RangeStream";

/// The answer, or why there is none.
pub(super) async fn serve(context: Arc<Context>, request: Request<Incoming>) -> Result<Response<Body>, Status> {
    let leader = context.monitor.admit(&context.inbox, request.headers()).map_err(|e| status(&e))?;
    let message = one_message(request.into_body(), context.max_message_bytes(), Shape::ServerStream).await?;
    let request: RangeRequest = decode(message, Shape::ServerStream)?;
    check::validate_range_stream(&request).map_err(|e| status(&e))?;
    if !request.serializable {
        context.inbox.read_index().await.map_err(|e| status(&e))?;
    }
    let chunks = Chunks::new(request, context.limits.max_request_bytes);
    let mut sending = Sending { context, leader, chunks: Some(chunks), parts: VecDeque::new() };
    sending.read().await?;
    let mut response = Response::new(Body::new(StreamBody::new(sending.frames())));
    response.headers_mut().insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    Ok(response)
}

/// One stream on its way out.
struct Sending {
    context: Arc<Context>,
    leader: LeaderGuard,
    /// `None` after the last.
    chunks: Option<Chunks>,
    /// Of the present chunk, not yet sent.
    parts: VecDeque<Bytes>,
}

impl Sending {
    /// Reads the next chunk, if there is one.
    async fn read(&mut self) -> Result<(), Status> {
        let Some(mut chunks) = self.chunks.take() else { return Ok(()) };
        if self.leader.lost().now_or_never().is_some() {
            return Err(status(&Error::NoLeader));
        }
        let inbox = self.context.inbox.clone();
        let read = tokio::task::spawn_blocking(move || {
            let chunk = chunks.next(inbox.published().moment());
            (chunks, chunk)
        });
        // The pool's thread panicked or the runtime is going away.
        let (chunks, chunk) = read.await.map_err(|_| read_status(&ReadError::Answer(Error::Stopped)))?;
        let Some(chunk) = chunk.map_err(|e| read_status(&e))? else { return Ok(()) };
        self.chunks = chunk.end.is_none().then_some(chunks);
        self.parts = self.framed(&chunk).into_iter().filter(|part| !part.is_empty()).collect();
        Ok(())
    }

    fn framed(&self, chunk: &Chunk) -> [Bytes; 3] {
        let header = chunk.end.map(|end| header(&self.context.inbox, end.revision));
        encoded::chunk(header.as_ref(), chunk)
    }

    /// The body: chunks, and how it ended in the trailers.
    fn frames(self) -> impl Stream<Item = Result<Frame<Bytes>, Status>> {
        stream::unfold(Some(self), |sending| async move {
            let mut sending = sending?;
            if sending.parts.is_empty()
                && let Err(last) = sending.read().await
            {
                return Some((Ok(Frame::trailers(trailers(&last))), None));
            }
            match sending.parts.pop_front() {
                Some(part) => Some((Ok(Frame::data(part)), Some(sending))),
                None => Some((Ok(Frame::trailers(trailers(&Status::ok("")))), None)),
            }
        })
    }
}
