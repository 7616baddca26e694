//! What every gRPC request passes before its service sees it, unary and stream alike: its metadata (contract 2.4) and its
//! deadline.
//!
//! A deadline ends a request as a client that goes away does: what is being done for it is dropped where it stands, a
//! proposal that was made stays made, and who holds something for the request (a place in a lock's queue) lets go of it.
//!
//! What it does not do: it authenticates nobody (its issue), and it does not end streams whose member loses its leader
//! ([`super::leader`] does).

use std::future::Future;
use std::time::Duration;

use http::HeaderMap;
use kvstore_core::Error;
use tonic::Status;

use super::leader::requires_leader;
use super::status::status;

/// What the metadata asks of the server.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Call {
    /// From now.
    pub(super) timeout: Option<Duration>,
}

/// Admits a request by its metadata, or says why not.
pub(super) fn admit(headers: &HeaderMap, has_leader: impl FnOnce() -> bool) -> Result<Call, Status> {
    let timeout = match headers.get("grpc-timeout") {
        Some(value) => Some(timeout(value.as_bytes())?),
        None => None,
    };
    if let Some(encoding) = headers.get("grpc-encoding").filter(|encoding| encoding.as_bytes() != b"identity") {
        let encoding = String::from_utf8_lossy(encoding.as_bytes());
        let text = format!("grpc: Decompressor is not installed for grpc-encoding \"{encoding}\"");
        return Err(Status::unimplemented(text));
    }
    if headers.get("client-api-version").is_some_and(|version| std::str::from_utf8(version.as_bytes()).is_err()) {
        return Err(status(&Error::InvalidClientApiVersion));
    }
    if requires_leader(headers) && !has_leader() {
        return Err(status(&Error::NoLeader));
    }
    Ok(Call { timeout })
}

/// What `grpc-timeout` says: up to eight digits and a unit.
fn timeout(value: &[u8]) -> Result<Duration, Status> {
    let text = String::from_utf8_lossy(value);
    let malformed = |why: String| Status::internal(format!("malformed grpc-timeout: {why}"));
    let [digits @ .., unit] = value else {
        return Err(malformed(format!("transport: timeout string is too short: {text:?}")));
    };
    if digits.is_empty() {
        return Err(malformed(format!("transport: timeout string is too short: {text:?}")));
    }
    if digits.len() > 8 {
        return Err(malformed(format!("transport: timeout string is too long: {text:?}")));
    }
    let unit = match unit {
        b'H' => Duration::from_secs(3600),
        b'M' => Duration::from_secs(60),
        b'S' => Duration::from_secs(1),
        b'm' => Duration::from_millis(1),
        b'u' => Duration::from_micros(1),
        b'n' => Duration::from_nanos(1),
        _ => return Err(malformed(format!("transport: timeout unit is not recognized: {text:?}"))),
    };
    let count =
        digits.iter().try_fold(0, |sum: u32, digit| digit.is_ascii_digit().then(|| 10 * sum + u32::from(digit - b'0')));
    let count = count.ok_or_else(|| {
        let digits = String::from_utf8_lossy(digits);
        malformed(format!("strconv.ParseUint: parsing {digits:?}: invalid syntax"))
    })?;
    Ok(unit * count)
}

/// Waits for `work`, but no longer than the client does.
pub(super) async fn within<T>(
    timeout: Option<Duration>,
    work: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    match timeout {
        None => work.await,
        Some(timeout) => match tokio::time::timeout(timeout, work).await {
            Ok(result) => result,
            Err(_) => Err(deadline_exceeded()),
        },
    }
}

pub(super) fn deadline_exceeded() -> Status {
    status(&Error::ContextDeadlineExceeded)
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use tonic::Code;

    use super::*;

    fn admitted(name: &'static str, value: &[u8]) -> Result<Option<Duration>, (Code, String)> {
        let mut headers = HeaderMap::new();
        headers.insert(name, HeaderValue::from_bytes(value).unwrap());
        let call = admit(&headers, || false);
        call.map(|call| call.timeout).map_err(|status| (status.code(), status.message().to_owned()))
    }

    #[test]
    fn metadata_is_looked_at_as_etcd_does() {
        assert_eq!(admitted("client-api-version", b"3.7"), Ok(None));
        let version = "etcdserver: invalid client api version".to_owned();
        assert_eq!(admitted("client-api-version", b"3.7\xff"), Err((Code::InvalidArgument, version)));
        assert_eq!(admitted("hasleader", b"false"), Ok(None));
        assert_eq!(admitted("hasleader", b"true"), Err((Code::Unavailable, "etcdserver: no leader".to_owned())));
        assert_eq!(admitted("grpc-encoding", b"identity"), Ok(None));
        let encoding = "grpc: Decompressor is not installed for grpc-encoding \"snappy\"".to_owned();
        assert_eq!(admitted("grpc-encoding", b"snappy"), Err((Code::Unimplemented, encoding)));
    }

    #[test]
    fn timeouts_are_read_in_every_unit_and_refused_in_grpcs_words() {
        let read = |value: &[u8]| admitted("grpc-timeout", value);
        for (value, seconds) in [("2H", 7200), ("3M", 180), ("99999999S", 99_999_999), ("5000m", 5), ("0n", 0)] {
            assert_eq!(read(value.as_bytes()), Ok(Some(Duration::from_secs(seconds))), "{value}");
        }
        assert_eq!(read(b"7u"), Ok(Some(Duration::from_micros(7))));
        assert!(read(b"99999999H").is_ok());
        for (value, why) in [
            ("", "transport: timeout string is too short: \"\""),
            ("S", "transport: timeout string is too short: \"S\""),
            ("123456789S", "transport: timeout string is too long: \"123456789S\""),
            ("1x", "transport: timeout unit is not recognized: \"1x\""),
            ("bogus", "transport: timeout unit is not recognized: \"bogus\""),
            ("-1S", "strconv.ParseUint: parsing \"-1\": invalid syntax"),
        ] {
            assert_eq!(read(value.as_bytes()), Err((Code::Internal, format!("malformed grpc-timeout: {why}"))));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_longer_than_the_client_is_dropped() {
        let never = within::<()>(Some(Duration::from_secs(3)), std::future::pending()).await.unwrap_err();
        assert_eq!((never.code(), never.message()), (Code::DeadlineExceeded, "context deadline exceeded"));
        assert_eq!(within(Some(Duration::ZERO), async { Ok(1) }).await.unwrap(), 1);
        assert_eq!(within(None, async { Ok(2) }).await.unwrap(), 2);
    }
}
