//! lease: grant, list, look, keep alive, revoke, let it expire; and put with a lease.

use keelson_proto::etcdserverpb::ResponseHeader;

use super::keys::FORMS;
use super::recorder::Recorder;

pub(super) fn tell(story: &mut Recorder) {
    let lease = grant(story, "100");
    story.all(&[
        &["put", "leased", "v", "--lease", &lease],
        &["get", "leased", "-w", "json"],
        &["get", "leased", "-w", "fields"],
        &["lease", "list"],
        &["lease", "timetolive", &lease],
        &["lease", "timetolive", &lease, "--keys"],
        &["lease", "keep-alive", "--once", &lease],
        // Never two keys when they are listed: etcd's order is its map's.
        &["put", "leased/2", "v", "--lease", &lease],
        &["put", "leased/2", "w", "--ignore-lease"],
        &["get", "leased/2", "-w", "fields"],
        &["put", "leased/2", "x"],
        &["get", "leased/2", "-w", "fields"],
        &["lease", "timetolive", &lease, "--keys"],
    ]);
    forms(story, &lease);
    story.all(&[
        &["lease", "revoke", &lease],
        &["get", "leased"],
        &["get", "leased/2"],
        &["lease", "list"],
        &["lease", "timetolive", &lease],
        &["lease", "timetolive", &lease, "--keys", "-w", "json"],
        &["lease", "keep-alive", "--once", &lease],
        &["lease", "keep-alive", &lease],
        &["lease", "revoke", &lease],
        &["put", "leased", "v", "--lease", &lease],
    ]);
    kept_alive(story);
    expired(story);
    refusals(story);
}

/// Grants a lease and returns its id; `0` in a rehearsal.
fn grant(story: &mut Recorder, seconds: &str) -> String {
    let granted = story.run(&["lease", "grant", seconds]);
    granted.split_whitespace().nth(1).unwrap_or("0").to_owned()
}

fn forms(story: &mut Recorder, lease: &str) {
    // What etcdctl prints as a message of a lease is no more than its header.
    story.message::<ResponseHeader>(&["lease", "list", "-w", "protobuf"]);
    story.message::<ResponseHeader>(&["lease", "timetolive", lease, "--keys", "-w", "protobuf"]);
    story.message::<ResponseHeader>(&["lease", "keep-alive", "--once", lease, "-w", "protobuf"]);
    story.message::<ResponseHeader>(&["lease", "grant", "50", "-w", "protobuf"]);
    for form in FORMS {
        story.all(&[
            &["lease", "list", "-w", form],
            &["lease", "timetolive", lease, "-w", form],
            &["lease", "timetolive", lease, "--keys", "-w", form],
            &["lease", "timetolive", lease, "--keys", "--hex", "-w", form],
            &["lease", "keep-alive", "--once", lease, "-w", form],
        ]);
        let granted = story.run(&["lease", "grant", "50", "-w", form]);
        if *form == "json" {
            let id = granted.split("\"id\":").nth(1).and_then(|rest| rest.split(',').next()).unwrap_or("0");
            let id = format!("{:x}", id.parse::<i64>().unwrap_or_default());
            story.run(&["lease", "revoke", &id, "-w", form]);
        }
    }
}

fn kept_alive(story: &mut Recorder) {
    // The client renews it every second.
    let lease = grant(story, "3");
    story.run(&["put", "kept", "v", "--lease", &lease]);
    let mut alive = story.begin("keeper", &["lease", "keep-alive", &lease]);
    story.lines(&mut alive, 3);
    story.run(&["get", "kept"]);
    story.run(&["lease", "revoke", &lease]);
    story.end(alive, "");
    story.run(&["get", "kept"]);
}

fn expired(story: &mut Recorder) {
    let lease = grant(story, "1");
    story.run(&["put", "short/1", "v", "--lease", &lease]);
    story.run(&["put", "short/2", "v", "--lease", &lease]);
    story.settle("short/", 0);
    story.all(&[
        &["lease", "timetolive", &lease, "--keys"],
        &["get", "short/", "--prefix", "-w", "json"],
        &["put", "short/1", "v", "--lease", &lease],
    ]);
    story.watch(16, &["watch", "short/", "--prefix", "--rev", "1", "--prev-kv"]);
}

fn refusals(story: &mut Recorder) {
    story.all(&[
        &["lease", "grant", "1"],
        &["lease", "grant", "0"],
        &["lease", "grant", "-5"],
        &["lease", "grant", "9000000000"],
        &["lease", "grant", "9000000001"],
        &["lease", "grant", "many"],
        &["lease", "grant"],
        &["lease", "grant", "1", "2"],
        &["lease", "revoke"],
        &["lease", "revoke", "nothex"],
        &["lease", "revoke", "0"],
        &["lease", "timetolive"],
        &["lease", "timetolive", "nothex"],
        &["lease", "timetolive", "0"],
        &["lease", "keep-alive"],
        &["lease", "keep-alive", "nothex"],
        &["lease", "unheard-of"],
        &["put", "leased", "v", "--lease", "1234abcd"],
    ]);
}
