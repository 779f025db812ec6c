//! Decides what happens to each path of the target: exactly one action.

use std::collections::BTreeSet;

use data_dir::{Entry, EntryKind};
use pg_format::file_class::EMPTIED_DIRECTORIES;
use pg_format::relation::database_directory;
use pg_format::{BLOCK_BYTES, BlockSet, DataPath, FileClass, Fork, RelationPath, RelationSegment};
use serde::{Deserialize, Serialize};

use crate::error::{Class, RewindError};
use crate::plan::input::{Differences, Facts, file_bytes};

/// What happens to one path of the target. The order is the order of execution.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileAction {
    /// It is removed, with everything below it.
    RemoveTree,
    /// The file is removed.
    Remove,
    /// A directory is made, or a link to one that exists.
    MakeDirectory {
        /// Where the link points.
        link: Option<String>,
    },
    /// A new file, whose content is fetched whole, takes its place.
    Replace {
        /// Its length; `None` if it ends where the fetched content ends.
        bytes: Option<u64>,
    },
    /// Pages are overwritten and the length is set.
    Patch {
        /// Its length at the end.
        bytes: u64,
    },
}

/// A path and its action.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedFile {
    /// The path.
    pub path: DataPath,
    /// The action.
    pub action: FileAction,
}

/// Pages to fetch for one planned file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PagesWanted {
    /// Index of the file in the plan.
    pub file: usize,
    /// The pages.
    pub blocks: BlockSet,
    /// Number of blocks that the file has at the end.
    pub end: u32,
    /// The target has another version of the pages before this block, so these are fetched as differences to
    /// it.
    pub known: u32,
}

/// Bytes to fetch for one planned file.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct BytesWanted {
    /// Index of the file in the plan.
    pub file: usize,
    /// Its length when it was listed.
    pub bytes: u64,
}

/// What will be done to the target's files.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Plan {
    /// Paths that change.
    pub files: Vec<PlannedFile>,
    /// Pages to fetch.
    pub pages: Vec<PagesWanted>,
    /// Whole files to fetch.
    pub whole: Vec<BytesWanted>,
    /// Replication slots of the target that are removed.
    pub slots: Vec<String>,
}

/// How the file of a path is treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Treatment {
    /// Left as it is on the target.
    Keep,
    /// Removed from the target, never fetched.
    Discard,
    /// Fetched whole.
    Whole,
    /// All its pages are compared by hash.
    ComparePages,
    /// Its pages that the WAL summary names are fetched.
    WindowPages(RelationSegment),
}

/// Facts with what follows from them for all files.
struct FileContext<'a> {
    facts: &'a Facts<'a>,
    /// Relations of which the source has an init fork.
    unlogged_on_source: BTreeSet<RelationPath>,
    unlogged_on_target: BTreeSet<RelationPath>,
    /// Directories whose files count as absent on the target.
    untrusted: Vec<DataPath>,
}

fn init_forks<'p>(paths: impl Iterator<Item = &'p DataPath>) -> BTreeSet<RelationPath> {
    paths
        .filter_map(RelationSegment::parse)
        .filter(|segment| segment.fork == Fork::Init)
        .map(|segment| segment.relation)
        .collect()
}

impl<'a> FileContext<'a> {
    fn new(facts: &'a Facts<'a>) -> Result<Self, RewindError> {
        let mut untrusted = Vec::new();
        if let Some(wal_summary) = facts.wal_summary {
            for (tablespace, database) in &wal_summary.directories {
                let path = database_directory(*tablespace, *database, facts.version_directory);
                untrusted.push(path.map_err(|error| {
                    RewindError::because(Class::Other, "a database directory has no path", error)
                })?);
            }
        }
        Ok(Self {
            facts,
            unlogged_on_source: init_forks(facts.source.keys()),
            unlogged_on_target: init_forks(facts.target.keys()),
            untrusted,
        })
    }

    fn treatment(&self, path: &DataPath) -> Treatment {
        let choices = self.facts.choices;
        match FileClass::of(path) {
            FileClass::Relation(segment) => self.relation(segment),
            FileClass::Slru => Treatment::ComparePages,
            FileClass::State => Treatment::Whole,
            FileClass::Discarded => Treatment::Discard,
            FileClass::Configuration if choices.config_from_source => Treatment::Whole,
            FileClass::Unknown if self.facts.keys.contains(path) => Treatment::Keep,
            FileClass::Unknown if choices.mirror_extra_files => Treatment::Whole,
            FileClass::Configuration
            | FileClass::Unknown
            | FileClass::Control
            | FileClass::Wal
            | FileClass::Signal
            | FileClass::Runtime
            | FileClass::Log
            | FileClass::Own => Treatment::Keep,
        }
    }

    fn relation(&self, segment: RelationSegment) -> Treatment {
        let unlogged = self.unlogged_on_source.contains(&segment.relation);
        match (segment.fork, unlogged, self.facts.wal_summary) {
            (Fork::Init, ..) => Treatment::ComparePages,
            // Recovery makes them anew from the init fork.
            (_, true, _) => Treatment::Discard,
            (Fork::Main, false, Some(_)) => Treatment::WindowPages(segment),
            (Fork::Main | Fork::FreeSpaceMap | Fork::VisibilityMap, false, _) => {
                Treatment::ComparePages
            }
        }
    }

    /// Whether the target's file of this path is another one that only has the same name.
    fn is_stranger(&self, path: &DataPath) -> bool {
        let Some(segment) = RelationSegment::parse(path) else {
            return false;
        };
        let unlogged_here = self.unlogged_on_target.contains(&segment.relation)
            && !self.unlogged_on_source.contains(&segment.relation);
        let wal_summary = self.facts.wal_summary;
        let created =
            wal_summary.is_some_and(|wal_summary| wal_summary.created.contains(&segment.relation));
        created
            || unlogged_here
            || self.untrusted.iter().any(|directory| path.is_within(directory.as_str()))
    }
}

/// A file whose pages are compared by hash before the plan is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Comparison {
    /// The file.
    pub path: DataPath,
    /// Pages both nodes have.
    pub blocks: u32,
}

/// Files whose page hashes the plan needs.
pub fn comparisons(facts: &Facts<'_>) -> Result<Vec<Comparison>, RewindError> {
    let context = FileContext::new(facts)?;
    let mut list = Vec::new();
    for (path, bytes) in facts.source {
        let (Some(theirs), Some(ours)) = (bytes, facts.target.get(path).and_then(file_bytes))
        else {
            continue;
        };
        if context.treatment(path) == Treatment::ComparePages && !context.is_stranger(path) {
            let blocks = blocks_in(ours.min(*theirs));
            if blocks > 0 {
                list.push(Comparison { path: path.clone(), blocks });
            }
        }
    }
    Ok(list)
}

/// Whole pages in so many bytes.
pub fn blocks_in(bytes: u64) -> u32 {
    u32::try_from(bytes / BLOCK_BYTES).unwrap_or(u32::MAX)
}

/// Makes the plan. `differences` has an entry for every file of [`comparisons`].
pub fn build(facts: &Facts<'_>, differences: &Differences) -> Result<Plan, RewindError> {
    let context = FileContext::new(facts)?;
    let mut plan = Plan::default();
    remove_what_the_source_lacks(&context, &mut plan);
    for (path, bytes) in facts.source {
        match bytes {
            None => make_directory(&context, path, &mut plan),
            Some(bytes) => fetch_file(&context, path, *bytes, differences, &mut plan)?,
        }
    }
    Ok(plan)
}

fn add(plan: &mut Plan, path: &DataPath, action: FileAction) -> usize {
    plan.files.push(PlannedFile { path: path.clone(), action });
    plan.files.len() - 1
}

fn make_directory(context: &FileContext<'_>, path: &DataPath, plan: &mut Plan) {
    if context.facts.target.contains_key(path) || is_kept_directory(context, path) {
        return;
    }
    let oid = path.as_str().strip_prefix("pg_tblspc/").and_then(|oid| oid.parse().ok());
    let link = oid.and_then(|oid: u32| context.facts.new_tablespaces.get(&oid).cloned());
    add(plan, path, FileAction::MakeDirectory { link });
}

/// Directories that are not PostgreSQL's are made only when extra files are mirrored.
fn is_kept_directory(context: &FileContext<'_>, path: &DataPath) -> bool {
    let known = |path: &DataPath| {
        let first = path.components().next().unwrap_or_default();
        first.starts_with("pg_") || first == "base" || first == "global"
    };
    !known(path) && !context.facts.choices.mirror_extra_files
}

fn fetch_file(
    context: &FileContext<'_>,
    path: &DataPath,
    bytes: u64,
    differences: &Differences,
    plan: &mut Plan,
) -> Result<(), RewindError> {
    let treatment = context.treatment(path);
    if matches!(treatment, Treatment::Keep | Treatment::Discard) {
        return Ok(());
    }
    let present = context.facts.target.get(path);
    if let Some(entry) = present
        && file_bytes(entry).is_none()
    {
        let message = format!(
            "{path} is a regular file on the source but not on the target: move the target's out \
             of the way"
        );
        return Err(RewindError::new(Class::Target, message));
    }
    let ours = present.and_then(file_bytes).filter(|_| !context.is_stranger(path));
    let end = blocks_in(bytes);
    let mut wanted = BlockSet::default();
    match (treatment, ours) {
        (Treatment::Whole, _) => {
            let file = add(plan, path, FileAction::Replace { bytes: None });
            plan.whole.push(BytesWanted { file, bytes });
            return Ok(());
        }
        (_, None) => {
            let bytes = u64::from(end) * BLOCK_BYTES;
            let file = add(plan, path, FileAction::Replace { bytes: Some(bytes) });
            wanted.insert_range(0, end);
            plan.pages.push(PagesWanted { file, blocks: wanted, end, known: 0 });
            return Ok(());
        }
        (Treatment::WindowPages(segment), Some(ours)) => {
            summary_pages(context, segment, blocks_in(ours), end, &mut wanted);
        }
        (_, Some(ours)) => {
            wanted = differences.get(path).cloned().unwrap_or_default();
            wanted.insert_range(blocks_in(ours), end);
        }
    }
    let final_bytes = u64::from(end) * BLOCK_BYTES;
    if wanted.iter().any(|block| block < end) || ours != Some(final_bytes) {
        let file = add(plan, path, FileAction::Patch { bytes: final_bytes });
        let known = blocks_in(ours.unwrap_or(0));
        plan.pages.push(PagesWanted { file, blocks: wanted, end, known });
    }
    Ok(())
}

/// R2: adds the blocks that the WAL summary names, those behind a truncation, and those behind the end of the
/// target's file.
fn summary_pages(
    context: &FileContext<'_>,
    segment: RelationSegment,
    ours: u32,
    end: u32,
    wanted: &mut BlockSet,
) {
    let Some(wal_summary) = context.facts.wal_summary else {
        return;
    };
    if let Some(named) = wal_summary.pages.segment(&segment) {
        *wanted = named.clone();
    }
    wanted.insert_range(ours, end);
    if let Some(cut) = wal_summary.truncated.get(&segment.relation) {
        wanted.insert_range(cut.saturating_sub(segment.first_block()), end);
    }
}

fn remove_what_the_source_lacks(context: &FileContext<'_>, plan: &mut Plan) {
    let mut removed: Option<DataPath> = None;
    for (path, entry) in context.facts.target {
        if removed.as_ref().is_some_and(|tree| path.is_within(tree.as_str())) {
            continue;
        }
        let on_source = context.facts.source.contains_key(path);
        match &entry.kind {
            EntryKind::Directory { .. } if !on_source => {
                if removes_directory(context, path) {
                    if path.parent().is_some_and(|parent| parent.as_str() == "pg_replslot") {
                        plan.slots.push(path.file_name().to_owned());
                    }
                    remove_directory(context, path, entry, plan);
                    removed = Some(path.clone());
                }
            }
            // A link is the operator's own arrangement, and a source that keeps its configuration
            // elsewhere lists none.
            EntryKind::Link { .. } => {}
            EntryKind::File { .. } if FileClass::of(path) == FileClass::Configuration => {}
            EntryKind::File { .. } => {
                let gone = match context.treatment(path) {
                    Treatment::Keep => false,
                    Treatment::Discard => true,
                    Treatment::Whole | Treatment::ComparePages | Treatment::WindowPages(_) => {
                        !on_source
                    }
                };
                if gone {
                    add(plan, path, FileAction::Remove);
                }
            }
            EntryKind::Directory { .. } | EntryKind::Unreadable | EntryKind::Other => {}
        }
    }
}

/// Of a tablespace, only the link and the directory of this version behind it are removed: clusters of other
/// versions may use the same tablespace.
fn remove_directory(context: &FileContext<'_>, path: &DataPath, entry: &Entry, plan: &mut Plan) {
    if !matches!(entry.kind, EntryKind::Directory { link: Some(_) }) {
        add(plan, path, FileAction::RemoveTree);
        return;
    }
    if let Ok(version) = path.join(context.facts.version_directory)
        && context.facts.target.contains_key(&version)
    {
        add(plan, &version, FileAction::RemoveTree);
    }
    add(plan, path, FileAction::Remove);
}

/// Whether a directory that the source does not have is removed: databases, tablespaces, slots and the like
/// always, directories that PostgreSQL does not know only if extra files are mirrored.
fn removes_directory(context: &FileContext<'_>, path: &DataPath) -> bool {
    let is_oid = |name: &str| name.bytes().all(|b| b.is_ascii_digit());
    let parts: Vec<&str> = path.components().collect();
    match parts[..] {
        ["base", database] => is_oid(database),
        ["pg_tblspc", tablespace] => is_oid(tablespace),
        ["pg_tblspc", _, version, database] => {
            version == context.facts.version_directory && is_oid(database)
        }
        [first, _, ..] if EMPTIED_DIRECTORIES.contains(&first) => true,
        [..] => match FileClass::of(path) {
            FileClass::Discarded => true,
            FileClass::Unknown => {
                context.facts.choices.mirror_extra_files && !parts[0].starts_with("pg_")
            }
            FileClass::Control
            | FileClass::Relation(_)
            | FileClass::Slru
            | FileClass::State
            | FileClass::Wal
            | FileClass::Signal
            | FileClass::Runtime
            | FileClass::Configuration
            | FileClass::Log
            | FileClass::Own => false,
        },
    }
}

#[cfg(test)]
mod tests;
