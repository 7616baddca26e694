//! Runs seeds and tells what came of them.

use std::ops::Range;
use std::process::ExitCode;

use clap::Parser;
use sim::{Options, Sabotage, run};

/// Simulates clusters of three members, one for each seed.
#[derive(Parser)]
struct Arguments {
    /// One seed.
    #[arg(long, conflicts_with = "seeds")]
    seed: Option<u64>,
    /// A range of seeds, the end excluded.
    #[arg(long, value_parser = range, default_value = "0..100")]
    seeds: Range<u64>,
    /// How long things are broken, in milliseconds of the simulation.
    #[arg(long, default_value_t = 20_000)]
    faults_ms: u64,
    /// Tell everything that happened, if it went wrong.
    #[arg(long)]
    trace: bool,
    /// Put a fault into the shell, which must be found.
    #[arg(long)]
    sabotage: Option<Sabotage>,
    /// Go on after a failure.
    #[arg(long)]
    keep_going: bool,
}

fn range(text: &str) -> Result<Range<u64>, String> {
    let (from, to) = text.split_once("..").ok_or("a range looks like 0..100")?;
    let number = |text: &str| text.parse().map_err(|_| format!("{text:?} is no number"));
    Ok(number(from)?..number(to)?)
}

#[allow(clippy::print_stdout, reason = "telling is what this program is for")]
fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let seeds = arguments.seed.map_or(arguments.seeds.clone(), |seed| seed..seed + 1);
    let mut failures = 0;
    for seed in seeds {
        let options =
            Options { seed, faults_ms: arguments.faults_ms, trace: arguments.trace, sabotage: arguments.sabotage };
        match run(options) {
            Ok(report) => println!("{report:?}"),
            Err(failure) => {
                failures += 1;
                for line in &failure.trace {
                    println!("{line}");
                }
                println!("seed {seed} failed: {}\n  repeat it: {}", failure.reason, failure.command());
                if !arguments.keep_going {
                    break;
                }
            }
        }
    }
    if failures == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
