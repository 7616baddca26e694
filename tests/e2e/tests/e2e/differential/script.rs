//! A story of the corpus: plain text, one step a line (more, if the next lines are indented).
//!
//! ```text
//! # 2.6.2 limit: `more` is said if and only if something was cut off      what the story is about; its first line
//! flags --max-request-bytes=4096       servers of its own, started with these
//! members 3                            a store of three members; steps talk to `to`
//! fresh                                servers of its own, so that revisions begin at 1
//! KV/Put key: "a" value: "x"*1000      a call: a method, and the request in protobuf's text format
//! KV/Put hex 0a0161                    the same in bytes of the message
//! KV/Put body 00000000030a0161         or of the whole request body
//! with hasleader: true                 metadata of the next call
//! open w Watch/Watch                   a stream
//! send w create_request { key: "a" }
//! receive w 2                          exactly two messages
//! receive w 3 events                   as many messages as three events come in
//! receive w quiet                      what came until all requests and all events are known to have been answered; a create that was
//!                                      refused has to be received before
//! receive w end                        what comes until the call ends, and how it ends
//! receive a|b end "words"              the same of that one of two streams whose answer holds the words
//! close w                              no more requests on it
//! until "count: 2" KV/Range key: "a"   asks again until the answer's text holds these words
//! keep id ID                           the field of the last message, for `{id}`
//! to follower                          the next calls go there: leader, follower, other (roles when the story began)
//! kill leader                          kill -9; also stop (SIGTERM), pause, resume, start
//! ```
//!
//! Expressions in braces without blanks are replaced when a step is played: `{R}` is the store's revision when the story began,
//! `{now}` the newest revision that an answer told, each with an offset (`{now-2}`), and what was kept. `"x"*1000` repeats a string,
//! `@3[ success { request_put { key: "#" } } ]@` repeats text with `#` counted from 0000.
//!
//! What it does not do: it knows no protobuf; a request's text is parsed when it is played.

use std::path::Path;
use std::{fmt, fs};

/// One script and what it needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Story {
    /// `area/case`.
    pub(super) name: String,
    pub(super) about: String,
    pub(super) needs: Needs,
    pub(super) steps: Vec<Step>,
}

/// The servers that a story is played on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Needs {
    pub(super) flags: Vec<String>,
    /// 0 stands for one.
    pub(super) members: usize,
    pub(super) fresh: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    With {
        name: String,
        value: String,
    },
    Call {
        method: String,
        request: Request,
    },
    Until {
        words: String,
        method: String,
        request: Request,
    },
    Keep {
        name: String,
        path: String,
    },
    Open {
        stream: String,
        method: String,
    },
    Send {
        stream: String,
        request: Request,
    },
    /// Of several streams, `a|b`, only what holds `words` counts.
    Receive {
        stream: String,
        what: Receive,
        words: String,
    },
    Close {
        stream: String,
    },
    Reset {
        stream: String,
    },
    To {
        role: String,
    },
    Fate {
        what: Fate,
        role: String,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Request {
    Text(String),
    Message(Vec<u8>),
    Body(Vec<u8>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Receive {
    Messages(usize),
    Events(usize),
    Quiet,
    End,
}

/// What happens to a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Kill,
    Stop,
    Pause,
    Resume,
    Start,
}

/// Reads every story of an area, in order of their names.
pub(super) fn area(folder: &Path) -> Vec<Story> {
    let mut paths: Vec<_> = fs::read_dir(folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "txt"))
        .collect();
    paths.sort();
    paths
        .iter()
        .map(|path| {
            let name = |path: &Path| path.file_stem().unwrap().to_string_lossy().into_owned();
            let name = format!("{}/{}", name(folder), name(path));
            parse(&name, &fs::read_to_string(path).unwrap()).unwrap_or_else(|error| panic!("{name}: {error}"))
        })
        .collect()
}

/// Reads a script; the error names the line.
pub(super) fn parse(name: &str, text: &str) -> Result<Story, String> {
    let about =
        text.lines().next().and_then(|line| line.strip_prefix("# ")).ok_or("no first line that says `# why`")?;
    let mut story =
        Story { name: name.to_owned(), about: about.to_owned(), needs: Needs::default(), steps: Vec::new() };
    let mut logical: Vec<(usize, String)> = Vec::new();
    for (number, line) in text.lines().enumerate() {
        if line.trim().is_empty() || line.trim_start().starts_with("# ") {
            continue;
        }
        match logical.last_mut() {
            Some((_, before)) if line.starts_with(' ') => {
                before.push('\n');
                before.push_str(line);
            }
            _ => logical.push((number + 1, line.to_owned())),
        }
    }
    for (number, line) in logical {
        let (word, rest) = split(&line);
        match word {
            "flags" => story.needs.flags = rest.split_whitespace().map(str::to_owned).collect(),
            "members" => story.needs.members = rest.parse().map_err(|_| format!("line {number}: how many?"))?,
            "fresh" => story.needs.fresh = true,
            _ => story.steps.push(step(&line).map_err(|error| format!("line {number}: {error}"))?),
        }
    }
    Ok(story)
}

/// Reads one step.
pub(super) fn step(line: &str) -> Result<Step, String> {
    let (word, rest) = split(line);
    let (first, more) = split(rest);
    let stream = first.to_owned();
    Ok(match word {
        "with" => {
            let (name, value) = rest.split_once(": ").ok_or("`with name: value`")?;
            Step::With { name: name.to_owned(), value: value.to_owned() }
        }
        "until" => {
            let (words, call) =
                rest.strip_prefix('"').and_then(|rest| rest.split_once("\" ")).ok_or("`until \"words\" call`")?;
            let (method, rest) = split(call);
            Step::Until { words: words.to_owned(), method: method.to_owned(), request: request(rest)? }
        }
        "keep" => Step::Keep { name: stream, path: more.to_owned() },
        "open" => Step::Open { stream, method: more.to_owned() },
        "send" => Step::Send { stream, request: request(more)? },
        "receive" => {
            let (what, words) = match more.strip_suffix('"').and_then(|more| more.split_once(" \"")) {
                Some((what, words)) => (what, words),
                None => (more, ""),
            };
            Step::Receive { stream, what: receive(what)?, words: words.to_owned() }
        }
        "close" => Step::Close { stream },
        "reset" => Step::Reset { stream },
        "to" => Step::To { role: stream },
        "kill" => Step::Fate { what: Fate::Kill, role: stream },
        "stop" => Step::Fate { what: Fate::Stop, role: stream },
        "pause" => Step::Fate { what: Fate::Pause, role: stream },
        "resume" => Step::Fate { what: Fate::Resume, role: stream },
        "start" => Step::Fate { what: Fate::Start, role: stream },
        method if method.contains('/') => Step::Call { method: method.to_owned(), request: request(rest)? },
        other => return Err(format!("`{other}` is no step")),
    })
}

fn split(text: &str) -> (&str, &str) {
    let text = text.trim();
    match text.split_once(char::is_whitespace) {
        Some((word, rest)) => (word, rest.trim_start()),
        None => (text, ""),
    }
}

fn receive(text: &str) -> Result<Receive, String> {
    let count = |word: &str| word.parse().map_err(|_| format!("receive how many? `{word}`"));
    Ok(match split(text) {
        ("quiet", "") => Receive::Quiet,
        ("end", "") => Receive::End,
        (number, "events") => Receive::Events(count(number)?),
        (number, "") => Receive::Messages(count(number)?),
        _ => return Err(format!("`receive {text}`")),
    })
}

fn request(text: &str) -> Result<Request, String> {
    Ok(match split(text) {
        ("hex", digits) => Request::Message(bytes(digits)?),
        ("body", digits) => Request::Body(bytes(digits)?),
        _ => Request::Text(text.to_owned()),
    })
}

fn bytes(digits: &str) -> Result<Vec<u8>, String> {
    let digits: String = digits.chars().filter(|digit| !digit.is_whitespace()).collect();
    if !digits.len().is_multiple_of(2) {
        return Err("half a byte".to_owned());
    }
    (0..digits.len() / 2)
        .map(|place| u8::from_str_radix(&digits[2 * place..2 * place + 2], 16).map_err(|error| error.to_string()))
        .collect()
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        match self {
            Request::Text(text) => f.write_str(text),
            Request::Message(message) => write!(f, "hex {}", hex(message)),
            Request::Body(body) => write!(f, "body {}", hex(body)),
        }
    }
}

/// A step as it is written in a script.
impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::With { name, value } => write!(f, "with {name}: {value}"),
            Step::Call { method, request } => write!(f, "{method} {request}"),
            Step::Until { words, method, request } => write!(f, "until \"{words}\" {method} {request}"),
            Step::Keep { name, path } => write!(f, "keep {name} {path}"),
            Step::Open { stream, method } => write!(f, "open {stream} {method}"),
            Step::Send { stream, request } => write!(f, "send {stream} {request}"),
            Step::Receive { stream, what, words } => {
                let what = match what {
                    Receive::Messages(count) => count.to_string(),
                    Receive::Events(count) => format!("{count} events"),
                    Receive::Quiet => "quiet".to_owned(),
                    Receive::End => "end".to_owned(),
                };
                let words = if words.is_empty() { String::new() } else { format!(" \"{words}\"") };
                write!(f, "receive {stream} {what}{words}")
            }
            Step::Close { stream } => write!(f, "close {stream}"),
            Step::Reset { stream } => write!(f, "reset {stream}"),
            Step::To { role } => write!(f, "to {role}"),
            Step::Fate { what, role } => {
                let word = match what {
                    Fate::Kill => "kill",
                    Fate::Stop => "stop",
                    Fate::Pause => "pause",
                    Fate::Resume => "resume",
                    Fate::Start => "start",
                };
                write!(f, "{word} {role}")
            }
        }
    }
}

/// Replaces `"x"*3`, `@3[ .. ]@`, and the expressions in braces, which `value` knows by name.
pub(super) fn expand(text: &str, value: &dyn Fn(&str) -> Option<String>) -> Result<String, String> {
    let text = repeat_text(text)?;
    let text = repeat_strings(&text)?;
    let mut out = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some(start) = rest.find('{') {
        let tail = &rest[start + 1..];
        let name = tail.split_once('}').map(|(name, _)| name).filter(|name| {
            !name.is_empty() && name.len() < 24 && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-".contains(&b))
        });
        out.push_str(&rest[..start]);
        match name {
            Some(expression) => {
                out.push_str(&evaluate(expression, value)?);
                rest = &tail[expression.len() + 1..];
            }
            None => {
                out.push('{');
                rest = tail;
            }
        }
    }
    out.push_str(rest);
    Ok(out)
}

fn evaluate(expression: &str, value: &dyn Fn(&str) -> Option<String>) -> Result<String, String> {
    let known = |name: &str| value(name).ok_or_else(|| format!("`{{{expression}}}` is not known here"));
    let Some(place) = expression.find(['+', '-']) else { return known(expression) };
    let (name, offset) = expression.split_at(place);
    let number: i64 = known(name)?.parse().map_err(|_| format!("`{name}` is no number"))?;
    let offset: i64 = offset.parse().map_err(|_| format!("`{expression}` has no offset"))?;
    Ok((number + offset).to_string())
}

fn repeat_text(text: &str) -> Result<String, String> {
    let Some(start) = text.find('@') else { return Ok(text.to_owned()) };
    let Some((count, body)) = text[start + 1..].split_once('[').filter(|(count, _)| count.parse::<usize>().is_ok())
    else {
        return Ok(text.to_owned());
    };
    let count: usize = count.parse().map_err(|_| "how often?")?;
    let (body, rest) = body.split_once("]@").ok_or("`@` without `]@`")?;
    let mut out = text[..start].to_owned();
    for number in 0..count {
        out.push_str(&body.replace('#', &format!("{number:04}")));
    }
    out.push_str(&repeat_text(rest)?);
    Ok(out)
}

/// A string literal followed by `*` and a number is that string that many times.
fn repeat_strings(text: &str) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find('"') {
        let body = &rest[start + 1..];
        let mut escaped = false;
        let end = body
            .bytes()
            .position(|byte| {
                let closes = byte == b'"' && !escaped;
                escaped = byte == b'\\' && !escaped;
                closes
            })
            .ok_or("a string does not end")?;
        out.push_str(&rest[..=start]);
        let after = &body[end + 1..];
        let digits = after.strip_prefix('*').map_or(0, |digits| digits.bytes().take_while(u8::is_ascii_digit).count());
        let times = if digits == 0 { 1 } else { after[1..=digits].parse().map_err(|_| "how often?")? };
        out.push_str(&body[..end].repeat(times));
        out.push('"');
        rest = if digits == 0 { after } else { &after[digits + 1..] };
    }
    out.push_str(rest);
    Ok(out)
}
