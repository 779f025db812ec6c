//! What went wrong, and which exit code says so.

use std::error::Error;
use std::{fmt, io};

use data_dir::OpenError;
use data_dir::control::ControlError;
use data_dir::wal::WalError;
use proto::refusal::{CallError, Reason};

/// An exit code of the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExitCode {
    /// The failures that end with it; `None` for success.
    pub class: Option<Class>,
    /// The code. A run that was stopped by a signal has two: for SIGINT and for SIGTERM.
    pub codes: &'static [u8],
    /// What happened.
    pub meaning: &'static str,
    /// What the target is.
    pub target: &'static str,
}

impl ExitCode {
    /// The codes as the README and `--help` show them.
    pub fn shown(&self) -> String {
        let codes: Vec<String> = self.codes.iter().map(u8::to_string).collect();
        codes.join(", ")
    }
}

/// All exit codes, as the program returns them and as `--help` and the README show them.
pub const EXIT_CODES: [ExitCode; 11] = [
    ExitCode {
        class: None,
        codes: &[0],
        meaning: "done, or nothing to do",
        target: "rewound, or unchanged",
    },
    ExitCode {
        class: Some(Class::Other),
        codes: &[1],
        meaning: "any other failure",
        target: "unchanged",
    },
    ExitCode {
        class: Some(Class::Usage),
        codes: &[2],
        meaning: "invalid command line",
        target: "unchanged",
    },
    ExitCode {
        class: Some(Class::Target),
        codes: &[3],
        meaning: "the target cannot be rewound as it is (running, damaged, of another cluster, in use by another pgrejoin)",
        target: "unchanged",
    },
    ExitCode {
        class: Some(Class::Authentication),
        codes: &[4],
        meaning: "TLS or authentication failed (certificate not accepted, not on the allow list)",
        target: "unchanged",
    },
    ExitCode {
        class: Some(Class::Transient),
        codes: &[5],
        meaning: "try again later (source unreachable, stalled or changing its role)",
        target: "unchanged; fetched data may be kept in `.pgrejoin`",
    },
    ExitCode {
        class: Some(Class::Rebuild),
        codes: &[6],
        meaning: "not possible as asked, because WAL is gone or there is no common history: do what the message says, or rebuild the node",
        target: "unchanged",
    },
    ExitCode {
        class: Some(Class::Preflight),
        codes: &[7],
        meaning: "a check before the first change failed (disk space, permissions, settings)",
        target: "unchanged; fetched data may be kept in `.pgrejoin`",
    },
    ExitCode {
        class: Some(Class::Unfinished),
        codes: &[8],
        meaning: "modified but unfinished: run `pgrejoin resume` or `pgrejoin rollback`, do not start PostgreSQL",
        target: "refuses to start",
    },
    ExitCode {
        class: Some(Class::Rewound),
        codes: &[9],
        meaning: "rewound, but PostgreSQL was not started, or temporary files are left",
        target: "rewound",
    },
    ExitCode {
        class: Some(Class::Interrupted),
        codes: &[130, 143],
        meaning: "stopped by SIGINT, SIGTERM",
        target: "unchanged; fetched data may be kept in `.pgrejoin`",
    },
];

/// Kinds of failure that an operator or a program treats differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Anything else; the target is as it was.
    Other,
    /// The options make no sense.
    Usage,
    /// The target cannot be rewound as it is.
    Target,
    /// TLS or authentication failed.
    Authentication,
    /// Trying again later can help.
    Transient,
    /// WAL that nothing can replace is gone, or the clusters have nothing in common.
    Rebuild,
    /// A check before the first change failed.
    Preflight,
    /// The target was modified and is not finished: run again, do not start PostgreSQL.
    Unfinished,
    /// The target is rewound, but something after that failed: it was not started, or temporary
    /// files are left.
    Rewound,
    /// Stopped by a signal, the target is as it was.
    Interrupted,
}

impl Class {
    /// The documented exit code; the second one if the run was stopped by SIGTERM.
    pub fn exit_code(self, by_sigterm: bool) -> u8 {
        let row = EXIT_CODES.iter().find(|row| row.class == Some(self));
        let codes = row.map_or(&[1][..], |row| row.codes);
        let code = if by_sigterm { codes.last() } else { codes.first() };
        code.copied().unwrap_or(1)
    }
}

/// What a failure leaves of the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetState {
    /// It is as it was.
    Unchanged,
    /// Another `pgrejoin` works on it, so nothing is known of it.
    InUse,
    /// It is modified and unfinished: PostgreSQL must not be started on it.
    PartlyChanged,
    /// It is rewound.
    Rewound,
}

/// Why a plan is not valid any more, and a new one may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replan {
    /// The source was restarted, promoted or stopped, or its files changed while they were listed and read.
    SourceChanged,
    /// WAL of the source that the plan needs cannot be had.
    WalUnavailable,
    /// The source has made a checkpoint from which replay can start.
    NewCheckpoint,
    /// Replay from the fork turned out to be impossible.
    ForkImpossible,
}

/// Why the source does not answer a request, although it can be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unanswered {
    /// It no longer has the WAL.
    WalMissing,
    /// It refuses the request, or its answer is not valid.
    Refused,
}

/// What the program itself can do about a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remedy {
    /// Nothing: it is reported.
    None,
    /// Trying the same again, in a moment or in a later run: the link broke, or the source is between two
    /// roles.
    Retry,
    /// Nothing in this run; a later one may come to its end with what this one has fetched.
    RunAgain,
    /// A new plan.
    Replan(Replan),
    /// Continuing without the answer, where that is possible.
    DoWithout(Unanswered),
}

/// Why a strategy, or something that it needs, is not possible.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotPossible {
    why: String,
    class: Class,
}

impl NotPossible {
    /// Not possible for this reason. If the operator insists on it the exit code is 6, because what is
    /// missing cannot be had again.
    pub fn new(why: impl Into<String>) -> Self {
        Self { why: why.into(), class: Class::Rebuild }
    }

    /// Not possible for this reason, which other options avoid. If the operator insists on it the exit code
    /// is 7.
    pub fn as_asked(why: impl Into<String>) -> Self {
        Self { why: why.into(), class: Class::Preflight }
    }

    /// The error for an operator who asks for `strategy`, which is not possible.
    pub fn insisted_on(&self, strategy: &str) -> RewindError {
        let why = &self.why;
        let message =
            format!("strategy {strategy} is not possible: {why}; use another one, or auto");
        RewindError::new(self.class, message)
    }
}

impl fmt::Display for NotPossible {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.why)
    }
}

/// Why an attempt at a rewind ended before it came to a result.
#[derive(Debug)]
pub enum Abort {
    /// Its plan does not hold: another attempt may come to a result.
    Replan {
        /// The reason, which the new plan takes into account.
        reason: Replan,
        /// The reason in words.
        why: String,
    },
    /// It failed.
    Failed(RewindError),
}

impl Abort {
    /// A new plan is needed, for this reason.
    pub fn replan(reason: Replan, why: impl Into<String>) -> Self {
        Self::Replan { reason, why: why.into() }
    }
}

impl From<RewindError> for Abort {
    fn from(error: RewindError) -> Self {
        match error.remedy {
            Remedy::Replan(reason) => Self::Replan { reason, why: error.chain() },
            Remedy::None | Remedy::Retry | Remedy::RunAgain | Remedy::DoWithout(_) => {
                Self::Failed(error)
            }
        }
    }
}

/// A failure: what, where, and what to do.
#[derive(Debug)]
pub struct RewindError {
    class: Class,
    target: TargetState,
    remedy: Remedy,
    message: String,
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl RewindError {
    /// A failure with no deeper cause, about which the program can do nothing.
    pub fn new(class: Class, message: impl Into<String>) -> Self {
        Self {
            class,
            target: TargetState::Unchanged,
            remedy: Remedy::None,
            message: message.into(),
            source: None,
        }
    }

    /// A failure that may not occur if the same is tried again, in a moment or in a later run (exit code 5).
    pub fn transient(message: impl Into<String>) -> Self {
        Self { remedy: Remedy::Retry, ..Self::new(Class::Transient, message) }
    }

    /// [`Self::transient`] with its cause.
    pub fn transient_because(
        message: impl Into<String>,
        source: impl Into<Box<dyn Error + Send + Sync>>,
    ) -> Self {
        Self { source: Some(source.into()), ..Self::transient(message) }
    }

    /// A failure that a new plan may avoid. If no new plan is made, a later run may succeed (exit code 5).
    pub fn replan(reason: Replan, message: impl Into<String>) -> Self {
        Self { remedy: Remedy::Replan(reason), ..Self::new(Class::Transient, message) }
    }

    /// A failure and its cause.
    pub fn because(
        class: Class,
        message: impl Into<String>,
        source: impl Into<Box<dyn Error + Send + Sync>>,
    ) -> Self {
        Self { source: Some(source.into()), ..Self::new(class, message) }
    }

    /// Its kind. What became of the target is more important than why.
    pub fn class(&self) -> Class {
        match self.target {
            TargetState::Unchanged | TargetState::InUse => self.class,
            TargetState::PartlyChanged => Class::Unfinished,
            TargetState::Rewound => Class::Rewound,
        }
    }

    /// What it leaves of the target.
    pub fn target(&self) -> TargetState {
        self.target
    }

    /// What the program can do about it.
    pub fn remedy(&self) -> Remedy {
        self.remedy
    }

    /// A run that a signal has stopped.
    pub fn interrupted(message: impl Into<String>) -> Self {
        Self { remedy: Remedy::RunAgain, ..Self::new(Class::Interrupted, message) }
    }

    /// Whether what was fetched may be of use to a later run.
    pub fn a_later_run_may_succeed(&self) -> bool {
        matches!(self.remedy, Remedy::Retry | Remedy::RunAgain) || self.is_disk_full()
    }

    /// Whether a disk was full.
    pub fn is_disk_full(&self) -> bool {
        self.io_kind().is_some_and(|kind| {
            matches!(kind, io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
        })
    }

    /// The kind of the operating system's error among the causes.
    fn io_kind(&self) -> Option<io::ErrorKind> {
        io_kind(self.source()?)
    }

    /// The same failure, with advice added to its message.
    #[must_use]
    pub fn advise(mut self, advice: &str) -> Self {
        self.message = format!("{} ({advice})", self.message);
        self
    }

    /// The same failure, which leaves the target in this state. No other remedy helps a target that was
    /// changed.
    #[must_use]
    pub fn leaving(mut self, target: TargetState) -> Self {
        (self.target, self.remedy) = (target, Remedy::None);
        self
    }

    /// The same failure after the target was modified.
    #[must_use]
    pub fn unfinished(self) -> Self {
        let mut unfinished = self.leaving(TargetState::PartlyChanged);
        unfinished.message = format!(
            "the target is only partly changed; do not start PostgreSQL; run pgrejoin resume or \
             pgrejoin rollback: {}",
            unfinished.message
        );
        unfinished
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
        Self::because(Class::Target, "the target cannot be used", error)
    }
}

impl From<ControlError> for RewindError {
    fn from(error: ControlError) -> Self {
        Self::because(Class::Target, "the target cannot be used", error)
    }
}

impl From<WalError> for RewindError {
    fn from(error: WalError) -> Self {
        Self::because(Class::Target, "the target's WAL is not usable", error)
    }
}

impl From<CallError> for RewindError {
    fn from(error: CallError) -> Self {
        let (class, remedy) = match &error {
            CallError::Refused(refusal) => match refusal.reason {
                Reason::NotAllowed => (Class::Authentication, Remedy::None),
                Reason::NotReady | Reason::Overloaded | Reason::ShuttingDown => {
                    (Class::Transient, Remedy::Retry)
                }
                Reason::WalMissing => (Class::Rebuild, Remedy::DoWithout(Unanswered::WalMissing)),
                Reason::InvalidRequest
                | Reason::WrongVersion
                | Reason::Damaged
                | Reason::NotServed
                | Reason::Internal => (Class::Other, Remedy::DoWithout(Unanswered::Refused)),
            },
            CallError::Broken(_) => (Class::Transient, Remedy::Retry),
            CallError::InvalidReply(_) => (Class::Other, Remedy::DoWithout(Unanswered::Refused)),
        };
        Self { remedy, ..Self::because(class, "a request to the source failed", error) }
    }
}

#[cfg(test)]
mod tests {
    use proto::Refusal;

    use super::*;

    fn refused(reason: Reason) -> RewindError {
        CallError::Refused(Refusal::new(reason, "x")).into()
    }

    #[test]
    fn every_class_has_its_documented_code() {
        let codes = [
            (Class::Other, 1),
            (Class::Usage, 2),
            (Class::Target, 3),
            (Class::Authentication, 4),
            (Class::Transient, 5),
            (Class::Rebuild, 6),
            (Class::Preflight, 7),
            (Class::Unfinished, 8),
            (Class::Rewound, 9),
            (Class::Interrupted, 130),
        ];
        for (class, code) in codes {
            assert_eq!(class.exit_code(false), code, "{class:?}");
            let by_sigterm = if class == Class::Interrupted { 143 } else { code };
            assert_eq!(class.exit_code(true), by_sigterm, "{class:?}");
        }
    }

    #[test]
    fn what_became_of_the_target_decides_on_the_exit_code() {
        let lost = |target| RewindError::transient("the link broke").leaving(target).class();
        assert_eq!(lost(TargetState::Unchanged), Class::Transient);
        assert_eq!(lost(TargetState::InUse), Class::Transient);
        assert_eq!(lost(TargetState::PartlyChanged), Class::Unfinished);
        assert_eq!(lost(TargetState::Rewound), Class::Rewound);
        assert_eq!(RewindError::transient("x").target(), TargetState::Unchanged);
    }

    #[test]
    fn a_source_that_is_away_for_a_moment_is_asked_again() {
        for reason in [Reason::NotReady, Reason::Overloaded, Reason::ShuttingDown] {
            let error = refused(reason);
            assert_eq!((error.remedy(), error.class()), (Remedy::Retry, Class::Transient));
        }
        let broken = RewindError::from(CallError::Broken("reset".to_owned()));
        assert_eq!(broken.remedy(), Remedy::Retry);
    }

    #[test]
    fn an_answer_that_a_source_cannot_give_may_be_done_without() {
        let missing = refused(Reason::WalMissing);
        assert_eq!(missing.remedy(), Remedy::DoWithout(Unanswered::WalMissing));
        assert_eq!(missing.class(), Class::Rebuild);
        let others = [
            Reason::InvalidRequest,
            Reason::WrongVersion,
            Reason::Damaged,
            Reason::NotServed,
            Reason::Internal,
        ];
        for reason in others {
            let error = refused(reason);
            assert_eq!(error.remedy(), Remedy::DoWithout(Unanswered::Refused), "{reason:?}");
            assert_eq!(error.class(), Class::Other, "{reason:?}");
        }
        let invalid = RewindError::from(CallError::InvalidReply("y".to_owned()));
        assert_eq!(invalid.remedy(), Remedy::DoWithout(Unanswered::Refused));
    }

    #[test]
    fn who_is_not_allowed_is_not_helped_by_asking_again() {
        let error = refused(Reason::NotAllowed);
        assert_eq!((error.remedy(), error.class()), (Remedy::None, Class::Authentication));
    }

    #[test]
    fn only_what_needs_a_new_plan_becomes_one() {
        let changed = RewindError::replan(Replan::SourceChanged, "it was restarted");
        assert_eq!(changed.class(), Class::Transient, "if it is the last attempt");
        match Abort::from(changed) {
            Abort::Replan { reason, why } => {
                assert_eq!((reason, &*why), (Replan::SourceChanged, "it was restarted"));
            }
            Abort::Failed(error) => panic!("{error}"),
        }
        let lost = RewindError::transient("the link broke");
        assert!(matches!(Abort::from(lost), Abort::Failed(_)));
    }

    #[test]
    fn a_target_that_was_changed_needs_no_other_remedy() {
        let lost = || RewindError::transient("the link broke");
        let unfinished = lost().unfinished();
        assert_eq!((unfinished.class(), unfinished.remedy()), (Class::Unfinished, Remedy::None));
        assert!(unfinished.to_string().contains("pgrejoin resume"), "{unfinished}");
        let rewound = lost().leaving(TargetState::Rewound);
        assert_eq!((rewound.class(), rewound.remedy()), (Class::Rewound, Remedy::None));
    }

    #[test]
    fn a_full_disk_is_known_among_the_causes() {
        let full = io::Error::from(io::ErrorKind::StorageFull);
        let error = RewindError::because(Class::Other, "could not write", full);
        assert!(error.is_disk_full());
        assert!(error.chain().starts_with("could not write: "));
        let denied = io::Error::from(io::ErrorKind::PermissionDenied);
        assert!(!RewindError::because(Class::Other, "x", denied).is_disk_full());
        assert!(!RewindError::new(Class::Other, "x").is_disk_full());
    }

    #[test]
    fn what_was_fetched_is_of_use_where_a_later_run_may_succeed() {
        let full = io::Error::from(io::ErrorKind::StorageFull);
        for error in [
            RewindError::transient("the link broke"),
            RewindError::interrupted("stopped by a signal"),
            RewindError::because(Class::Preflight, "could not write", full),
        ] {
            assert!(error.a_later_run_may_succeed(), "{error}");
        }
        let running = RewindError::new(Class::Target, "PostgreSQL runs");
        assert!(!running.a_later_run_may_succeed());
    }

    #[test]
    fn insisting_names_the_strategy_and_the_reason() {
        let error = NotPossible::new("its WAL is gone").insisted_on("fork");
        assert_eq!(
            error.to_string(),
            "strategy fork is not possible: its WAL is gone; use another one, or auto"
        );
        assert_eq!(error.class(), Class::Rebuild);
        assert_eq!(NotPossible::as_asked("x").insisted_on("latest").class(), Class::Preflight);
    }
}
