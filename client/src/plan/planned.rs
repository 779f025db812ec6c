//! A rewind that is planned: everything that is decided before anything of it is fetched.

use pg_format::backup_label::ReplayStart;
use pg_format::{Lsn, WalSegmentSize};
use serde::{Deserialize, Serialize};

use super::file_actions::Plan;
use super::input::{ForkPoint, SourceFiles, Strategy};

/// See the module.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Planned {
    /// The strategy.
    pub strategy: Strategy,
    /// Why it was chosen.
    pub why: String,
    /// Where replay will begin.
    pub start: ReplayStart,
    /// Redo position of the source's newest checkpoint before anything was read from it: everything that was
    /// read is at least as new.
    pub source_redo: Lsn,
    /// Where the histories part, if that is proven.
    pub fork: Option<ForkPoint>,
    /// End of the target's valid WAL, if it could be read.
    pub target_end: Option<Lsn>,
    /// What is done, file by file.
    pub plan: Plan,
    /// What the source listed.
    pub listed: SourceFiles,
    /// Payload bytes of page hashes that were compared.
    pub hash_bytes: u64,
}

impl Planned {
    /// First WAL segment that is not common to both nodes; `None` if nothing is known to be common.
    pub fn fork_segment(&self, size: WalSegmentSize) -> Option<u64> {
        self.fork.map(|fork| size.segment_of(fork.lsn))
    }
}
