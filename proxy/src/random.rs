//! Random numbers, from the kernel: where allocation begins to look, and the uids of new objects.

use std::fs::File;
use std::io::{self, Read};

#[derive(Debug)]
pub struct Random(File);

impl Random {
    pub fn open() -> io::Result<Random> {
        File::open("/dev/urandom").map(Random)
    }

    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.0.read_exact(&mut bytes).expect("/dev/urandom never ends");
        bytes
    }

    pub fn number(&mut self) -> u64 {
        u64::from_ne_bytes(self.bytes())
    }

    /// A UUID of version 4, as Kubernetes gives every object.
    pub fn uid(&mut self) -> String {
        let mut bytes = self.bytes::<16>();
        bytes[6] = bytes[6] & 0x0f | 0x40;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uid_is_a_uuid_of_version_four() {
        let mut random = Random::open().unwrap();
        let uid = random.uid();
        let parts: Vec<&str> = uid.split('-').collect();
        assert_eq!(parts.iter().map(|part| part.len()).collect::<Vec<_>>(), [8, 4, 4, 4, 12]);
        assert!(parts[2].starts_with('4') && "89ab".contains(&parts[3][..1]), "{uid}");
        assert_ne!(uid, random.uid());
    }
}
