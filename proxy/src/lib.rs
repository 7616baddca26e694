//! The doing half of `keelson-proxy`: what `proxy-core` decides is written to the kernel here.
//!
//! ```text
//! cli ─▶ config ─▶ daemon: source ─▶ sync ─▶ backend (nft) ─▶ kernel        health, metrics beside it
//!            └───▶ verbs: apply, delete ─▶ store      services ◀─ kernel      --cleanup ─▶ kernel
//! ```
//! - [`daemon`]: the proxy, running; [`source`] feeds [`sync`], which plans and writes; [`health`] and [`metrics`] tell of it;
//! - [`storage`]: Kubernetes' encoding of objects in the store; [`etcd`]: the client of the store;
//! - [`apply`]: objects from files into the store; [`services`]: what is in the kernel, as a table;
//! - [`nft`]: the nftables backend, over [`netlink`]; [`conntrack`]: flows that lead nowhere any more.

pub mod addresses;
pub mod apply;
pub mod cli;
pub mod config;
pub mod conntrack;
pub mod daemon;
pub mod etcd;
pub mod health;
pub mod metrics;
pub mod netlink;
pub mod nft;
pub mod random;
pub mod services;
pub mod source;
pub mod storage;
pub mod sync;

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::process::ExitCode;
use std::time::Duration;

use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use crate::cli::CliError;
use crate::config::{Command, FileConfig, StoreConfig};
use crate::etcd::Etcd;
use crate::nft::kernel::KernelError;
use crate::nft::{Nft, NftError};

/// How long a verb waits for a store that does not answer.
const VERB_PATIENCE: Duration = Duration::from_secs(10);

/// The program: what was typed, to an exit status. Every failure is one line on standard error.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match cli::parse(args) {
        Ok(cli) => cli,
        Err(CliError::Help(text)) => return print(&text),
        Err(CliError::Wrong(line)) => return fail(&line),
    };
    let command = match Command::of(cli, host_name) {
        Ok(command) => command,
        Err(error) => return fail(&error.to_string()),
    };
    match command {
        Command::Version => print(&format!("keelson-proxy {}\n", env!("CARGO_PKG_VERSION"))),
        Command::File(config) => write_file(config),
        Command::Services { store } => list_services(store),
        Command::Cleanup { verbosity } => {
            log_to_stderr(verbosity);
            clean_up()
        }
        Command::Proxy(config) => {
            log_to_stderr(config.verbosity);
            match runtime()
                .map_err(|error| error.to_string())
                .and_then(|runtime| runtime.block_on(daemon::run(*config)).map_err(|error| error.to_string()))
            {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => fail(&error),
            }
        }
    }
}

/// `-v` as Kubernetes' programs count it: 2 is what one wants to know, 4 is for debugging, from 6 on everything.
fn log_to_stderr(verbosity: u8) {
    let level = match verbosity {
        0..=3 => tracing::Level::INFO,
        4..=5 => tracing::Level::DEBUG,
        _ => tracing::Level::TRACE,
    };
    // Libraries below us speak from their own level on: what they debug is not what we debug.
    let filter = tracing_subscriber::filter::Targets::new()
        .with_default(tracing::Level::WARN)
        .with_target("proxy", level)
        .with_target("proxy_core", level);
    let format = tracing_subscriber::fmt::layer().with_writer(io::stderr).with_ansi(false);
    // Set already only where a test has set it.
    let _ = tracing_subscriber::registry().with(format.with_filter(filter)).try_init();
}

/// `--cleanup`.
fn clean_up() -> ExitCode {
    match Nft::open().and_then(|mut nft| nft.cleanup()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error @ NftError::Kernel(KernelError::Owned { .. })) => {
            fail(&format!("nftables: {error}: is keelson-proxy still running?"))
        }
        Err(error) => fail(&format!("nftables: {error}")),
    }
}

/// `services`.
fn list_services(store: Option<StoreConfig>) -> ExitCode {
    let listed = match Nft::open().and_then(|mut nft| nft.listing()) {
        Ok(listed) => listed,
        Err(error) => return fail(&format!("nftables: {error}")),
    };
    let names = store.map(|store| {
        let runtime = runtime().map_err(|error| error.to_string())?;
        runtime.block_on(async {
            let etcd = Etcd::new(&store.endpoints, VERB_PATIENCE).map_err(|error| error.to_string())?;
            services::Names::read(&etcd, &store.keys).await.map_err(|error| error.to_string())
        })
    });
    match names.transpose() {
        Ok(names) => print(&services::table(&listed, names.as_ref())),
        Err(error) => fail(&error),
    }
}

fn host_name() -> Option<String> {
    std::fs::read_to_string("/proc/sys/kernel/hostname").ok()
}

fn print(text: &str) -> ExitCode {
    match io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn fail(line: &str) -> ExitCode {
    let _ = writeln!(io::stderr(), "keelson-proxy: {line}");
    ExitCode::FAILURE
}

/// `apply` and `delete`.
fn write_file(config: FileConfig) -> ExitCode {
    let mut objects = Vec::new();
    for file in &config.files {
        let text = if file == "-" {
            let mut text = String::new();
            io::stdin().read_to_string(&mut text).map(|_| text)
        } else {
            std::fs::read_to_string(file)
        };
        let read = text.map_err(|error| error.to_string());
        match read.and_then(|text| apply::read(&text).map_err(|error| error.to_string())) {
            Ok(more) => objects.extend(more),
            Err(error) => return fail(&format!("{file}: {error}")),
        }
    }
    if objects.is_empty() {
        return fail("no objects passed to apply");
    }
    let outcome = runtime().map_err(|error| error.to_string()).and_then(|runtime| {
        runtime.block_on(async {
            let etcd = Etcd::new(&config.store.endpoints, VERB_PATIENCE).map_err(|error| error.to_string())?;
            let target = apply::Target {
                etcd,
                keys: config.store.keys,
                cluster_ip_ranges: config.cluster_ip_ranges,
                node_ports: config.node_ports,
            };
            apply::run(target, config.verb, objects).await.map_err(|error| error.to_string())
        })
    });
    match outcome {
        Ok(reports) => tell(&reports),
        Err(error) => fail(&error),
    }
}

/// What became of each object: what went well to standard output, what did not to standard error.
fn tell(reports: &[apply::Report]) -> ExitCode {
    let mut stdout = io::BufWriter::new(io::stdout().lock());
    let mut stderr = io::stderr().lock();
    let mut code = ExitCode::SUCCESS;
    for report in reports {
        let written = match report.result {
            Ok(_) => writeln!(stdout, "{report}"),
            Err(_) => {
                code = ExitCode::FAILURE;
                stdout.flush().and_then(|()| writeln!(stderr, "{report}"))
            }
        };
        if written.is_err() {
            return ExitCode::FAILURE;
        }
    }
    if stdout.flush().is_err() { ExitCode::FAILURE } else { code }
}

fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}
