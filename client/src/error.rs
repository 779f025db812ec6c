//! What went wrong, and which exit code says so.

use std::error::Error;
use std::{fmt, io};

use data_dir::OpenError;
use data_dir::control::ControlError;
use data_dir::wal::WalError;
use proto::status::{CallError, Reason};

/// Kinds of failure that an operator or a program treats differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Anything else; the target is as it was.
    Other,
    /// The options make no sense.
    Usage,
    /// The target cannot be rewound as it is.
    Target,
    /// The two ends do not accept each other.
    Authentication,
    /// Trying again later can help.
    Transient,
    /// WAL that nothing can replace is gone, or the clusters have nothing in common.
    Rebuild,
    /// A check before the first change failed.
    Preflight,
    /// The target was modified and is not finished: run again, do not start PostgreSQL.
    Unfinished,
    /// The source changed while it was read: a new plan helps.
    Changed,
    /// WAL of the source that the plan needs cannot be had: a new plan, or another strategy, helps.
    WalUnavailable,
    /// The target is rewound, but something after that failed: it was not started, or temporary
    /// files are left.
    Rewound,
    /// Stopped by a signal, the target is as it was.
    Interrupted,
}

impl Class {
    /// The documented exit code.
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Other => 1,
            Self::Usage => 2,
            Self::Target => 3,
            Self::Authentication => 4,
            Self::Transient | Self::Changed | Self::WalUnavailable => 5,
            Self::Rebuild => 6,
            Self::Preflight => 7,
            Self::Unfinished => 8,
            Self::Rewound => 9,
            Self::Interrupted => 130,
        }
    }
}

/// A failure: what, where, and what to do.
#[derive(Debug)]
pub struct RewindError {
    class: Class,
    message: String,
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl RewindError {
    /// A failure with no deeper cause.
    pub fn new(class: Class, message: impl Into<String>) -> Self {
        Self { class, message: message.into(), source: None }
    }

    /// A failure and its cause.
    pub fn because(
        class: Class,
        message: impl Into<String>,
        source: impl Into<Box<dyn Error + Send + Sync>>,
    ) -> Self {
        Self { class, message: message.into(), source: Some(source.into()) }
    }

    /// Its kind.
    pub fn class(&self) -> Class {
        self.class
    }

    /// Whether a plan that is made anew may do without what failed.
    pub fn needs_new_plan(&self) -> bool {
        matches!(self.class, Class::Changed | Class::WalUnavailable)
    }

    /// Whether a disk was full.
    pub fn is_for_want_of_room(&self) -> bool {
        self.io_kind().is_some_and(|kind| {
            matches!(kind, io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
        })
    }

    /// The system's error at the bottom of it.
    fn io_kind(&self) -> Option<io::ErrorKind> {
        io_kind(self.source()?)
    }

    /// The same failure with more to say.
    #[must_use]
    pub fn advise(mut self, advice: &str) -> Self {
        self.message = format!("{} ({advice})", self.message);
        self
    }

    /// The same failure after the target was modified.
    #[must_use]
    pub fn unfinished(mut self) -> Self {
        self.class = Class::Unfinished;
        self.message = format!(
            "the target is modified and unfinished, do not start PostgreSQL, run pgrejoin resume or \
             pgrejoin rollback: {}",
            self.message
        );
        self
    }

    /// The same failure after the target was rewound.
    #[must_use]
    pub fn rewound(mut self) -> Self {
        self.class = Class::Rewound;
        self
    }

    /// The message with its causes, in one line.
    pub fn chain(&self) -> String {
        let mut text = self.message.clone();
        let mut cause = self.source();
        while let Some(error) = cause {
            text = format!("{text}: {error}");
            cause = error.source();
        }
        text
    }
}

/// The kind of the system's error among an error and its causes.
pub(crate) fn io_kind(error: &(dyn Error + 'static)) -> Option<io::ErrorKind> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<io::Error>()
            && io.kind() != io::ErrorKind::Other
        {
            return Some(io.kind());
        }
        next = error.source();
    }
    None
}

impl fmt::Display for RewindError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for RewindError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_deref().map(|source| source as &(dyn Error + 'static))
    }
}

impl From<OpenError> for RewindError {
    fn from(error: OpenError) -> Self {
        Self::because(Class::Target, "target is not usable", error)
    }
}

impl From<ControlError> for RewindError {
    fn from(error: ControlError) -> Self {
        Self::because(Class::Target, "target is not usable", error)
    }
}

impl From<WalError> for RewindError {
    fn from(error: WalError) -> Self {
        Self::because(Class::Target, "the target's WAL is not usable", error)
    }
}

impl From<CallError> for RewindError {
    fn from(error: CallError) -> Self {
        let class = match &error {
            CallError::Refused(refusal) => match refusal.reason {
                Reason::NotAllowed => Class::Authentication,
                Reason::NotReady | Reason::Overloaded | Reason::ShuttingDown => Class::Transient,
                Reason::WalMissing => Class::Rebuild,
                Reason::InvalidRequest
                | Reason::WrongVersion
                | Reason::Damaged
                | Reason::NotServed
                | Reason::Internal => Class::Other,
            },
            CallError::Broken(_) => Class::Transient,
            CallError::InvalidReply(_) => Class::Other,
        };
        Self::because(class, "the source could not be read", error)
    }
}
