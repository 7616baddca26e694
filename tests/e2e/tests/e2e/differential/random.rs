//! Seeded random sequences, written in the corpus's own language, and how a difference in one is made small.
//!
//! Few keys, few leases, few revisions around now: so that every step meets what others left. What is refused is as likely as
//! what works. A watch over everything follows along with some that come and go; each time before a watch is cancelled, and after
//! one was created, the stream is brought up to date, because an event on its way when its watch is cancelled may or may not come.
//!
//! What it does not do: it draws nothing that the notes in `masks.txt` leave out.

use std::time::{Duration, Instant};

use super::mask::Masks;
use super::script::{self, Needs, Step, Story};
use super::{Pair, cut, differences, tell};

/// Played when no seed is asked for.
const SEEDS: std::ops::RangeInclusive<u64> = 1..=8;
const STEPS: usize = 1300;
/// How long a difference is made smaller before it is told.
const SHRINKING: Duration = Duration::from_secs(120);

/// Keys and ends of ranges: neighbours, prefixes of each other, and the very last.
const KEYS: [&str; 8] = ["a", r"a\0", "a/1", "a/2", "b", "c", r"\xff", r"\xff\xff"];
const ENDS: [&str; 7] = [r"\0", "a0", "b", "c", r"\xff", "a", r"a/2\0"];
const VALUES: [&str; 5] = ["", "1", "2", "22", r"\0\xff"];
/// Every sequence begins with these; a progress request is only answered where there is a watch.
const HEAD: [&str; 4] = [
    "open w Watch/Watch",
    r#"send w create_request { key: "\0" range_end: "\0" watch_id: 1000 prev_kv: true }"#,
    "open k Lease/LeaseKeepAlive",
    "receive w quiet",
];

/// splitmix64: a sequence of numbers that a seed alone decides.
struct Draw(u64);

impl Draw {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// True once in `times`.
    fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    fn of<'a>(&mut self, all: &[&'a str]) -> &'a str {
        all[self.below(all.len() as u64) as usize]
    }

    fn maybe(&mut self, times: u64, text: &str) -> String {
        if self.once_in(times) { format!(" {text}") } else { String::new() }
    }

    fn key(&mut self) -> String {
        let key = if self.once_in(60) { "" } else { self.of(&KEYS) };
        format!("key: \"{key}\"")
    }

    fn keys(&mut self) -> String {
        let key = self.key();
        if self.once_in(2) { key } else { format!("{key} range_end: \"{}\"", self.of(&ENDS)) }
    }

    /// A revision around now: mostly one that can be read.
    fn revision(&mut self) -> String {
        match self.below(12) {
            0 => "0".to_owned(),
            1 => "-1".to_owned(),
            2 => "{now+1}".to_owned(),
            3 => "1".to_owned(),
            4 => "{now}".to_owned(),
            back => format!("{{now-{}}}", back - 4),
        }
    }

    fn lease(&mut self) -> u64 {
        1 + self.below(5)
    }

    fn range(&mut self) -> String {
        let mut text = self.keys();
        if self.once_in(3) {
            text += &format!(" limit: {}", self.below(6) as i64 - 1);
        }
        if self.once_in(3) {
            text += &format!(" revision: {}", self.revision());
        }
        if self.once_in(3) {
            text += &format!(" sort_order: {}", self.below(if self.0.is_multiple_of(20) { 4 } else { 3 }));
        }
        if self.once_in(3) {
            text += &format!(" sort_target: {}", self.below(if self.0.is_multiple_of(20) { 6 } else { 5 }));
        }
        for bound in ["min_mod_revision", "max_mod_revision", "min_create_revision", "max_create_revision"] {
            if self.once_in(10) {
                text += &format!(" {bound}: {}", self.revision());
            }
        }
        text += &self.maybe(4, "serializable: true");
        text += &self.maybe(6, "keys_only: true");
        text += &self.maybe(8, "count_only: true");
        text
    }

    fn put(&mut self) -> String {
        let mut text = self.key();
        let keeps_value = self.once_in(8);
        if !keeps_value || self.once_in(6) {
            text += &format!(" value: \"{}\"", self.of(&VALUES));
        }
        text += if keeps_value { " ignore_value: true" } else { "" };
        let keeps_lease = self.once_in(8);
        if self.once_in(4) && (!keeps_lease || self.once_in(6)) {
            text += &format!(" lease: {}", self.lease());
        }
        text += if keeps_lease { " ignore_lease: true" } else { "" };
        text += &self.maybe(3, "prev_kv: true");
        text
    }

    fn delete(&mut self) -> String {
        let keys = self.keys();
        keys + &self.maybe(2, "prev_kv: true")
    }

    fn compare(&mut self) -> String {
        let keys = self.keys();
        let target = self.below(5);
        let union = if self.once_in(12) { self.below(5) } else { target };
        let value = match union {
            0 => format!("version: {}", self.below(4)),
            1 => format!("create_revision: {}", self.revision()),
            2 => format!("mod_revision: {}", self.revision()),
            3 => format!("value: \"{}\"", self.of(&VALUES)),
            _ => format!("lease: {}", self.below(4)),
        };
        let value = if self.once_in(10) { String::new() } else { value };
        format!("{keys} target: {target} result: {} {value}", self.below(4))
    }

    fn txn(&mut self, depth: u64) -> String {
        let mut text = String::new();
        for _ in 0..self.below(3) {
            text += &format!(" compare {{ {} }}", self.compare());
        }
        for branch in ["success", "failure"] {
            for _ in 0..self.below(4) {
                let op = match self.below(10) {
                    0..=2 => format!("request_range {{ {} }}", self.range()),
                    3..=6 => format!("request_put {{ {} }}", self.put()),
                    7 => format!("request_delete_range {{ {} }}", self.delete()),
                    8 if depth > 0 => format!("request_txn {{ {} }}", self.txn(depth - 1)),
                    8 => format!("request_range {{ {} }}", self.range()),
                    _ if self.once_in(8) => String::new(),
                    _ => format!("request_put {{ {} }}", self.put()),
                };
                text += &format!(" {branch} {{ {op} }}");
            }
        }
        text.trim_start().to_owned()
    }

    fn watch(&mut self) -> String {
        let id = 1 + self.below(4);
        // Never below what a compaction may have taken: see `step`.
        let start = match self.below(4) {
            0 => "start_revision: {now}",
            1 => "start_revision: {now-1}",
            _ => "",
        };
        let keys = self.keys();
        let (filter, previous) = (self.maybe(5, "filters: NOPUT"), self.maybe(2, "prev_kv: true"));
        let other = self.maybe(5, "filters: NODELETE");
        format!("send w create_request {{ {keys} watch_id: {id} {start}{filter}{other}{previous} }}")
    }

    /// One step, and what has to go with it.
    fn step(&mut self) -> Vec<String> {
        let line = match self.below(100) {
            0..=24 => format!("KV/Put {}", self.put()),
            25..=47 => format!("KV/Range {}", self.range()),
            48..=55 => format!("KV/DeleteRange {}", self.delete()),
            56..=77 => format!("KV/Txn {}", self.txn(2)),
            78..=80 => {
                let back = self.below(8);
                let revision =
                    if back < 2 { ["{now+1}", "0"][back as usize].to_owned() } else { format!("{{now-{back}}}") };
                format!("KV/Compact revision: {revision}{}", self.maybe(3, "physical: true"))
            }
            81..=84 => {
                let id = self.lease();
                // Expiry is the order in which leases are listed: no two alike.
                format!(
                    "Lease/LeaseGrant ID: {id} TTL: {}",
                    if self.once_in(9) { 9_000_000_001 } else { 6000 - 1000 * id }
                )
            }
            85..=86 => format!("Lease/LeaseRevoke ID: {}", self.lease()),
            87..=88 => format!("Lease/LeaseTimeToLive ID: {}{}", self.lease(), self.maybe(2, "keys: true")),
            89 => "Lease/LeaseLeases".to_owned(),
            90..=91 => return vec![format!("send k ID: {}", self.lease()), "receive k 1".to_owned()],
            92..=94 => return vec![self.watch(), "receive w quiet".to_owned()],
            95..=96 => {
                let cancel = format!("send w cancel_request {{ watch_id: {} }}", 1 + self.below(5));
                return vec!["receive w quiet".to_owned(), cancel, "receive w quiet".to_owned()];
            }
            97 => "Cluster/MemberList".to_owned(),
            _ => "receive w quiet".to_owned(),
        };
        vec![line]
    }
}

/// The story that a seed tells.
fn story(seed: u64) -> Story {
    let mut draw = Draw(seed);
    let mut lines: Vec<String> = HEAD.map(str::to_owned).to_vec();
    while lines.len() < STEPS {
        lines.extend(draw.step());
    }
    lines.push("receive w quiet".to_owned());
    let steps = lines.iter().map(|line| script::step(line).unwrap_or_else(|error| panic!("{line}: {error}"))).collect();
    Story { name: format!("seed {seed}"), about: "drawn".to_owned(), needs: Needs::default(), steps }
}

#[test]
fn random_sequences() {
    let masks = Masks::load();
    let asked = std::env::var("KEELSON_SEED").ok().map(|seed| seed.parse::<u64>().expect("KEELSON_SEED is a number"));
    let seeds: Vec<u64> = asked.map_or_else(|| SEEDS.collect(), |seed| vec![seed]);
    let (mut pair, mut steps, begun) = (None, 0, Instant::now());
    for seed in &seeds {
        let story = story(*seed);
        let Some(mut both) = Pair::suited(pair.take(), &story) else { return };
        let (ours, etcd) = both.play(&story, &masks);
        let found = differences(&story, &ours, &etcd);
        if let Some(first) = found.first() {
            drop(both);
            let at = (0..story.steps.len()).find(|&at| !super::same(&ours[at], &etcd[at])).unwrap_or(0);
            let small = shrunk(&story.steps[..=at], &masks);
            panic!("KEELSON_SEED={seed}: {} differences, the first:\n{first}\nmade small:\n{small}", found.len());
        }
        steps += story.steps.len();
        pair = Some(both);
    }
    tell(&format!("differential: {steps} random steps of the seeds {seeds:?} in {:?}", begun.elapsed()));
}

/// The fewest steps found that still end in a difference, as a script.
fn shrunk(steps: &[Step], masks: &Masks) -> String {
    let deadline = Instant::now() + SHRINKING;
    let mut hunt = Hunt { pair: None, masks };
    let (head, mut kept) = (HEAD.len().min(steps.len()), steps.to_vec());
    let mut size = (kept.len() - head).div_ceil(2).max(1);
    loop {
        let mut start = head;
        let mut smaller = false;
        while start < kept.len() && Instant::now() < deadline {
            let end = (start + size).min(kept.len());
            let fewer: Vec<Step> = kept[..start].iter().chain(&kept[end..]).cloned().collect();
            if hunt.differs(&fewer) {
                (kept, smaller) = (fewer, true);
            } else {
                start = end;
            }
        }
        if Instant::now() >= deadline || size == 1 && !smaller {
            break;
        }
        size = size.div_ceil(2).max(1);
    }
    let of_streams = |step: &Step| matches!(step, Step::Open { .. } | Step::Send { .. } | Step::Receive { .. });
    let unary: Vec<Step> = kept.iter().filter(|step| !of_streams(step)).cloned().collect();
    if hunt.differs(&unary) {
        kept = unary;
    }
    let told = hunt.told(&kept);
    let script: String = kept.iter().map(|step| format!("{step}\n")).collect();
    format!("# found at random\n{}\n{told}", cut(&script, 20_000))
}

/// Plays candidates on servers that are alike: after a difference they no longer are.
struct Hunt<'a> {
    pair: Option<Pair>,
    masks: &'a Masks,
}

impl Hunt<'_> {
    fn differs(&mut self, steps: &[Step]) -> bool {
        !self.told(steps).is_empty()
    }

    fn told(&mut self, steps: &[Step]) -> String {
        let name = "shrunk".to_owned();
        let story = Story { name, about: String::new(), needs: Needs::default(), steps: steps.to_vec() };
        let mut pair = Pair::suited(self.pair.take(), &story).expect("both were there a moment ago");
        let (ours, etcd) = pair.play(&story, self.masks);
        let found = differences(&story, &ours, &etcd);
        if found.is_empty() {
            self.pair = Some(pair);
        }
        found.join("\n")
    }
}

#[test]
fn a_seed_tells_the_same_story_each_time() {
    assert_eq!(story(7), story(7));
    assert_ne!(story(7).steps, story(8).steps);
    let written: String = story(7).steps.iter().map(|step| format!("{step}\n")).collect();
    let read = script::parse("seed 7", &format!("# drawn\n{written}")).unwrap();
    assert_eq!(read.steps, story(7).steps, "what is printed can be read again");
}
