//! Records in the staged WAL that replay would get wrong.

use pg_format::Lsn;
use pg_format::control_file::WalLevel;
use pg_format::wal::Effect;

/// Something in the replayed range that replay would get wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hazard {
    /// A database copied file by file: replay copies what the directory then holds (R11).
    CopyDatabase {
        /// The record.
        at: Lsn,
        /// The database.
        database: u32,
    },
    /// A tablespace made or dropped under a path of the source.
    Tablespace {
        /// The record.
        at: Lsn,
        /// The tablespace.
        tablespace: u32,
        /// Its path; `None` if it was dropped.
        location: Option<String>,
    },
    /// `full_page_writes` was off: torn pages would not be repaired (R9).
    FullPageWritesOff {
        /// The record.
        at: Lsn,
    },
    /// `wal_level` was minimal: replay stops there (R12).
    MinimalWal {
        /// The record.
        at: Lsn,
    },
}

impl Hazard {
    /// Where it is.
    pub fn at(&self) -> Lsn {
        match self {
            Self::CopyDatabase { at, .. }
            | Self::Tablespace { at, .. }
            | Self::FullPageWritesOff { at }
            | Self::MinimalWal { at } => *at,
        }
    }

    /// The hazard a record at `at` is, if any.
    pub fn of(at: Lsn, effect: &Effect) -> Option<Self> {
        match effect {
            Effect::CopyDatabase { database, .. } => {
                Some(Self::CopyDatabase { at, database: *database })
            }
            Effect::Tablespace { tablespace, location } => {
                Some(Self::Tablespace { at, tablespace: *tablespace, location: location.clone() })
            }
            Effect::FullPageWrites(false) => Some(Self::FullPageWritesOff { at }),
            Effect::ParameterChange { wal_level: WalLevel::Minimal, .. } => {
                Some(Self::MinimalWal { at })
            }
            Effect::Checkpoint { checkpoint, .. } if !checkpoint.full_page_writes => {
                Some(Self::FullPageWritesOff { at })
            }
            _ => None,
        }
    }

    /// What it is, and where.
    fn describe(&self) -> String {
        match self {
            Self::CopyDatabase { at, database } => format!(
                "the source copied database {database} file by file at {at} (CREATE DATABASE … \
                 STRATEGY file_copy, or SET TABLESPACE), which replay cannot repeat"
            ),
            Self::Tablespace { at, tablespace, location: Some(location) } => format!(
                "the source created tablespace {tablespace} in \"{location}\" at {at}, and replay \
                 needs an empty directory of that path on the target"
            ),
            Self::Tablespace { at, tablespace, location: None } => {
                format!("the source dropped tablespace {tablespace} at {at}")
            }
            Self::FullPageWritesOff { at } => format!(
                "full_page_writes was off on the source at {at}: pages read while they were being \
                 written could not be repaired"
            ),
            Self::MinimalWal { at } => {
                format!("wal_level was minimal on the source at {at}: replay would stop there")
            }
        }
    }

    /// What, where and what to do: run CHECKPOINT on the source, so that replay begins behind it.
    pub fn explain(&self) -> String {
        let advice = match self {
            Self::CopyDatabase { .. } | Self::Tablespace { location: None, .. } => {
                "run CHECKPOINT on the source and try again"
            }
            Self::Tablespace { location: Some(_), .. } => {
                "create that directory and do not map it, or run CHECKPOINT on the source and use \
                 --tablespace-mapping"
            }
            Self::FullPageWritesOff { .. } => "switch it on, run CHECKPOINT there and try again",
            Self::MinimalWal { .. } => "raise it, run CHECKPOINT there and try again",
        };
        format!("{}: {advice}", self.describe())
    }

    /// The message for an operator who insists on replay from the fork, which begins before the hazard
    /// whatever the source does.
    pub fn explain_to_fork(&self) -> String {
        format!("{}: use --strategy latest or auto, which start replay after it", self.describe())
    }

    /// That message where the source has no checkpoint behind the hazard yet.
    pub fn explain_to_fork_without_checkpoint(&self) -> String {
        let first = match self {
            Self::FullPageWritesOff { .. } => "switch it on, run CHECKPOINT there",
            Self::MinimalWal { .. } => "raise it, run CHECKPOINT there",
            Self::CopyDatabase { .. } | Self::Tablespace { .. } => "run CHECKPOINT on the source",
        };
        let then = "then use --strategy latest or auto, which start replay after it";
        format!("{}: {first}, {then}", self.describe())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at() -> Lsn {
        Lsn::new(100)
    }

    #[test]
    fn what_replay_cannot_repeat_is_a_hazard() {
        let copied = Effect::CopyDatabase {
            database: 7,
            tablespace: 1663,
            source_database: 5,
            source_tablespace: 1663,
        };
        assert_eq!(Hazard::of(at(), &copied), Some(Hazard::CopyDatabase { at: at(), database: 7 }));
        let off = Hazard::of(at(), &Effect::FullPageWrites(false));
        assert_eq!(off, Some(Hazard::FullPageWritesOff { at: at() }));
        let minimal = Effect::ParameterChange { wal_level: WalLevel::Minimal, wal_log_hints: true };
        assert_eq!(Hazard::of(at(), &minimal), Some(Hazard::MinimalWal { at: at() }));
        let location = Some("/place".to_owned());
        let made = Effect::Tablespace { tablespace: 16400, location: location.clone() };
        let hazard = Hazard::Tablespace { at: at(), tablespace: 16400, location };
        assert_eq!(Hazard::of(at(), &made), Some(hazard));
    }

    #[test]
    fn what_replay_repeats_is_none() {
        let higher = Effect::ParameterChange { wal_level: WalLevel::Replica, wal_log_hints: false };
        for effect in [Effect::None, Effect::FullPageWrites(true), Effect::Switch, higher] {
            assert_eq!(Hazard::of(at(), &effect), None, "{effect:?}");
        }
    }

    #[test]
    fn a_checkpoint_says_whether_pages_are_logged_whole() {
        let mut checkpoint = crate::test_values::control().checkpoint_copy;
        let of = |checkpoint| Hazard::of(at(), &Effect::Checkpoint { shutdown: false, checkpoint });
        checkpoint.full_page_writes = true;
        assert_eq!(of(checkpoint), None);
        checkpoint.full_page_writes = false;
        assert_eq!(of(checkpoint), Some(Hazard::FullPageWritesOff { at: at() }));
    }

    #[test]
    fn every_explanation_says_where_and_what_to_do() {
        let tablespace = |location: Option<&str>| Hazard::Tablespace {
            at: at(),
            tablespace: 16400,
            location: location.map(str::to_owned),
        };
        let hazards = [
            Hazard::CopyDatabase { at: at(), database: 7 },
            tablespace(Some("/place")),
            tablespace(None),
            Hazard::FullPageWritesOff { at: at() },
            Hazard::MinimalWal { at: at() },
        ];
        for hazard in hazards {
            assert_eq!(hazard.at(), at());
            let text = hazard.explain();
            assert!(text.contains("0/64") && text.contains("CHECKPOINT"), "{text}");
            let text = hazard.explain_to_fork();
            assert!(text.contains("0/64") && text.contains("--strategy latest or auto"), "{text}");
            let text = hazard.explain_to_fork_without_checkpoint();
            assert!(text.contains("CHECKPOINT") && text.contains("--strategy latest"), "{text}");
        }
    }
}
