//! Real packets between namespaces: what clients see of Services.

use std::collections::BTreeSet;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use proxy::conntrack::Conntrack;
use proxy_core::model::{Family, Protocol, Service, TrafficPolicy};

use crate::cluster::{Cluster, at, config, ip, service};
use crate::netns::{Hello, Host, become_node, is_refused, is_silent, isolated, tcp, udp, udp_on};

const TRIES: usize = 40;

/// A node with two pods, and a client outside.
struct Wires {
    pods: [Host; 2],
    outside: Host,
}

fn wires() -> Wires {
    become_node();
    let wires = Wires { pods: [Host::new("pod1", 1), Host::new("pod2", 2)], outside: Host::new("out", 9) };
    wires.pods[0].serve("one", 8080);
    wires.pods[1].serve("two", 8080);
    wires
}

impl Wires {
    fn endpoints(&self, family: Family) -> [(std::net::IpAddr, bool); 2] {
        self.pods.each_ref().map(|pod| (if family == Family::V4 { pod.v4 } else { pod.v6 }, true))
    }
}

type Ask = fn(SocketAddr) -> std::io::Result<Hello>;

/// Who answers, and which sources they saw.
fn ask_many(ask: Ask, address: SocketAddr) -> (BTreeSet<String>, BTreeSet<(String, std::net::IpAddr)>) {
    let answers: Vec<_> =
        (0..TRIES).map(|_| ask(address).unwrap_or_else(|error| panic!("{address}: {error}"))).collect();
    let who = answers.iter().map(|hello| hello.who.clone()).collect();
    (who, answers.into_iter().map(|hello| (hello.who, hello.peer)).collect())
}

fn names(list: &[&str]) -> BTreeSet<String> {
    list.iter().map(|name| (*name).to_owned()).collect()
}

fn both(protocol: Protocol) -> (Service, Service) {
    let name = if protocol == Protocol::Tcp { "web" } else { "dns" };
    let v4 = service(name, &["10.96.0.1"], protocol, 80, Some(30_080));
    let v6 = service(&format!("{name}6"), &["fd00:96::1"], protocol, 80, Some(30_080));
    (v4, v6)
}

#[test]
fn cluster_ips_and_node_ports_answer_from_everywhere() {
    isolated(|| {
        let wires = wires();
        let mut cluster = Cluster::new(config());
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let (v4, v6) = both(protocol);
            cluster.set(&v4, Family::V4, 8080, &wires.endpoints(Family::V4));
            cluster.set(&v6, Family::V6, 8080, &wires.endpoints(Family::V6));
        }
        cluster.follow();
        for (ask, kind) in [(tcp as Ask, "tcp"), (udp as Ask, "udp")] {
            for (family, vip, node) in [
                (Family::V4, at("10.96.0.1:80"), at("192.168.0.2:30080")),
                (Family::V6, at("[fd00:96::1]:80"), at("[fd00:192::2]:30080")),
            ] {
                let own = |host: &Host| if family == Family::V4 { host.v4 } else { host.v6 };
                // From a pod: its address is kept, but for the answer of itself to itself.
                let (who, seen) = wires.pods[0].inside(|| ask_many(ask, vip));
                assert_eq!(who, names(&["one", "two"]), "{kind} {vip} from a pod");
                assert!(seen.contains(&("two".into(), own(&wires.pods[0]))), "{kind} {vip}: {seen:?}");
                let hairpin: Vec<_> = seen.iter().filter(|(who, _)| who == "one").collect();
                assert!(hairpin.iter().all(|(_, peer)| *peer != own(&wires.pods[0])), "{kind} {vip}: {seen:?}");
                // From the node itself, by both.
                let (who, _) = ask_many(ask, vip);
                assert_eq!(who, names(&["one", "two"]), "{kind} {vip} from the node");
                let (who, _) = ask_many(ask, node);
                assert_eq!(who, names(&["one", "two"]), "{kind} {node} from the node");
                // From outside, by both: masqueraded.
                for address in [vip, node] {
                    let (who, seen) = wires.outside.inside(|| ask_many(ask, address));
                    assert_eq!(who, names(&["one", "two"]), "{kind} {address} from outside");
                    assert!(seen.iter().all(|(_, peer)| *peer != own(&wires.outside)), "{kind} {address}: {seen:?}");
                }
            }
        }
        cluster.nft.cleanup().expect("a cleanup");
        assert_eq!(crate::netns::run("nft", &["list", "ruleset"]), "");
    });
}

#[test]
fn who_has_no_endpoints_is_refused_and_who_is_unknown_is_dropped() {
    isolated(|| {
        let wires = wires();
        let mut cluster = Cluster::new(config());
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let (v4, v6) = both(protocol);
            cluster.set(&v4, Family::V4, 8080, &[]);
            cluster.set(&v6, Family::V6, 8080, &[]);
        }
        cluster.follow();
        for (vip, node, unknown) in [
            ("10.96.0.1:80", "192.168.0.2:30080", "10.96.7.7:80"),
            ("[fd00:96::1]:80", "[fd00:192::2]:30080", "[fd00:96::7:7]:80"),
        ] {
            for address in [at(vip), at(node)] {
                assert!(is_refused(wires.pods[0].inside(|| tcp(address))), "{address} from a pod");
                assert!(is_refused(wires.outside.inside(|| tcp(address))), "{address} from outside");
                assert!(is_refused(tcp(address)), "{address} from the node");
                assert!(is_refused(wires.pods[1].inside(|| udp(address))), "udp {address} from a pod");
            }
            let other_port = SocketAddr::new(at(vip).ip(), 81);
            assert!(is_refused(wires.pods[0].inside(|| tcp(other_port))), "{other_port}");
            assert!(wires.pods[0].inside(|| is_silent(at(unknown))), "{unknown}");
        }
    });
}

#[test]
fn a_udp_client_with_a_fixed_port_follows_its_service() {
    isolated(|| {
        let wires = wires();
        let mut cluster = Cluster::new(config());
        let mut conntrack = Conntrack::open().expect("a netlink socket");
        let (dns, _) = both(Protocol::Udp);
        let [one, two] = wires.endpoints(Family::V4);
        cluster.set(&service("other", &["10.96.0.9"], Protocol::Tcp, 80, None), Family::V4, 8080, &[one]);
        cluster.follow();
        let patience = Duration::from_millis(200);
        let socket = |to| {
            let socket = UdpSocket::bind("0.0.0.0:0").expect("a socket");
            socket.connect(to).expect("a destination");
            socket
        };
        let client = wires.outside.inside(|| socket(at("192.168.0.2:30080")));
        // It speaks before its Service is there: an untranslated flow.
        assert!(udp_on(&client, patience).is_err(), "nobody is there yet");
        cluster.set(&dns, Family::V4, 8080, &[one]);
        let mut sweep = |cluster: &mut Cluster| {
            let applied = cluster.follow();
            let now = Instant::now();
            conntrack.note(applied.stale, now);
            let swept = conntrack.sweep(now).expect("a sweep");
            assert!(swept.next.is_some_and(|next| next > now), "a second sweep is due");
            swept.deleted
        };
        assert_eq!(sweep(&mut cluster), 1);
        // A refusal that came before may still lie on the socket.
        let answer = (0..3).find_map(|_| udp_on(&client, patience).ok());
        assert_eq!(answer.map(|hello| hello.who), Some("one".into()));
        cluster.set(&dns, Family::V4, 8080, &[two]);
        assert_eq!(sweep(&mut cluster), 1);
        assert_eq!(udp_on(&client, patience).expect("an answer").who, "two");
        // Another Service's change leaves it alone.
        cluster.set(&service("other", &["10.96.0.9"], Protocol::Udp, 80, None), Family::V4, 8080, &[one]);
        assert_eq!(sweep(&mut cluster), 0);
        cluster.set(&dns, Family::V4, 8080, &[]);
        assert_eq!(sweep(&mut cluster), 1);
        let refused = udp_on(&client, patience).expect_err("nobody is left");
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    });
}

#[test]
fn a_client_with_affinity_sticks_whichever_way_it_comes() {
    isolated(|| {
        let wires = wires();
        let mut cluster = Cluster::new(config());
        for local in [false, true] {
            for (family, vip, node) in [
                (Family::V4, "10.96.0.1:80", "192.168.0.2:30080"),
                (Family::V6, "[fd00:96::1]:80", "[fd00:192::2]:30080"),
            ] {
                let (v4, v6) = both(Protocol::Tcp);
                let mut sticky = if family == Family::V4 { v4 } else { v6 };
                sticky.affinity_timeout_s = Some(10_800);
                if local {
                    sticky.external_traffic_policy = TrafficPolicy::Local;
                }
                cluster.set(&sticky, family, 8080, &wires.endpoints(family));
                cluster.follow();
                let ask = |address: &str| ask_many(tcp, at(address)).0;
                let answers = wires.outside.inside(|| [ask(vip), ask(node), ask(vip)]);
                assert_eq!(answers[0].len(), 1, "{family}: {answers:?}");
                assert_eq!(answers[0], answers[1], "{family}, local {local}");
                assert_eq!(answers[0], answers[2], "{family}, local {local}");
                // The one it had goes: it moves, and sticks to the other.
                let [one, two] = wires.endpoints(family);
                let (left, name) = if answers[0].contains("one") { (two, "two") } else { (one, "one") };
                cluster.set(&sticky, family, 8080, &[left]);
                cluster.follow();
                assert_eq!(wires.outside.inside(|| ask(vip)), names(&[name]));
                cluster.set(&sticky, family, 8080, &wires.endpoints(family));
                cluster.follow();
                let answers = wires.outside.inside(|| [ask(node), ask(vip)]);
                assert_eq!(answers, [names(&[name]), names(&[name])], "{family}, local {local}");
            }
        }
        let listing = crate::netns::run("nft", &["list", "ruleset"]);
        assert!(listing.contains("chain affinity-local-10800-2"), "nft lists the affinity rules of both families");
    });
}

#[test]
fn external_traffic_may_be_kept_local() {
    isolated(|| {
        let wires = wires();
        let mut cluster = Cluster::new(config());
        let (mut web, _) = both(Protocol::Tcp);
        web.external_traffic_policy = TrafficPolicy::Local;
        web.external_ips = vec![ip("203.0.113.9")];
        let [one, two] = wires.endpoints(Family::V4);
        let node = at("192.168.0.2:30080");
        let external = at("203.0.113.9:80");
        cluster.set(&web, Family::V4, 8080, &[one, (two.0, false)]);
        cluster.follow();
        for address in [node, external] {
            let (who, seen) = wires.outside.inside(|| ask_many(tcp, address));
            assert_eq!(who, names(&["one"]), "{address}: the endpoint here");
            assert_eq!(seen, [("one".to_owned(), wires.outside.v4)].into(), "{address}: with its own address");
            let (who, _) = wires.pods[0].inside(|| ask_many(tcp, address));
            assert_eq!(who, names(&["one", "two"]), "{address}: pods reach all");
            let (who, _) = ask_many(tcp, address);
            assert_eq!(who, names(&["one", "two"]), "{address}: the node reaches all");
        }
        cluster.set(&web, Family::V4, 8080, &[(one.0, false), (two.0, false)]);
        cluster.follow();
        assert!(wires.outside.inside(|| is_silent(node)), "none here: dropped");
        let (who, _) = ask_many(tcp, node);
        assert_eq!(who, names(&["one", "two"]), "the node still reaches those elsewhere");
        cluster.set(&web, Family::V4, 8080, &[]);
        cluster.follow();
        assert!(is_refused(wires.outside.inside(|| tcp(node))), "none at all: refused");
    });
}

/// Scales a Service up and down as fast as it goes while a client connects all the time: nobody is refused, whichever
/// generation a packet's lookups see.
#[test]
fn connections_go_on_while_endpoints_come_and_go() {
    isolated(|| {
        let wires = wires();
        let mut cluster = Cluster::new(config());
        let (web, _) = both(Protocol::Tcp);
        let mut elsewhere = web.clone();
        elsewhere.external_traffic_policy = TrafficPolicy::Local;
        let endpoints = wires.endpoints(Family::V4);
        cluster.set(&web, Family::V4, 8080, &endpoints);
        cluster.follow();
        let stop = AtomicBool::new(false);
        let (connects, changes) = std::thread::scope(|scope| {
            let client = scope.spawn(|| {
                wires.outside.inside(|| {
                    let mut connects = 0_u32;
                    while !stop.load(Ordering::Relaxed) {
                        for address in [at("10.96.0.1:80"), at("192.168.0.2:30080")] {
                            tcp(address).unwrap_or_else(|error| panic!("{address} after {connects}: {error}"));
                            connects += 1;
                        }
                    }
                    connects
                })
            });
            let start = Instant::now();
            let mut changes = 0_usize;
            while start.elapsed() < Duration::from_millis(1_500) && !client.is_finished() {
                // One and two endpoints, and now and then another policy: new ids for everything that leads to them.
                let of = if changes % 8 < 4 { &web } else { &elsewhere };
                cluster.set(of, Family::V4, 8080, &endpoints[..1 + changes % 2]);
                cluster.follow();
                cluster.nft.retire(Instant::now()).expect("a retirement");
                changes += 1;
            }
            stop.store(true, Ordering::Relaxed);
            (client.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), changes)
        });
        println!("{connects} connects during {changes} changes");
        assert!(connects > 0 && changes > 0);
    });
}
