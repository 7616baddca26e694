//! End to end: real processes, real clients, the real kernel. Every body about the store runs on ours and on real etcd, because
//! what passes on ours alone proves nothing.

#![allow(clippy::unwrap_used, reason = "a test's panic is its report")]

/// Makes of each body two tests, one for each store.
macro_rules! on_both {
    ($($body:ident),* $(,)?) => {
        $(mod $body {
            #[test]
            fn on_keelson() {
                super::$body(e2e::Kind::Keelson);
            }

            #[test]
            fn on_etcd() {
                super::$body(e2e::Kind::Etcd);
            }
        })*
    };
}

mod clients;
mod command_line;
mod compaction;
mod crash;
mod differential;
mod endpoints;
mod errors;
mod history;
mod kube;
mod kv;
mod lease;
mod lease_edges;
mod limits;
mod proxy;
mod quota;
mod recipes;
mod stream;
mod three;
mod tidy;
mod transcript;
mod watch;
