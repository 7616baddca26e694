//! Messages in gRPC's frames as they come in, and what gRPC says of those that may not come in.
//!
//! [`Measured`] stands between a request's body and whoever decodes it, the thin handler and tonic alike: it looks at each
//! frame's prefix as soon as it is there, and refuses by what that announces, before the rest is waited for. The texts and
//! codes are grpc-go's, held against etcd (contract 2.4); so is what it overlooks: whatever follows the one message of
//! a unary request.
//!
//! What it does not do: decompress. A client that compresses is told that no decompressor is installed.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Body, Frame};
use http_body_util::BodyExt;
use prost::{DecodeError, Message};
use tonic::Status;

use super::encoded::PREFIX;

/// How many messages a request holds, and how grpc-go reads them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Shape {
    /// One, and one answer.
    Unary,
    /// One, and a stream of answers.
    ServerStream,
    /// Any number.
    ClientStream,
}

impl Shape {
    pub(super) fn of(path: &str) -> Shape {
        match path {
            "/etcdserverpb.Watch/Watch" | "/etcdserverpb.Lease/LeaseKeepAlive" => Shape::ClientStream,
            "/etcdserverpb.KV/RangeStream"
            | "/etcdserverpb.Maintenance/Snapshot"
            | "/v3electionpb.Election/Observe"
            | "/grpc.health.v1.Health/Watch" => Shape::ServerStream,
            _ => Shape::Unary,
        }
    }

    /// What is said of a message that does not decode. `detail` is the decoder's own text.
    fn malformed(self, detail: &str) -> Status {
        // prost tells more than Go does; a client of etcd's sees one of two texts.
        let what = if detail.contains("UTF-8") {
            "string field contains invalid UTF-8"
        } else {
            "proto: cannot parse invalid wire-format data"
        };
        Status::internal(match self {
            Shape::Unary => format!("grpc: error unmarshalling request: {what}"),
            _ => format!("grpc: failed to unmarshal the received message: {what}"),
        })
    }

    fn no_message(self) -> Status {
        match self {
            Shape::Unary => Status::unknown("EOF"),
            _ => Status::internal("cardinality violation: received no request message from non-client-streaming RPC"),
        }
    }

    fn cut_off(self) -> Status {
        match self {
            Shape::Unary => Status::unknown("unexpected EOF"),
            _ => Status::internal("unexpected EOF"),
        }
    }
}

/// Decodes the message of a request of `shape`.
pub(super) fn decode<M: Message + Default>(message: impl Buf, shape: Shape) -> Result<M, Status> {
    M::decode(message).map_err(|error: DecodeError| shape.malformed(&error.to_string()))
}

/// What becomes of a status that tonic made of a message that does not decode.
pub(super) fn mended(status: Status, shape: Shape) -> Status {
    if status.code() == tonic::Code::Internal && status.message().starts_with("failed to decode Protobuf message") {
        return shape.malformed(status.message());
    }
    status
}

/// The length of the message behind this prefix.
pub(super) fn announced(prefix: &[u8; PREFIX], max: usize) -> Result<usize, Status> {
    let [flag, length @ ..] = *prefix;
    let length = u32::from_be_bytes(length) as usize;
    if length > max {
        let text = format!("grpc: received message larger than max ({length} vs. {max})");
        return Err(Status::resource_exhausted(text));
    }
    match flag {
        0 => Ok(length),
        1 => Err(Status::internal("grpc: compressed flag set with identity or empty encoding")),
        flag => Err(Status::internal(format!("grpc: received unexpected payload format {flag}"))),
    }
}

/// How a stream ended, for behind its messages.
pub(super) fn trailers(status: &Status) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    if status.add_header(&mut trailers).is_err() {
        tracing::error!(%status, "a status can't be sent");
    }
    trailers
}

/// The one message of a request.
pub(super) async fn one_message<B>(body: B, max: usize, shape: Shape) -> Result<Bytes, Status>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let mut body = Measured::new(body, max, shape);
    let mut data = Bytes::new();
    while let Some(frame) = body.frame().await {
        let Ok(part) = frame?.into_data() else { continue };
        if data.is_empty() {
            data = part;
            continue;
        }
        // A message in many parts grows its buffer geometrically from here.
        let mut joined = BytesMut::with_capacity(2 * (data.len() + part.len()));
        joined.extend_from_slice(&data);
        joined.extend_from_slice(&part);
        while let Some(frame) = body.frame().await {
            if let Ok(part) = frame?.into_data() {
                joined.extend_from_slice(&part);
            }
        }
        data = joined.freeze();
        break;
    }
    data.advance(PREFIX);
    Ok(data)
}

/// A request's body whose frames are in order: its data ends with a whole message, unless it ends with an error.
pub(super) struct Measured<B> {
    body: B,
    shape: Shape,
    max: usize,
    /// A part of a prefix, until the rest has come.
    held: Bytes,
    /// Bytes of the current message that are still to come.
    left: usize,
    messages: usize,
    done: bool,
}

impl<B> Measured<B> {
    /// Messages of more than `max` bytes are refused.
    pub(super) fn new(body: B, max: usize, shape: Shape) -> Measured<B> {
        Measured { body, shape, max, held: Bytes::new(), left: 0, messages: 0, done: false }
    }

    /// What of `data` may go on.
    fn measure(&mut self, mut data: Bytes) -> Result<Bytes, Status> {
        if !self.held.is_empty() {
            data = [std::mem::take(&mut self.held), data].concat().into();
        }
        let mut at = 0;
        loop {
            let part = self.left.min(data.len() - at);
            at += part;
            self.left -= part;
            if part > 0 && self.left == 0 && self.finish_message() || at == data.len() {
                data.truncate(at);
                return Ok(data);
            }
            let Some(prefix) = data[at..].first_chunk::<PREFIX>() else {
                self.held = data.split_off(at);
                return Ok(data);
            };
            self.left = self.announced(prefix)?;
            at += PREFIX;
            if self.left == 0 && self.finish_message() {
                data.truncate(at);
                return Ok(data);
            }
        }
    }

    /// Whether what follows this message is nobody's concern.
    fn finish_message(&mut self) -> bool {
        self.messages += 1;
        self.done = self.shape == Shape::Unary;
        self.done
    }

    fn announced(&self, prefix: &[u8; PREFIX]) -> Result<usize, Status> {
        if self.shape == Shape::ServerStream && self.messages > 0 {
            let text = "cardinality violation: received multiple request messages for non-client-streaming RPC";
            return Err(Status::internal(text));
        }
        announced(prefix, self.max)
    }

    fn end(&self) -> Option<Status> {
        if self.left > 0 {
            Some(self.shape.cut_off())
        } else if self.messages == 0 && self.shape != Shape::ClientStream {
            Some(self.shape.no_message())
        } else {
            None
        }
    }
}

impl<B> Body for Measured<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        while !self.done {
            let frame = match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(Ok(frame)) => frame,
                Some(Err(error)) => {
                    self.done = true;
                    return Poll::Ready(Some(Err(Status::from_error(error.into()))));
                }
                None => {
                    self.done = true;
                    return Poll::Ready(self.end().map(Err));
                }
            };
            let Ok(data) = frame.into_data() else { continue };
            match self.measure(data) {
                Ok(data) if data.is_empty() => {}
                Ok(data) => return Poll::Ready(Some(Ok(Frame::data(data)))),
                Err(status) => {
                    self.done = true;
                    return Poll::Ready(Some(Err(status)));
                }
            }
        }
        Poll::Ready(None)
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use futures_util::stream;
    use http_body_util::StreamBody;
    use keelson_proto::etcdserverpb::{MemberAddRequest, PutRequest};
    use tonic::Code;

    use super::*;

    fn framed(flag: u8, len: u32, message: &[u8]) -> Vec<u8> {
        [&[flag][..], &len.to_be_bytes(), message].concat()
    }

    fn message(text: &str) -> Vec<u8> {
        framed(0, text.len() as u32, text.as_bytes())
    }

    /// What comes out of `data`, in pieces of `piece` bytes, at most 10 bytes a message.
    fn passed(data: &[u8], piece: usize, shape: Shape) -> Result<Vec<u8>, (Code, String)> {
        let pieces: Vec<_> = data
            .chunks(piece.max(1))
            .map(|part| Ok::<_, Infallible>(Frame::data(Bytes::copy_from_slice(part))))
            .collect();
        let body = Measured::new(StreamBody::new(stream::iter(pieces)), 10, shape);
        let whole = futures_util::FutureExt::now_or_never(body.collect()).expect("nothing to wait for");
        whole.map(|whole| whole.to_bytes().to_vec()).map_err(|s| (s.code(), s.message().to_owned()))
    }

    fn refused(data: &[u8], shape: Shape, code: Code, text: &str) {
        for piece in 1..=data.len().max(1) {
            assert_eq!(passed(data, piece, shape), Err((code, text.to_owned())), "{shape:?} in pieces of {piece}");
        }
    }

    const SHAPES: [Shape; 3] = [Shape::Unary, Shape::ServerStream, Shape::ClientStream];

    #[test]
    fn whole_messages_pass_however_they_are_cut() {
        for shape in SHAPES {
            for whole in [message("abc"), message("")] {
                for piece in 1..=whole.len() {
                    assert_eq!(passed(&whole, piece, shape), Ok(whole.clone()));
                }
            }
        }
        let two = [message("abc"), message("de")].concat();
        for piece in 1..=two.len() {
            assert_eq!(passed(&two, piece, Shape::ClientStream), Ok(two.clone()));
            assert_eq!(passed(&two, piece, Shape::Unary), Ok(message("abc")), "the rest is nobody's concern");
        }
    }

    #[test]
    fn what_is_too_large_is_refused_by_its_prefix() {
        for shape in SHAPES {
            let text = "grpc: received message larger than max (11 vs. 10)";
            refused(&framed(0, 11, b""), shape, Code::ResourceExhausted, text);
            refused(&framed(2, 11, b"abc"), shape, Code::ResourceExhausted, text);
        }
    }

    #[test]
    fn flags_and_ends_are_refused_in_grpcs_words() {
        for shape in SHAPES {
            let compressed = "grpc: compressed flag set with identity or empty encoding";
            refused(&framed(1, 3, b"abc"), shape, Code::Internal, compressed);
            refused(&framed(2, 3, b"abc"), shape, Code::Internal, "grpc: received unexpected payload format 2");
            let code = if shape == Shape::Unary { Code::Unknown } else { Code::Internal };
            refused(&framed(0, 4, b"abc"), shape, code, "unexpected EOF");
        }
        for nothing in [&b""[..], b"abc"] {
            refused(nothing, Shape::Unary, Code::Unknown, "EOF");
            let none = "cardinality violation: received no request message from non-client-streaming RPC";
            refused(nothing, Shape::ServerStream, Code::Internal, none);
            assert_eq!(passed(nothing, 1, Shape::ClientStream), Ok(Vec::new()));
        }
        let two = [message("abc"), message("de")].concat();
        let many = "cardinality violation: received multiple request messages for non-client-streaming RPC";
        refused(&two, Shape::ServerStream, Code::Internal, many);
    }

    #[test]
    fn what_does_not_decode_is_refused_in_gos_words() {
        let refusal = decode::<PutRequest>(&b"\xff\xff\xff"[..], Shape::Unary).unwrap_err();
        let text = "grpc: error unmarshalling request: proto: cannot parse invalid wire-format data";
        assert_eq!((refusal.code(), refusal.message()), (Code::Internal, text));
        let refusal = decode::<MemberAddRequest>(&b"\x0a\x02\xff\xfe"[..], Shape::ClientStream).unwrap_err();
        let text = "grpc: failed to unmarshal the received message: string field contains invalid UTF-8";
        assert_eq!((refusal.code(), refusal.message()), (Code::Internal, text));
        // tonic words it by the same decoder.
        let error = MemberAddRequest::decode(&b"\x0a\x02\xff\xfe"[..]).unwrap_err();
        let text = "grpc: error unmarshalling request: string field contains invalid UTF-8";
        assert_eq!(mended(Status::internal(error.to_string()), Shape::Unary).message(), text);
        assert_eq!(mended(Status::internal("other"), Shape::Unary).message(), "other");
    }
}
