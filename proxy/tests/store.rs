//! `apply`, `delete` and the store source against a real etcd, on loopback. (`tests/e2e` runs the program itself, and on
//! both stores.) Skipped, loudly, where there is no etcd.

#![allow(clippy::unwrap_used, reason = "a test's panic is its report")]

use std::collections::BTreeSet;
use std::io::Write;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use keelson_proto::etcdserverpb::request_op::Request;
use keelson_proto::etcdserverpb::{CompactionRequest, PutRequest, RequestOp, TxnRequest, kv_client::KvClient};
use proxy::apply::{self, Outcome, Report, Target, Verb};
use proxy::etcd::{Bring, Etcd, Listed};
use proxy::metrics::Metrics;
use proxy::source::store::StoreSource;
use proxy::source::{Listing, Update};
use proxy::storage::{Keys, Kind, decode};
use proxy_core::state::Change;
use tokio::sync::{mpsc, watch};

const PATIENCE: Duration = Duration::from_secs(30);

/// Where etcd is: `ETCD_BIN`, the cache that `make peers` fills, `PATH`.
fn etcd_program() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("ETCD_BIN") {
        return Some(path.into());
    }
    let home = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let cache = home("KEELSON_CACHE")
        .or_else(|| Some(home("XDG_CACHE_HOME").or_else(|| Some(home("HOME")?.join(".cache")))?.join("keelson")));
    let peers = cache.and_then(|cache| std::fs::read_dir(cache.join("peers")).ok()).into_iter().flatten().flatten();
    let in_cache = peers.filter(|peer| peer.file_name().to_string_lossy().starts_with("etcd-"));
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let candidates = in_cache.map(|peer| peer.path().join("etcd"));
    candidates.chain(std::env::split_paths(&paths).map(|folder| folder.join("etcd"))).find(|path| path.is_file())
}

/// Says that a test is skipped, where `.ci/test` counts it.
fn skip(test: &str) {
    assert!(std::env::var_os("CI").is_none(), "{test}: etcd is missing (make peers)");
    eprintln!("SKIPPED {test}: etcd is missing (make peers)");
    if let Some(file) = std::env::var_os("KEELSON_SKIPS") {
        let mut file = std::fs::OpenOptions::new().append(true).create(true).open(file).unwrap();
        writeln!(file, "{test}: etcd is missing (make peers)").unwrap();
    }
}

fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// One etcd with data of its own.
struct Store {
    process: Child,
    folder: PathBuf,
    address: SocketAddr,
}

impl Store {
    fn start(test: &str) -> Option<Store> {
        let Some(program) = etcd_program() else {
            skip(test);
            return None;
        };
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{test}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).unwrap();
        let (address, peer) = (free_address(), free_address());
        let process = Command::new(program)
            .arg(format!("--data-dir={}", folder.join("data").display()))
            .arg(format!("--listen-client-urls=http://{address}"))
            .arg(format!("--advertise-client-urls=http://{address}"))
            .arg(format!("--listen-peer-urls=http://{peer}"))
            .arg(format!("--initial-advertise-peer-urls=http://{peer}"))
            .arg(format!("--initial-cluster=default=http://{peer}"))
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(folder.join("log")).unwrap())
            .spawn()
            .unwrap();
        Some(Store { process, folder, address })
    }

    fn etcd(&self) -> Etcd {
        client(&[self.address])
    }

    fn target(&self, ranges: &[&str], node_ports: (u16, u16)) -> Target {
        Target {
            etcd: self.etcd(),
            keys: Keys::new("/registry"),
            cluster_ip_ranges: ranges.iter().map(|range| range.parse().unwrap()).collect(),
            node_ports,
        }
    }

    fn usual(&self) -> Target {
        self.target(&["10.96.0.0/12"], (30000, 32767))
    }

    async fn list(&self, kind: Kind) -> Listed {
        self.etcd().list(&Keys::new("/registry").all(kind), 0, Bring::Values).await.unwrap()
    }

    async fn put(&self, key: &str, value: &'static [u8]) -> i64 {
        let put = PutRequest { key: key.to_owned().into(), value: value.into(), ..Default::default() };
        let success = vec![RequestOp { request: Some(Request::RequestPut(put)) }];
        self.etcd().txn(TxnRequest { success, ..Default::default() }).await.unwrap().header.unwrap().revision
    }

    async fn compact(&self, revision: i64) {
        let mut client = KvClient::connect(format!("http://{}", self.address)).await.unwrap();
        client.compact(CompactionRequest { revision, physical: true }).await.unwrap();
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn client(addresses: &[SocketAddr]) -> Etcd {
    let urls: Vec<String> = addresses.iter().map(|address| format!("http://{address}")).collect();
    Etcd::new(&urls, PATIENCE).unwrap()
}

/// A way to the store that can be cut: connections through it die, new ones are refused.
struct Gate {
    address: SocketAddr,
    open: watch::Sender<bool>,
}

impl Gate {
    async fn to(store: SocketAddr) -> Gate {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (open, watched) = watch::channel(true);
        tokio::spawn(async move {
            loop {
                let (mut client, _) = listener.accept().await.unwrap();
                let mut watched = watched.clone();
                tokio::spawn(async move {
                    if !*watched.borrow_and_update() {
                        return;
                    }
                    let mut server = tokio::net::TcpStream::connect(store).await.unwrap();
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut client, &mut server) => {}
                        _ = watched.changed() => {}
                    }
                });
            }
        });
        Gate { address, open }
    }

    fn cut(&self) {
        self.open.send_replace(false);
    }

    fn restore(&self) {
        self.open.send_replace(true);
    }
}

async fn applied(target: &Target, yaml: &str) -> Vec<Report> {
    apply::run(target.clone(), Verb::Apply, apply::read(yaml).unwrap()).await.unwrap()
}

async fn deleted(target: &Target, yaml: &str) -> Vec<Report> {
    apply::run(target.clone(), Verb::Delete, apply::read(yaml).unwrap()).await.unwrap()
}

fn outcomes(reports: &[Report]) -> Vec<Outcome> {
    reports.iter().map(|report| report.result.clone().unwrap()).collect()
}

fn services(names: &str, count: usize, kind: &str) -> String {
    let service = |i| {
        format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {names}{i}}}\n\
             spec: {{type: {kind}, ports: [{{port: 80}}]}}\n"
        )
    };
    (0..count).map(service).collect()
}

fn slice(name: &str, address: &str) -> String {
    format!(
        "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: {name}-1, labels: {{kubernetes.io/service-name: {name}}}}}\naddressType: IPv4\n\
         ports: [{{port: 8080}}]\nendpoints: [{{addresses: [{address}]}}]\n"
    )
}

/// Addresses and node ports of all Services, as lists with repetitions, if any.
async fn given(store: &Store) -> (Vec<IpAddr>, Vec<u16>) {
    let mut given = (Vec::new(), Vec::new());
    for kv in store.list(Kind::Service).await.kvs {
        let service = decode::service(&kv.value, &mut Vec::new()).unwrap();
        given.0.extend(service.cluster_ips);
        given.1.extend(service.ports.iter().filter_map(|port| port.node_port));
    }
    given.0.sort_unstable();
    given.1.sort_unstable();
    given
}

/// The node ports that the stored bitmap has.
async fn booked_ports(store: &Store, first: u16) -> Vec<u16> {
    let kvs = store.list(Kind::RangeAllocation).await.kvs;
    let allocation: keelson_proto::k8s::core_v1::RangeAllocation =
        proxy::storage::message(Kind::RangeAllocation, &kvs[0].value).unwrap();
    let bytes = allocation.data();
    let bit = |i: usize| bytes[bytes.len() - 1 - i / 8] & (1 << (i % 8)) != 0;
    (0..bytes.len() * 8).filter(|i| bit(*i)).map(|i| first + i as u16).collect()
}

async fn booked_addresses(store: &Store) -> Vec<IpAddr> {
    let prefix = "/registry/ipaddresses/".len();
    let kvs = store.list(Kind::IpAddress).await.kvs;
    let mut booked: Vec<IpAddr> =
        kvs.iter().map(|kv| std::str::from_utf8(&kv.key[prefix..]).unwrap().parse().unwrap()).collect();
    booked.sort_unstable();
    booked
}

#[tokio::test]
async fn concurrent_applies_never_give_anything_twice() {
    let Some(store) = Store::start("concurrent_applies_never_give_anything_twice") else { return };
    // 60 Services out of 62 addresses and 64 ports: they must meet.
    let target = || store.target(&["10.96.0.0/26"], (30000, 30063));
    let yaml = ["a", "b", "c"].map(|name| services(name, 20, "NodePort"));
    let targets = (target(), target(), target());
    let (a, b, c) =
        tokio::join!(applied(&targets.0, &yaml[0]), applied(&targets.1, &yaml[1]), applied(&targets.2, &yaml[2]));
    for reports in [a, b, c] {
        assert_eq!(outcomes(&reports), vec![Outcome::Created; 20]);
    }
    let (addresses, ports) = given(&store).await;
    assert_eq!((addresses.len(), ports.len()), (60, 60));
    assert_eq!(addresses.iter().collect::<BTreeSet<_>>().len(), 60);
    assert_eq!(ports.iter().collect::<BTreeSet<_>>().len(), 60);
    assert_eq!(booked_addresses(&store).await, addresses);
    assert_eq!(booked_ports(&store, 30000).await, ports);
    // Two more addresses are left, so the third of these is refused, whoever it is, and books nothing.
    let last = applied(&target(), &services("d", 3, "ClusterIP")).await;
    let refused: Vec<String> = last.into_iter().filter_map(|report| report.result.err()).collect();
    assert_eq!(
        refused,
        ["Error from server (InternalError): Internal error occurred: failed to allocate a serviceIP: range is full"]
    );
    assert_eq!(booked_addresses(&store).await.len(), 62);
    assert_eq!(booked_ports(&store, 30000).await.len(), 60);
}

#[tokio::test]
async fn what_is_applied_again_is_unchanged_and_what_is_deleted_is_free() {
    let Some(store) = Store::start("what_is_applied_again_is_unchanged_and_what_is_deleted_is_free") else { return };
    let target = store.usual();
    let yaml = services("web", 1, "NodePort") + &slice("web0", "10.1.0.1");
    assert_eq!(outcomes(&applied(&target, &yaml).await), [Outcome::Created, Outcome::Created]);
    let before = store.list(Kind::Service).await;
    assert_eq!(outcomes(&applied(&target, &yaml).await), [Outcome::Unchanged, Outcome::Unchanged]);
    let (addresses, ports) = given(&store).await;
    assert_eq!(store.list(Kind::Service).await.revision, before.revision, "nothing was written");

    let other_port = yaml.replace("port: 80}", "port: 81}");
    assert_eq!(outcomes(&applied(&target, &other_port).await), [Outcome::Configured, Outcome::Unchanged]);
    assert_eq!(given(&store).await, (addresses.clone(), ports.clone()), "it keeps what it was given");
    let uid = |kv: &keelson_proto::mvccpb::KeyValue| decode::service_shape(&kv.value).unwrap().metadata.uid;
    assert_eq!(uid(&store.list(Kind::Service).await.kvs[0]), uid(&before.kvs[0]));

    let plain = services("web", 1, "ClusterIP");
    assert_eq!(outcomes(&applied(&target, &plain).await), [Outcome::Configured]);
    assert_eq!(booked_ports(&store, 30000).await, Vec::<u16>::new(), "the node port is given back with the type");
    assert_eq!(booked_addresses(&store).await, addresses);

    let lines: Vec<String> = deleted(&target, &yaml).await.iter().map(ToString::to_string).collect();
    assert_eq!(lines, ["service \"web0\" deleted", "endpointslice.discovery.k8s.io \"web0-1\" deleted"]);
    assert_eq!(booked_addresses(&store).await, Vec::<IpAddr>::new());
    let lines: Vec<String> = deleted(&target, &plain).await.iter().map(ToString::to_string).collect();
    assert_eq!(lines, ["Error from server (NotFound): services \"web0\" not found"]);
}

#[tokio::test]
async fn addresses_of_services_that_nobody_booked_are_respected() {
    let Some(store) = Store::start("addresses_of_services_that_nobody_booked_are_respected") else { return };
    let json = br#"{"kind":"Service","apiVersion":"v1","metadata":{"name":"raw","namespace":"default"},
        "spec":{"type":"NodePort","clusterIP":"10.96.0.1","ports":[{"port":80,"nodePort":30001}]}}"#;
    store.put("/registry/services/specs/default/raw", json).await;
    let target = store.target(&["10.96.0.0/30"], (30000, 30001));
    let reports = applied(&target, &services("web", 2, "NodePort")).await;
    assert_eq!(reports.iter().filter(|report| report.result.is_ok()).count(), 1, "one address is left: {reports:?}");
    let (addresses, ports) = given(&store).await;
    assert_eq!(addresses, ["10.96.0.1", "10.96.0.2"].map(|ip| ip.parse::<IpAddr>().unwrap()));
    assert_eq!(ports, [30000, 30001]);
    assert_eq!(booked_ports(&store, 30000).await, [30000, 30001], "the books are put right");
    let other = store.target(&["10.96.0.0/30"], (30000, 32767));
    let error = apply::run(other, Verb::Apply, apply::read(&services("x", 1, "ClusterIP")).unwrap()).await;
    assert_eq!(
        error.unwrap_err().to_string(),
        "--service-node-port-range: 30000-32767, but the node ports in the store are of 30000-30001 \
         (/registry/ranges/servicenodeports)"
    );
}

/// A source, and what it reports.
struct Followed {
    updates: mpsc::Receiver<Update>,
    metrics: Arc<Metrics>,
}

impl Followed {
    fn start(addresses: &[SocketAddr]) -> Followed {
        let (sender, updates) = mpsc::channel(16);
        let metrics = Arc::new(Metrics::default());
        let etcd = client(addresses);
        let source = StoreSource::new(etcd, Keys::new("/registry"), "n1".into(), sender, metrics.clone());
        tokio::spawn(source.run());
        Followed { updates, metrics }
    }

    async fn next(&mut self) -> Update {
        tokio::time::timeout(PATIENCE, self.updates.recv()).await.expect("an update in time").unwrap()
    }

    async fn listing(&mut self) -> Listing {
        match self.next().await {
            Update::Listed(listing) => *listing,
            other => panic!("{other:?}"),
        }
    }

    /// The endpoints that the next change of a slice brings.
    async fn endpoints(&mut self) -> Vec<String> {
        match self.next().await {
            Update::Changed(changes) => endpoints(&changes),
            other => panic!("{other:?}"),
        }
    }
}

fn endpoints(changes: &[Change]) -> Vec<String> {
    let slices = changes.iter().filter_map(|change| match change {
        Change::SliceSet(slice) => Some(slice),
        _ => None,
    });
    slices.flat_map(|slice| &slice.endpoints).map(|endpoint| endpoint.address.to_string()).collect()
}

fn count(listing: &Listing, which: impl Fn(&Change) -> bool) -> usize {
    listing.changes.iter().filter(|change| which(change)).count()
}

#[tokio::test]
async fn a_listing_has_every_page_and_changes_follow_it() {
    let Some(store) = Store::start("a_listing_has_every_page_and_changes_follow_it") else { return };
    let target = store.usual();
    applied(&target, &services("web", 1201, "ClusterIP")).await;
    applied(&target, &slice("web0", "10.1.0.1")).await;
    let cidr = br#"{"kind":"ServiceCIDR","metadata":{"name":"kubernetes"},"spec":{"cidrs":["10.96.0.0/12"]}}"#;
    store.put("/registry/servicecidrs/kubernetes", cidr).await;
    let mut followed = Followed::start(&[store.address]);
    let listing = followed.listing().await;
    assert_eq!(count(&listing, |change| matches!(change, Change::ServiceSet(_))), 1201);
    assert_eq!(endpoints(&listing.changes), ["10.1.0.1"]);
    assert_eq!(listing.service_cidrs.len(), 1);
    assert_eq!(listing.eligibility, None, "there is no Node object");

    applied(&target, &slice("web0", "10.1.0.2")).await;
    assert_eq!(followed.endpoints().await, ["10.1.0.2"]);
    deleted(&target, &services("web", 1, "ClusterIP")).await;
    let Update::Changed(changes) = followed.next().await else { panic!("a change") };
    assert!(matches!(&changes[..], [Change::ServiceGone(name)] if name.to_string() == "default/web0"), "{changes:?}");
    let node = br#"{"kind":"Node","metadata":{"name":"n1"},"status":{"addresses":[{"type":"InternalIP","address":"192.0.2.1"}]}}"#;
    store.put("/registry/minions/n10", node).await;
    store.put("/registry/minions/n1", node).await;
    let Update::Changed(changes) = followed.next().await else { panic!("a change") };
    assert!(matches!(&changes[..], [Change::NodeSet(node)] if &*node.name == "n1"), "the own Node only: {changes:?}");
    assert!(matches!(followed.next().await, Update::Eligibility(Some(_))));
}

#[tokio::test]
async fn a_broken_stream_goes_on_where_it_was_and_a_compacted_one_lists_again() {
    let Some(store) = Store::start("a_broken_stream_goes_on_where_it_was_and_a_compacted_one_lists_again") else {
        return;
    };
    let target = store.usual();
    applied(&target, &slice("web", "10.1.0.1")).await;
    let gate = Gate::to(store.address).await;
    let mut followed = Followed::start(&[gate.address]);
    assert_eq!(endpoints(&followed.listing().await.changes), ["10.1.0.1"]);

    gate.cut();
    applied(&target, &slice("web", "10.1.0.2")).await;
    applied(&target, &slice("web", "10.1.0.3")).await;
    gate.restore();
    let mut seen = followed.endpoints().await;
    while seen.last().unwrap() != "10.1.0.3" {
        seen.extend(followed.endpoints().await);
    }
    assert_eq!(seen, ["10.1.0.2", "10.1.0.3"], "nothing was missed and nothing listed again");

    gate.cut();
    applied(&target, &slice("web", "10.1.0.4")).await;
    applied(&target, &slice("other", "10.1.1.1")).await;
    let revision = store.put("/elsewhere", b"x").await;
    store.compact(revision).await;
    gate.restore();
    let mut found = endpoints(&followed.listing().await.changes);
    found.sort_unstable();
    assert_eq!(found, ["10.1.0.4", "10.1.1.1"]);
    applied(&target, &slice("web", "10.1.0.5")).await;
    assert_eq!(followed.endpoints().await, ["10.1.0.5"]);
}

#[tokio::test]
async fn another_endpoint_takes_over_for_calls_and_streams() {
    let Some(store) = Store::start("another_endpoint_takes_over_for_calls_and_streams") else { return };
    let target = store.usual();
    applied(&target, &slice("web", "10.1.0.1")).await;
    let (first, second) = (Gate::to(store.address).await, Gate::to(store.address).await);
    let mut followed = Followed::start(&[first.address, second.address]);
    followed.listing().await;
    let both = client(&[first.address, second.address]);
    first.cut();
    applied(&target, &slice("web", "10.1.0.2")).await;
    assert_eq!(followed.endpoints().await, ["10.1.0.2"]);
    assert_eq!(both.list("/registry/endpointslices/", 0, Bring::Keys).await.unwrap().kvs.len(), 1);
    first.restore();
    second.cut();
    applied(&target, &slice("web", "10.1.0.3")).await;
    assert_eq!(followed.endpoints().await, ["10.1.0.3"]);
}

#[tokio::test]
async fn a_value_that_cannot_be_read_stops_nothing_else() {
    let Some(store) = Store::start("a_value_that_cannot_be_read_stops_nothing_else") else { return };
    let target = store.usual();
    store.put("/registry/services/specs/default/secret", b"k8s:enc:aescbc:v1:key1:\x00\x01").await;
    applied(&target, &(services("web", 1, "ClusterIP") + &slice("web0", "10.1.0.1"))).await;
    let mut followed = Followed::start(&[store.address]);
    let listing = followed.listing().await;
    assert_eq!(count(&listing, |change| matches!(change, Change::ServiceSet(_))), 1);
    let unreadable: Vec<String> = listing.unreadable.iter().map(|(_, name)| name.to_string()).collect();
    assert_eq!(unreadable, ["default/secret"]);
    store.put("/registry/endpointslices/default/broken", b"k8s\0\xff").await;
    applied(&target, &slice("web0", "10.1.0.2")).await;
    assert_eq!(followed.endpoints().await, ["10.1.0.2"]);
    let text = followed.metrics.render();
    for kind in ["Service", "EndpointSlice"] {
        let line = format!("keelson_proxy_source_unreadable_values_total{{kind=\"{kind}\"}} 1");
        assert!(text.contains(&line), "{line}");
    }
}

#[tokio::test]
async fn a_store_that_is_not_there_is_told_in_one_line() {
    let nobody = free_address();
    let etcd = Etcd::new(&[format!("http://{nobody}")], Duration::from_millis(1)).unwrap();
    let error = etcd.list("/registry/", 0, Bring::Keys).await.unwrap_err().to_string();
    assert!(error.starts_with(&format!("no answer from http://{nobody}: Connection refused")), "{error}");
}
