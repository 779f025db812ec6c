//! What a plan amounts to, for dry runs, space checks and the summary.

use pg_format::{BLOCK_BYTES, DataPath};
use proto::fetch::BlockRange;

use crate::plan::file_actions::{FileAction, Plan};

/// What a plan does to one path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedChange<'a> {
    /// The path.
    pub path: &'a DataPath,
    /// The action, in one word.
    pub action: &'static str,
    /// Pages to fetch.
    pub blocks: Vec<BlockRange>,
    /// Bytes to fetch, of pages or of a whole file, before compression.
    pub bytes: u64,
}

/// Every change of a plan, in the order of its files.
pub fn changes(plan: &Plan) -> Vec<PlannedChange<'_>> {
    let mut changes: Vec<PlannedChange<'_>> = plan
        .files
        .iter()
        .map(|file| PlannedChange {
            path: &file.path,
            action: match file.action {
                FileAction::RemoveTree | FileAction::Remove => "remove",
                FileAction::MakeDirectory { .. } => "create",
                FileAction::Replace { .. } => "replace",
                FileAction::Patch { .. } => "patch",
            },
            blocks: Vec::new(),
            bytes: 0,
        })
        .collect();
    for wanted in &plan.pages {
        if let Some(change) = changes.get_mut(wanted.file) {
            change.blocks = wanted.blocks.ranges(wanted.end, u32::MAX);
            change.bytes = change.blocks.iter().map(|r| u64::from(r.count) * BLOCK_BYTES).sum();
        }
    }
    for wanted in &plan.whole {
        if let Some(change) = changes.get_mut(wanted.file) {
            change.bytes = wanted.bytes;
        }
    }
    changes
}

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
    /// Files and directories that are removed.
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

#[cfg(test)]
mod tests {
    use pg_format::BlockSet;

    use super::*;
    use crate::plan::file_actions::{BytesWanted, PagesWanted, PlannedFile};

    fn plan() -> Plan {
        let file = |name: &str, action| PlannedFile { path: DataPath::new(name).unwrap(), action };
        let mut blocks = BlockSet::default();
        blocks.insert_range(2, 5);
        // Behind the end of the file: it does not travel.
        blocks.insert(9);
        Plan {
            files: vec![
                file("base/5/16384", FileAction::Patch { bytes: 8 * 8192 }),
                file("PG_VERSION", FileAction::Replace { bytes: None }),
                file("base/5/16385", FileAction::Remove),
                file("base/7", FileAction::RemoveTree),
                file("base/8", FileAction::MakeDirectory { link: None }),
            ],
            pages: vec![PagesWanted { file: 0, blocks, end: 8, known: 8 }],
            whole: vec![BytesWanted { file: 1, bytes: 3 }],
            slots: Vec::new(),
        }
    }

    #[test]
    fn totals_count_what_travels() {
        let totals = Totals::of(&plan());
        let expected = Totals {
            pages: 3,
            whole_bytes: 3,
            patched: 1,
            replaced: 1,
            removed: 2,
            directories: 1,
        };
        assert_eq!(totals, expected);
        assert_eq!(totals.bytes(), 3 * 8192 + 3);
    }

    #[test]
    fn every_change_is_named_with_what_it_fetches() {
        let plan = plan();
        let changes = changes(&plan);
        let words: Vec<_> = changes.iter().map(|change| (change.action, change.bytes)).collect();
        let expected =
            [("patch", 3 * 8192), ("replace", 3), ("remove", 0), ("remove", 0), ("create", 0)];
        assert_eq!(words, expected);
        assert_eq!(changes[0].blocks, [BlockRange { first: 2, count: 3 }]);
    }
}
