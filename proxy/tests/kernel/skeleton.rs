//! The constant part loads, lists, and goes.

use std::time::Instant;

use proxy::nft::Nft;
use proxy_core::dataplane::Dataplane;

use crate::netns::{isolated, run};

#[test]
fn the_skeleton_loads_and_nft_lists_it() {
    isolated(|| {
        let mut nft = Nft::open().expect("a netlink socket");
        let applied = nft.reconcile(&Dataplane::default(), Instant::now()).expect("the kernel takes the skeleton");
        println!("skeleton: {} messages, {} bytes", applied.messages, applied.bytes);
        let listing = run("nft", &["list", "ruleset"]);
        for part in ["table ip keelson", "table ip6 keelson", "chain pick-128", "chain nat-postrouting"] {
            assert!(listing.contains(part), "{part} is missing");
        }
        nft.cleanup().expect("a cleanup");
        assert_eq!(run("nft", &["list", "ruleset"]), "");
    });
}
