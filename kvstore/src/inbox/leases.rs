//! Keep-alive and time-to-live: questions for the leader's clock, wherever the leader is (trap 6).

use keelson_proto::etcdserverpb::LeaseTimeToLiveResponse;
use kvstore_core::types::LeaseId;
use kvstore_core::{Error, lease};
use tokio::sync::oneshot;

use super::Inbox;
use crate::driver::Input;

pub(super) async fn keep_alive(inbox: &Inbox, id: LeaseId) -> Result<i64, Error> {
    let (answer, ttl) = oneshot::channel();
    inbox.shared.driver.push(Input::KeepAlive { id, answer }).map_err(|_| Error::Stopped)?;
    ttl.await.unwrap_or(Err(Error::Stopped))
}

pub(super) async fn time_to_live(inbox: &Inbox, id: LeaseId, keys: bool) -> Result<LeaseTimeToLiveResponse, Error> {
    let (answer, remaining) = oneshot::channel();
    inbox.shared.driver.push(Input::Remaining { id, answer }).map_err(|_| Error::Stopped)?;
    let remaining = remaining.await.unwrap_or(Err(Error::Stopped))?;
    let mut response = LeaseTimeToLiveResponse { id: id.0, ttl: -1, ..LeaseTimeToLiveResponse::default() };
    if let Some(remaining) = remaining {
        (response.ttl, response.granted_ttl) = (remaining.remaining_s, remaining.granted_s);
        if keys {
            let published = inbox.published();
            response.keys = lease::keys(&published.view, id).map_err(|_| Error::Stopped)?;
        }
    }
    Ok(response)
}
