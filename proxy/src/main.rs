//! `keelson-proxy`: see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    proxy::run(std::env::args_os())
}
