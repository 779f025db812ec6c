//! What a refusal means, the same on both ends.

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::text::{escaped, of_peer};

const DOMAIN: &str = "pgrejoin";

/// Why a server refused. The client derives from it what the operator can do and its exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The request makes no sense: the programs disagree.
    InvalidRequest,
    /// The protocol versions differ.
    WrongVersion,
    /// The certificate's names are not on the allow list.
    NotAllowed,
    /// The node's files do not prove a role at this moment.
    NotReady,
    /// The node's files are damaged or of an unknown version.
    Damaged,
    /// WAL that was asked for is not there any more.
    WalMissing,
    /// A file that is not served to anybody was asked for.
    NotServed,
    /// Too many connections or streams.
    Overloaded,
    /// The server is shutting down.
    ShuttingDown,
    /// The operating system reported an error on the server.
    Internal,
}

impl Reason {
    const ALL: [(Self, &'static str, Code); 10] = [
        (Self::InvalidRequest, "INVALID_REQUEST", Code::InvalidArgument),
        (Self::WrongVersion, "WRONG_VERSION", Code::FailedPrecondition),
        (Self::NotAllowed, "NOT_ALLOWED", Code::PermissionDenied),
        (Self::NotReady, "NOT_READY", Code::FailedPrecondition),
        (Self::Damaged, "DAMAGED", Code::DataLoss),
        (Self::WalMissing, "WAL_MISSING", Code::NotFound),
        (Self::NotServed, "NOT_SERVED", Code::PermissionDenied),
        (Self::Overloaded, "OVERLOADED", Code::ResourceExhausted),
        (Self::ShuttingDown, "SHUTTING_DOWN", Code::Unavailable),
        (Self::Internal, "INTERNAL", Code::Internal),
    ];

    fn entry(self) -> (&'static str, Code) {
        let found = Self::ALL.iter().find(|(reason, ..)| *reason == self);
        found.map_or(("INTERNAL", Code::Internal), |(_, name, code)| (name, *code))
    }

    fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, known, _)| *known == name).map(|(reason, ..)| *reason)
    }
}

/// A refusal with its message.
///
/// Its text is shown escaped: it may name what a peer asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", escaped(message))]
pub struct Refusal {
    /// What kind.
    pub reason: Reason,
    /// What, where and what to do, in one line.
    pub message: String,
}

impl Refusal {
    /// A refusal.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into() }
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let (name, code) = refusal.reason.entry();
        let details = ErrorDetails::with_error_info(name, DOMAIN, std::collections::HashMap::new());
        Self::with_error_details(code, refusal.message, details)
    }
}

/// Why a call failed, as its caller sees it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// The server refused the call. The words are the server's.
    #[error("the source says: {}", of_peer(&_0.message))]
    Refused(Refusal),
    /// The connection broke, or the server is not what it should be.
    #[error("{}", of_peer(_0))]
    Broken(String),
    /// The peer sent what the protocol does not allow.
    #[error("the source sent an invalid reply: {}", of_peer(_0))]
    InvalidReply(String),
}

impl CallError {
    /// Whether trying again later can help.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Refused(refusal) => match refusal.reason {
                Reason::NotReady | Reason::Overloaded | Reason::ShuttingDown => true,
                Reason::InvalidRequest
                | Reason::WrongVersion
                | Reason::NotAllowed
                | Reason::Damaged
                | Reason::WalMissing
                | Reason::NotServed
                | Reason::Internal => false,
            },
            Self::Broken(_) => true,
            Self::InvalidReply(_) => false,
        }
    }
}

impl From<Status> for CallError {
    fn from(status: Status) -> Self {
        let info = status.get_error_details().error_info().cloned();
        let reason = info
            .filter(|info| info.domain == DOMAIN)
            .and_then(|info| Reason::from_name(&info.reason));
        if let Some(reason) = reason {
            return Self::Refused(Refusal::new(reason, status.message()));
        }
        // The cause of a transport error is only in its chain of sources.
        let mut text = status.message().to_owned();
        let mut source = std::error::Error::source(&status);
        while let Some(error) = source {
            let cause = error.to_string();
            if !text.contains(&cause) {
                text = format!("{text}: {cause}");
            }
            source = error.source();
        }
        match status.code() {
            Code::Unimplemented => {
                Self::InvalidReply(format!("it does not know this call: {text}"))
            }
            Code::OutOfRange | Code::InvalidArgument => Self::InvalidReply(text),
            Code::Ok
            | Code::Cancelled
            | Code::Unknown
            | Code::DeadlineExceeded
            | Code::NotFound
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::ResourceExhausted
            | Code::FailedPrecondition
            | Code::Aborted
            | Code::Internal
            | Code::Unavailable
            | Code::DataLoss
            | Code::Unauthenticated => Self::Broken(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_survives_the_wire() {
        for (reason, ..) in Reason::ALL {
            let refusal = Refusal::new(reason, "what, where, what to do");
            let status = Status::from(refusal.clone());
            assert_eq!(CallError::from(status), CallError::Refused(refusal));
        }
    }

    #[test]
    fn the_words_of_a_server_are_marked_as_its_own_and_cannot_forge_a_line() {
        let message = format!("no\n\u{1b}[2Jpgrejoin: the target is rewound{}", "!".repeat(1000));
        for error in [
            CallError::from(Status::from(Refusal::new(Reason::NotReady, message.clone()))),
            CallError::from(Status::unknown(message.clone())),
            CallError::from(Status::out_of_range(message)),
        ] {
            let shown = error.to_string();
            assert!(!shown.contains('\n') && !shown.contains('\u{1b}'), "{shown}");
            assert!(shown.len() < 400 && shown.contains(r"no\n\u{1b}[2J"), "{shown}");
        }
        let refused = CallError::Refused(Refusal::new(Reason::NotReady, "it is starting"));
        assert_eq!(refused.to_string(), "the source says: it is starting");
    }

    #[test]
    fn a_foreign_error_is_no_refusal() {
        let error = CallError::from(Status::permission_denied("proxy says no"));
        assert!(matches!(error, CallError::Broken(_)));
    }
}
