//! The command line: what is understood, and how what is not is refused: one clear line, exit status not 0, nothing touched.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use e2e::cluster::READY;
use e2e::folder::{Folder, listing};
use e2e::peers::{self, Program};
use e2e::rpc::{self, Rpc};
use e2e::{Cluster, Kind, PATIENCE, Process, http, ports};

on_both!(
    unknown_flags,
    bad_urls,
    bad_timeouts,
    bad_compaction,
    bad_gates,
    missing_from_its_own_cluster,
    spellings,
    environment,
    environment_against_flags,
    ports_in_use,
    version,
    help,
    ready_is_said_once_it_is,
    terminated_politely,
);

fn program(kind: Kind) -> Option<PathBuf> {
    peers::need(match kind {
        Kind::Keelson => Program::Keelson,
        Kind::Etcd => Program::Etcd,
    })
}

/// Runs the server with arguments that it has to refuse, in a folder that it has to leave alone.
#[track_caller]
fn refuses(kind: Kind, folder: &Folder, arguments: &[&str], names: &str) {
    let Some(program) = program(kind) else { return };
    let before = listing(folder.path());
    let mut process = Process::start("server", Command::new(program).current_dir(folder.path()).args(arguments));
    let status = process.wait(Duration::from_secs(20));
    assert!(!status.success(), "{arguments:?} was taken");
    assert_eq!(listing(folder.path()), before, "{arguments:?} touched the folder");
    // etcd prints its whole usage, or a log; ours says it in one line.
    if kind == Kind::Keelson {
        let lines = process.lines();
        assert_eq!(lines.len(), 1, "one clear line: {lines:#?}");
        assert!(lines[0].contains(names), "{:?} does not name {names:?}", lines[0]);
    }
}

fn unknown_flags(kind: Kind) {
    let folder = Folder::new("flags");
    refuses(kind, &folder, &["--unheard-of=1"], "unheard-of");
    refuses(kind, &folder, &["-unheard-of", "1"], "unheard-of");
    refuses(kind, &folder, &["stray"], "stray");
    refuses(kind, &folder, &["--snapshot-count=many"], "snapshot-count");
    refuses(kind, &folder, &["--feature-gates=UnheardOf=true"], "UnheardOf");
    refuses(kind, &folder, &["--log-level=loud"], "log-level");
}

fn bad_urls(kind: Kind) {
    let folder = Folder::new("urls");
    for flag in ["listen-client-urls", "advertise-client-urls", "listen-peer-urls", "initial-advertise-peer-urls"] {
        for url in ["nonsense", "ftp://127.0.0.1:2379", "http://127.0.0.1", "http://127.0.0.1:2379/path"] {
            refuses(kind, &folder, &[&format!("--{flag}={url}")], flag);
        }
    }
    let mut named =
        vec!["--listen-client-urls=http://example.com:2379", "--advertise-client-urls=http://example.com:2379"];
    refuses(kind, &folder, &named, "listen-client-urls");
    named.truncate(0);
    refuses(kind, &folder, &["--listen-client-urls=http://127.0.0.1:2379"], "--advertise-client-urls is required");
    refuses(kind, &folder, &["--initial-cluster=default"], "initial-cluster");
}

fn bad_timeouts(kind: Kind) {
    let folder = Folder::new("timeouts");
    refuses(kind, &folder, &["--election-timeout=499", "--heartbeat-interval=100"], "--election-timeout[499ms]");
    refuses(kind, &folder, &["--election-timeout=50001"], "--election-timeout[50001ms]");
    refuses(kind, &folder, &["--heartbeat-interval=0"], "heartbeat-interval");
}

fn bad_compaction(kind: Kind) {
    let folder = Folder::new("compaction");
    refuses(kind, &folder, &["--auto-compaction-mode=hourly"], "unknown auto-compaction-mode \"hourly\"");
    refuses(kind, &folder, &["--auto-compaction-mode="], "undefined auto-compaction-mode");
    for (retention, why) in [
        ("abc", "time: invalid duration"),
        ("-1", "time: missing unit in duration"),
        ("1.5", "time: missing unit in duration"),
        ("3x", "time: unknown unit"),
    ] {
        for mode in ["periodic", "revision"] {
            let flags = [format!("--auto-compaction-mode={mode}"), format!("--auto-compaction-retention={retention}")];
            refuses(kind, &folder, &flags.each_ref().map(String::as_str), why);
        }
    }
}

fn bad_gates(kind: Kind) {
    let folder = Folder::new("gates");
    let alone = "--feature-gates=LeaseCheckpointPersist=true";
    refuses(kind, &folder, &[alone], "requires enabling feature gate LeaseCheckpoint");
    refuses(kind, &folder, &["--feature-gates=LeaseCheckpoint=maybe"], "LeaseCheckpoint");
}

fn missing_from_its_own_cluster(kind: Kind) {
    let folder = Folder::new("founders");
    let peer = format!("http://127.0.0.1:{}", ports::free());
    let founders = |name: &str, url: &str| format!("--initial-cluster={name}={url}");
    let listen = format!("--listen-peer-urls={peer}");
    let advertise = format!("--initial-advertise-peer-urls={peer}");
    let elsewhere = format!("http://127.0.0.1:{}", ports::free());
    let client = format!("--listen-client-urls=http://127.0.0.1:{}", ports::free());
    let common =
        ["--name=me", "--data-dir=d", &client, "--advertise-client-urls=http://127.0.0.1:1", &listen, &advertise];
    for cluster in [founders("other", &peer), founders("me", &elsewhere)] {
        let Some(program) = program(kind) else { return };
        let mut command = Command::new(program);
        command.current_dir(folder.path()).args(common).arg(&cluster);
        let mut process = Process::start("server", &mut command);
        assert!(!process.wait(Duration::from_secs(20)).success(), "{cluster}");
        if kind == Kind::Keelson {
            let lines = process.lines();
            assert!(lines.len() == 1 && lines[0].contains("initial-cluster"), "{lines:#?}");
            assert_eq!(listing(folder.path()), []);
        }
    }
}

/// The flags of a member on ports and in a folder of its own, as pairs.
fn pairs(folder: &Folder) -> (Vec<(&'static str, String)>, u16) {
    let (client_port, peer_port) = (ports::free(), ports::free());
    let (client, peer) = (format!("http://127.0.0.1:{client_port}"), format!("http://127.0.0.1:{peer_port}"));
    let pairs = vec![
        ("name", "spelled".to_owned()),
        ("data-dir", folder.path().join("data").display().to_string()),
        ("listen-client-urls", client.clone()),
        ("advertise-client-urls", client),
        ("listen-peer-urls", peer.clone()),
        ("initial-advertise-peer-urls", peer.clone()),
        ("initial-cluster", format!("spelled={peer}")),
        ("heartbeat-interval", "50".to_owned()),
        ("election-timeout", "500".to_owned()),
        ("snapshot-count", "5000".to_owned()),
        ("quota-backend-bytes", "1000000000".to_owned()),
        ("watch-progress-notify-interval", "5s".to_owned()),
        ("feature-gates", "InitialCorruptCheck=true".to_owned()),
        ("initial-cluster-token", "tok".to_owned()),
        ("initial-cluster-state", "new".to_owned()),
        ("log-level", "info".to_owned()),
    ];
    (pairs, client_port)
}

fn serves_with_its_quota(port: u16) {
    let url = format!("http://127.0.0.1:{port}");
    let status = rpc::run(async { Rpc::to(&url, PATIENCE).status().await.unwrap() });
    assert_eq!(status.db_size_quota, 1_000_000_000);
}

fn spellings(kind: Kind) {
    let Some(program) = program(kind) else { return };
    let spell: [fn(&str, &str) -> Vec<String>; 4] = [
        |flag, value| vec![format!("--{flag}={value}")],
        |flag, value| vec![format!("-{flag}={value}")],
        |flag, value| vec![format!("--{flag}"), value.to_owned()],
        |flag, value| vec![format!("-{flag}"), value.to_owned()],
    ];
    for style in spell {
        let folder = Folder::new("spelling");
        let (pairs, port) = pairs(&folder);
        let arguments: Vec<String> = pairs.iter().flat_map(|(flag, value)| style(flag, value)).collect();
        let process = Process::start("server", Command::new(&program).args(&arguments));
        process.wait_for(READY, PATIENCE);
        serves_with_its_quota(port);
    }
}

fn variable(flag: &str) -> String {
    format!("ETCD_{}", flag.replace('-', "_").to_uppercase())
}

fn environment(kind: Kind) {
    let Some(program) = program(kind) else { return };
    let folder = Folder::new("environment");
    let (pairs, port) = pairs(&folder);
    let mut command = Command::new(program);
    command.envs(pairs.iter().map(|(flag, value)| (variable(flag), value))).env("ETCD_UNHEARD_OF", "1");
    let process = Process::start("server", &mut command);
    process.wait_for("unrecognized environment variable", PATIENCE);
    process.wait_for("recognized and used environment variable", PATIENCE);
    process.wait_for(READY, PATIENCE);
    serves_with_its_quota(port);
}

fn environment_against_flags(kind: Kind) {
    let Some(program) = program(kind) else { return };
    let folder = Folder::new("shadow");
    let mut command = Command::new(program);
    command.current_dir(folder.path()).arg("--name=typed").env("ETCD_NAME", "exported");
    let mut process = Process::start("server", &mut command);
    assert!(!process.wait(Duration::from_secs(20)).success());
    process.wait_for("conflicting environment variable", Duration::ZERO);
    process.wait_for("ETCD_NAME", Duration::ZERO);
    assert_eq!(listing(folder.path()), []);
}

fn ports_in_use(kind: Kind) {
    let Some(cluster) = Cluster::start(kind, 1) else { return };
    let folder = Folder::new("in-use");
    let Some(program) = program(kind) else { return };
    let (mut pairs, _) = pairs(&folder);
    pairs.retain(|(flag, _)| !flag.ends_with("client-urls"));
    let taken = cluster.members[0].client_url();
    let mut command = Command::new(program);
    command.args(pairs.iter().map(|(flag, value)| format!("--{flag}={value}")));
    command.arg(format!("--listen-client-urls={taken}")).arg(format!("--advertise-client-urls={taken}"));
    let mut process = Process::start("server", &mut command);
    assert!(!process.wait(Duration::from_secs(20)).success());
    process.wait_for("address already in use", Duration::ZERO);
    assert!(http::get(cluster.members[0].client_port, "/health").contains("true"), "who was there first goes on");
}

fn version(kind: Kind) {
    let Some(program) = program(kind) else { return };
    for spelling in ["--version", "-version"] {
        let output = Command::new(&program).arg(spelling).output().unwrap();
        assert!(output.status.success());
        let text = String::from_utf8(output.stdout).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("etcd Version: 3.7."), "{text}");
        assert!(lines[1].starts_with("Git SHA: ") && lines[2].starts_with("Go Version: "), "{text}");
        assert!(lines[3].starts_with("Go OS/Arch: linux/"), "{text}");
        if kind == Kind::Keelson {
            assert!(text.contains(concat!("Keelson Version: ", env!("CARGO_PKG_VERSION"))), "{text}");
        }
    }
}

fn help(kind: Kind) {
    let Some(program) = program(kind) else { return };
    let output = Command::new(&program).arg("--help").output().unwrap();
    assert!(output.status.success());
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    for flag in ["--name", "--data-dir", "--initial-cluster", "--snapshot-count", "--election-timeout"] {
        assert!(text.contains(flag), "{flag}");
    }
}

/// A member of three that is alone has nobody to elect: it is not ready, and says so only when it is.
fn ready_is_said_once_it_is(kind: Kind) {
    let Some(mut cluster) = Cluster::prepare(kind, 3, &[]) else { return };
    cluster.members[0].spawn();
    let port = cluster.members[0].metrics_port;
    e2e::eventually("the metrics port answers", PATIENCE, || http::ask(port, "GET", "/health").ok());
    let early = cluster.members[0].process().lines();
    assert!(!early.iter().any(|line| line.contains(READY)), "{early:#?}");
    cluster.members[1].spawn();
    cluster.members[2].spawn();
    cluster.members.iter().for_each(e2e::Member::wait_ready);
}

fn terminated_politely(kind: Kind) {
    let Some(mut cluster) = Cluster::start(kind, 1) else { return };
    rpc::run(async { Rpc::new(&cluster.members[0]).put("k", "v").await.unwrap() });
    cluster.members[0].stop();
    cluster.members[0].restart();
    let answer = rpc::run(async { Rpc::new(&cluster.members[0]).get("k").await.unwrap() });
    assert_eq!(answer.kvs[0].value, "v");
}

/// etcd has no such flags missing; ours has TLS still before it, and says so instead of serving in the clear.
#[test]
fn tls_is_refused_until_it_is_there() {
    let folder = Folder::new("tls");
    for flag in [
        "cert-file=c",
        "key-file=k",
        "trusted-ca-file=t",
        "client-cert-auth",
        "client-cert-auth=true",
        "auto-tls",
        "peer-cert-file=c",
        "peer-key-file=k",
        "peer-trusted-ca-file=t",
        "peer-client-cert-auth=true",
        "peer-auto-tls",
    ] {
        let name = flag.split('=').next().unwrap();
        refuses(Kind::Keelson, &folder, &[&format!("--{flag}")], name);
    }
    let https = ["--listen-client-urls=https://127.0.0.1:2379", "--advertise-client-urls=https://127.0.0.1:2379"];
    refuses(Kind::Keelson, &folder, &https, "TLS");
}

/// Another name at other addresses is another member; etcd starts on it and breaks its cluster. A name alone may change.
#[test]
fn the_data_of_another_member_is_refused() {
    let Some(mut cluster) = Cluster::start(Kind::Keelson, 1) else { return };
    let member = &mut cluster.members[0];
    member.kill();
    let (data, client) = (format!("--data-dir={}", member.data_dir.display()), member.client_url());
    // Refused before anything is bound, so any address will do.
    let peer = "http://127.0.0.2:2380";
    let folder = Folder::new("other");
    let arguments = [
        "--name=other".to_owned(),
        data,
        format!("--listen-client-urls={client}"),
        format!("--advertise-client-urls={client}"),
        format!("--listen-peer-urls={peer}"),
        format!("--initial-advertise-peer-urls={peer}"),
        format!("--initial-cluster=other={peer}"),
    ];
    let before = listing(&member.data_dir);
    refuses(Kind::Keelson, &folder, &arguments.each_ref().map(String::as_str), "m1");
    assert_eq!(listing(&member.data_dir), before);
    member.restart();
}

#[test]
fn the_data_of_etcd_is_refused() {
    let Some(mut etcd) = Cluster::start(Kind::Etcd, 1) else { return };
    let member = &mut etcd.members[0];
    member.kill();
    let before = listing(&member.data_dir);
    let folder = Folder::new("etcd-data");
    refuses(Kind::Keelson, &folder, &["--name=m1", &format!("--data-dir={}", member.data_dir.display())], "etcd");
    assert_eq!(listing(&member.data_dir), before);
    member.restart();
}
