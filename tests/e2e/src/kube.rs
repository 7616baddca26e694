//! A real kube-apiserver on a store, a kube-controller-manager beside it, and kubectl and a client of our own to talk to it.

pub mod client;

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use self::client::Client;
use crate::ctl::Answer;
use crate::peers::{self, Program};
use crate::{Folder, PATIENCE, Process, eventually, ports};

/// The token of a user who may do everything.
const TOKEN: &str = "token-of-the-tests";

/// One kube-apiserver, ready when it is returned.
#[derive(Debug)]
pub struct Apiserver {
    pub port: u16,
    /// From the start of the process to the first time it said that it is ready.
    pub ready_after: Duration,
    kubectl: PathBuf,
    process: Process,
    folder: Folder,
}

impl Apiserver {
    /// Starts one on the store at `endpoints`; `None` after a loud skip because a program is missing.
    pub fn start(endpoints: &str) -> Option<Apiserver> {
        Apiserver::start_with(endpoints, &[])
    }

    /// The same with more flags.
    pub fn start_with(endpoints: &str, extra: &[&str]) -> Option<Apiserver> {
        let (program, kubectl) = (peers::need(Program::KubeApiserver)?, peers::need(Program::Kubectl)?);
        let folder = Folder::new("apiserver");
        let file = |name: &str| folder.path().join(name).display().to_string();
        let made = Command::new("openssl").args(["genrsa", "-out", &file("sa.key"), "2048"]).output();
        assert!(made.is_ok_and(|output| output.status.success()), "openssl makes a key");
        fs::write(file("tokens.csv"), format!("{TOKEN},admin,1,system:masters\n")).unwrap();
        let port = ports::free();
        let mut command = Command::new(program);
        command.args([
            format!("--etcd-servers={endpoints}"),
            "--service-cluster-ip-range=10.96.0.0/12".to_owned(),
            "--authorization-mode=RBAC".to_owned(),
            format!("--token-auth-file={}", file("tokens.csv")),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!("--service-account-key-file={}", file("sa.key")),
            format!("--service-account-signing-key-file={}", file("sa.key")),
            "--disable-admission-plugins=ServiceAccount".to_owned(),
            format!("--cert-dir={}", file("certs")),
            "--bind-address=127.0.0.1".to_owned(),
            format!("--secure-port={port}"),
        ]);
        command.args(extra);
        let begun = Instant::now();
        let process = Process::start("kube-apiserver", &mut command);
        let mut server = Apiserver { port, ready_after: Duration::ZERO, kubectl, process, folder };
        process_ready(&server);
        server.ready_after = begun.elapsed();
        Some(server)
    }

    pub fn kubectl(&self, arguments: &[&str]) -> Answer {
        let output = self.command(arguments).output().expect("kubectl starts");
        Answer {
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            status: output.status.code().unwrap_or(-1),
        }
    }

    /// The output of a kubectl that has to succeed.
    pub fn ok(&self, arguments: &[&str]) -> String {
        let answer = self.kubectl(arguments);
        assert_eq!(answer.status, 0, "kubectl {arguments:?}: {answer:?}");
        answer.stdout
    }

    /// A kubectl that does not end by itself.
    pub fn begin(&self, arguments: &[&str]) -> Process {
        Process::start(&format!("kubectl {}", arguments.join(" ")), &mut self.command(arguments))
    }

    /// Starts a kube-controller-manager with these controllers only, in nobody's way; `None` after a loud skip.
    pub fn controllers(&self, names: &[&str]) -> Option<Process> {
        let program = peers::need(Program::KubeControllerManager)?;
        let file = |name: &str| self.folder.path().join(name).display().to_string();
        let config = serde_json::json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "it",
            "clusters": [{"name": "it", "cluster": {
                "server": format!("https://127.0.0.1:{}", self.port), "insecure-skip-tls-verify": true,
            }}],
            "users": [{"name": "it", "user": {"token": TOKEN}}],
            "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
        });
        fs::write(file("kubeconfig"), config.to_string()).unwrap();
        let mut command = Command::new(program);
        command.args([
            format!("--kubeconfig={}", file("kubeconfig")),
            "--leader-elect=false".to_owned(),
            format!("--service-account-private-key-file={}", file("sa.key")),
            format!("--root-ca-file={}", file("certs/apiserver.crt")),
            format!("--controllers={}", names.join(",")),
            // Its default of 20 calls a second is made for a control plane that others use as well.
            "--kube-api-qps=300".to_owned(),
            "--kube-api-burst=600".to_owned(),
            format!("--cert-dir={}", file("controllers")),
            "--bind-address=127.0.0.1".to_owned(),
            format!("--secure-port={}", ports::free()),
        ]);
        Some(Process::start("kube-controller-manager", &mut command))
    }

    /// A client that belongs to the runtime it is first used on.
    pub fn client(&self) -> Client {
        Client::new(self.port, TOKEN, &self.folder.path().join("certs/apiserver.crt"))
    }

    /// A file for kubectl to read.
    pub fn write(&self, name: &str, text: &str) -> String {
        let path = self.folder.path().join(name);
        fs::write(&path, text).unwrap();
        path.display().to_string()
    }

    pub fn process(&self) -> &Process {
        &self.process
    }

    /// SIGTERM, and the exit that follows.
    pub fn stop(&mut self) -> std::process::ExitStatus {
        self.process.signal("TERM");
        self.process.wait(PATIENCE)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.kubectl);
        command
            .arg(format!("--server=https://127.0.0.1:{}", self.port))
            .arg(format!("--token={TOKEN}"))
            .args(["--insecure-skip-tls-verify", "--kubeconfig=/dev/null", "--cache-dir"])
            .arg(self.folder.path().join("kubectl"))
            .args(arguments);
        command
    }
}

/// Asks until the server says that it is ready; a fresh one says 500 with a list for a while.
fn process_ready(server: &Apiserver) {
    // kubectl takes a tenth of a second to start, curl a hundredth.
    let url = format!("https://127.0.0.1:{}/readyz", server.port);
    let header = format!("Authorization: Bearer {TOKEN}");
    eventually("kube-apiserver is ready", 2 * PATIENCE, || {
        let output = Command::new("curl").args(["-sk", "--max-time", "5", "-H", &header, &url]).output().ok()?;
        (output.stdout == b"ok").then_some(())
    });
}
