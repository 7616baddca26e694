//! The thin handler of the RPCs that carry the load: one frame in, one function, one frame and its trailers out.
//!
//! It does for KV what tonic's generated service does, with a fraction of the work per request; measured in the design's
//! section 4.5. What it does not do: compression, and messages in several frames; the dispatcher sends the first to
//! tonic's routes, and the second are refused here in gRPC's words.

use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Response};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use prost::Message;
use tonic::{Code, Status};

use super::encoded::{self, PREFIX};
use super::{Body, Context, kv, refused};
use crate::metrics::{Metrics, RpcCounts};

/// The methods served here, in the order of [`Metrics::HOT`](crate::metrics::Metrics::HOT).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Method {
    Range,
    Put,
    DeleteRange,
    Txn,
}

impl Method {
    pub(super) fn of(path: &str) -> Option<Method> {
        const METHODS: [Method; Metrics::HOT.len()] = [Method::Range, Method::Put, Method::DeleteRange, Method::Txn];
        Metrics::HOT.iter().position(|hot| *hot == path).map(|place| METHODS[place])
    }
}

pub(super) async fn serve(context: &Context, method: Method, body: Incoming) -> Response<Body> {
    let mut ended = Ended { counts: &context.metrics.hot[method as usize], code: Code::Cancelled };
    ended.counts.started.add(1);
    match answer(context, method, body).await {
        Ok(frame) => {
            ended.code = Code::Ok;
            accepted(frame)
        }
        Err(status) => {
            ended.code = status.code();
            refused(&status)
        }
    }
}

/// Counts how a request ended; one that is dropped on the way was cancelled by its client.
struct Ended<'a> {
    counts: &'a RpcCounts,
    code: Code,
}

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.counts.handled(self.code as usize);
    }
}

async fn answer(context: &Context, method: Method, body: Incoming) -> Result<Bytes, Status> {
    let message = read_message(body, context.max_message_bytes()).await?;
    match method {
        Method::Range => {
            let found = kv::range(context, decode(message)?).await?;
            Ok(encoded::range(&found.header, &found.ranged))
        }
        Method::Put => Ok(encoded::message(&kv::put(context, decode(message)?).await?)),
        Method::DeleteRange => Ok(encoded::message(&kv::delete_range(context, decode(message)?).await?)),
        Method::Txn => Ok(encoded::message(&kv::txn(context, decode(message)?).await?)),
    }
}

fn decode<M: Message + Default>(message: Bytes) -> Result<M, Status> {
    M::decode(message).map_err(|e| Status::internal(format!("grpc: error unmarshalling request: {e}")))
}

/// The one message of a unary request.
async fn read_message(mut body: Incoming, max: usize) -> Result<Bytes, Status> {
    let mut data = Bytes::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|e| Status::cancelled(e.to_string()))?;
        let Ok(part) = frame.into_data() else { continue };
        if data.is_empty() {
            data = part;
        } else {
            let mut joined = BytesMut::with_capacity(data.len() + part.len());
            joined.extend_from_slice(&data);
            joined.extend_from_slice(&part);
            // A request that comes in many parts grows its buffer geometrically from here.
            data = read_rest(&mut body, joined, max).await?;
            break;
        }
        check_length(&data, max)?;
    }
    unframe(data, max)
}

async fn read_rest(body: &mut Incoming, mut joined: BytesMut, max: usize) -> Result<Bytes, Status> {
    check_length(&joined, max)?;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|e| Status::cancelled(e.to_string()))?;
        if let Ok(part) = frame.into_data() {
            joined.extend_from_slice(&part);
            check_length(&joined, max)?;
        }
    }
    Ok(joined.freeze())
}

/// Refuses a message by what its prefix announces, before the rest of it is waited for.
fn check_length(data: &[u8], max: usize) -> Result<(), Status> {
    let Some(prefix) = data.get(..PREFIX) else { return Ok(()) };
    let len = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]) as usize;
    if len > max || data.len() > PREFIX + max {
        return Err(Status::resource_exhausted(format!("grpc: received message larger than max ({len} vs. {max})")));
    }
    Ok(())
}

fn unframe(mut data: Bytes, max: usize) -> Result<Bytes, Status> {
    check_length(&data, max)?;
    if data.len() < PREFIX {
        return Err(Status::internal("grpc: the request holds no message"));
    }
    let compressed = data[0] != 0;
    let len = u32::from_be_bytes([data[1], data[2], data[3], data[4]]) as usize;
    data.advance(PREFIX);
    if compressed {
        return Err(Status::internal("grpc: compressed flag set with identity or empty encoding"));
    }
    if data.len() != len {
        return Err(Status::internal("grpc: a unary request holds exactly one message"));
    }
    Ok(data)
}

fn accepted(frame: Bytes) -> Response<Body> {
    let mut trailers = HeaderMap::with_capacity(1);
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    let mut response = Response::new(Body::Unary { message: Some(frame), trailers: Some(trailers) });
    response.headers_mut().insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framed(flag: u8, len: u32, message: &[u8]) -> Bytes {
        [&[flag][..], &len.to_be_bytes(), message].concat().into()
    }

    #[test]
    fn one_message_is_unframed() {
        assert_eq!(unframe(framed(0, 3, b"abc"), 10).unwrap(), "abc");
        assert_eq!(unframe(framed(0, 0, b""), 10).unwrap(), "");
    }

    #[test]
    fn anything_else_is_refused_in_grpcs_words() {
        let text = |data| unframe(data, 10).unwrap_err().message().to_owned();
        assert_eq!(text(framed(0, 11, b"abc")), "grpc: received message larger than max (11 vs. 10)");
        assert!(text(framed(0, 4, b"abc")).contains("exactly one message"));
        assert!(text(framed(0, 2, b"abc")).contains("exactly one message"));
        assert!(text(framed(1, 3, b"abc")).contains("compressed flag set"));
        assert!(text(Bytes::from_static(b"abc")).contains("no message"));
    }

    #[test]
    fn only_the_hot_methods_are_served_here() {
        assert_eq!(Method::of("/etcdserverpb.KV/Put"), Some(Method::Put));
        assert_eq!(Method::of("/etcdserverpb.KV/Compact"), None);
        assert_eq!(Method::of("/etcdserverpb.Lease/Put"), None);
    }
}
