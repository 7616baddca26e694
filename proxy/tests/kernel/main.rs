//! The nftables backend against the real kernel, in network namespaces of its own. Needs root, `nft` and `ip`.

mod netns;
mod skeleton;
