//! Operations as their clients saw them.
//!
//! What it does not do: judge.

use std::fmt;

/// When something happened, in the recorder's own count. Two events never share one.
pub type Moment = u64;

/// What was asked for. Values are written once each, so that a value names its write.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Action {
    Get,
    Put {
        value: String,
    },
    Delete,
    /// A transaction: if the key holds `expected` (`None`: does not exist), put `value`; else get.
    Swap {
        expected: Option<String>,
        value: String,
    },
}

/// A key as a reader saw it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Version {
    pub value: String,
    pub mod_revision: i64,
    pub version: i64,
}

/// What was answered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    Got(Option<Version>),
    Put,
    Deleted { count: i64 },
    Swapped,
    NotSwapped(Option<Version>),
}

/// One operation on one key, from the call to its end.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Operation {
    pub client: u64,
    pub key: String,
    pub action: Action,
    pub called: Moment,
    pub ended: Ended,
}

/// How an operation ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Ended {
    /// Answered; `revision` is the header's.
    Answered { at: Moment, revision: i64, answer: Answer },
    /// It certainly did nothing.
    Refused,
    /// Never answered, but the store's own history shows it at this revision ([`crate::revision::resolve`]).
    Late { revision: i64 },
    /// It may have happened, may yet happen, or never.
    Unknown,
}

impl Operation {
    /// Whether it may have changed something.
    pub fn writes(&self) -> bool {
        self.action != Action::Get
            && self.ended != Ended::Refused
            && !matches!(
                self.ended,
                Ended::Answered { answer: Answer::NotSwapped(_) | Answer::Deleted { count: 0 }, .. }
            )
    }

    /// Where a write that happened stands.
    pub fn write_revision(&self) -> Option<i64> {
        match self.ended {
            Ended::Answered { revision, .. } | Ended::Late { revision } if self.writes() => Some(revision),
            _ => None,
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "client {} at {}: {} {:?}", self.client, self.called, self.key, self.action)?;
        match &self.ended {
            Ended::Answered { at, revision, answer } => write!(f, " → at {at}, revision {revision}: {answer:?}"),
            Ended::Late { revision } => write!(f, " → unanswered, at revision {revision}"),
            Ended::Refused => write!(f, " → refused"),
            Ended::Unknown => write!(f, " → unknown"),
        }
    }
}
