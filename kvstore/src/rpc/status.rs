//! The one place where an [`Error`] becomes a gRPC status: code and exact text, as etcd sends them (contract 2.3).
//!
//! The match is exhaustive, so that a new error can't be forgotten and fall through to `Unknown`. The two rows that etcd
//! itself sends as `Unknown` say so.

use kvstore_core::Error;
use kvstore_core::mvcc::ReadError;
use tonic::{Code, Status};

/// The gRPC code of an answer that is an error.
pub fn code(error: &Error) -> Code {
    use Error::*;
    match error {
        EmptyKey
        | KeyNotFound
        | ValueProvided
        | LeaseProvided
        | TooManyOps
        | DuplicateKey
        | InvalidClientApiVersion
        | InvalidSortOption
        | MemberBadUrls
        | RequestTooLarge
        | UserEmpty
        | RoleEmpty
        | AuthFailed
        | PermissionNotGiven
        | InvalidAuthManagement
        | AuthOldRevision
        | WrongDowngradeVersionFormat
        | InvalidDowngradeTargetVersion => Code::InvalidArgument,
        Compacted | FutureRevision | LeaseTtlTooLarge => Code::OutOfRange,
        RangeStreamSortOrder | RangeStreamRevisionFilter => Code::Unimplemented,
        NoSpace => Code::ResourceExhausted,
        LeaseNotFound | MemberNotFound => Code::NotFound,
        LeaseExists
        | MemberExists
        | PeerUrlExists
        | MemberNotLearner
        | LearnerNotReady
        | TooManyLearners
        | ClusterIdMismatch
        | RootUserNotExist
        | RootRoleNotExist
        | UserAlreadyExists
        | UserNotFound
        | RoleAlreadyExists
        | RoleNotFound
        | RoleNotGranted
        | PermissionNotGranted
        | AuthNotEnabled
        | NotLeader
        | NotCapable
        | NotSupportedForLearner
        | BadLeaderTransferee
        | ClusterVersionUnavailable
        | DowngradeInProcess
        | NoInflightDowngrade => Code::FailedPrecondition,
        PermissionDenied => Code::PermissionDenied,
        InvalidAuthToken => Code::Unauthenticated,
        NoLeader
        | LeaderChanged
        | Stopped
        | Timeout
        | TimeoutDueToLeaderFail
        | TimeoutDueToConnectionLost
        | TimeoutWaitAppliedIndex
        | Unhealthy => Code::Unavailable,
        Corrupt => Code::DataLoss,
        WatchCanceled | Canceled => Code::Cancelled,
        DeadlineExceeded | ContextDeadlineExceeded => Code::DeadlineExceeded,
        // etcd maps these two to errors of its client library, which carry no code.
        MemberNotEnoughStarted | TooManyRequests => Code::Unknown,
        Other(_) => Code::Unknown,
    }
}

/// The status that a client gets for an error.
pub fn status(error: &Error) -> Status {
    Status::new(code(error), error.to_string())
}

/// What a Lock or Election RPC answers of it. etcd serves these through its own client library, whose errors carry no code:
/// all that the library knows by their texts arrive as `Unknown`.
pub fn recipe_status(error: &Error) -> Status {
    use Error::*;
    match error {
        InvalidClientApiVersion
        | WatchCanceled
        | PermissionNotGiven
        | TimeoutWaitAppliedIndex
        | Canceled
        | DeadlineExceeded
        | ContextDeadlineExceeded => status(error),
        known => Status::unknown(known.to_string()),
    }
}

/// The same for a read, whose other failure is that this member is broken: it can't answer, and says no more.
pub fn read_status(error: &ReadError) -> Status {
    match error {
        ReadError::Answer(error) => status(error),
        ReadError::Fatal(fatal) => {
            tracing::error!(error = %fatal, "reading failed");
            Status::new(Code::Internal, "keelson: this member can't read its data; see its log")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table of the contract (2.3), written out again so that neither a text nor a code can change unnoticed.
    const GOLDEN: &str = include_str!("status.golden");

    #[test]
    fn every_error_has_etcds_code_and_text() {
        let table: String =
            Error::ALL.iter().map(|(name, error)| format!("{name} | {:?} | {error}\n", code(error))).collect();
        assert_eq!(table, GOLDEN);
    }

    #[test]
    fn metrics_name_codes_as_they_are_numbered() {
        for (number, name) in crate::metrics::CODE_NAMES.iter().enumerate() {
            let code = format!("{:?}", Code::from(number as i32)).replace("Cancelled", "Canceled");
            assert_eq!(code.to_lowercase(), name.to_lowercase());
        }
    }
}
