//! get over many keys: order, limits, filters by revision, past revisions; and compaction, which ends a past.

use super::recorder::Recorder;

pub(super) fn tell(story: &mut Recorder) {
    // Created in one order, changed in another, with values in a third: no two sort targets agree.
    for (key, value) in [("r/c", "5"), ("r/a", "4"), ("r/e", "1"), ("r/b", "2"), ("r/d", "3")] {
        story.run(&["put", key, value]);
    }
    for (key, value) in [("r/b", "9"), ("r/b", "8"), ("r/e", "7"), ("r/a", "6"), ("r/b", "0")] {
        story.run(&["put", key, value]);
    }
    story.all(&[&["del", "r/d"], &["put", "r/d", "back"]]);
    sorted(story);
    filtered(story);
    past(story);
    if story.new {
        streamed(story);
    }
    compacted(story);
}

fn sorted(story: &mut Recorder) {
    for target in ["CREATE", "KEY", "MODIFY", "VALUE", "VERSION", "modify", ""] {
        for order in ["ASCEND", "DESCEND", ""] {
            story.run(&["get", "r/", "--prefix", "--sort-by", target, "--order", order, "-w", "fields"]);
            story.run(&["get", "r/", "--prefix", "--sort-by", target, "--order", order, "--limit", "2", "-w", "json"]);
        }
    }
    story.all(&[
        &["get", "r/b", "r/d", "--order", "DESCEND", "--keys-only"],
        &["get", "r/c", "--from-key", "--order", "descend"],
        &["get", "r/", "--prefix", "--limit", "100"],
        &["get", "r/", "--prefix", "--limit", "0"],
        &["get", "r/", "--prefix", "--limit", "2", "--consistency", "s", "-w", "json"],
        &["get", "r/d", "r/b"],
        &["get", "r/b", "r/b"],
        &["get", "", "--prefix", "--limit", "3", "-w", "json"],
    ]);
}

fn filtered(story: &mut Recorder) {
    for flag in ["--min-mod-rev", "--max-mod-rev", "--min-create-rev", "--max-create-rev"] {
        for revision in ["1", "4", "9", "13", "100"] {
            story.run(&["get", "r/", "--prefix", flag, revision, "-w", "json"]);
        }
        story.run(&["get", "r/", "--prefix", flag, "5", "--limit", "1", "-w", "json"]);
        story.run(&["get", "r/", "--prefix", flag, "5", "--count-only", "-w", "fields"]);
    }
    story.all(&[
        &["get", "r/", "--prefix", "--min-mod-rev", "8", "--max-mod-rev", "10"],
        &["get", "r/", "--prefix", "--min-create-rev", "3", "--max-create-rev", "4"],
        &["get", "r/", "--prefix", "--min-mod-rev", "9", "--max-mod-rev", "8"],
        &["get", "r/", "--prefix", "--min-create-rev", "9", "--max-create-rev", "8"],
    ]);
}

fn past(story: &mut Recorder) {
    for revision in ["1", "2", "6", "12", "13"] {
        story.run(&["get", "r/", "--prefix", "--rev", revision]);
    }
    story.all(&[
        &["get", "r/", "--prefix", "--rev", "6", "--limit", "2", "-w", "json"],
        &["get", "r/", "--prefix", "--rev", "6", "--count-only", "-w", "fields"],
        &["get", "r/", "--prefix", "--rev", "14"],
        &["get", "r/", "--prefix", "--rev", "-1"],
    ]);
}

/// What 3.7 can ask for in pieces.
fn streamed(story: &mut Recorder) {
    for more in [
        &["-w", "json"][..],
        &["-w", "fields", "--limit", "2"],
        &["--order", "DESCEND", "--sort-by", "MODIFY"],
        &["--keys-only"],
        &["--rev", "6", "-w", "json"],
        &["--rev", "100000"],
        &["--consistency", "s"],
        &["--count-only", "-w", "fields"],
        &["--min-mod-rev", "9"],
    ] {
        let arguments: Vec<&str> = ["get", "r/", "--prefix", "--stream"].iter().chain(more).copied().collect();
        story.run(&arguments);
    }
    story.all(&[&["get", "nothing", "--stream", "-w", "json"], &["get", "", "--stream"]]);
}

fn compacted(story: &mut Recorder) {
    story.all(&[
        &["compaction", "5"],
        &["compaction", "5"],
        &["compaction", "4"],
        &["compact", "100000"],
        &["compaction", "7", "--physical"],
        &["compaction", "7", "--physical"],
        &["compaction", "8", "--physical=false"],
        &["get", "r/b", "--rev", "3"],
        &["get", "r/b", "--rev", "7"],
        &["get", "r/b", "--rev", "8"],
        &["get", "r/b", "--rev", "100000"],
        &["watch", "r/b", "--rev", "2"],
        &["compaction"],
        &["compaction", "1", "2"],
        &["compaction", "many"],
        &["compaction", "-1"],
        &["compaction", "0"],
        &["compaction", "9", "-w", "json"],
        &["compaction", "13"],
        &["get", "r/", "--prefix", "--rev", "13"],
        &["get", "r/", "--prefix", "--rev", "12"],
    ]);
}
