//! The doing half of `keelson-proxy`: what `proxy-core` decides is written to the kernel here.

pub mod conntrack;
pub mod netlink;
pub mod nft;
