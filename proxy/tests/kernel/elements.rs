//! Elements in the real kernel: what is written is read back, refused whole, adopted, watched and removed. And how fast.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use proxy::nft::fake::FakeKernel;
use proxy::nft::kernel::{Kernel, KernelError};
use proxy::nft::listing::Answer;
use proxy::nft::netlink::Netlink;
use proxy::nft::object::{Data, Element, Id, Op, SetId, key};
use proxy::nft::watch::{Foreign, Watch};
use proxy::nft::{Nft, NftError};
use proxy_core::dataplane::Changes;
use proxy_core::model::{Family, Ingress, IpMode, Protocol, TrafficPolicy};

use crate::cluster::{Cluster, config, ip, service};
use crate::netns::{isolated, run};

/// Services of every kind, so that every map has elements.
fn fill(cluster: &mut Cluster) {
    let pods = [(ip("10.244.1.2"), true), (ip("10.244.3.2"), false)];
    let mut web = service("web", &["10.96.0.1"], Protocol::Tcp, 80, Some(30_080));
    web.external_ips = vec![ip("203.0.113.9")];
    web.ingress = vec![Ingress { ip: ip("203.0.113.10"), mode: IpMode::Vip }];
    web.source_ranges =
        ["198.51.100.0/24", "198.51.100.7/32", "192.0.2.0/25"].map(|net| net.parse().expect("a net")).to_vec();
    web.external_traffic_policy = TrafficPolicy::Local;
    cluster.set(&web, Family::V4, 8080, &pods);
    let mut sticky = service("sticky", &["10.96.0.2"], Protocol::Sctp, 81, Some(30_081));
    sticky.affinity_timeout_s = Some(60);
    cluster.set(&sticky, Family::V4, 8081, &pods);
    let pods = [(ip("fd00:244:1::2"), true), (ip("fd00:244:3::2"), false), (ip("fd00:244:3::3"), false)];
    let mut web6 = service("web6", &["fd00:96::1"], Protocol::Udp, 80, Some(30_080));
    web6.ingress = vec![Ingress { ip: ip("2001:db8::10"), mode: IpMode::Vip }];
    web6.source_ranges = vec!["2001:db8:1::/48".parse().expect("a net")];
    cluster.set(&web6, Family::V6, 8080, &pods);
    cluster.set(&service("none", &["10.96.0.3"], Protocol::Tcp, 80, None), Family::V4, 8080, &[]);
}

fn dump<K: Kernel>(kernel: &mut K) -> BTreeMap<(Family, SetId), Vec<Element>> {
    let mut all = BTreeMap::new();
    for family in Family::BOTH {
        for set in SetId::ALL {
            let mut elements = kernel.elements(family, set).expect("a dump");
            elements.sort();
            all.insert((family, set), elements);
        }
    }
    all
}

#[test]
fn the_kernel_and_its_twin_hold_the_same() {
    isolated(|| {
        let mut cluster = Cluster::new(config());
        fill(&mut cluster);
        cluster.follow();
        let mut twin = Nft::new(FakeKernel::default());
        twin.reconcile(cluster.planner.dataplane(), Instant::now()).expect("the twin takes it");
        let real = dump(cluster.nft.kernel());
        for (at, elements) in dump(twin.kernel()) {
            assert_eq!(real[&at], elements, "{at:?}");
            let dynamic = at.1 == SetId::Affinity;
            let filled = at.0 == Family::V6 && matches!(at.1, SetId::Picks | SetId::Slots | SetId::Outside);
            assert!(dynamic || filled || !elements.is_empty(), "{at:?} is empty, which proves nothing");
        }
        for family in Family::BOTH {
            assert_eq!(
                cluster.nft.kernel().chains(family).expect("the chains"),
                twin.kernel().chains(family).expect("the chains")
            );
        }
        // As nft reads them: the fields of every key in their order, and ids as numbers.
        let listing = run("nft", &["list", "ruleset"]);
        for text in [
            "10.96.0.1 . tcp . 80 : 0:6012",
            "tcp . 30080 : 0:6005",
            "0:6000 . tcp . 0 : 10.244.1.2 . 8080",
            "0:6003 . 198.51.100.0/24",
            "10.96.0.0/12",
            "fd00:96::1 . udp . 80 :",
        ] {
            let spaced: String = listing.split_whitespace().collect::<Vec<_>>().join(" ");
            assert!(spaced.contains(text), "{text} is not listed:\n{spaced}");
        }
    });
}

#[test]
fn a_refused_batch_names_the_fault_and_leaves_nothing() {
    isolated(|| {
        let mut cluster = Cluster::new(config());
        fill(&mut cluster);
        cluster.follow();
        let before = dump(cluster.nft.kernel());
        let element = |id, to| Element { key: key().id(Id(id)), data: Data::Id(Id(to)) };
        let family = Family::V4;
        let add = |elements| Op::AddElements { family, set: SetId::Outside, elements };
        let good = add((0x0100_0000..0x0100_2000).map(|id| element(id, 1)).collect());
        let bad = Op::DeleteElements { family, set: SetId::Outside, keys: vec![key().id(Id(77))] };
        let error = cluster.nft.kernel().transact(&[good, bad]).expect_err("a refusal");
        let KernelError::Refused { op, what, .. } = &error else { panic!("{error}") };
        assert_eq!((*op, what.as_str()), (1, "delete 1 elements of ip keelson outside"));
        assert_eq!(error.errno(), Some(libc::ENOENT));
        assert_eq!(dump(cluster.nft.kernel()), before);
        let twice = [add(vec![element(5, 1)]), add(vec![element(5, 2)])];
        let error = cluster.nft.kernel().transact(&twice).expect_err("a refusal");
        assert_eq!(error.errno(), Some(libc::EEXIST), "{error}");
        assert_eq!(dump(cluster.nft.kernel()), before);
    });
}

#[test]
fn a_new_process_adopts_and_writes_no_element() {
    isolated(|| {
        let mut cluster = Cluster::new(config());
        fill(&mut cluster);
        cluster.follow();
        let before = dump(cluster.nft.kernel());
        let elements = before.iter().filter(|((_, set), _)| !set.name().ends_with("steps")).map(|(_, list)| list.len());
        let elements: usize = elements.sum();

        // While the first lives, its tables are its own.
        let mut second = Nft::open().expect("a netlink socket");
        let error = second.adopt(&cluster.planner.dataplane().node).expect_err("somebody's");
        assert!(matches!(error, NftError::Kernel(KernelError::Owned { .. })), "{error}");
        let error = second.cleanup().expect_err("somebody's");
        assert!(matches!(error, NftError::Kernel(KernelError::Owned { .. })), "{error}");
        assert_eq!(second.listing().expect("reading is free").len(), 10);

        cluster.nft = second;
        let mut watch = Watch::open(0).expect("a listener");
        let adopted = cluster.nft.adopt(&cluster.planner.dataplane().node).expect("an adoption");
        assert_eq!((adopted.tables, adopted.elements, adopted.replaced), (2, elements, 0));
        let applied = cluster.nft.reconcile(cluster.planner.dataplane(), Instant::now()).expect("nothing to do");
        assert_eq!((applied.transactions, applied.bytes), (0, 0));
        assert_eq!(dump(cluster.nft.kernel()), before);
        // The claim of ownership is all that was heard.
        assert_eq!(watch.poll().expect("news"), Some(Foreign::Touched));
        assert_eq!(watch.poll().expect("news"), None);
        let generation = cluster.nft.kernel().generation().expect("a generation");
        cluster.nft.distrust();
        cluster.nft.reconcile(cluster.planner.dataplane(), Instant::now()).expect("nothing to do");
        assert_eq!(cluster.nft.kernel().generation().expect("a generation"), generation);
        run("nft", &["flush", "ruleset"]);
        assert_eq!(dump(cluster.nft.kernel()), before, "an owned table survives another tool");
    });
}

#[test]
fn a_foreign_change_is_heard_and_repaired() {
    isolated(|| {
        let mut cluster = Cluster::new(config());
        fill(&mut cluster);
        cluster.follow();
        let before = dump(cluster.nft.kernel());
        let mut watch = Watch::open(cluster.nft.port()).expect("a listener");
        // Ours is not heard, nor is another table's.
        let many: Vec<_> = (0..200).map(|n| (ip(&format!("10.244.3.{n}")), false)).collect();
        let large = service("large", &["10.96.0.9"], Protocol::Tcp, 80, None);
        cluster.set(&large, Family::V4, 8080, &many);
        cluster.follow();
        run("nft", &["add", "table", "ip", "other"]);
        run("nft", &["add", "set", "ip", "other", "keelson", "{ type ipv4_addr; }"]);
        assert_eq!(watch.poll().expect("no news"), None);
        let large = dump(cluster.nft.kernel());
        assert_ne!(large, before);
        // Whoever owns the table cannot be interfered with; so the owner goes first.
        let config = cluster.planner.dataplane().clone();
        drop(std::mem::replace(&mut cluster.nft, Nft::open().expect("a netlink socket")));
        let table = run("nft", &["list", "map", "ip", "keelson", "endpoints"]);
        assert!(table.contains("map endpoints"));
        let mut watch = Watch::open(cluster.nft.port()).expect("a listener");
        run("nft", &["flush", "map", "ip", "keelson", "endpoints"]);
        run("nft", &["delete", "table", "ip6", "keelson"]);
        assert_eq!(watch.poll().expect("news"), Some(Foreign::Touched));
        cluster.nft.distrust();
        cluster.nft.reconcile_changes(&config, &Changes::default(), Instant::now()).expect("a repair");
        let repaired = dump(cluster.nft.kernel());
        for ((family, set), elements) in &large {
            assert_eq!(repaired[&(*family, *set)].len(), elements.len(), "{family} {set:?}");
        }
    });
}

#[test]
fn one_endpoint_is_one_small_batch_without_nft() {
    isolated(|| {
        let mut cluster = Cluster::new(config());
        let [pod, more] = [(ip("10.244.3.2"), false), (ip("10.244.3.3"), false)];
        for n in 0..1_000_u32 {
            let address = format!("10.100.{}.{}", n >> 8, n & 255);
            let web = service(&format!("s{n}"), &[&address], Protocol::Tcp, 80, None);
            cluster.set(&web, Family::V4, 8080, &[pod]);
        }
        cluster.follow();
        let mut monitor = Monitor::start();
        let web = service("s500", &["10.100.1.244"], Protocol::Tcp, 80, None);
        cluster.set(&web, Family::V4, 8080, &[pod, more]);
        let applied = cluster.follow();
        assert_eq!((applied.transactions, applied.elements_added, applied.elements_deleted), (1, 2, 1));
        println!("one endpoint more: {} messages, {} bytes in one batch", applied.messages, applied.bytes);
        let heard = monitor.until_generation();
        let lines: Vec<_> = heard.iter().filter(|line| line.contains("element ip ")).collect();
        assert_eq!(lines.len(), 3, "{heard:?}");
        assert!(applied.bytes < 600, "{}", applied.bytes);
    });
}

/// `nft monitor`, line by line.
struct Monitor {
    child: std::process::Child,
    lines: std::sync::mpsc::Receiver<String>,
}

impl Monitor {
    fn start() -> Monitor {
        let mut child =
            Command::new("nft").arg("monitor").stdout(Stdio::piped()).spawn().expect("nft monitor can be started");
        let output = BufReader::new(child.stdout.take().expect("it is piped"));
        let (sender, lines) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let mut monitor = Monitor { child, lines };
        // It says nothing when it is ready: a table of our own is made until it is heard.
        let ready = (0..100).any(|n| {
            run("nft", &["add", "table", "ip", &format!("probe{n}")]);
            monitor.next(Duration::from_millis(100)).is_some()
        });
        assert!(ready, "nft monitor hears nothing");
        while monitor.next(Duration::from_millis(200)).is_some() {}
        monitor
    }

    fn next(&mut self, patience: Duration) -> Option<String> {
        self.lines.recv_timeout(patience).ok()
    }

    /// Everything up to the end of a transaction.
    fn until_generation(&mut self) -> Vec<String> {
        let mut heard = Vec::new();
        while let Some(line) = self.next(Duration::from_secs(5)) {
            let last = line.contains("new generation");
            heard.push(line);
            if last {
                return heard;
            }
        }
        panic!("no end of a transaction: {heard:?}");
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Processor time of this thread and of the kernel on its behalf: other tests run beside this one.
fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: time is a live timespec.
    let done = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    assert_eq!(done, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Prints what it costs; asserts only that it is done. `cargo test --release -- --nocapture figures` shows it.
#[test]
fn figures() {
    for services in [1_000_u32, 10_000] {
        isolated(|| {
            let mut cluster = Cluster::new(config());
            let pods =
                |n: u32| [0, 1].map(|at| (std::net::IpAddr::from((0x0af4_0000 + n * 4 + at).to_be_bytes()), false));
            let web = |n: u32| {
                let address = std::net::IpAddr::from((0x0a60_0001 + n).to_be_bytes()).to_string();
                service(&format!("s{n}"), &[&address], Protocol::Tcp, 80, None)
            };
            for n in 0..services {
                cluster.set(&web(n), Family::V4, 8080, &pods(n));
            }
            cluster.planner.update(&mut cluster.state);
            let start = cpu_time();
            let applied = cluster.nft.reconcile(cluster.planner.dataplane(), Instant::now()).expect("a load");
            println!(
                "{services} services x 2: {:?}, {} elements, {} messages, {} bytes, {} transaction",
                cpu_time() - start,
                applied.elements_added,
                applied.messages,
                applied.bytes,
                applied.transactions,
            );
            let mut times = Vec::new();
            let mut last = None;
            for round in 0..200_u32 {
                let n = round / 2 * 37 % services;
                let both = pods(n);
                cluster.set(&web(n), Family::V4, 8080, if round % 2 == 0 { &both[..1] } else { &both });
                let changes = cluster.planner.update(&mut cluster.state);
                let now = Instant::now();
                let start = cpu_time();
                let applied = cluster.nft.reconcile_changes(cluster.planner.dataplane(), &changes, now);
                times.push(cpu_time() - start);
                last = Some(applied.expect("a change"));
            }
            times.sort_unstable();
            println!(
                "  one endpoint: p50 {:?}, p99 {:?}; {:?}",
                times[100],
                times[198],
                last.map(|a| (a.messages, a.bytes))
            );
            let start = cpu_time();
            let applied = cluster.nft.reconcile(cluster.planner.dataplane(), Instant::now()).expect("a full compare");
            println!("  full compare, {} changes: {:?}", applied.elements_added, cpu_time() - start);
            let mut next = Nft::open().expect("a netlink socket");
            drop(std::mem::replace(&mut cluster.nft, Nft::open().expect("a netlink socket")));
            let start = cpu_time();
            let adopted = next.adopt(&cluster.planner.dataplane().node).expect("an adoption");
            println!("  adoption of {} elements: {:?}", adopted.elements, cpu_time() - start);
            let rows = next.listing().expect("a listing");
            assert_eq!(rows.len(), services as usize);
            assert!(rows.iter().all(|row| matches!(&row.answer, Answer::Endpoints(list) if !list.is_empty())));
            let start = cpu_time();
            next.cleanup().expect("a cleanup");
            println!("  cleanup: {:?}", cpu_time() - start);
            assert_eq!(run("nft", &["list", "ruleset"]), "");
            assert!(Netlink::open().expect("a socket").tables().expect("a list").is_empty());
        });
    }
}

/// A generator of small numbers that is the same every time.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }

    fn some<T: Copy>(&mut self, list: &[T]) -> Vec<T> {
        list.iter().filter(|_| self.roll(2) == 0).copied().collect()
    }
}

/// Whatever the twin takes the real kernel takes, and it holds the same afterwards: overlapping, adjacent and changing
/// ranges, policies, affinity and sizes, in an order nobody would think of.
#[test]
fn any_sequence_of_changes_suits_the_kernel_as_its_twin() {
    isolated(|| {
        let mut dice = Dice(7);
        let mut cluster = Cluster::new(config());
        let mut twin = Nft::new(FakeKernel::default());
        let mut now = Instant::now();
        let nets = |list: Vec<&str>| list.into_iter().map(|net| net.parse().expect("a net")).collect::<Vec<_>>();
        let ranges =
            ["10.0.0.0/8", "10.0.0.0/9", "10.128.0.0/9", "192.0.2.0/25", "192.0.2.128/25", "192.0.2.7/32", "0.0.0.0/1"];
        let cidrs = ["10.96.0.0/12", "10.96.0.0/16", "10.112.0.0/16", "10.97.0.0/24", "fd00:96::/108", "240.0.0.0/4"];
        for step in 0..300 {
            if dice.roll(8) == 0 {
                let mut config = config();
                config.service_cidrs = nets(dice.some(&cidrs));
                config.masquerade_all = dice.roll(4) == 0;
                cluster.planner.reconfigure(config);
            }
            let n = dice.roll(5);
            let mut web = service(&format!("s{n}"), &[&format!("10.96.0.{}", n + 1)], Protocol::Tcp, 80, None);
            web.ports[0].node_port = (dice.roll(2) == 0).then_some(30_000 + n as u16);
            web.service_type = proxy_core::model::ServiceType::LoadBalancer;
            web.ingress = vec![Ingress { ip: ip(&format!("203.0.113.{n}")), mode: IpMode::Vip }];
            web.source_ranges = nets(dice.some(&ranges));
            web.affinity_timeout_s = (dice.roll(3) == 0).then_some(60);
            if dice.roll(2) == 0 {
                web.external_traffic_policy = TrafficPolicy::Local;
            }
            let pods =
                ["10.244.1.2", "10.244.1.3", "10.244.1.4", "10.244.3.2", "10.244.3.3"].map(|pod| (ip(pod), true));
            cluster.set(&web, Family::V4, 8080, &dice.some(&pods));
            let changes = cluster.planner.update(&mut cluster.state);
            let desired = cluster.planner.dataplane();
            twin.reconcile_changes(desired, &changes, now).expect("the twin takes the change");
            let applied = cluster.nft.reconcile_changes(desired, &changes, now);
            applied.unwrap_or_else(|error| panic!("step {step}: {error}\n{changes}"));
            if dice.roll(3) == 0 {
                now += proxy::nft::diff::RETIRE_AFTER;
                twin.retire(now).expect("the twin retires");
                cluster.nft.retire(now).expect("the kernel retires");
            }
            if dice.roll(10) == 0 {
                let real = dump(cluster.nft.kernel());
                for (at, elements) in dump(twin.kernel()) {
                    assert_eq!(real[&at], elements, "step {step}: {at:?}");
                }
            }
        }
    });
}
