//! The commands of `testscripts/expiry`: a leader's lease clock and the keep-alives beside it. Times are milliseconds.
//!
//! | command | |
//! |---|---|
//! | `config in-flight=N batch=N election=MS spread-from=N per-second=N checkpoint=MS checkpoint-batch=N` | begins anew |
//! | `promote T term=N ID:TTL[:REMAINING]…`, `promote-many T term=N count=N ttl=S`, `demote` | |
//! | `grant T ID TTL`, `revoke T ID`, `checkpoint T ID REMAINING` | applied changes |
//! | `tick T`, `sleep T` (ticks up to T), `doubt T`, `confirm T asked=T` | |
//! | `renew T ID`, `left T ID`, `due T`, `failed ID`, `checkpoints T`, `order` | |
//! | `drain-due from=T to=T` | revokes what falls due, and counts it by seconds |
//! | `ask ID W until=T`, `drive T committed=N applied=N`, `reset-failed ID` | keep-alives |

use std::fmt::Write as _;

use kvstore_core::Error;
use kvstore_core::lease::expiry::{Expiry, ExpiryConfig};
use kvstore_core::lease::keepalive::KeepAlives;
use kvstore_core::lease::{LeaseChange, LeaseState};
use kvstore_core::types::{LeaseId, Timestamp};

use crate::story::{Command, Teller, play_all};

#[test]
fn stories() {
    play_all::<Story>("expiry");
}

struct Story {
    expiry: Expiry,
    keepalives: KeepAlives<String>,
    last_tick: u64,
}

impl Default for Story {
    fn default() -> Self {
        Story { expiry: Expiry::new(ExpiryConfig::new(100, 1000)), keepalives: KeepAlives::default(), last_tick: 0 }
    }
}

impl Teller for Story {
    fn tell(&mut self, command: &Command, out: &mut String) {
        let now = || Timestamp(command.word(0));
        let id = |at| LeaseId(command.word(at));
        let expiry = &mut self.expiry;
        match command.name.as_str() {
            "config" => *self = Story { expiry: Expiry::new(config(command)), ..Story::default() },
            "promote" => {
                let leases = command.words[1..].iter().map(|word| lease(word));
                expiry.promote(now(), command.option("term").unwrap(), leases);
                self.last_tick = now().0;
            }
            "promote-many" => {
                let ttl_s = command.option("ttl").unwrap();
                let leases = (1..=command.option("count").unwrap()).map(|id| LeaseState {
                    id: LeaseId(id),
                    ttl_s,
                    remaining_ttl_s: 0,
                });
                expiry.promote(now(), command.option("term").unwrap(), leases);
                self.last_tick = now().0;
            }
            "demote" => expiry.demote(),
            "grant" => self.change(now(), &LeaseChange::Granted { id: id(1), ttl_s: command.word(2) }),
            "revoke" => self.change(now(), &LeaseChange::Revoked { id: id(1) }),
            "checkpoint" => {
                self.change(now(), &LeaseChange::Checkpointed { id: id(1), remaining_ttl_s: command.word(2) });
            }
            "tick" => {
                expiry.tick(now());
                self.last_tick = now().0;
            }
            "sleep" => {
                while self.last_tick < now().0 {
                    self.last_tick = (self.last_tick + 100).min(now().0);
                    expiry.tick(Timestamp(self.last_tick));
                }
            }
            "doubt" => writeln!(out, "{}", expiry.in_doubt(now())).unwrap(),
            "confirm" => expiry.confirmed(Timestamp(command.option("asked").unwrap()), now()),
            "renew" => writeln!(out, "{:?}", expiry.renew(now(), id(1))).unwrap(),
            "left" => writeln!(out, "{:?}", expiry.remaining(now(), id(1))).unwrap(),
            "due" => match expiry.due(now()) {
                Some(due) if command.has("count") => writeln!(out, "{} in term {}", due.items.len(), due.term).unwrap(),
                due => writeln!(out, "{due:?}").unwrap(),
            },
            "failed" => expiry.revoke_failed(id(0)),
            "checkpoints" => writeln!(out, "{:?}", expiry.checkpoints(now())).unwrap(),
            "order" => match expiry.by_end() {
                Some(order) => writeln!(out, "{order:?}").unwrap(),
                None => writeln!(out, "not primary").unwrap(),
            },
            "ask" => self.keepalives.ask(id(0), command.word(1), Timestamp(command.option("until").unwrap())),
            "drive" => {
                let (committed, applied) =
                    (command.option("committed").unwrap_or(1), command.option("applied").unwrap_or(1));
                for step in self.keepalives.drive(now(), expiry, committed, applied) {
                    writeln!(out, "{step:?}").unwrap();
                }
            }
            "reset-failed" => self.keepalives.reset_failed(id(0)),
            "drain" => {
                for (waiter, error) in self.keepalives.drain(&Error::Stopped) {
                    writeln!(out, "{waiter}: {error}").unwrap();
                }
            }
            "drain-due" => self.drain_due(command, out),
            other => panic!("unknown command {other}"),
        }
    }
}

impl Story {
    fn change(&mut self, now: Timestamp, change: &LeaseChange) {
        self.expiry.change(now, change);
        self.keepalives.changed(change.id());
    }

    /// Revokes everything that falls due between two times, as fast as it may be, and counts a second at a time.
    fn drain_due(&mut self, command: &Command, out: &mut String) {
        let (from, to): (u64, u64) = (command.option("from").unwrap(), command.option("to").unwrap());
        let mut seconds = vec![0; ((to - from) / 1000) as usize];
        for now in (from..to).step_by(100) {
            self.expiry.tick(Timestamp(now));
            while let Some(due) = self.expiry.due(Timestamp(now)) {
                seconds[((now - from) / 1000) as usize] += due.items.len();
                for id in due.items {
                    self.expiry.change(Timestamp(now), &LeaseChange::Revoked { id });
                }
            }
        }
        self.last_tick = to;
        writeln!(out, "{seconds:?}").unwrap();
    }
}

fn lease(word: &str) -> LeaseState {
    let mut parts = word.split(':').map(|part| part.parse().unwrap());
    LeaseState {
        id: LeaseId(parts.next().unwrap()),
        ttl_s: parts.next().unwrap(),
        remaining_ttl_s: parts.next().unwrap_or(0),
    }
}

fn config(command: &Command) -> ExpiryConfig {
    let mut config = ExpiryConfig::new(100, command.option("election").unwrap_or(1000));
    let set = |limit: &mut usize, name: &str| *limit = command.option(name).unwrap_or(*limit);
    set(&mut config.max_in_flight, "in-flight");
    set(&mut config.revoke_batch, "batch");
    set(&mut config.spread_from, "spread-from");
    set(&mut config.spread_per_second, "per-second");
    set(&mut config.checkpoint_batch, "checkpoint-batch");
    config.checkpoint_interval_ms = command.option("checkpoint");
    config
}
