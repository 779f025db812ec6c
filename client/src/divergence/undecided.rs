//! Why a question about the two histories has no answer.

use std::io;

use data_dir::control::ControlError;
use data_dir::wal::WalError;

use crate::error::{NotPossible, Remedy, RewindError};

/// See the module.
#[derive(Debug)]
pub enum Undecided {
    /// The target's WAL has no answer, or is not proven to be the source's too. The strategies that depend on
    /// it are not possible.
    NotPossible(NotPossible),
    /// A file of the target cannot be read or understood. Nothing else that the target's WAL says is relied
    /// on either.
    Unreadable(NotPossible),
    /// The source could not be asked.
    Failed(RewindError),
}

impl Undecided {
    /// The target's WAL has no answer, for this reason.
    pub fn new(why: impl Into<String>) -> Self {
        Self::NotPossible(NotPossible::new(why))
    }

    /// A request to the source failed. What it refuses is not to be had; everything else ends the run.
    fn of_source(failed: RewindError) -> Self {
        match failed.remedy() {
            Remedy::DoWithout(_) => Self::Unreadable(NotPossible::new(failed.chain())),
            Remedy::None | Remedy::Retry | Remedy::RunAgain | Remedy::Replan(_) => {
                Self::Failed(failed)
            }
        }
    }

    /// A file of the target that has the answer cannot be read: a disk may have lost it.
    pub fn unreadable(what: &str) -> impl FnOnce(io::Error) -> Self + '_ {
        move |error| Self::Unreadable(NotPossible::new(format!("could not read {what}: {error}")))
    }
}

impl From<RewindError> for Undecided {
    fn from(error: RewindError) -> Self {
        Self::Failed(error)
    }
}

impl From<NotPossible> for Undecided {
    fn from(why: NotPossible) -> Self {
        Self::NotPossible(why)
    }
}

/// WAL that a disk has partly lost, a record of an unknown kind, or a segment that only the source has and that
/// could not be fetched.
impl From<WalError> for Undecided {
    fn from(error: WalError) -> Self {
        let error = match error {
            WalError::Io { at, source } => match source.downcast::<RewindError>() {
                Ok(failed) => return Self::of_source(failed),
                Err(source) => WalError::Io { at, source },
            },
            error @ WalError::Format(_) => error,
        };
        Self::Unreadable(NotPossible::new(RewindError::from(error).chain()))
    }
}

impl From<ControlError> for Undecided {
    fn from(error: ControlError) -> Self {
        Self::Unreadable(NotPossible::new(RewindError::from(error).chain()))
    }
}

#[cfg(test)]
mod tests {
    use pg_format::Lsn;
    use proto::Refusal;
    use proto::refusal::{CallError, Reason};

    use super::*;

    #[test]
    fn what_cannot_be_read_is_told_from_what_is_not_proven() {
        let lost = || io::Error::other("input/output error");
        let wal = WalError::Io { at: Lsn::new(0x300_0028), source: lost() };
        assert!(matches!(Undecided::from(wal), Undecided::Unreadable(_)));
        assert!(matches!(Undecided::unreadable("base/5/1")(lost()), Undecided::Unreadable(_)));
        assert!(matches!(Undecided::new("it ends too early"), Undecided::NotPossible(_)));
        let away = RewindError::transient("the source is away");
        assert!(matches!(Undecided::from(away), Undecided::Failed(_)));
    }

    #[test]
    fn a_link_that_breaks_does_not_pass_for_wal_that_is_gone() {
        let read = |error: RewindError| {
            let source = io::Error::other(error);
            Undecided::from(WalError::Io { at: Lsn::new(0x300_0028), source })
        };
        let away = RewindError::transient("the source is away");
        assert!(matches!(read(away), Undecided::Failed(_)), "a later run may read it");
        let refused = CallError::Refused(Refusal::new(Reason::WalMissing, "it is gone"));
        match read(refused.into()) {
            Undecided::Unreadable(why) => assert!(why.to_string().contains("it is gone"), "{why}"),
            other => panic!("{other:?}"),
        }
    }
}
