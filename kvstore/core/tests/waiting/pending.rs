//! The commands of `testscripts/pending`; waiters are words.
//!
//! | command | |
//! |---|---|
//! | `propose ID W at=T for=T`, `outcome ID` | |
//! | `ask ROUND W at=T for=T`, `ready ROUND index=N`, `read W index=N at=T for=T`, `applied N` | |
//! | `elected at=T`, `expire at=T link=none/lost/T`, `drain` | |

use std::fmt::Write as _;

use kvstore_core::Error;
use kvstore_core::pending::{Link, Pending};
use kvstore_core::types::RequestId;

use crate::story::{Command, Teller, play_all};

#[test]
fn stories() {
    play_all::<Story>("pending");
}

struct Story(Pending<String>);

impl Default for Story {
    fn default() -> Self {
        Story(Pending::new(10))
    }
}

impl Teller for Story {
    fn tell(&mut self, command: &Command, out: &mut String) {
        let pending = &mut self.0;
        let at = || command.option("at").unwrap();
        let timeout = || command.option("for").unwrap();
        match command.name.as_str() {
            "propose" => pending.propose(RequestId(command.word(0)), command.word(1), at(), timeout()),
            "outcome" => {
                let waiter = pending.outcome(RequestId(command.word(0)));
                writeln!(out, "{}", waiter.as_deref().unwrap_or("nobody")).unwrap();
            }
            "ask" => pending.ask(command.word(0), command.word(1), at(), timeout()),
            "ready" => pending.ready(command.word(0), command.option("index").unwrap()),
            "read" => pending.read(command.word(0), command.option("index").unwrap(), at(), timeout()),
            "applied" => writeln!(out, "{:?}", pending.applied(command.word(0))).unwrap(),
            "elected" => pending.leader_elected(at()),
            "expire" => {
                let link = match command.option::<String>("link").as_deref() {
                    Some("none") => Link::NoLeader,
                    Some("lost") => Link::Lost,
                    Some(since) => Link::Since(since.parse().unwrap()),
                    None => Link::Since(0),
                };
                for (waiter, error) in pending.expire(at(), link) {
                    writeln!(out, "{waiter}: {error}").unwrap();
                }
            }
            "drain" => {
                for (waiter, error) in pending.drain(&Error::Stopped) {
                    writeln!(out, "{waiter}: {error}").unwrap();
                }
            }
            "count" => writeln!(out, "{} proposals, {} reads", pending.proposals(), pending.reads()).unwrap(),
            other => panic!("unknown command {other}"),
        }
    }
}
