//! The generated clients, on one runtime a test.

use std::time::Duration;

use keelson_proto::etcdserverpb::cluster_client::ClusterClient;
use keelson_proto::etcdserverpb::kv_client::KvClient;
use keelson_proto::etcdserverpb::lease_client::LeaseClient;
use keelson_proto::etcdserverpb::maintenance_client::MaintenanceClient;
use keelson_proto::etcdserverpb::watch_client::WatchClient;
use keelson_proto::etcdserverpb::{
    CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, PutRequest, PutResponse,
    RangeRequest, RangeResponse, StatusRequest, StatusResponse, TxnRequest, TxnResponse,
};
use keelson_proto::v3electionpb::election_client::ElectionClient;
use keelson_proto::v3lockpb::lock_client::LockClient;
use tonic::transport::{Channel, Endpoint};

use crate::Member;

/// Every service of one member over one connection.
#[derive(Clone, Debug)]
pub struct Rpc {
    pub kv: KvClient<Channel>,
    pub watch: WatchClient<Channel>,
    pub lease: LeaseClient<Channel>,
    pub cluster: ClusterClient<Channel>,
    pub maintenance: MaintenanceClient<Channel>,
    pub lock: LockClient<Channel>,
    pub election: ElectionClient<Channel>,
}

type Result<T> = std::result::Result<T, tonic::Status>;

impl Rpc {
    /// A client of `member`; it connects at the first call and again after the member was down.
    pub fn new(member: &Member) -> Rpc {
        Rpc::to(&member.client_url(), Duration::from_secs(20))
    }

    /// A client of the server at `url` whose calls give up after `timeout`.
    pub fn to(url: &str, timeout: Duration) -> Rpc {
        let endpoint = Endpoint::from_shared(url.to_owned()).expect("a URL of ours");
        // Long enough for streams too: the limit is each call's own.
        Rpc::over(endpoint.connect_timeout(Duration::from_secs(2)).timeout(timeout).connect_lazy())
    }

    /// A client of `member` over a connection of its own, which takes 64 KiB a stream before somebody has to read.
    pub fn narrow(member: &Member) -> Rpc {
        let endpoint = Endpoint::from_shared(member.client_url()).expect("a URL of ours");
        Rpc::over(endpoint.initial_stream_window_size(0xffff).initial_connection_window_size(0xffff).connect_lazy())
    }

    fn over(channel: Channel) -> Rpc {
        Rpc {
            kv: KvClient::new(channel.clone()).max_decoding_message_size(usize::MAX),
            watch: WatchClient::new(channel.clone()).max_decoding_message_size(usize::MAX),
            lease: LeaseClient::new(channel.clone()),
            cluster: ClusterClient::new(channel.clone()),
            maintenance: MaintenanceClient::new(channel.clone()),
            lock: LockClient::new(channel.clone()),
            election: ElectionClient::new(channel),
        }
    }

    pub async fn put(&mut self, key: &str, value: &str) -> Result<PutResponse> {
        self.kv_put(put(key, value)).await
    }

    pub async fn kv_put(&mut self, request: PutRequest) -> Result<PutResponse> {
        Ok(self.kv.put(request).await?.into_inner())
    }

    pub async fn get(&mut self, key: &str) -> Result<RangeResponse> {
        self.range(RangeRequest { key: key.to_owned().into(), ..Default::default() }).await
    }

    pub async fn range(&mut self, request: RangeRequest) -> Result<RangeResponse> {
        Ok(self.kv.range(request).await?.into_inner())
    }

    pub async fn delete(&mut self, request: DeleteRangeRequest) -> Result<DeleteRangeResponse> {
        Ok(self.kv.delete_range(request).await?.into_inner())
    }

    pub async fn txn(&mut self, request: TxnRequest) -> Result<TxnResponse> {
        Ok(self.kv.txn(request).await?.into_inner())
    }

    pub async fn compact(&mut self, revision: i64) -> Result<CompactionResponse> {
        let request = CompactionRequest { revision, physical: true };
        Ok(self.kv.compact(request).await?.into_inner())
    }

    pub async fn status(&mut self) -> Result<StatusResponse> {
        Ok(self.maintenance.status(StatusRequest {}).await?.into_inner())
    }
}

pub fn put(key: &str, value: &str) -> PutRequest {
    PutRequest { key: key.to_owned().into(), value: value.to_owned().into(), ..Default::default() }
}

/// Runs a test's async body on a runtime of its own.
pub fn run<T>(body: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(body)
}

/// Tries until the answer is `Some`, a little apart, for states that nothing announces; panics when patience ends.
pub async fn until<T>(what: &str, mut attempt: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = std::time::Instant::now() + crate::PATIENCE;
    loop {
        if let Some(answer) = attempt().await {
            return answer;
        }
        assert!(std::time::Instant::now() < deadline, "{what}: not within {:?}", crate::PATIENCE);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The end of the range of all keys that begin with `prefix`.
pub fn prefix_end(prefix: &str) -> bytes::Bytes {
    let mut end = prefix.as_bytes().to_vec();
    while let Some(last) = end.pop() {
        if last < 0xff {
            end.push(last + 1);
            return end.into();
        }
    }
    bytes::Bytes::from_static(b"\0")
}
