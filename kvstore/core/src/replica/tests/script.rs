//! The replica's stories (`testscripts/replica`): a desk of three members, moved by commands.

use std::fmt::Write as _;

use super::*;
use crate::testing;

#[test]
fn stories() {
    testing::stories("replica", || {
        let mut desk = Desk::new(&[A, B, C]);
        let mut reads = 0;
        let mut requests = 0;
        move |line: &str| {
            let words: Vec<&str> = line.split_whitespace().collect();
            command(&mut desk, &mut reads, &mut requests, &words)
        }
    });
}

fn id(word: &str) -> MemberId {
    MemberId(u64::from(word.as_bytes()[0] - b'a') + 1)
}

fn name(id: MemberId) -> char {
    char::from(b'a' + u8::try_from(id.0 - 1).unwrap())
}

fn command(desk: &mut Desk, reads: &mut u64, requests: &mut u64, words: &[&str]) -> String {
    match words {
        ["elect", member] => desk.elect(id(member)),
        ["tick", times] => desk.tick(times.parse().unwrap()),
        ["tick", member, times] => {
            for _ in 0..times.parse().unwrap() {
                desk.at(id(member)).step(Input::Tick);
                desk.settle();
            }
        }
        ["propose", member, texts @ ..] => {
            let proposals = texts.iter().map(|text| {
                *requests += 1;
                proposal(*requests, text)
            });
            let proposals = proposals.collect();
            desk.at(id(member)).step(Input::Propose(proposals));
            desk.settle();
        }
        ["revoke", member, term, text] => {
            *requests += 1;
            let proposals = vec![proposal(*requests, text)];
            desk.at(id(member)).step(Input::ProposeAsLeader { term: term.parse().unwrap(), proposals });
            desk.settle();
        }
        ["read", member] => {
            *reads += 1;
            desk.at(id(member)).step(Input::Read(ReadId(*reads)));
            desk.settle();
        }
        ["hand-over", from, to] => {
            desk.at(id(from)).step(Input::TransferLeader(id(to)));
            desk.settle();
        }
        ["cut-off", members @ ..] => desk.cut_off = members.iter().map(|member| id(member)).collect(),
        ["slow-disk", member] => desk.at(id(member)).slow_disk = true,
        ["flush", member] => {
            desk.at(id(member)).slow_disk = false;
            desk.at(id(member)).flush();
            desk.settle();
        }
        ["crash", member] => desk.restart(id(member)),
        ["snapshot", from, to] => return snapshot(desk, id(from), id(to)),
        ["install", member] => {
            install(desk.at(id(member)));
            desk.settle();
        }
        ["sent", from, to, ok] => {
            desk.at(id(from)).step(Input::SnapshotSent { to: id(to), ok: *ok == "ok" });
            desk.settle();
        }
        ["state", members @ ..] => return members.iter().map(|member| state(desk.at(id(member)))).collect(),
        ["writes", member] => return desk.at(id(member)).writes.iter().map(write).collect(),
        other => panic!("unknown command {other:?}"),
    }
    String::new()
}

/// The leader's checkpoint goes over and is stepped; says what the receiver makes of it.
fn snapshot(desk: &mut Desk, from: MemberId, to: MemberId) -> String {
    let Some(build) = desk.at(from).builds.last().cloned() else { return "none was asked for".into() };
    desk.at(to).step(received(&build, &[A, B, C]));
    desk.settle();
    let receiver = desk.at(to);
    match (receiver.installs.last(), receiver.discards.last()) {
        (Some(install), _) => format!("taken, at {}", install.at.index),
        (None, Some(_)) => "refused".into(),
        (None, None) => "neither taken nor refused".into(),
    }
}

fn state(member: &mut Member) -> String {
    let status = member.replica.status();
    let mut line = format!("{}: term {}", name(member.id), status.leadership.term);
    match status.leadership.leader {
        Some(leader) if leader == member.id => line.push_str(", leads"),
        Some(leader) => write!(line, ", follows {}", name(leader)).unwrap(),
        None => line.push_str(", no leader"),
    }
    write!(line, ", log {}..{}, committed {}", status.first_index, status.last_index, status.committed).unwrap();
    writeln!(line, ", applied {} {:?}", member.applied_to(), member.texts()).unwrap();
    for (read, index) in &member.reads {
        writeln!(line, "   read {} at {index}", read.0).unwrap();
    }
    for (read, error) in &member.reads_failed {
        writeln!(line, "   read {} failed: {error}", read.0).unwrap();
    }
    for (request, error) in &member.failed {
        writeln!(line, "   request {request} failed: {error}").unwrap();
    }
    line
}

fn write(write: &LogWrite) -> String {
    let mut line = String::from("write:");
    if let Some(at) = write.reset {
        write!(line, " reset to {}/{}", at.index, at.term).unwrap();
    }
    if let Some(from) = write.truncate_from {
        write!(line, " truncate from {from}").unwrap();
    }
    for entry in &write.entries {
        write!(line, " {}/{}", entry.index, entry.term).unwrap();
    }
    if let Some(hard_state) = &write.hard_state {
        let (term, vote, commit) = wire::hard_state(hard_state).unwrap();
        let vote = if vote.0 == 0 { '-' } else { name(vote) };
        write!(line, " hard state: term {term}, vote {vote}, commit {commit}").unwrap();
    }
    if write.must_sync {
        line.push_str(" sync");
    }
    line + "\n"
}
