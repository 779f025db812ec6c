//! Where the histories of the two nodes part, and which pages either of them changed since.

pub mod compat;
pub mod find;
pub mod fork_point;
pub mod hint_logging;
pub mod search;
pub mod source_changes;
pub mod target_changes;
pub mod undecided;

use data_dir::wal::summary::WalSummary;
use pg_format::Lsn;
use pg_format::backup_label::ReplayStart;

use crate::error::NotPossible;
use crate::plan::ForkPoint;
use crate::target::wal_archive::RestoredSegment;

/// What the target changed since the last checkpoint before the fork point that both nodes have.
#[derive(Debug)]
pub struct TargetChanges {
    /// The pages, as its WAL names them.
    pub wal_summary: WalSummary,
    /// Where replay from that checkpoint begins.
    pub start: ReplayStart,
}

/// What is known about where the two nodes parted.
#[derive(Debug)]
pub struct Divergence {
    /// Where the histories part, if it is proven.
    pub fork: Option<ForkPoint>,
    /// End of the target's valid WAL, if it could be read.
    pub target_end: Option<Lsn>,
    /// What the target changed, or why its WAL does not tell.
    pub target_changes: Result<TargetChanges, NotPossible>,
    /// Segments of the common part that came from an archive or the source.
    pub restored: Vec<RestoredSegment>,
}

impl Divergence {
    /// Nothing is known, for this reason.
    pub fn unknown(why: NotPossible) -> Self {
        Self { fork: None, target_end: None, target_changes: Err(why), restored: Vec::new() }
    }

    /// The fork point's position, or one before everything.
    pub fn fork_lsn(&self) -> Lsn {
        self.fork.map_or(Lsn::INVALID, |fork| fork.lsn)
    }
}
