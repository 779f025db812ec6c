//! What a plan does to each kind of file.

use std::collections::BTreeMap;

use data_dir::wal::summary::WalSummary;

use super::*;
use crate::plan::input::{Choices, SourceFiles, TargetFiles};

const FILE: &str = "base/5/16384";
const RELATION: RelationPath = RelationPath { tablespace: 1663, database: 5, number: 16384 };

fn target(bytes: u64) -> TargetFiles {
    let path = DataPath::new(FILE).expect("a path");
    let kind = EntryKind::File { bytes };
    let entry = Entry { path: path.clone(), kind, mode: 0o600, inode: 1, modified: (0, 0) };
    TargetFiles::from([(path, entry)])
}

/// The plan for one relation of so many pages on the target and the source, of which the WAL summary
/// names the second.
fn plan(ours: u64, theirs: u64, change: impl FnOnce(&mut WalSummary)) -> Plan {
    let mut wal_summary = WalSummary::default();
    wal_summary.pages.insert(RELATION, 1);
    change(&mut wal_summary);
    let path = DataPath::new(FILE).expect("a path");
    let facts = Facts {
        target: &target(ours * BLOCK_BYTES),
        source: &SourceFiles::from([(path, Some(theirs * BLOCK_BYTES))]),
        wal_summary: Some(&wal_summary),
        version_directory: "PG_15_202209061",
        choices: Choices { config_from_source: false, mirror_extra_files: false },
        keys: &BTreeSet::new(),
        new_tablespaces: &BTreeMap::new(),
    };
    build(&facts, &Differences::new()).expect("a plan")
}

fn blocks(plan: &Plan) -> Vec<u32> {
    plan.pages.iter().flat_map(|wanted| wanted.blocks.iter()).collect()
}

#[test]
fn named_pages_and_the_tail_are_fetched() {
    assert_eq!(blocks(&plan(5, 5, |_| {})), [1]);
    assert_eq!(blocks(&plan(3, 5, |_| {})), [1, 3, 4]);
}

/// What lies behind a cut may have come back without a record that names it.
#[test]
fn everything_behind_a_cut_is_fetched() {
    let cut = plan(6, 6, |wal_summary| _ = wal_summary.truncated.insert(RELATION, 3));
    assert_eq!(blocks(&cut), [1, 3, 4, 5]);
}

/// A file of the same name that either side made after the fork is another file.
#[test]
fn a_relation_made_after_the_fork_is_fetched_whole() {
    let made = plan(4, 4, |wal_summary| _ = wal_summary.created.insert(RELATION));
    assert_eq!(blocks(&made), [0, 1, 2, 3]);
    assert!(matches!(made.files[..], [PlannedFile { action: FileAction::Replace { .. }, .. }]));
    assert_eq!(made.pages[0].known, 0, "its pages are no base for differences");
}

/// What is in a directory that was made, moved or dropped has no records.
#[test]
fn everything_in_a_directory_that_moved_is_fetched() {
    let moved = plan(4, 4, |wal_summary| _ = wal_summary.directories.insert((1663, 5)));
    assert_eq!(blocks(&moved), [0, 1, 2, 3]);
}

/// The plan for a target with these paths and a source with those; nothing is compared.
fn plan_of(ours: &[(&str, EntryKind)], theirs: &[(&str, Option<u64>)], choices: Choices) -> Plan {
    let path = |name: &str| DataPath::new(name).expect("a path");
    let entry = |(name, kind): &(&str, EntryKind)| {
        let (path, kind) = (path(name), kind.clone());
        (path.clone(), Entry { path, kind, mode: 0o600, inode: 1, modified: (0, 0) })
    };
    let keys = BTreeSet::from([path("mine/server.key")]);
    let facts = Facts {
        target: &ours.iter().map(entry).collect(),
        source: &theirs.iter().map(|(name, bytes)| (path(name), *bytes)).collect(),
        wal_summary: None,
        version_directory: "PG_15_202209061",
        choices,
        keys: &keys,
        new_tablespaces: &BTreeMap::new(),
    };
    build(&facts, &Differences::new()).expect("a plan")
}

const KEEP: Choices = Choices { config_from_source: false, mirror_extra_files: false };
const MIRROR: Choices = Choices { config_from_source: true, mirror_extra_files: true };

fn file(bytes: u64) -> EntryKind {
    EntryKind::File { bytes }
}

fn directory() -> EntryKind {
    EntryKind::Directory { link: None }
}

/// What happens to each path.
fn actions(plan: &Plan) -> Vec<(&str, &FileAction)> {
    plan.files.iter().map(|file| (file.path.as_str(), &file.action)).collect()
}

#[test]
fn what_the_source_lacks_of_a_database_goes() {
    let ours = [
        ("base", directory()),
        ("base/5", directory()),
        ("base/5/16384", file(8192)),
        ("base/7", directory()),
        ("base/7/1259", file(8192)),
    ];
    let theirs = [("base", None), ("base/5", None)];
    let plan = plan_of(&ours, &theirs, KEEP);
    let expected = [("base/5/16384", &FileAction::Remove), ("base/7", &FileAction::RemoveTree)];
    assert_eq!(actions(&plan), expected);
}

#[test]
fn slots_of_the_target_go_and_are_named() {
    let ours = [
        ("pg_replslot", directory()),
        ("pg_replslot/old", directory()),
        ("pg_replslot/old/state", file(200)),
    ];
    let plan = plan_of(&ours, &[("pg_replslot", None)], KEEP);
    assert_eq!(plan.slots, ["old"]);
    assert_eq!(actions(&plan), [("pg_replslot/old", &FileAction::RemoveTree)]);
}

#[test]
fn configuration_and_unknown_files_stay_unless_they_are_mirrored() {
    let ours = [
        ("postgresql.conf", file(10)),
        ("mine", directory()),
        ("mine/notes", file(10)),
        ("mine/server.key", file(10)),
    ];
    let theirs = [("postgresql.conf", Some(20)), ("mine", None), ("mine/other", Some(5))];
    assert_eq!(actions(&plan_of(&ours, &theirs, KEEP)), []);
    let whole = FileAction::Replace { bytes: None };
    let mirrored = plan_of(&ours, &theirs, MIRROR);
    let mut actions = actions(&mirrored);
    actions.sort_by_key(|(path, _)| *path);
    let expected =
        [("mine/notes", &FileAction::Remove), ("mine/other", &whole), ("postgresql.conf", &whole)];
    assert_eq!(actions, expected, "a private key stays");
}

#[test]
fn what_postgres_makes_anew_is_neither_fetched_nor_kept() {
    let ours = [
        ("pg_subtrans", directory()),
        ("pg_subtrans/0000", file(8192)),
        ("base", directory()),
        ("base/5", directory()),
        ("base/5/t3_16390", file(8192)),
    ];
    let theirs = [
        ("pg_subtrans", None),
        ("base", None),
        ("base/5", None),
        ("base/5/16400", Some(8192)),
        ("base/5/16400_init", Some(8192)),
    ];
    let plan = plan_of(&ours, &theirs, KEEP);
    let mut paths: Vec<&str> = plan.files.iter().map(|file| file.path.as_str()).collect();
    paths.sort_unstable();
    // Of an unlogged relation the init fork alone comes.
    assert_eq!(paths, ["base/5/16400_init", "base/5/t3_16390", "pg_subtrans/0000"]);
}

#[test]
fn a_file_that_is_no_file_here_is_refused() {
    let path = DataPath::new("base/5/16384").expect("a path");
    let kind = EntryKind::Directory { link: None };
    let entry = Entry { path: path.clone(), kind, mode: 0o700, inode: 1, modified: (0, 0) };
    let facts = Facts {
        target: &TargetFiles::from([(path.clone(), entry)]),
        source: &SourceFiles::from([(path, Some(8192))]),
        wal_summary: None,
        version_directory: "PG_15_202209061",
        choices: KEEP,
        keys: &BTreeSet::new(),
        new_tablespaces: &BTreeMap::new(),
    };
    let error = build(&facts, &Differences::new()).expect_err("a directory");
    assert_eq!(error.class(), Class::Target);
}

#[test]
fn a_shorter_file_is_cut_without_fetching_anything() {
    let ours = [("base", directory()), ("base/5", directory()), (FILE, file(5 * BLOCK_BYTES))];
    let theirs = [("base", None), ("base/5", None), (FILE, Some(2 * BLOCK_BYTES))];
    let plan = plan_of(&ours, &theirs, KEEP);
    let cut = FileAction::Patch { bytes: 2 * BLOCK_BYTES };
    assert_eq!(actions(&plan), [(FILE, &cut)]);
    assert!(blocks(&plan).is_empty());
}

#[test]
fn everything_that_both_have_is_compared_where_no_wal_names_pages() {
    let path = |name: &str| DataPath::new(name).expect("a path");
    let target = target(5 * BLOCK_BYTES);
    let source = SourceFiles::from([
        (path(FILE), Some(3 * BLOCK_BYTES)),
        (path("base/5/16400"), Some(8192)),
    ]);
    let (keys, new_tablespaces) = (BTreeSet::new(), BTreeMap::new());
    let facts = |wal_summary| Facts {
        target: &target,
        source: &source,
        wal_summary,
        version_directory: "PG_15_202209061",
        choices: KEEP,
        keys: &keys,
        new_tablespaces: &new_tablespaces,
    };
    let all = comparisons(&facts(None)).expect("comparisons");
    assert_eq!(all, [Comparison { path: path(FILE), blocks: 3 }]);
    let wal_summary = WalSummary::default();
    assert_eq!(comparisons(&facts(Some(&wal_summary))).expect("comparisons"), []);
}
