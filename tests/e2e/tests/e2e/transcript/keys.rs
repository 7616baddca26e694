//! put, get and del: their flags, their forms of output, and what they refuse.

use keelson_proto::etcdserverpb::{DeleteRangeResponse, PutResponse, RangeResponse};

use super::recorder::Recorder;

/// Every form but protobuf, which is no text.
pub(super) const FORMS: &[&str] = &["simple", "json", "fields", "table"];

pub(super) fn tell(story: &mut Recorder) {
    first_steps(story);
    put(story);
    forms(story);
    del(story);
    refusals(story);
}

fn first_steps(story: &mut Recorder) {
    story.all(&[
        &["put", "a", "b"],
        &["get", "a"],
        &["get", "a", "--print-value-only"],
        &["get", "--prefix", ""],
        &["get", "nothing"],
        &["get", "nothing", "-w", "json"],
        &["put", "a", "b2", "--prev-kv"],
        &["put", "dir/1", "one"],
        &["put", "dir/2", "two"],
        &["put", "dir/3", ""],
        &["get", "dir/", "--prefix", "--keys-only"],
        &["get", "dir/1", "dir/3"],
        &["get", "dir/2", "--from-key"],
        &["get", "a", "--rev", "2"],
        &["get", "a", "--consistency", "s"],
        &["get", "a", "--consistency=l"],
        &["get", "--prefix", "", "--count-only", "-w", "fields"],
        &["del", "dir/3", "--prev-kv"],
        &["del", "nothing"],
        &["del", "dir/", "--prefix"],
        &["get", "--prefix", ""],
    ]);
}

fn put(story: &mut Recorder) {
    story.all(&[
        &["put", "a", "--ignore-lease", "b3"],
        &["put", "a", "--ignore-value"],
        &["put", "a", "--ignore-value", "--prev-kv"],
        &["put", "a", "--ignore-value", "--ignore-lease"],
        &["get", "a", "-w", "json"],
        &["put", "dash", "--", "-value"],
        &["put", "--", "-key", "value"],
        &["get", "--", "-key"],
        &["put", "unicode/ß/鍵", "värde 値"],
        &["get", "unicode/", "--prefix"],
        &["put", "empty", ""],
        &["put", "empty", "now not", "--prev-kv"],
        &["put", "fresh", "value", "--prev-kv"],
        &["put", "three", "more", "words"],
    ]);
    story.run_with("from the input", &["put", "piped"]);
    story.run(&["get", "piped"]);
    story.run_with("two\nlines\n", &["put", "piped", "--prev-kv"]);
    story.run(&["get", "piped", "-w", "json"]);
    story.run_with("", &["put", "piped"]);
    story.run_with("ignored", &["put", "piped", "from the arguments"]);
    story.run(&["get", "piped"]);
}

fn forms(story: &mut Recorder) {
    story.run(&["put", "form/1", "one \"quoted\""]);
    for form in FORMS {
        story.all(&[
            &["put", "form/2", "two", "-w", form],
            &["put", "form/2", "two again", "--prev-kv", "-w", form],
            &["get", "form/", "--prefix", "-w", form],
            &["get", "form/", "--prefix", "--write-out", form, "--keys-only"],
            &["get", "form/", "--prefix", "--limit", "1", "-w", form],
            &["get", "form/", "--prefix", "--hex", "-w", form],
            &["get", "form/", "--prefix", "--count-only", "-w", form],
            &["get", "form/1", "--print-value-only", "-w", form],
            &["del", "form/2", "--prev-kv", "-w", form],
            &["del", "form/2", "--prev-kv", "--hex", "-w", form],
            &["put", "form/2", "hex", "--hex", "-w", form],
            &["put", "form/2", "hexed", "--hex", "--prev-kv", "-w", form],
        ]);
    }
    story.message::<PutResponse>(&["put", "form/3", "three", "-w", "protobuf"]);
    story.message::<PutResponse>(&["put", "form/3", "four", "--prev-kv", "-w", "protobuf"]);
    story.message::<RangeResponse>(&["get", "form/", "--prefix", "-w", "protobuf"]);
    story.message::<RangeResponse>(&["get", "form/", "--prefix", "--limit", "1", "-w", "protobuf"]);
    story.message::<RangeResponse>(&["get", "none", "-w", "protobuf"]);
    story.message::<DeleteRangeResponse>(&["del", "form/3", "--prev-kv", "-w", "protobuf"]);
    story.run(&["get", "a", "-w", "unheard-of"]);
}

fn del(story: &mut Recorder) {
    for key in ["d/1", "d/2", "d/3", "d/4", "e/1", "e/2", "f"] {
        story.run(&["put", key, "value"]);
    }
    story.all(&[
        &["del", "d/1", "d/3", "--range"],
        &["del", "d/1", "d/3", "--range", "--prev-kv"],
        &["del", "d/3", "d/5"],
        &["del", "e/", "--prefix", "--prev-kv"],
        &["del", "f", "a", "--range"],
        &["del", "f", "--prev-kv"],
        &["del", "f", "--prev-kv"],
        &["del", "unicode/", "--from-key", "--prev-kv"],
        &["get", "", "--from-key", "--keys-only"],
        &["del", "", "--prefix"],
        &["get", "", "--prefix"],
        &["put", "again", "1"],
        &["del", "", "--from-key"],
        &["get", "", "--prefix", "-w", "json"],
    ]);
}

fn refusals(story: &mut Recorder) {
    story.all(&[
        &["put", "", "v"],
        &["get", ""],
        &["del", ""],
        &["put", "only-a-key", "--ignore-value"],
        &["put", "only-a-key", "v", "--ignore-lease"],
        &["put", "k", "v", "--ignore-value"],
        &["put", "k", "v", "--ignore-lease", "--lease", "1234"],
        &["put", "k", "v", "--lease", "no-number"],
        &["put", "k", "v", "--lease", "1234abcd"],
        &["put"],
        &["get"],
        &["del"],
        &["del", "a", "b", "c"],
        &["get", "a", "b", "--prefix"],
        &["get", "a", "b", "--from-key"],
        &["get", "a", "--prefix", "--from-key"],
        &["del", "a", "--prefix", "--from-key"],
        &["del", "a", "b", "--prefix"],
        &["get", "a", "--keys-only", "--count-only"],
        &["get", "a", "--consistency", "x"],
        &["get", "a", "--order", "SIDEWAYS"],
        &["get", "a", "--sort-by", "COLOUR"],
        &["get", "a", "--limit", "few"],
        &["get", "a", "--rev", "100000"],
        &["get", "a", "--limit", "-1"],
        &["get", "a", "--unheard-of"],
        &["unheard-of"],
        &["ge", "a"],
    ]);
}
