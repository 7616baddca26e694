//! watch: from the past, over prefixes and ranges, with previous values, told over the input, and with a command for each event.

use super::recorder::Recorder;

/// Prints what a command is told about an event, in an order of its own.
const TELL: &str = "env | grep ^ETCD_WATCH_ | sort";

pub(super) fn tell(story: &mut Recorder) {
    story.all(&[
        &["put", "w", "first"],
        &["put", "w", "second"],
        &["del", "w"],
        &["put", "w/1", "one"],
        &["put", "w/2", "two"],
        &["put", "x", "other"],
    ]);
    story.run_with("\nput w/1 uno\nput w/3 tres\ndel w/2\n\n\n", &["txn"]);
    past(story);
    live(story);
    commands(story);
    interactive(story);
    environment(story);
    refusals(story);
}

fn past(story: &mut Recorder) {
    story.watch(9, &["watch", "w", "--rev", "1"]);
    story.watch(6, &["watch", "w/1", "--rev", "1"]);
    story.watch(24, &["watch", "w", "--prefix", "--rev", "1"]);
    story.watch(13, &["watch", "w", "--rev", "1", "--prev-kv"]);
    story.watch(19, &["watch", "w/", "--prefix", "--rev", "5", "--prev-kv"]);
    story.watch(12, &["watch", "w/1", "w/3", "--rev", "1"]);
    story.watch(12, &["watch", "", "--prefix", "--rev", "7"]);
    story.watch(1, &["watch", "w", "--prefix", "--rev", "1", "-w", "json"]);
    story.watch(1, &["watch", "w", "--prefix", "--rev", "1", "--prev-kv", "-w", "json"]);
    story.watch(20, &["watch", "w", "--prefix", "--rev", "2", "-w", "fields"]);
    story.watch(9, &["watch", "w", "--rev", "1", "--hex"]);
    story.run(&["watch", "w", "--rev", "1", "-w", "table"]);
}

fn live(story: &mut Recorder) {
    let mut watch = story.begin("watch", &["watch", "live", "--rev", "9", "--prev-kv"]);
    let mut all = story.begin("all", &["watch", "live", "--prefix", "--rev=9"]);
    story.run(&["put", "live", "1"]);
    story.lines(&mut watch, 3);
    story.lines(&mut all, 3);
    story.run_with("\nput live 2\nput live/2 3\n\n\n", &["txn"]);
    story.lines(&mut watch, 5);
    story.lines(&mut all, 6);
    story.run(&["del", "live"]);
    story.lines(&mut watch, 5);
    story.lines(&mut all, 3);
    story.kill(watch);
    story.end(all, "INT");
    if story.new {
        // The member was told to speak every second; nobody writes meanwhile.
        let mut quiet = story.begin("quiet", &["watch", "quiet", "--progress-notify"]);
        story.lines(&mut quiet, 2);
        story.kill(quiet);
    }
}

fn commands(story: &mut Recorder) {
    let mut watch = story.begin("watch", &["watch", "w", "--prefix", "--rev", "2", "--", "sh", "-c", TELL]);
    story.lines(&mut watch, 56);
    story.kill(watch);
    let failing = story.begin("failing", &["watch", "w", "--rev", "1", "--", "sh", "-c", "echo no; exit 3"]);
    story.end(failing, "");
    let missing = story.begin("missing", &["watch", "w", "--rev", "1", "--", "/no/such/program"]);
    story.end(missing, "");
}

fn interactive(story: &mut Recorder) {
    let mut watch = story.talk("interactive", &["watch", "-i"]);
    story.say(&mut watch, "watch w --rev 1");
    story.lines(&mut watch, 9);
    story.say(&mut watch, "watch w/1 w/3 --rev=5 --prev-kv");
    story.lines(&mut watch, 16);
    story.say(&mut watch, "watch \"w/\" --prefix --rev 8 -- echo seen");
    story.lines(&mut watch, 12);
    story.say(&mut watch, "progress");
    // Each of the three watchers says so.
    story.lines(&mut watch, 3);
    for nonsense in ["watch", "", "get w", "watch w z --prefix"] {
        story.say(&mut watch, nonsense);
        story.lines(&mut watch, 1);
    }
    story.fall_silent(&mut watch);
    story.end(watch, "");
    for last_words in ["watch w --", "watch w --unheard-of"] {
        let mut watch = story.talk("interactive", &["watch", "--interactive"]);
        story.say(&mut watch, last_words);
        story.end(watch, "");
    }
}

fn environment(story: &mut Recorder) {
    let key = ("ETCDCTL_WATCH_KEY", "w/");
    let end = ("ETCDCTL_WATCH_RANGE_END", "w0");
    story.watch_in(&[key], 9, &["watch", "--prefix", "--rev", "7"]);
    story.watch_in(&[("ETCDCTL_WATCH_KEY", "w/1"), end], 9, &["watch", "--rev", "8"]);
    story.watch_in(&[key], 12, &["watch", "--prefix", "--rev", "8", "--", "echo", "seen"]);
    story.run_in(&[end], "", &["watch"]);
    story.run_in(&[key], "", &["watch", "w"]);
    story.run_in(&[key], "", &["watch", "w", "--", "echo", "seen"]);
}

fn refusals(story: &mut Recorder) {
    story.all(&[
        &["watch"],
        &["watch", "a", "b", "--prefix"],
        &["watch", "a", "--"],
        &["watch", "a", "--rev", "soon"],
        &["compaction", "8"],
        &["watch", "w", "--rev", "2"],
        &["watch", "w", "--rev", "7", "--prefix"],
    ]);
    story.watch(1, &["watch", "w", "--prefix", "--rev", "8", "--prev-kv", "-w", "json"]);
}
