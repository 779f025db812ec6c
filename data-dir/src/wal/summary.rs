//! What a range of WAL says about changes: the blocks that its records name, and changes of files and
//! settings.

use std::collections::{BTreeMap, BTreeSet};

use pg_format::control_file::CheckPoint;
use pg_format::{Lsn, PageMap, RelationPath};

/// A checkpoint record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checkpoint {
    /// Where the record begins.
    pub lsn: Lsn,
    /// Whether it was written at a shutdown.
    pub shutdown: bool,
    /// What it says.
    pub checkpoint: CheckPoint,
}

impl Checkpoint {
    /// The oldest transaction that was running, with its epoch; `None` if the record does not say.
    pub fn oldest_active(&self) -> Option<u64> {
        let (next, oldest) = (self.checkpoint.next_xid, self.checkpoint.oldest_active_xid);
        if oldest == 0 {
            return None;
        }
        let same_epoch = (next & !0xFFFF_FFFF) | u64::from(oldest);
        Some(if same_epoch > next { same_epoch.saturating_sub(1 << 32) } else { same_epoch })
    }
}

/// See the module.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WalSummary {
    /// First record read.
    pub start: Lsn,
    /// End of the last valid record.
    pub end: Lsn,
    /// Main-fork blocks named by any record.
    pub pages: PageMap,
    /// Smallest length, in blocks, to which each relation was truncated.
    pub truncated: BTreeMap<RelationPath, u32>,
    /// Relations created after the fork.
    pub created: BTreeSet<RelationPath>,
    /// Database directories (tablespace, database) that were made, moved or dropped: what is in
    /// them has no block references.
    pub directories: BTreeSet<(u32, u32)>,
    /// Checkpoints, oldest first.
    pub checkpoints: Vec<Checkpoint>,
    /// Positions of the records that end recovery: promotions.
    pub promotions: Vec<Lsn>,
    /// First commit after the fork.
    pub first_commit: Option<Lsn>,
    /// Where `wal_level` became minimal.
    pub minimal_at: Option<Lsn>,
    /// Where settings changed at a restart: the record has only the new values.
    pub settings_changed_at: Option<Lsn>,
    /// Where checksums were switched (19).
    pub checksums_changed_at: Option<Lsn>,
    /// Position of a record whose effect on files is not known.
    pub unknown_at: Option<Lsn>,
    /// Position of a record of an extension's own resource manager: only the blocks that it names are known.
    pub extension_at: Option<Lsn>,
}

impl WalSummary {
    /// Adds the summary of the WAL that follows directly. `later.start` is ignored.
    pub fn absorb(&mut self, later: Self) {
        self.end = later.end;
        self.pages.absorb(later.pages);
        for (relation, blocks) in later.truncated {
            let smallest = self.truncated.entry(relation).or_insert(blocks);
            *smallest = blocks.min(*smallest);
        }
        self.created.extend(later.created);
        self.directories.extend(later.directories);
        self.checkpoints.extend(later.checkpoints);
        self.promotions.extend(later.promotions);
        self.first_commit = self.first_commit.or(later.first_commit);
        self.minimal_at = self.minimal_at.or(later.minimal_at);
        self.settings_changed_at = self.settings_changed_at.or(later.settings_changed_at);
        self.checksums_changed_at = self.checksums_changed_at.or(later.checksums_changed_at);
        self.unknown_at = self.unknown_at.or(later.unknown_at);
        self.extension_at = self.extension_at.or(later.extension_at);
    }

    /// The newest checkpoint record that begins before `fork`.
    pub fn last_checkpoint_before(&self, fork: Lsn) -> Option<&Checkpoint> {
        self.checkpoints.iter().rev().find(|checkpoint| checkpoint.lsn < fork)
    }
}
