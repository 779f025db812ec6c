//! What a plan amounts to, for dry runs, space checks and the summary.

use pg_format::BLOCK_BYTES;

use super::decide::{FileAction, Plan};

/// Totals of a plan.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Pages to fetch.
    pub pages: u64,
    /// Bytes of whole files to fetch.
    pub whole_bytes: u64,
    /// Files that change in place.
    pub patched: usize,
    /// Files that are replaced or new.
    pub replaced: usize,
    /// Files and directories that go.
    pub removed: usize,
    /// Directories that are made.
    pub directories: usize,
}

impl Totals {
    /// The totals of `plan`.
    pub fn of(plan: &Plan) -> Self {
        let count = |wanted: fn(&FileAction) -> bool| {
            plan.files.iter().filter(|file| wanted(&file.action)).count()
        };
        Self {
            pages: plan
                .pages
                .iter()
                .map(|wanted| wanted.blocks.iter().take_while(|b| *b < wanted.end).count() as u64)
                .sum(),
            whole_bytes: plan.whole.iter().map(|wanted| wanted.bytes).sum(),
            patched: count(|action| matches!(action, FileAction::Patch { .. })),
            replaced: count(|action| matches!(action, FileAction::Replace { .. })),
            removed: count(|action| matches!(action, FileAction::Remove | FileAction::RemoveTree)),
            directories: count(|action| matches!(action, FileAction::MakeDirectory { .. })),
        }
    }

    /// Bytes before compression.
    pub fn bytes(&self) -> u64 {
        self.pages * BLOCK_BYTES + self.whole_bytes
    }
}
