//! The log, in etcd's form: one JSON object a line with `level`, `ts`, `caller` and `msg`, then the event's fields; or
//! the same on a plain line with `--log-format=console`. It goes to stderr.
//!
//! What it does not do: rotate files, send traces (the operator's issue).

use std::fmt;
use std::io::IsTerminal;

use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use crate::config::LogFormat;

/// Starts logging. Called once, by the binary.
pub fn start(level: Level, format: LogFormat) {
    let filter = tracing_subscriber::filter::Targets::new()
        .with_default(tracing::level_filters::LevelFilter::WARN)
        .with_target("kvstore", level)
        .with_target("kvstore_core", level)
        .with_target("keelson", level);
    use tracing_subscriber::layer::SubscriberExt;
    use tracing_subscriber::util::SubscriberInitExt;
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .event_format(Lines { format });
    tracing_subscriber::registry().with(filter).with(lines).init();
}

struct Lines {
    format: LogFormat,
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let metadata = event.metadata();
        let level = metadata.level().as_str().to_ascii_lowercase();
        let ts = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S%.6fZ").to_string();
        let caller = format!("{}:{}", metadata.file().unwrap_or("unknown"), metadata.line().unwrap_or(0));
        match self.format {
            // Written field by field: readers of etcd's log expect `level` first and the event's own fields last.
            LogFormat::Json => {
                let text = |s: &str| Value::from(s).to_string();
                write!(writer, "{{\"level\":{},\"ts\":{},\"caller\":{}", text(&level), text(&ts), text(&caller))?;
                write!(writer, ",\"msg\":{}", text(&fields.message))?;
                for (name, value) in &fields.rest {
                    write!(writer, ",{}:{value}", text(name))?;
                }
                writeln!(writer, "}}")
            }
            LogFormat::Console if fields.rest.is_empty() => {
                writeln!(writer, "{ts}\t{level}\t{caller}\t{}", fields.message)
            }
            LogFormat::Console => {
                writeln!(writer, "{ts}\t{level}\t{caller}\t{}\t{}", fields.message, Value::Object(fields.rest))
            }
        }
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    rest: Map<String, Value>,
}

impl Fields {
    fn set(&mut self, field: &Field, value: Value) {
        match (field.name(), value) {
            ("message", Value::String(text)) => self.message = text,
            // tracing's names can't hold a dash, zap's usually do.
            (name, value) => drop(self.rest.insert(name.replace('_', "-"), value)),
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.set(field, format!("{value:?}").into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.set(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.set(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.set(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.set(field, value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.set(field, value.into());
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.set(field, value.to_string().into());
    }
}
