//! The two ways in which something can fail here.
//!
//! [`Error`] is an *answer*: a pure function of the request and the replicated state, the same on every member, with
//! etcd's own text (contract 2.3: clients match on the text). `rpc/status.rs` in the shell maps each variant to its gRPC
//! code in one exhaustive match. [`Fatal`] means that *this member* is broken: it logs, flushes and stops, and never
//! answers as if it had applied.

use thiserror::Error;

macro_rules! etcd_errors {
    ($($(#[$doc:meta])* $name:ident => $text:literal,)*) => {
        /// An answer that is an error, in etcd's words.
        #[derive(Clone, PartialEq, Eq, Debug, Error)]
        pub enum Error {
            $($(#[$doc])* #[error($text)] $name,)*
            /// Refused by a rule that etcd words itself and sends with code Unknown.
            #[error("{0}")]
            Other(&'static str),
        }

        impl Error {
            /// Every named variant with its text, for the golden table.
            pub const ALL: &'static [(&'static str, Error)] = &[$((stringify!($name), Error::$name),)*];
        }
    };
}

etcd_errors! {
    EmptyKey => "etcdserver: key is not provided",
    KeyNotFound => "etcdserver: key not found",
    ValueProvided => "etcdserver: value is provided",
    LeaseProvided => "etcdserver: lease is provided",
    TooManyOps => "etcdserver: too many operations in txn request",
    DuplicateKey => "etcdserver: duplicate key given in txn request",
    InvalidClientApiVersion => "etcdserver: invalid client api version",
    InvalidSortOption => "etcdserver: invalid sort option",
    RangeStreamSortOrder => "RangeStream does not support custom sort orders",
    RangeStreamRevisionFilter => "RangeStream does not support revision filters",
    Compacted => "etcdserver: mvcc: required revision has been compacted",
    FutureRevision => "etcdserver: mvcc: required revision is a future revision",
    NoSpace => "etcdserver: mvcc: database space exceeded",
    LeaseNotFound => "etcdserver: requested lease not found",
    LeaseExists => "etcdserver: lease already exists",
    LeaseTtlTooLarge => "etcdserver: too large lease TTL",
    WatchCanceled => "etcdserver: watch canceled",
    MemberExists => "etcdserver: member ID already exist",
    PeerUrlExists => "etcdserver: Peer URLs already exists",
    /// Sent with code Unknown, as etcd's map has it (contract 2.3).
    MemberNotEnoughStarted => "etcdserver: re-configuration failed due to not enough started members",
    MemberBadUrls => "etcdserver: given member URLs are invalid",
    MemberNotFound => "etcdserver: member not found",
    MemberNotLearner => "etcdserver: can only promote a learner member",
    LearnerNotReady => "etcdserver: can only promote a learner member which is in sync with leader",
    TooManyLearners => "etcdserver: too many learner members in cluster",
    ClusterIdMismatch => "etcdserver: cluster ID mismatch",
    RequestTooLarge => "etcdserver: request is too large",
    /// Sent with code Unknown, as etcd's map has it (contract 2.3).
    TooManyRequests => "etcdserver: too many requests",
    RootUserNotExist => "etcdserver: root user does not exist",
    RootRoleNotExist => "etcdserver: root user does not have root role",
    UserAlreadyExists => "etcdserver: user name already exists",
    UserEmpty => "etcdserver: user name is empty",
    UserNotFound => "etcdserver: user name not found",
    RoleAlreadyExists => "etcdserver: role name already exists",
    RoleNotFound => "etcdserver: role name not found",
    RoleEmpty => "etcdserver: role name is empty",
    AuthFailed => "etcdserver: authentication failed, invalid user ID or password",
    PermissionNotGiven => "etcdserver: permission not given",
    PermissionDenied => "etcdserver: permission denied",
    RoleNotGranted => "etcdserver: role is not granted to the user",
    PermissionNotGranted => "etcdserver: permission is not granted to the role",
    AuthNotEnabled => "etcdserver: authentication is not enabled",
    InvalidAuthToken => "etcdserver: invalid auth token",
    InvalidAuthManagement => "etcdserver: invalid auth management",
    AuthOldRevision => "etcdserver: revision of auth store is old",
    NoLeader => "etcdserver: no leader",
    NotLeader => "etcdserver: not leader",
    LeaderChanged => "etcdserver: leader changed",
    NotCapable => "etcdserver: not capable",
    Stopped => "etcdserver: server stopped",
    Timeout => "etcdserver: request timed out",
    TimeoutDueToLeaderFail => "etcdserver: request timed out, possibly due to previous leader failure",
    TimeoutDueToConnectionLost => "etcdserver: request timed out, possibly due to connection lost",
    TimeoutWaitAppliedIndex => "etcdserver: request timed out, waiting for the applied index took too long",
    Unhealthy => "etcdserver: unhealthy cluster",
    Corrupt => "etcdserver: corrupt cluster",
    NotSupportedForLearner => "etcdserver: rpc not supported for learner",
    BadLeaderTransferee => "etcdserver: bad leader transferee",
    WrongDowngradeVersionFormat => "etcdserver: wrong downgrade target version format",
    InvalidDowngradeTargetVersion => "etcdserver: invalid downgrade target version",
    ClusterVersionUnavailable => "etcdserver: cluster version not found during downgrade",
    DowngradeInProcess => "etcdserver: cluster has a downgrade job in progress",
    NoInflightDowngrade => "etcdserver: no inflight downgrade job",
    Canceled => "etcdserver: request canceled",
    DeadlineExceeded => "etcdserver: context deadline exceeded",
    /// A proposal that no leader took in time: not even in the log. etcd passes its context's own error through.
    ContextDeadlineExceeded => "context deadline exceeded",
}

/// This member can't go on: its disk, its data or an invariant is broken. Never an answer to a client.
#[derive(Debug, Error)]
pub enum Fatal {
    #[error("{path}: {message}")]
    Disk { path: String, message: String },
    /// Stored bytes that this program did not write, or a newer one did.
    #[error("damaged data in table {table}: {message}")]
    Damaged { table: &'static str, message: String },
    #[error("invariant broken: {0}")]
    Invariant(String),
}
