//! The proxy in a real kernel: Services applied through the store, packets sent through a node's namespace. Each body runs with ours
//! and with real etcd as the store.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use e2e::net::{NODE_V4, NODE_V6, pod_v4, pod_v6};
use e2e::peers::{self, Program};
use e2e::{Cluster, Folder, Kind, Net, PATIENCE, Process, eventually};
use keelson_proto::k8s::{core_v1::Service, runtime::Unknown};
use prost::Message;

on_both!(
    cluster_ips_and_node_ports,
    the_example,
    endpoints_come_and_go,
    refused_without_endpoints,
    deleted,
    its_own_table_survives_it,
    a_thousand_services,
);

const RANGES: &str = "--service-cluster-ip-range=10.96.0.0/12,fd00:10:96::/112";

/// A node with the proxy on it, a store it reads, two pods that serve and one that asks.
struct Stage {
    net: Net,
    cluster: Cluster,
    proxy: Option<Process>,
    program: PathBuf,
    folder: Folder,
    _pods: Vec<Process>,
}

impl Stage {
    fn new(kind: Kind) -> Option<Stage> {
        let program = peers::need(Program::KeelsonProxy)?;
        let mut net = Net::new()?;
        let mut cluster = Cluster::prepare(kind, 1, &[])?;
        cluster.members[0].move_into(&net.space("node"));
        cluster.members[0].restart();
        for (name, number) in [("web-1", 11), ("web-2", 12), ("client", 100)] {
            net.add_pod(name, number);
        }
        let ports = ["tcp:8080", "udp:8053"];
        let pods = vec![net.serve("web-1", &ports), net.serve("web-2", &ports)];
        let mut stage = Stage { net, cluster, proxy: None, program, folder: Folder::new("proxy"), _pods: pods };
        stage.start();
        Some(stage)
    }

    fn start(&mut self) {
        let program = self.program.display().to_string();
        let servers = self.servers();
        let arguments = [
            program.as_str(),
            "--source=store",
            &servers,
            "--hostname-override=node",
            "--proxy-mode=nftables",
            "--cluster-cidr=10.244.0.0/24,fd00:10:244::/64",
            "--nodeport-addresses=192.168.77.0/24,fd00:77::/64",
        ];
        self.proxy = Some(self.net.start("node", &arguments));
    }

    fn servers(&self) -> String {
        format!("--etcd-servers={}", self.cluster.endpoints())
    }

    fn verb(&self, verb: &str, yaml: &str) -> String {
        let file = self.folder.path().join("objects.yaml").display().to_string();
        std::fs::write(&file, yaml).unwrap();
        self.net.ok("node", &[&self.program.display().to_string(), verb, "-f", &file, &self.servers(), RANGES])
    }

    fn apply(&self, yaml: &str) -> String {
        self.verb("apply", yaml)
    }

    /// The table of what the kernel has been given.
    fn services(&self) -> String {
        self.net.ok("node", &[&self.program.display().to_string(), "services", &self.servers()])
    }

    /// Asks until exactly `names` were heard, and nobody else ever.
    #[track_caller]
    fn heard(&self, machine: &str, protocol: &str, address: &str, names: &[&str]) {
        let want: BTreeSet<String> = names.iter().map(|&name| name.to_owned()).collect();
        let mut seen = BTreeSet::new();
        for _ in 0..200 {
            match self.net.ask(machine, protocol, address) {
                Ok((name, _)) => {
                    assert!(want.contains(&name), "{name} answered {machine} at {protocol} {address}");
                    seen.insert(name);
                }
                Err(how) => panic!("{machine} at {protocol} {address}: {how}"),
            }
            if seen == want {
                return;
            }
        }
        panic!("{machine} heard {seen:?} at {protocol} {address}, not {want:?}");
    }

    /// Waits until an answer, or a way of being turned away, is as wanted.
    #[track_caller]
    fn becomes(&self, machine: &str, protocol: &str, address: &str, want: Result<&str, &str>) {
        eventually(&format!("{machine} at {protocol} {address} gets {want:?}"), PATIENCE, || {
            let got = self.net.ask(machine, protocol, address);
            let got = got.as_ref().map(|(name, _)| name.as_str()).map_err(String::as_str);
            (got == want).then_some(())
        });
    }

    fn ruleset(&self) -> String {
        self.net.ok("node", &["nft", "list", "ruleset"])
    }

    fn stored(&self, key: &str) -> Option<Service> {
        let ctl = peers::need(Program::Etcdctl)?;
        let url = format!("--endpoints={}", self.cluster.endpoints());
        let output = self.net.run("node", &[&ctl.display().to_string(), &url, "get", key, "--print-value-only"]);
        let stored = output.stdout.strip_suffix(b"\n")?.strip_prefix(b"k8s\0")?;
        let envelope = Unknown::decode(stored).expect("an Unknown");
        Some(Service::decode(envelope.raw?.as_ref()).expect("a Service"))
    }
}

/// A Service of both families with a TCP and a UDP port, and node ports 30080 and 30053.
fn dual_stack(name: &str, v4: &str, v6: &str) -> String {
    format!(
        "apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: default}}
spec:
  type: NodePort
  ipFamilyPolicy: RequireDualStack
  ipFamilies: [IPv4, IPv6]
  clusterIP: {v4}
  clusterIPs: [\"{v4}\", \"{v6}\"]
  ports:
  - {{name: http, protocol: TCP, port: 80, targetPort: 8080, nodePort: 30080}}
  - {{name: dns, protocol: UDP, port: 53, targetPort: 8053, nodePort: 30053}}
"
    )
}

/// The slice of one family: each endpoint an address and whether it is ready.
fn slice(service: &str, family: &str, endpoints: &[(String, bool)]) -> String {
    let mut text = format!(
        "apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: {service}-{}
  namespace: default
  labels: {{kubernetes.io/service-name: {service}}}
addressType: {family}
ports:
- {{name: http, protocol: TCP, port: 8080}}
- {{name: dns, protocol: UDP, port: 8053}}
",
        family.to_lowercase()
    );
    text += if endpoints.is_empty() { "endpoints: []\n" } else { "endpoints:\n" };
    for (address, ready) in endpoints {
        let _ = writeln!(text, "- {{addresses: [\"{address}\"], nodeName: node, conditions: {{ready: {ready}}}}}");
    }
    text
}

fn both_slices(service: &str, numbers: &[(u8, bool)]) -> String {
    let of = |address: fn(u8) -> String| -> Vec<(String, bool)> {
        numbers.iter().map(|&(number, ready)| (address(number), ready)).collect()
    };
    slice(service, "IPv4", &of(pod_v4)) + "---\n" + &slice(service, "IPv6", &of(pod_v6))
}

const BOTH: &[&str] = &["web-1", "web-2"];

fn cluster_ips_and_node_ports(kind: Kind) {
    let Some(stage) = Stage::new(kind) else { return };
    let objects =
        dual_stack("web", "10.96.0.80", "fd00:10:96::80") + "---\n" + &both_slices("web", &[(11, true), (12, true)]);
    let said = stage.apply(&objects);
    assert!(said.contains("web"), "{said}");
    let addresses = [
        ("tcp", "10.96.0.80:80".to_owned()),
        ("udp", "10.96.0.80:53".to_owned()),
        ("tcp", "[fd00:10:96::80]:80".to_owned()),
        ("udp", "[fd00:10:96::80]:53".to_owned()),
    ];
    for (protocol, address) in &addresses {
        eventually("the Service is in the kernel", PATIENCE, || stage.net.ask("client", protocol, address).ok());
        for machine in ["client", "node", "web-1"] {
            stage.heard(machine, protocol, address, BOTH);
        }
    }
    // A pod keeps its address on the way to a ClusterIP; one that meets itself is seen as the node.
    let (_, client) = stage.net.ask("client", "tcp", "10.96.0.80:80").unwrap();
    assert_eq!(client, "10.244.0.100");
    for (protocol, port) in [("tcp", 30080), ("udp", 30053)] {
        for address in [format!("{NODE_V4}:{port}"), format!("[{NODE_V6}]:{port}")] {
            for machine in ["outside", "client", "node"] {
                stage.heard(machine, protocol, &address, BOTH);
            }
        }
    }
    assert_eq!(stage.net.ask("outside", "tcp", &format!("{NODE_V4}:30081")), Err("refused".to_owned()));

    let table = stage.services();
    for word in ["default/web", "10.96.0.80", "fd00:10:96::80", "30080", "30053", "TCP", "UDP"] {
        assert!(table.contains(word), "no {word} in:\n{table}");
    }
    let ruleset = stage.ruleset();
    assert!(!ruleset.is_empty() && !ruleset.contains("kube-proxy"));
}

/// `examples/web.yaml` names no address: it is given one of the range, and a node port.
fn the_example(kind: Kind) {
    let Some(stage) = Stage::new(kind) else { return };
    let yaml = include_str!("../../../../examples/web.yaml");
    stage.apply(yaml);
    let Some(service) = stage.stored("/registry/services/specs/default/web") else { return };
    let spec = service.spec.unwrap();
    let address = spec.cluster_ip().to_owned();
    let port = spec.ports[0].node_port();
    assert!(address.starts_with("10.") && (30_000..=32_767).contains(&port), "{address} {port}");
    let cluster_ip = format!("{address}:80");
    eventually("the Service is in the kernel", PATIENCE, || stage.net.ask("client", "tcp", &cluster_ip).ok());
    stage.heard("client", "tcp", &cluster_ip, BOTH);
    stage.heard("outside", "tcp", &format!("{NODE_V4}:{port}"), BOTH);
    // Applied once more it keeps what it was given.
    stage.apply(yaml);
    let again = stage.stored("/registry/services/specs/default/web").unwrap().spec.unwrap();
    assert_eq!((again.cluster_ip(), again.ports[0].node_port()), (address.as_str(), port));
}

fn endpoints_come_and_go(kind: Kind) {
    let Some(stage) = Stage::new(kind) else { return };
    let (service, address) = (dual_stack("web", "10.96.0.80", "fd00:10:96::80"), "10.96.0.80:80");
    stage.apply(&(service + "---\n" + &both_slices("web", &[(11, true)])));
    stage.becomes("client", "tcp", address, Ok("web-1"));
    stage.heard("client", "udp", "10.96.0.80:53", &["web-1"]);
    stage.apply(&both_slices("web", &[(11, true), (12, true)]));
    stage.becomes("client", "tcp", address, Ok("web-2"));
    stage.heard("client", "tcp", "[fd00:10:96::80]:80", BOTH);
    stage.apply(&both_slices("web", &[(11, false), (12, true)]));
    eventually("web-1 is not ready and answers no more", PATIENCE, || {
        (0..12).all(|_| stage.net.ask("client", "tcp", address).is_ok_and(|(name, _)| name == "web-2")).then_some(())
    });
    stage.heard("outside", "tcp", &format!("{NODE_V4}:30080"), &["web-2"]);
}

fn refused_without_endpoints(kind: Kind) {
    let Some(stage) = Stage::new(kind) else { return };
    stage.apply(&dual_stack("web", "10.96.0.80", "fd00:10:96::80"));
    let doors = [
        ("client", "tcp", "10.96.0.80:80".to_owned()),
        ("client", "udp", "10.96.0.80:53".to_owned()),
        ("client", "tcp", "[fd00:10:96::80]:80".to_owned()),
        ("node", "tcp", "10.96.0.80:80".to_owned()),
        ("outside", "tcp", format!("{NODE_V4}:30080")),
        ("outside", "udp", format!("{NODE_V4}:30053")),
    ];
    for (machine, protocol, address) in &doors {
        stage.becomes(machine, protocol, address, Err("refused"));
    }
    stage.apply(&both_slices("web", &[(12, true)]));
    for (machine, protocol, address) in &doors {
        stage.becomes(machine, protocol, address, Ok("web-2"));
    }
    stage.apply(&both_slices("web", &[]));
    for (machine, protocol, address) in &doors {
        stage.becomes(machine, protocol, address, Err("refused"));
    }
}

fn deleted(kind: Kind) {
    let Some(stage) = Stage::new(kind) else { return };
    let objects = dual_stack("web", "10.96.0.80", "fd00:10:96::80") + "---\n" + &both_slices("web", &[(11, true)]);
    stage.apply(&objects);
    stage.becomes("client", "tcp", "10.96.0.80:80", Ok("web-1"));
    stage.verb("delete", &objects);
    eventually("the Service leaves the kernel", PATIENCE, || (!stage.services().contains("default/web")).then_some(()));
    assert!(stage.net.ask("client", "tcp", "10.96.0.80:80").is_err());
    assert_eq!(stage.net.ask("outside", "tcp", &format!("{NODE_V4}:30080")), Err("refused".to_owned()));
}

/// What is in the kernel outlives the process; the next one takes it over without touching it; `--cleanup` ends it.
fn its_own_table_survives_it(kind: Kind) {
    let Some(mut stage) = Stage::new(kind) else { return };
    stage.apply(&(dual_stack("web", "10.96.0.80", "fd00:10:96::80") + "---\n" + &both_slices("web", &[(11, true)])));
    stage.becomes("client", "tcp", "10.96.0.80:80", Ok("web-1"));
    stage.proxy.take().unwrap().kill();
    stage.heard("client", "tcp", "10.96.0.80:80", &["web-1"]);
    stage.apply(&both_slices("web", &[(12, true)]));
    stage.heard("client", "tcp", "10.96.0.80:80", &["web-1"]);
    stage.start();
    stage.becomes("client", "tcp", "10.96.0.80:80", Ok("web-2"));
    stage.proxy.take().unwrap().kill();
    stage.net.ok("node", &["nft", "add", "table", "inet", "somebody-elses"]);
    for _ in 0..2 {
        stage.net.ok("node", &[&stage.program.display().to_string(), "--cleanup"]);
        assert_eq!(stage.ruleset(), "table inet somebody-elses {\n}\n", "ours is gone, and only ours");
    }
    assert!(stage.net.ask("client", "tcp", "10.96.0.80:80").is_err());
}

fn a_thousand_services(kind: Kind) {
    let Some(mut stage) = Stage::new(kind) else { return };
    let mut objects = String::new();
    for number in 0..1000 {
        let (name, address) = (format!("s-{number:04}"), address(number));
        let _ = write!(
            objects,
            "---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: default}}
spec: {{clusterIP: {address}, ports: [{{name: http, protocol: TCP, port: 80, targetPort: 8080}}]}}
---
{}",
            slice(&name, "IPv4", &[(pod_v4(11), true), (pod_v4(12), true)])
        );
    }
    stage.apply(&objects);
    eventually("the kernel has a thousand Services", PATIENCE, || {
        let table = stage.services();
        (table.lines().filter(|line| line.contains("default/s-")).count() >= 1000).then_some(())
    });
    for number in [0, 1, 499, 998, 999] {
        stage.heard("client", "tcp", &format!("{}:80", address(number)), BOTH);
    }

    // One endpoint of one Service changes: one transaction of a few elements, and no process but ours wrote it.
    let monitor = stage.net.start("node", &["nft", "monitor"]);
    eventually("the monitor hears", PATIENCE, || {
        stage.net.ok("node", &["nft", "add", "table", "inet", "sentinel"]);
        stage.net.ok("node", &["nft", "delete", "table", "inet", "sentinel"]);
        monitor.lines().iter().any(|line| line.contains("delete table inet sentinel")).then_some(())
    });
    let before = settled(&monitor, &stage);
    stage.apply(&slice("s-0500", "IPv4", &[(pod_v4(12), true)]));
    let door = format!("{}:80", address(500));
    eventually("web-1 answers no more", PATIENCE, || {
        (0..12).all(|_| stage.net.ask("client", "tcp", &door).is_ok_and(|(name, _)| name == "web-2")).then_some(())
    });
    let after = settled(&monitor, &stage);
    let lines: Vec<String> = monitor.lines()[before..after].to_vec();
    let ours: Vec<&String> =
        lines.iter().filter(|line| !line.contains("sentinel") && !line.contains("(nft)")).collect();
    let batches: Vec<&&String> = ours.iter().filter(|line| line.starts_with("# new generation")).collect();
    let [batch] = batches.as_slice() else { panic!("one batch: {ours:#?}") };
    // The kernel names the thread that wrote it: one of the proxy's.
    let thread = batch.split_whitespace().skip_while(|word| *word != "process").nth(1).unwrap();
    let task = format!("/proc/{}/task/{thread}", stage.proxy.as_ref().unwrap().id());
    assert!(std::path::Path::new(&task).exists(), "{batch}");
    assert!(ours.len() <= 12, "a small one: {ours:#?}");

    stage.proxy.take().unwrap().kill();
    stage.net.ok("node", &[&stage.program.display().to_string(), "--cleanup"]);
    assert_eq!(stage.ruleset(), "");
}

fn address(number: usize) -> String {
    format!("10.97.{}.{}", number / 250, number % 250 + 1)
}

/// How many lines the monitor has written up to a change of our own: all before it has been told.
fn settled(monitor: &Process, stage: &Stage) -> usize {
    let told = monitor.lines().iter().filter(|line| line.contains("delete table inet sentinel")).count();
    stage.net.ok("node", &["nft", "add", "table", "inet", "sentinel"]);
    stage.net.ok("node", &["nft", "delete", "table", "inet", "sentinel"]);
    monitor.wait_for_nth("delete table inet sentinel", told + 1, PATIENCE);
    monitor.lines().len()
}

/// Wrong command lines are told in one line, and nothing is touched.
#[test]
fn wrong_command_lines() {
    let Some(program) = peers::need(Program::KeelsonProxy) else { return };
    for (arguments, names) in [
        (&["--unheard-of"][..], "unheard-of"),
        (&["--etcd-servers=nonsense"], "etcd-servers"),
        (&["--source=store"], "etcd-servers"),
        (&["--proxy-mode=iptables", "--etcd-servers=http://127.0.0.1:1"], "proxy-mode"),
        (&["--cluster-cidr=10.0.0.0/40", "--etcd-servers=http://127.0.0.1:1"], "cluster-cidr"),
        (&["apply", "--etcd-servers=http://127.0.0.1:1"], "filename"),
    ] {
        let mut process = Process::start("keelson-proxy", Command::new(&program).args(arguments));
        assert!(!process.wait(Duration::from_secs(20)).success(), "{arguments:?}");
        let lines = process.lines();
        assert!(lines.len() == 1 && lines[0].contains(names), "{arguments:?}: {lines:#?}");
    }
}
