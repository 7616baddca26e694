//! make-mirror: one store's keys in another, as they are and as they change.

use super::recorder::Recorder;

pub(super) fn tell(story: &mut Recorder) {
    let destination = story.second();
    for number in 1..=5 {
        story.run(&["put", &format!("a/{number}"), &format!("value {number}")]);
    }
    story.run(&["put", "b/1", "other"]);
    mirror(story, &[&destination, "--prefix", "a/"], 5, &|story| {
        story.run(&["put", "a/6", "later"]);
        story.run(&["del", "a/1"]);
        story.run_with("\nput a/7 x\nput a/8 y\nput a/9 z\ndel a/2\n\n\n", &["txn"]);
        7
    });
    mirror(story, &[&destination, "--prefix", "a/", "--dest-prefix", "moved/"], 7, &|_| 7);
    mirror(story, &[&destination, "--prefix", "a/", "--no-dest-prefix"], 7, &|_| 7);
    mirror(story, &[&destination, "--dest-insecure-transport=true"], 8, &|_| 8);
    if story.new {
        // From a revision on: what was before is not copied. One operation a transaction.
        mirror(story, &[&destination, "--rev", "8", "--max-txn-ops", "1"], 4, &|_| 4);
    }
    story.all(&[&["make-mirror"], &["make-mirror", &destination, "--dest-prefix", "x", "--no-dest-prefix"]]);
}

/// Mirrors with these arguments, waits for `count` keys, lets `more` write, waits for what it says, looks, and clears.
fn mirror(story: &mut Recorder, arguments: &[&str], count: usize, more: &dyn Fn(&mut Recorder) -> usize) {
    let arguments: Vec<&str> = ["make-mirror"].iter().chain(arguments).copied().collect();
    let running = story.begin("mirror", &arguments);
    story.settle_second("", count);
    let after = more(story);
    story.settle_second("", after);
    story.turn_to_second(true);
    story.run(&["get", "", "--prefix", "--order", "ASCEND"]);
    story.kill(running);
    story.run(&["del", "", "--prefix"]);
    story.turn_to_second(false);
}
