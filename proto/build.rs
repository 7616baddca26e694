//! Turns the `.proto` files of the enabled features into Rust, without `protoc`.
//!
//! One run over all of them, so that packages can name each other; `_modules.rs` is the module tree that
//! `src/lib.rs` includes. Clients and servers are written only for the feature `grpc`.

use std::error::Error;
use std::path::{Path, PathBuf};

use prost_types::{DescriptorProto, FileDescriptorSet};

/// Feature, folder.
const GROUPS: [(&str, &str); 3] = [("ETCD", "etcd"), ("K8S", "k8s"), ("INTERNAL", "internal")];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    let mut files = Vec::new();
    let mut folders = Vec::new();
    for (feature, folder) in GROUPS {
        println!("cargo::rerun-if-changed={folder}");
        if enabled(feature) {
            files.extend(proto_files(Path::new(folder))?);
            folders.push(folder);
        }
    }
    let mut descriptors = protox::compile(files, folders)?;
    respell_acronyms(&mut descriptors);

    let mut config = prost_build::Config::new();
    config.bytes(["."]).btree_map(["."]).include_file("_modules.rs");
    tonic_prost_build::configure()
        .build_client(enabled("GRPC"))
        .build_server(enabled("GRPC"))
        .compile_fds_with_config(descriptors, config)?;
    Ok(())
}

fn enabled(feature: &str) -> bool {
    std::env::var_os(format!("CARGO_FEATURE_{feature}")).is_some()
}

fn proto_files(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "proto") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Plural acronyms confuse the conversion to snake case: without this `peerURLs` would be `peer_ur_ls` in Rust.
/// The names on the wire are numbers, so nothing else changes.
fn respell_acronyms(descriptors: &mut FileDescriptorSet) {
    fn walk(message: &mut DescriptorProto) {
        for field in &mut message.field {
            for (acronym, word) in [("URLs", "_urls"), ("IPs", "_ips"), ("CIDRs", "_cidrs")] {
                if let Some(stem) = field.name().strip_suffix(acronym) {
                    field.name = Some(format!("{stem}{word}"));
                    break;
                }
            }
        }
        message.nested_type.iter_mut().for_each(walk);
    }
    descriptors.file.iter_mut().flat_map(|file| &mut file.message_type).for_each(walk);
}
