//! The thin handler of the RPCs that carry the load: one frame in, one function, one frame and its trailers out.
//!
//! It does for KV what tonic's generated service does, with a fraction of the work per request; measured in the design's
//! section 4.5. What it does not do: look into metadata (`intercept`) or into frames (`framing`).

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response};
use hyper::body::Incoming;
use tonic::{Code, Status};

use super::framing::{Shape, decode, one_message};
use super::intercept::within;
use super::{Body, Context, encoded, kv, refused};
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

/// `timeout`: how long the client waits.
pub(super) async fn serve(
    context: &Context,
    method: Method,
    body: Incoming,
    timeout: Option<Duration>,
) -> Response<Body> {
    let mut ended = Ended { counts: &context.metrics.hot[method as usize], code: Code::Cancelled };
    ended.counts.started.add(1);
    match within(timeout, answer(context, method, body)).await {
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
    const UNARY: Shape = Shape::Unary;
    let message = one_message(body, context.max_message_bytes(), UNARY).await?;
    match method {
        Method::Range => {
            let found = kv::range(context, decode(message, UNARY)?).await?;
            Ok(encoded::range(&found.header, &found.ranged))
        }
        Method::Put => Ok(encoded::message(&kv::put(context, decode(message, UNARY)?).await?)),
        Method::DeleteRange => Ok(encoded::message(&kv::delete_range(context, decode(message, UNARY)?).await?)),
        Method::Txn => Ok(encoded::message(&kv::txn(context, decode(message, UNARY)?).await?)),
    }
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

    #[test]
    fn only_the_hot_methods_are_served_here() {
        assert_eq!(Method::of("/etcdserverpb.KV/Put"), Some(Method::Put));
        assert_eq!(Method::of("/etcdserverpb.KV/Compact"), None);
        assert_eq!(Method::of("/etcdserverpb.Lease/Put"), None);
    }
}
