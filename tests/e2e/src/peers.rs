//! Where the real programs are: an environment variable first, then the cache that `make peers` fills, then `PATH`.

use std::io::Write;
use std::path::{Path, PathBuf};

use crate::folder;

/// A program that a test drives or holds ours against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    Keelson,
    KeelsonProxy,
    Etcd,
    Etcdctl,
    Etcdutl,
    /// Debian's, the old client.
    Etcdctl34,
    Benchmark,
    KubeApiserver,
    KubeControllerManager,
    KubeProxy,
    Kubectl,
    H2load,
}

impl Program {
    /// The variable that names it, its manifest under `tests/peers` with the module that carries the version, its file name.
    fn facts(self) -> (&'static str, Option<(&'static str, &'static str, &'static str)>, &'static str) {
        const ETCD: (&str, &str, &str) = ("etcd", include_str!("../../peers/etcd/go.mod"), "go.etcd.io/etcd/server/v3");
        const BENCHMARK: (&str, &str, &str) =
            ("benchmark", include_str!("../../peers/benchmark/go.mod"), "go.etcd.io/etcd/v3");
        const KUBERNETES: (&str, &str, &str) =
            ("kubernetes", include_str!("../../peers/kubernetes/go.mod"), "k8s.io/kubernetes");
        match self {
            Program::Keelson => ("KEELSON_BIN", None, "keelson"),
            Program::KeelsonProxy => ("KEELSON_PROXY_BIN", None, "keelson-proxy"),
            Program::Etcd => ("ETCD_BIN", Some(ETCD), "etcd"),
            Program::Etcdctl => ("ETCDCTL_BIN", Some(ETCD), "etcdctl"),
            Program::Etcdutl => ("ETCDUTL_BIN", Some(ETCD), "etcdutl"),
            Program::Etcdctl34 => ("ETCDCTL34_BIN", None, "etcdctl"),
            Program::Benchmark => ("BENCHMARK_BIN", Some(BENCHMARK), "benchmark"),
            Program::KubeApiserver => ("KUBE_APISERVER_BIN", Some(KUBERNETES), "kube-apiserver"),
            Program::KubeControllerManager => {
                ("KUBE_CONTROLLER_MANAGER_BIN", Some(KUBERNETES), "kube-controller-manager")
            }
            Program::KubeProxy => ("KUBE_PROXY_BIN", Some(KUBERNETES), "kube-proxy"),
            Program::Kubectl => ("KUBECTL_BIN", Some(KUBERNETES), "kubectl"),
            Program::H2load => ("H2LOAD_BIN", None, "h2load"),
        }
    }

    /// Ours are a part of the build: without them there is nothing to test, so their absence is never a skip.
    fn ours(self) -> bool {
        matches!(self, Program::Keelson | Program::KeelsonProxy)
    }
}

/// Where `program` is, or `None` after a loud skip of the calling test.
pub fn need(program: Program) -> Option<PathBuf> {
    let found = find(program);
    if found.is_none() {
        assert!(!program.ours(), "{program:?} is not built: cargo build --release -p kvstore -p proxy --bins");
        skip(&format!("{} is missing (make peers)", program.facts().2));
    }
    found
}

/// Where `program` is, if it is anywhere.
pub fn find(program: Program) -> Option<PathBuf> {
    let (variable, manifest, name) = program.facts();
    if let Some(path) = std::env::var_os(variable) {
        let path = PathBuf::from(path);
        assert!(path.is_file(), "{variable} names {}, which is no file", path.display());
        return Some(path);
    }
    let near = match (program.ours(), manifest) {
        (true, _) => Some(folder::release().join(name)),
        (false, Some((folder, text, module))) => {
            let version = pinned(text, module).unwrap_or_else(|| panic!("{folder}/go.mod does not name {module}"));
            cache().map(|cache| cache.join("peers").join(format!("{folder}-{version}")).join(name))
        }
        (false, None) => None,
    };
    if let Some(path) = near.filter(|path| path.is_file()) {
        return Some(path);
    }
    if program.ours() { None } else { on_path(name) }
}

/// Says that the calling test is skipped, where `make test` counts it; in CI that is a failure.
pub fn skip(reason: &str) {
    assert!(std::env::var_os("CI").is_none(), "may not be skipped in CI: {reason}");
    let test = std::thread::current().name().unwrap_or("main").to_owned();
    // Not eprintln: the harness would swallow it with the output of a test that passes.
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {reason}");
    if let Some(list) = std::env::var_os("KEELSON_SKIPS") {
        let file = std::fs::OpenOptions::new().append(true).create(true).open(list);
        let _ = file.and_then(|mut file| writeln!(file, "{test}: {reason}"));
    }
}

/// The version, without its `v`, that a go.mod pins for a module.
fn pinned<'a>(manifest: &'a str, module: &str) -> Option<&'a str> {
    manifest.lines().find_map(|line| {
        let mut words = line.split_whitespace().skip_while(|word| *word != module);
        words.next()?;
        words.next()?.strip_prefix('v')
    })
}

fn cache() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    variable("KEELSON_CACHE")
        .or_else(|| variable("XDG_CACHE_HOME").map(|cache| cache.join("keelson")))
        .or_else(|| variable("HOME").map(|home| home.join(".cache/keelson")))
}

fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file: &PathBuf| Path::is_file(file))
}
