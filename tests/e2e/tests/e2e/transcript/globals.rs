//! The flags of every command, the environment, several addresses, and servers that are not there or do not answer.

use super::recorder::Recorder;

pub(super) fn tell(story: &mut Recorder) {
    story.run(&["put", "k", "v"]);
    let here = story.address();
    let dead = "127.0.0.1:1";
    addresses(story, &here, dead);
    sizes(story);
    environment(story, &here);
    silence(story);
    unreachable(story, dead);
}

fn addresses(story: &mut Recorder, here: &str, dead: &str) {
    let (url, both) = (format!("http://{here}"), format!("{here},{dead}"));
    for endpoints in [here, &url, &both] {
        story.run_at(&["get", "k", "--endpoints", endpoints]);
        story.run_at(&["--endpoints", endpoints, "put", "k", "v"]);
    }
    story.run_at(&["get", "k", "--endpoints", here, "--endpoints", &url]);
    story.run_at(&["endpoint", "status", "--endpoints", ""]);
    story.run(&["get", "k", "--endpoints", here]);
    story.run_quietly(&["get", "k", "--debug"]);
    story.all(&[
        &["get", "k", "--dial-timeout", "1s", "--command-timeout", "10s"],
        &["get", "k", "--keepalive-time", "1s", "--keepalive-timeout", "1s"],
        &["get", "k", "--command-timeout", "soon"],
        &["get", "k", "--dial-timeout", "soon"],
        &["get", "k", "--insecure-transport"],
        &["get", "k", "--insecure-transport=true", "--insecure-discovery=true"],
        &["get", "k", "--hex"],
    ]);
}

fn sizes(story: &mut Recorder) {
    story.run_with(&"x".repeat(1_000), &["put", "big", "--max-request-bytes", "500"]);
    story.run_with(&"x".repeat(1_000), &["put", "big", "--max-request-bytes", "1500"]);
    story.all(&[
        &["get", "big", "--max-recv-bytes", "500"],
        &["get", "big", "--max-recv-bytes", "2000", "--keys-only"],
        &["get", "big", "--keys-only", "--max-recv-bytes", "500"],
    ]);
    // More than a member takes, and more than gRPC lets through.
    story.run_with(&"x".repeat(1_600_000), &["put", "big"]);
    story.run_with(&"x".repeat(3_000_000), &["put", "big"]);
    story.run_with(&"x".repeat(3_000_000), &["put", "big", "--max-request-bytes", "10000000"]);
}

fn environment(story: &mut Recorder, here: &str) {
    story.run_in(&[("ETCDCTL_WRITE_OUT", "json")], "", &["get", "k"]);
    story.run_in(&[("ETCDCTL_WRITE_OUT", "json")], "", &["get", "k", "-w", "fields"]);
    story.run_in(&[("ETCDCTL_HEX", "true")], "", &["get", "k"]);
    story.run_in(&[("ETCDCTL_COMMAND_TIMEOUT", "8s"), ("ETCDCTL_DIAL_TIMEOUT", "3s")], "", &["get", "k"]);
    story.run_in(&[("ETCDCTL_COMMAND_TIMEOUT", "soon")], "", &["get", "k"]);
    story.run_in(&[("ETCDCTL_ENDPOINTS", here)], "", &["get", "k"]);
    story.run_in(&[("ETCDCTL_UNHEARD_OF", "1")], "", &["get", "k"]);
    story.run_in(&[("ETCDCTL_PREFIX", "true")], "", &["get", ""]);
}

/// The member is stopped as a process: the connection stands, and nothing comes.
fn silence(story: &mut Recorder) {
    story.signal_member("STOP");
    story.all(&[
        &["get", "k", "--command-timeout", "300ms"],
        &["put", "k", "late", "--command-timeout", "300ms"],
        &["del", "k", "--command-timeout=300ms"],
        &["endpoint", "health", "--command-timeout=300ms"],
        &["endpoint", "status", "--command-timeout=300ms"],
        &["lease", "grant", "10", "--command-timeout=300ms"],
        &["alarm", "list", "--command-timeout=300ms"],
        &["member", "list", "--command-timeout=300ms"],
        &["compaction", "1", "--command-timeout=300ms"],
    ]);
    story.signal_member("CONT");
    story.run(&["get", "nothing"]);
}

fn unreachable(story: &mut Recorder, dead: &str) {
    for command in [
        &["get", "k"][..],
        &["put", "k", "v"],
        &["del", "k"],
        &["endpoint", "health"],
        &["endpoint", "status"],
        &["lease", "grant", "10"],
        &["alarm", "list"],
        &["member", "list"],
        &["compaction", "1"],
    ] {
        let timeouts = ["--dial-timeout=200ms", "--command-timeout=300ms", "--endpoints", dead];
        story.run_at(&command.iter().chain(&timeouts).copied().collect::<Vec<_>>());
    }
}
