//! The wire's messages by name, read from the `.proto` files of the build: a request from text to bytes, an answer from bytes to
//! text.
//!
//! What it does not do: it masks and compares nothing.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use prost_reflect::prost::Message;
use prost_reflect::text_format::FormatOptions;
use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor, MethodDescriptor};

/// The services that scripts name in short.
const SERVICES: &[(&str, &str)] = &[
    ("KV", "etcdserverpb.KV"),
    ("Watch", "etcdserverpb.Watch"),
    ("Lease", "etcdserverpb.Lease"),
    ("Cluster", "etcdserverpb.Cluster"),
    ("Maintenance", "etcdserverpb.Maintenance"),
    ("Auth", "etcdserverpb.Auth"),
    ("Lock", "v3lockpb.Lock"),
    ("Election", "v3electionpb.Election"),
    ("Health", "grpc.health.v1.Health"),
];

/// All messages and services of etcd's API.
pub(super) fn pool() -> &'static DescriptorPool {
    static POOL: OnceLock<DescriptorPool> = OnceLock::new();
    POOL.get_or_init(|| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../proto/etcd");
        let mut files: Vec<PathBuf> = std::fs::read_dir(&folder)
            .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "proto"))
            .collect();
        files.sort();
        let descriptors = protox::compile(files, [folder]).unwrap_or_else(|error| panic!("{error}"));
        DescriptorPool::from_file_descriptor_set(descriptors).unwrap_or_else(|error| panic!("{error}"))
    })
}

/// A method as a script names it: `KV/Range`, or `some.Service/Method` of which nothing has to be known.
#[derive(Clone, Debug)]
pub(super) struct Method {
    pub(super) path: String,
    descriptor: Option<MethodDescriptor>,
}

impl Method {
    pub(super) fn named(name: &str) -> Method {
        let (service, method) = name.rsplit_once('/').unwrap_or((name, ""));
        let service = SERVICES.iter().find(|(short, _)| *short == service).map_or(service, |(_, long)| long);
        let descriptor = pool()
            .get_service_by_name(service)
            .and_then(|service| service.methods().find(|candidate| candidate.name() == method));
        Method { path: format!("/{service}/{method}"), descriptor }
    }

    /// The request's bytes.
    pub(super) fn encode(&self, text: &str) -> Result<Vec<u8>, String> {
        let Some(descriptor) = &self.descriptor else {
            return if text.trim().is_empty() {
                Ok(Vec::new())
            } else {
                Err("only hex for an unknown method".to_owned())
            };
        };
        DynamicMessage::parse_text_format(descriptor.input(), text)
            .map(|message| message.encode_to_vec())
            .map_err(|error| format!("{error} in `{text}`"))
    }

    pub(super) fn answer(&self) -> Option<MessageDescriptor> {
        self.descriptor.as_ref().map(MethodDescriptor::output)
    }

    /// Whether answers may come one by one.
    pub(super) fn is_streaming(&self) -> bool {
        self.descriptor.as_ref().is_some_and(MethodDescriptor::is_server_streaming)
    }

    pub(super) fn is_watch(&self) -> bool {
        self.path == "/etcdserverpb.Watch/Watch"
    }
}

/// An answer as text, or its bytes where that can't be.
pub(super) fn text(descriptor: Option<&MessageDescriptor>, bytes: &[u8]) -> String {
    let hex = || bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let Some(descriptor) = descriptor else { return format!("hex {}", hex()) };
    match DynamicMessage::decode(descriptor.clone(), bytes) {
        Ok(message) => message.to_text_format_with_options(&FormatOptions::new().pretty(true)),
        Err(error) => format!("hex {} ({error})", hex()),
    }
}

/// A field of a message by its path, `header.revision` for one, as text.
pub(super) fn field(descriptor: &MessageDescriptor, bytes: &[u8], path: &str) -> Option<String> {
    let mut message = DynamicMessage::decode(descriptor.clone(), bytes).ok()?;
    let mut names = path.split('.').peekable();
    while let Some(name) = names.next() {
        let value = message.get_field_by_name(name)?.into_owned();
        if names.peek().is_none() {
            return Some(match &value {
                prost_reflect::Value::String(text) => text.clone(),
                prost_reflect::Value::Bytes(bytes) => bytes.escape_ascii().to_string(),
                prost_reflect::Value::Message(message) => message.to_text_format(),
                other => other.to_string(),
            });
        }
        message = value.as_message()?.clone();
    }
    None
}
