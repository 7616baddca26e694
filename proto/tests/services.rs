//! The services that this crate declares, against the list that clients know them by.
//!
//! The list is read from the `.proto` files with the compiler the build uses; the generated client and servers are
//! then asked for the names they really put on the wire.

use std::fmt::Write;

const METHODS: &str = "\
/etcdserverpb.Auth/AuthDisable
/etcdserverpb.Auth/AuthEnable
/etcdserverpb.Auth/AuthStatus
/etcdserverpb.Auth/Authenticate
/etcdserverpb.Auth/RoleAdd
/etcdserverpb.Auth/RoleDelete
/etcdserverpb.Auth/RoleGet
/etcdserverpb.Auth/RoleGrantPermission
/etcdserverpb.Auth/RoleList
/etcdserverpb.Auth/RoleRevokePermission
/etcdserverpb.Auth/UserAdd
/etcdserverpb.Auth/UserChangePassword
/etcdserverpb.Auth/UserDelete
/etcdserverpb.Auth/UserGet
/etcdserverpb.Auth/UserGrantRole
/etcdserverpb.Auth/UserList
/etcdserverpb.Auth/UserRevokeRole
/etcdserverpb.Cluster/MemberAdd
/etcdserverpb.Cluster/MemberList
/etcdserverpb.Cluster/MemberPromote
/etcdserverpb.Cluster/MemberRemove
/etcdserverpb.Cluster/MemberUpdate
/etcdserverpb.KV/Compact
/etcdserverpb.KV/DeleteRange
/etcdserverpb.KV/Put
/etcdserverpb.KV/Range
/etcdserverpb.KV/RangeStream -> stream
/etcdserverpb.KV/Txn
/etcdserverpb.Lease/LeaseGrant
/etcdserverpb.Lease/LeaseKeepAlive stream -> stream
/etcdserverpb.Lease/LeaseLeases
/etcdserverpb.Lease/LeaseRevoke
/etcdserverpb.Lease/LeaseTimeToLive
/etcdserverpb.Maintenance/Alarm
/etcdserverpb.Maintenance/Defragment
/etcdserverpb.Maintenance/Downgrade
/etcdserverpb.Maintenance/Hash
/etcdserverpb.Maintenance/HashKV
/etcdserverpb.Maintenance/MoveLeader
/etcdserverpb.Maintenance/Snapshot -> stream
/etcdserverpb.Maintenance/Status
/etcdserverpb.Watch/Watch stream -> stream
/grpc.health.v1.Health/Check
/grpc.health.v1.Health/Watch -> stream
/keelson.peer.v1.Peer/Forward
/keelson.peer.v1.Peer/Hello
/keelson.peer.v1.Peer/Raft stream ->
/keelson.peer.v1.Peer/Snapshot stream ->
/v3electionpb.Election/Campaign
/v3electionpb.Election/Leader
/v3electionpb.Election/Observe -> stream
/v3electionpb.Election/Proclaim
/v3electionpb.Election/Resign
/v3lockpb.Lock/Lock
/v3lockpb.Lock/Unlock
";

#[test]
fn every_method_has_the_path_and_the_shape_that_clients_expect() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let folders = [root.join("etcd"), root.join("internal")];
    let files: Vec<_> = folders
        .iter()
        .flat_map(|folder| std::fs::read_dir(folder).unwrap())
        .map(|entry| entry.unwrap().path())
        .collect();
    let descriptors = protox::compile(files, &folders).unwrap();

    let mut methods = Vec::new();
    for file in &descriptors.file {
        for service in &file.service {
            for method in &service.method {
                let mut line = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                match (method.client_streaming(), method.server_streaming()) {
                    (false, false) => {}
                    (true, false) => line.push_str(" stream ->"),
                    (false, true) => line.push_str(" -> stream"),
                    (true, true) => line.push_str(" stream -> stream"),
                }
                methods.push(line);
            }
        }
    }
    methods.sort();
    let mut listed = String::new();
    for method in methods {
        writeln!(listed, "{method}").unwrap();
    }
    assert_eq!(listed, METHODS);
}

#[cfg(feature = "grpc")]
mod generated {
    use std::convert::Infallible;
    use std::pin::pin;
    use std::sync::{Arc, Mutex};
    use std::task::{Context, Poll, Waker};

    use keelson_proto::{etcdserverpb, grpc_health_v1, peer, v3electionpb, v3lockpb};
    use tonic::body::Body;
    use tonic::codegen::{Service, http, tokio_stream};

    /// A transport that notes the path and answers with an empty response.
    #[derive(Clone, Default)]
    struct Ear(Arc<Mutex<Vec<String>>>);

    impl Service<http::Request<Body>> for Ear {
        type Response = http::Response<Body>;
        type Error = Infallible;
        type Future = std::future::Ready<Result<Self::Response, Infallible>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, request: http::Request<Body>) -> Self::Future {
            self.0.lock().expect("one thread").push(request.uri().path().to_owned());
            std::future::ready(Ok(http::Response::new(Body::empty())))
        }
    }

    /// Nothing here waits for anything, so one poll is enough; what is answered does not matter.
    fn run<F: Future>(future: F) {
        let mut context = Context::from_waker(Waker::noop());
        assert!(pin!(future).poll(&mut context).is_ready());
    }

    #[test]
    fn clients_call_the_paths_of_the_contract() {
        let ear = Ear::default();
        run(etcdserverpb::kv_client::KvClient::new(ear.clone()).range(etcdserverpb::RangeRequest::default()));
        run(etcdserverpb::watch_client::WatchClient::new(ear.clone())
            .watch(tokio_stream::empty::<etcdserverpb::WatchRequest>()));
        run(etcdserverpb::maintenance_client::MaintenanceClient::new(ear.clone())
            .hash_kv(etcdserverpb::HashKvRequest::default()));
        run(peer::peer_client::PeerClient::new(ear.clone()).raft(tokio_stream::empty::<peer::RaftBatch>()));
        assert_eq!(
            *ear.0.lock().unwrap(),
            [
                "/etcdserverpb.KV/Range",
                "/etcdserverpb.Watch/Watch",
                "/etcdserverpb.Maintenance/HashKV",
                "/keelson.peer.v1.Peer/Raft",
            ]
        );
    }

    #[test]
    fn servers_are_registered_under_the_names_of_the_contract() {
        assert_eq!(etcdserverpb::kv_server::SERVICE_NAME, "etcdserverpb.KV");
        assert_eq!(etcdserverpb::watch_server::SERVICE_NAME, "etcdserverpb.Watch");
        assert_eq!(etcdserverpb::lease_server::SERVICE_NAME, "etcdserverpb.Lease");
        assert_eq!(etcdserverpb::cluster_server::SERVICE_NAME, "etcdserverpb.Cluster");
        assert_eq!(etcdserverpb::maintenance_server::SERVICE_NAME, "etcdserverpb.Maintenance");
        assert_eq!(etcdserverpb::auth_server::SERVICE_NAME, "etcdserverpb.Auth");
        assert_eq!(v3lockpb::lock_server::SERVICE_NAME, "v3lockpb.Lock");
        assert_eq!(v3electionpb::election_server::SERVICE_NAME, "v3electionpb.Election");
        assert_eq!(grpc_health_v1::health_server::SERVICE_NAME, "grpc.health.v1.Health");
        assert_eq!(peer::peer_server::SERVICE_NAME, "keelson.peer.v1.Peer");
    }
}
