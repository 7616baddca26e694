//! The nftables backend against the real kernel, in network namespaces of its own. Needs root, `nft` and `ip`.

mod cluster;
mod elements;
mod netns;
mod packets;
mod skeleton;
