//! lock and elect, which etcdctl makes of leases, keys and watches: one holder after another, in the order they came.

use super::recorder::Recorder;

pub(super) fn locks(story: &mut Recorder) {
    let held = "echo ${ETCD_LOCK_KEY%/*} at $ETCD_LOCK_REV";
    story.all(&[
        &["lock", "alone", "--", "sh", "-c", held],
        &["lock", "alone", "--ttl", "5", "--", "sh", "-c", "exit 7"],
        &["lock", "alone", "/no/such/program"],
        &["lock", "alone", "echo", "done", "-w", "json"],
        &["get", "alone/", "--prefix"],
        &["lock"],
        &["lock", "alone", "--ttl", "0", "true"],
        &["lock", "alone", "--ttl", "many"],
    ]);
    // Three in a queue: the first lets go, the second is killed and holds on until its lease is over, the third is last.
    let mut first = story.begin("first", &["lock", "m", "--ttl", "60"]);
    story.lines(&mut first, 2);
    let second = story.begin("second", &["lock", "m", "--ttl", "2"]);
    let mut second = second;
    story.settle("m/", 2);
    let mut third = story.begin("third", &["lock", "m", "--ttl=60"]);
    story.settle("m/", 3);
    story.run(&["get", "m/", "--prefix", "--sort-by", "CREATE", "-w", "fields"]);
    story.end(first, "TERM");
    story.lines(&mut second, 2);
    story.settle("m/", 2);
    story.kill(second);
    story.lines(&mut third, 2);
    story.settle("m/", 1);
    // A waiting one that is told to go leaves the queue.
    let waiting = story.begin("waiting", &["lock", "m"]);
    story.settle("m/", 2);
    story.end(waiting, "INT");
    story.settle("m/", 1);
    // And one whose key somebody takes away.
    let robbed = story.begin("robbed", &["lock", "m", "echo", "robbed"]);
    let mine = story.settle("m/", 2).pop().expect("two");
    story.run(&["del", &mine]);
    story.end(third, "INT");
    story.end(robbed, "");
    let mut last = story.begin("last", &["lock", "m"]);
    story.lines(&mut last, 2);
    let mine = story.settle("m/", 1).pop().expect("one");
    let lease = mine.rsplit('/').next().unwrap_or_default().to_owned();
    story.run(&["lease", "timetolive", &lease, "--keys"]);
    story.run(&["lease", "revoke", &lease]);
    story.end(last, "");
    story.run(&["get", "", "--prefix", "-w", "json"]);
}

pub(super) fn elections(story: &mut Recorder) {
    story.all(&[&["elect"], &["elect", "e"], &["elect", "e", "p", "-l"], &["elect", "e", "p", "too", "many"]]);
    let mut first = story.begin("first", &["elect", "e", "one"]);
    story.lines(&mut first, 2);
    let mut observer = story.begin("observer", &["elect", "-l", "e"]);
    story.lines(&mut observer, 2);
    let mut second = story.begin("second", &["elect", "e", "two"]);
    story.settle("e/", 2);
    let mut third = story.begin("third", &["elect", "e", "three"]);
    let queue = story.settle("e/", 3);
    story.run(&["get", "e/", "--prefix", "--sort-by", "CREATE", "--print-value-only"]);
    story.end(first, "TERM");
    story.lines(&mut second, 2);
    story.lines(&mut observer, 2);
    // The second's lease is taken from it, as a holder's that was killed is.
    let lease = queue[1].rsplit('/').next().unwrap_or_default().to_owned();
    story.run(&["lease", "revoke", &lease]);
    story.end(second, "");
    story.lines(&mut third, 2);
    story.lines(&mut observer, 2);
    // A leader that changes its mind is seen by who listens.
    story.run(&["put", &queue[2], "changed"]);
    story.lines(&mut observer, 2);
    story.end(observer, "INT");
    let mut listener = story.begin("listener", &["elect", "e", "--listen"]);
    story.lines(&mut listener, 2);
    let lost = story.begin("lost", &["elect", "e", "four"]);
    story.settle("e/", 2);
    story.end(lost, "INT");
    story.settle("e/", 1);
    story.end(third, "INT");
    story.kill(listener);
    story.run(&["get", "e/", "--prefix", "-w", "json"]);
}
