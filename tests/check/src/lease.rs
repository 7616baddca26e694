//! A lease lives at least as long as it was promised: its TTL from the moment that the last answered grant or keep-alive
//! was *called* (the server cannot have counted from earlier). And it ends, once nobody keeps it.
//!
//! What it does not do: count server time. All times are the recorder's, in the unit of `ttl`.

/// What happened to one lease, as its client saw it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Lease {
    pub id: i64,
    pub ttl: u64,
    /// When the grant and each answered keep-alive were called.
    pub promised: Vec<u64>,
    /// When a revoke was first called by a client, answered or not.
    pub revoked: Option<u64>,
    /// When it was first seen to be gone.
    pub gone: Option<u64>,
}

/// `patience`: how long after its end a lease may linger; judged only if `now`, the end of the recording, is later.
pub fn judge(leases: &[Lease], now: u64, patience: u64) -> Result<(), String> {
    for lease in leases {
        let Some(last) = lease.promised.iter().max() else { continue };
        let due = last.saturating_add(lease.ttl);
        match lease.gone {
            Some(gone) if lease.revoked.is_none_or(|revoked| gone < revoked) && gone < due => {
                return Err(format!("gone at {gone}, but promised until {due}: {lease:?}"));
            }
            None if now > due.saturating_add(patience) => {
                return Err(format!("still there at {now}, but due at {due}: {lease:?}"));
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(revoked: Option<u64>, gone: Option<u64>) -> [Lease; 1] {
        [Lease { id: 1, ttl: 10, promised: vec![5, 12], revoked, gone }]
    }

    #[test]
    fn a_lease_lives_as_promised_and_no_longer_than_patience() {
        assert_eq!(judge(&lease(None, Some(22)), 100, 5), Ok(()));
        assert!(judge(&lease(None, Some(21)), 100, 5).is_err());
        assert_eq!(judge(&lease(None, None), 27, 5), Ok(()));
        assert!(judge(&lease(None, None), 28, 5).is_err());
    }

    #[test]
    fn a_revoke_ends_it_early() {
        assert_eq!(judge(&lease(Some(14), Some(15)), 100, 5), Ok(()));
        assert!(judge(&lease(Some(16), Some(15)), 100, 5).is_err());
    }
}
