//! The facts a plan is made from, as plain values.

use std::collections::{BTreeMap, BTreeSet};

use data_dir::wal::summary::WalSummary;
use data_dir::{Entry, EntryKind};
use pg_format::{BlockSet, DataPath, Lsn, TimelineId};
use serde::{Deserialize, Serialize};

/// Everything in the target.
pub type TargetFiles = BTreeMap<DataPath, Entry>;

/// Everything the source serves: length of a file, `None` for a directory.
pub type SourceFiles = BTreeMap<DataPath, Option<u64>>;

/// Pages that differ, for each file whose hashes were compared.
pub type Differences = BTreeMap<DataPath, BlockSet>;

/// A proven fork point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForkPoint {
    /// First position at which the histories differ, or can.
    pub lsn: Lsn,
    /// The timeline they share up to there.
    pub timeline: TimelineId,
}

/// How the pages to fetch are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Strategy {
    /// Every page is compared; replay starts at the source's last completed checkpoint.
    Compare,
    /// The target's WAL names them; replay starts at the last common checkpoint.
    Fork,
    /// The WAL of both names them; replay starts at the source's last completed checkpoint.
    Latest,
}

impl Strategy {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Compare => "compare",
            Self::Fork => "fork",
            Self::Latest => "latest",
        }
    }
}

/// Which strategy the operator wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum StrategyChoice {
    /// *Fork* or *latest*, whichever has the smaller estimated transfer; *compare* where neither is possible.
    Auto,
    /// This one.
    Only(Strategy),
}

/// What the operator chose for files that are not PostgreSQL's data.
#[derive(Debug, Clone, Copy)]
pub struct Choices {
    /// The source's configuration replaces the target's.
    pub config_from_source: bool,
    /// Unknown files are made equal to the source's.
    pub mirror_extra_files: bool,
}

/// All facts.
#[derive(Debug)]
pub struct Facts<'a> {
    /// The target's files.
    pub target: &'a TargetFiles,
    /// The source's files.
    pub source: &'a SourceFiles,
    /// What may differ in main forks; `None` if every page is compared.
    pub wal_summary: Option<&'a WalSummary>,
    /// Name of the version's directory inside tablespaces.
    pub version_directory: &'a str,
    /// The operator's choices.
    pub choices: Choices,
    /// Files of the target that are private keys. The source never lists keys, so they must not be removed
    /// because its list lacks them.
    pub keys: &'a BTreeSet<DataPath>,
    /// Directories on the target for the linked tablespaces that it lacks, by OID.
    pub new_tablespaces: &'a BTreeMap<u32, String>,
}

/// Length of a target's regular file.
pub fn file_bytes(entry: &Entry) -> Option<u64> {
    match entry.kind {
        EntryKind::File { bytes } => Some(bytes),
        EntryKind::Directory { .. }
        | EntryKind::Link { .. }
        | EntryKind::Unreadable
        | EntryKind::Other => None,
    }
}
