//! endpoint, member list, alarm and check: what they say of a member.

use keelson_proto::etcdserverpb::{AlarmResponse, MemberListResponse};

use super::keys::FORMS;
use super::recorder::Recorder;

pub(super) fn tell(story: &mut Recorder) {
    story.wait_for_versions();
    // An empty store of ours has nothing in use, where etcd's has pages.
    story.run_with(&"x".repeat(5_000), &["put", "some"]);
    for form in FORMS.iter().chain(&["protobuf"]) {
        story.all(&[
            &["endpoint", "health", "-w", form],
            &["endpoint", "health", "--cluster", "-w", form],
            &["endpoint", "status", "-w", form],
            &["endpoint", "status", "--cluster", "-w", form],
        ]);
    }
    for form in FORMS {
        story.all(&[
            &["member", "list", "-w", form],
            &["member", "list", "--hex", "-w", form],
            &["alarm", "list", "-w", form],
            &["alarm", "disarm", "-w", form],
        ]);
    }
    story.message::<AlarmResponse>(&["alarm", "list", "-w", "protobuf"]);
    story.message::<MemberListResponse>(&["member", "list", "-w", "protobuf"]);
    story.all(&[
        &["endpoint", "health", "an argument"],
        &["alarm", "list", "an argument"],
        &["alarm", "disarm", "an argument"],
        &["alarm", "unheard-of"],
        &["endpoint", "unheard-of"],
        &["member", "list", "an argument"],
        &["member", "list", "--consistency", "s"],
        &["version"],
    ]);
}

/// More is written than may be: the alarm is raised, seen by everybody, and taken back.
pub(super) fn no_space(story: &mut Recorder) {
    let much = "x".repeat(1 << 20);
    story.run(&["put", "small", "1"]);
    story.until_refused(&much, &["put", "much"]);
    story.all(&[
        &["alarm", "list"],
        &["put", "small", "2"],
        &["get", "small", "--print-value-only"],
        &["lease", "grant", "100"],
        &["endpoint", "health"],
        &["endpoint", "health", "-w", "json"],
    ]);
    story.run_with("mod(\"small\") > \"0\"\n\nput small 2\n\n\n", &["txn"]);
    story.run_with("mod(\"small\") > \"0\"\n\nget small\n\n\n", &["txn"]);
    story.all(&[
        &["del", "small"],
        &["endpoint", "status"],
        &["alarm", "disarm"],
        &["alarm", "list"],
        &["alarm", "disarm"],
        &["endpoint", "health"],
    ]);
}

/// What the two checks refuse, and a check that is run. `check perf` takes a minute and prints figures: it is told to stop.
pub(super) fn checks(story: &mut Recorder) {
    story.all(&[
        &["check"],
        &["check", "perf", "--load", "unheard-of"],
        &["check", "datascale", "--load", "unheard-of"],
        &["put", "/etcdctl-check-perf/1", "taken"],
        &["check", "perf"],
        &["put", "/mine/1", "taken"],
        &["check", "perf", "--prefix", "/mine/"],
        &["check", "datascale", "--prefix", "/mine/"],
        &["del", "", "--prefix"],
    ]);
    story.run_quietly(&["check", "datascale", "--load", "s", "--prefix", "/scale/", "--auto-compact"]);
    story.run(&["get", "", "--prefix", "--keys-only"]);
}
