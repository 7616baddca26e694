//! The server: parse, judge, bind, run, and say how it went.

use std::process::ExitCode;

use kvstore::config::Config;
use kvstore::{cli, server, telemetry};

/// etcd's exit status for a command line that can't be used.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let typed = match cli::parse(std::env::args().skip(1), std::env::vars()) {
        Ok(typed) => typed,
        Err(error) => return refuse(&error, USAGE),
    };
    if typed.is_true("help") {
        return print(&cli::help());
    }
    if typed.is_true("version") {
        return print(&cli::version());
    }
    let config = match Config::from_typed(&typed) {
        Ok(config) => config,
        Err(error) => return refuse(&error, 1),
    };
    telemetry::start(config.log_level, config.log_format);
    for variable in &typed.used_environment {
        tracing::info!(variable_name = variable, "recognized and used environment variable");
    }
    for variable in &typed.unknown_environment {
        tracing::warn!(environment_variable = variable, "unrecognized environment variable");
    }
    match server::bind(config).and_then(|bound| bound.run()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => refuse(&error, 1),
    }
}

#[expect(clippy::print_stdout, reason = "what --help and --version are for")]
fn print(text: &str) -> ExitCode {
    print!("{text}");
    ExitCode::SUCCESS
}

/// One clear line on stderr.
#[expect(clippy::print_stderr, reason = "the user is looking at this terminal, and logging may not have begun")]
fn refuse(error: &dyn std::error::Error, status: u8) -> ExitCode {
    eprintln!("keelson: {error}");
    ExitCode::from(status)
}
