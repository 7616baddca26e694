//! The commands of `testscripts/compactor`: automatic compaction. Times are in seconds, or `6m`, `2h`.
//!
//! | command | |
//! |---|---|
//! | `time PERIOD revision=N`, `revisions N revision=N` | begins anew at time 0 |
//! | `rate N` | the newest revision rises by so much at each look from now on |
//! | `run UNTIL` | looks whenever it is time to; each compaction succeeds |
//! | `run UNTIL fails`, `run UNTIL follows` | each compaction fails; another member leads |

use std::fmt::Write as _;

use kvstore_core::compactor::{Compactor, Retention};
use kvstore_core::types::Timestamp;

use crate::story::{Command, Teller, play_all};

#[test]
fn stories() {
    play_all::<Story>("compactor");
}

struct Story {
    compactor: Compactor,
    revision: i64,
    rate: i64,
}

impl Default for Story {
    fn default() -> Self {
        Story { compactor: Compactor::new(Retention::Revisions { count: 0 }, Timestamp(0), 0), revision: 0, rate: 0 }
    }
}

impl Teller for Story {
    fn tell(&mut self, command: &Command, out: &mut String) {
        match command.name.as_str() {
            "time" => self.begin(Retention::Time { ms: ms(&command.words[0]) }, command, out),
            "revisions" => self.begin(Retention::Revisions { count: command.word(0) }, command, out),
            "rate" => self.rate = command.word(0),
            "run" => self.run(command, out),
            other => panic!("unknown command {other}"),
        }
    }
}

impl Story {
    fn begin(&mut self, retention: Retention, command: &Command, out: &mut String) {
        self.revision = command.option("revision").unwrap();
        self.compactor = Compactor::new(retention, Timestamp(0), self.revision);
        writeln!(out, "looks every {}", shown(self.compactor.interval_ms())).unwrap();
    }

    fn run(&mut self, command: &Command, out: &mut String) {
        let until = ms(&command.words[0]);
        while self.compactor.next().0 <= until {
            let now = self.compactor.next();
            self.revision += self.rate;
            let Some(target) = self.compactor.look(now, self.revision, !command.has("follows")) else { continue };
            let (compacted, says) = if command.has("fails") { (false, ", in vain") } else { (true, "") };
            self.compactor.done(now, self.revision, target, compacted);
            writeln!(out, "{}: compact to {target} of {}{says}", shown(now.0), self.revision).unwrap();
        }
    }
}

fn ms(text: &str) -> u64 {
    let (number, unit) = text.split_at(text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len()));
    let number: u64 = number.parse().unwrap();
    match unit {
        "h" => number * 3_600_000,
        "m" => number * 60_000,
        "ms" => number,
        _ => number * 1_000,
    }
}

fn shown(ms: u64) -> String {
    let mut out = String::new();
    let mut rest = ms;
    for (unit, size) in [("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)] {
        if rest >= size {
            write!(out, "{}{unit}", rest / size).unwrap();
            rest %= size;
        }
    }
    out
}
