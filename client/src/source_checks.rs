//! Checks that what a source says makes sense, beyond its form, before it is used: its description, its file
//! list, what a plan made from them would do, and its seal. Pure.

use std::collections::{BTreeMap, BTreeSet};

use pg_format::relation::{PG_CLASS, PG_DATABASE, is_of_version, tablespace_version_directory};
use pg_format::{
    BLOCK_BYTES, ControlFile, DataPath, FileClass, Fork, Major, RELATION_SEGMENT_BLOCKS,
    TimelineHistory, relation_map,
};
use proto::model::{Description, FileEntry, Sealed};

use crate::error::{Class, Replan, RewindError};
use crate::plan::input::file_bytes;
use crate::plan::{FinalFile, Plan, SourceFiles, TargetFiles};

/// Largest segment file of a relation; those of transaction status are smaller.
const SEGMENT_BYTES_MAX: u64 = RELATION_SEGMENT_BLOCKS as u64 * BLOCK_BYTES;
/// Largest other file: extensions and operators may keep large ones in a data directory.
const FILE_BYTES_MAX: u64 = 16 << 40;
/// Bytes of all files together: no sum of lengths that a plan makes can overflow.
const LISTED_BYTES_MAX: u64 = 1 << 56;
/// A database may not shrink to less than one part in this many, unless the operator accepts it.
const SHRINKS_TO: u64 = 10;
/// Files that every cluster has, whatever is done to it.
const ESSENTIAL: [&str; 2] = ["PG_VERSION", RELATION_MAP];
const RELATION_MAP: &str = "global/pg_filenode.map";

fn nonsense(what: &str) -> RewindError {
    RewindError::new(Class::Other, format!("the source's answers are inconsistent: {what}"))
}

/// An inconsistency that may be temporary, because the source was changing its files: another plan may
/// succeed.
fn unsettled(what: &str) -> RewindError {
    let message = format!("the source's files are inconsistent: {what}");
    RewindError::replan(Replan::SourceChanged, message)
}

/// Checks that a description is consistent.
pub(crate) fn check_description(
    source: &Description,
    history: &TimelineHistory,
) -> Result<(), RewindError> {
    let control = &source.node.control;
    let checkpoint = &control.checkpoint_copy;
    if !checkpoint.redo.is_valid() || checkpoint.redo > control.checkpoint {
        return Err(nonsense(&format!(
            "its checkpoint at {} has an invalid redo position, {}",
            control.checkpoint, checkpoint.redo
        )));
    }
    let timeline = history.timeline_of(checkpoint.redo);
    if timeline != checkpoint.timeline
        && history.timeline_of(control.checkpoint) != checkpoint.timeline
    {
        return Err(nonsense(&format!(
            "its checkpoint at {} is on timeline {}, but its history has another timeline there",
            control.checkpoint, checkpoint.timeline
        )));
    }
    Ok(())
}

/// Makes a file list of its entries, if it can be that of a whole cluster.
pub(crate) fn check_list(
    entries: Vec<FileEntry>,
    control: &ControlFile,
) -> Result<SourceFiles, RewindError> {
    let (mut files, mut bytes) = (SourceFiles::new(), 0_u64);
    for entry in entries {
        check_entry(&entry, control)?;
        bytes = bytes.saturating_add(entry.bytes.unwrap_or(0));
        if bytes > LISTED_BYTES_MAX {
            return Err(nonsense("its files have more bytes than any cluster"));
        }
        let path = entry.path.clone();
        if files.insert(entry.path, entry.bytes).is_some() {
            return Err(nonsense(&format!("it lists {path} twice")));
        }
    }
    for path in files.keys() {
        if let Some(parent) = path.parent()
            && files.get(&parent).is_some_and(Option::is_some)
        {
            return Err(nonsense(&format!(
                "its file list has {path}, but also {parent} as a file"
            )));
        }
    }
    let has_file =
        |name: &str| files.iter().any(|(path, bytes)| path.as_str() == name && bytes.is_some());
    if let Some(name) = ESSENTIAL.into_iter().find(|name| !has_file(name)) {
        return Err(nonsense(&format!("its file list lacks {name}")));
    }
    if databases(&files).is_empty() {
        return Err(nonsense("its file list has no database"));
    }
    Ok(files)
}

/// Directories that hold files of one database, by its OID.
fn databases(files: &SourceFiles) -> BTreeMap<u32, BTreeSet<DataPath>> {
    let mut databases: BTreeMap<u32, BTreeSet<DataPath>> = BTreeMap::new();
    for path in files.keys() {
        if let (FileClass::Relation(segment), Some(parent)) = (FileClass::of(path), path.parent())
            && segment.relation.database != 0
        {
            databases.entry(segment.relation.database).or_default().insert(parent);
        }
    }
    databases
}

/// Checks that each database that the target has whole is whole on the source, too. A database has a version
/// and a relation map in its own tablespace, and may have relations in others. Databases that only the source
/// has may be in the middle of being created or dropped, or be left from a crash.
pub(crate) fn check_databases(
    files: &SourceFiles,
    target: &TargetFiles,
) -> Result<(), RewindError> {
    let is_whole = |directory: &DataPath, has: &dyn Fn(&DataPath) -> bool| {
        let files = ["PG_VERSION", "pg_filenode.map"];
        files.iter().all(|name| directory.join(name).is_ok_and(|path| has(&path)))
    };
    let theirs = |path: &DataPath| files.get(path).is_some_and(Option::is_some);
    let ours = |path: &DataPath| target.contains_key(path);
    for (database, directories) in databases(files) {
        let here = directories.iter().find(|directory| is_whole(directory, &ours));
        if let Some(directory) = here
            && !directories.iter().any(|directory| is_whole(directory, &theirs))
        {
            return Err(unsettled(&format!(
                "database {database} has relations in {directory} but no PG_VERSION or no \
                 pg_filenode.map: check that database on the source, unless it is just being \
                 dropped"
            )));
        }
    }
    Ok(())
}

/// Whether the content of a planned file is checked before the seal.
pub(crate) fn is_judged(path: &DataPath) -> bool {
    matches!(path.file_name(), "PG_VERSION" | "pg_filenode.map")
        && FileClass::of(path) == FileClass::State
}

/// Checks the content that came for versions and relation maps, by the file's index in the plan.
pub(crate) fn check_contents(
    plan: &Plan,
    listed: &SourceFiles,
    contents: &BTreeMap<usize, Vec<u8>>,
    vanished: &BTreeSet<usize>,
    major: Major,
) -> Result<(), RewindError> {
    for (index, file) in plan.files.iter().enumerate() {
        let path = &file.path;
        let planned = plan.whole.iter().any(|wanted| wanted.file == index);
        if !planned || !is_judged(path) {
            continue;
        }
        if vanished.contains(&index) {
            let what = format!("its file list has {path}, but the file does not exist");
            return Err(match ESSENTIAL.contains(&path.as_str()) {
                true => nonsense(&what),
                // Its database is being dropped: the next list has none of it.
                false => unsettled(&what),
            });
        }
        let content = contents.get(&index).map(Vec::as_slice).unwrap_or_default();
        if path.file_name() == "PG_VERSION" {
            if content != format!("{major}\n").as_bytes() {
                return Err(nonsense(&format!("its {path} is not that of PostgreSQL {major}")));
            }
            continue;
        }
        let mapped = relation_map::parse(content, major)
            .map_err(|error| nonsense(&format!("its {path} is damaged ({error})")))?;
        let catalog = if path.as_str() == RELATION_MAP { PG_DATABASE } else { PG_CLASS };
        if !mapped.iter().any(|mapping| mapping.relation == catalog) {
            return Err(nonsense(&format!("its {path} has no entry for relation {catalog}")));
        }
        let mapped = mapped.iter().map(|mapping| &mapping.file);
        let beside =
            |number: &u32| path.parent().and_then(|dir| dir.join(&number.to_string()).ok());
        let lacks = |path: &DataPath| !listed.get(path).is_some_and(Option::is_some);
        if let Some(missing) = mapped.filter_map(beside).find(lacks) {
            return Err(unsettled(&format!("{path} names {missing}, which is not listed")));
        }
    }
    Ok(())
}

/// Main-fork bytes of each database; shared relations count as one.
fn sizes<'f>(files: impl Iterator<Item = (&'f DataPath, u64)>) -> BTreeMap<u32, u64> {
    let mut sizes: BTreeMap<u32, u64> = BTreeMap::new();
    for (path, bytes) in files {
        if let FileClass::Relation(segment) = FileClass::of(path)
            && segment.fork == Fork::Main
        {
            let size = sizes.entry(segment.relation.database).or_default();
            *size = size.saturating_add(bytes);
        }
    }
    sizes
}

/// The list with what was fetched: files may have become shorter or vanished meanwhile.
pub(crate) fn what_is_left(listed: &SourceFiles, files: &[FinalFile<'_>]) -> SourceFiles {
    let mut left = listed.clone();
    for file in files {
        if file.is_gone {
            left.remove(&file.planned.path);
        } else if let Some(Some(bytes)) = left.get_mut(&file.planned.path) {
            *bytes = file.bytes(*bytes);
        }
    }
    left
}

/// Refuses a list with which a database that both nodes have would keep less than a tenth of its bytes on the
/// target.
pub(crate) fn check_shrink(target: &TargetFiles, source: &SourceFiles) -> Result<(), RewindError> {
    let theirs = sizes(source.iter().filter_map(|(path, bytes)| Some((path, (*bytes)?))));
    let ours = sizes(target.iter().filter_map(|(path, entry)| Some((path, file_bytes(entry)?))));
    for (database, had) in ours {
        let Some(left) = theirs.get(&database).filter(|left| **left < had / SHRINKS_TO) else {
            continue;
        };
        let which = match database {
            0 => "the relations shared by all databases".to_owned(),
            oid => format!("database {oid}"),
        };
        return Err(RewindError::new(
            Class::Preflight,
            format!(
                "{which} would shrink from {had} bytes on the target to {left} bytes, as on the \
                 source: check that this is the right source, then give --accept-shrink"
            ),
        ));
    }
    Ok(())
}

/// Whether a seal is of the node that was described.
pub(crate) fn check_seal(source: &Description, sealed: &Sealed) -> Result<(), RewindError> {
    let (was, is) = (&source.node.control, &sealed.node.control);
    let same = was.system_identifier == is.system_identifier
        && was.control_version == is.control_version
        && was.catalog_version == is.catalog_version
        && was.wal_segment_size == is.wal_segment_size
        && was.data_checksum_version == is.data_checksum_version;
    if !same {
        return Err(nonsense(
            "its pg_control is now of another cluster, version, segment size or checksum setting",
        ));
    }
    if is.checkpoint_copy.redo < was.checkpoint_copy.redo {
        return Err(nonsense(&format!(
            "its newest checkpoint went back from {} to {}",
            was.checkpoint_copy.redo, is.checkpoint_copy.redo
        )));
    }
    if sealed.end < is.checkpoint {
        return Err(nonsense(&format!(
            "its WAL ends at {}, before its checkpoint at {}",
            sealed.end, is.checkpoint
        )));
    }
    Ok(())
}

/// Checks that a source may serve this entry.
fn check_entry(entry: &FileEntry, control: &ControlFile) -> Result<(), RewindError> {
    let path = &entry.path;
    let version = tablespace_version_directory(control.major, control.catalog_version);
    let directory = entry.bytes.is_none();
    let served = match FileClass::of(path) {
        FileClass::Relation(_) | FileClass::Slru => {
            entry.bytes.is_none_or(|bytes| bytes <= SEGMENT_BYTES_MAX)
        }
        FileClass::State | FileClass::Configuration | FileClass::Unknown => {
            entry.bytes.is_none_or(|bytes| bytes <= FILE_BYTES_MAX)
        }
        FileClass::Wal => directory && path.as_str() == "pg_wal",
        FileClass::Control
        | FileClass::Discarded
        | FileClass::Signal
        | FileClass::Runtime
        | FileClass::Log
        | FileClass::Own => false,
    };
    if served && is_of_version(path, &version) {
        return Ok(());
    }
    let what = entry.bytes.map_or("directory".to_owned(), |bytes| format!("file of {bytes} bytes"));
    Err(nonsense(&format!("its file list has {path} as a {what}, which a source never serves")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Remedy;
    use crate::plan::{FileAction, PlannedFile};
    use crate::test_values::{control, least_files};

    const CHANGED: Remedy = Remedy::Replan(Replan::SourceChanged);

    #[test]
    fn what_no_source_serves_is_not_believed() {
        let check = |path: &str, bytes: Option<u64>| {
            check_entry(&FileEntry { path: DataPath::new(path).unwrap(), bytes }, &control())
        };
        assert!(check("base/5/16384", Some(1 << 30)).is_ok());
        assert!(check("pg_wal", None).is_ok());
        assert!(check("mine/notes", Some(1 << 40)).is_ok());
        assert!(check("mine/notes", Some(u64::MAX)).is_err());
        assert!(check("PG_VERSION", Some(FILE_BYTES_MAX + 1)).is_err());
        assert!(check("pg_tblspc/9/PG_15_202209061/5/16384", Some(0)).is_ok());
        for (path, bytes) in [
            ("base/5/16384", Some(1 << 45)),
            ("pg_xact/0000", Some((1 << 30) + 1)),
            ("pg_wal/000000010000000000000001", None),
            ("pg_wal/000000010000000000000001", Some(1)),
            ("pg_tblspc/9/authorized_keys", Some(9)),
            ("pg_tblspc/9/PG_14_202107181/5/16384", Some(0)),
            (".pgrejoin/sealed", Some(9)),
            ("global/pg_control", Some(8192)),
            ("standby.signal", Some(0)),
        ] {
            assert!(check(path, bytes).is_err(), "{path}");
        }
    }

    fn path(name: &str) -> DataPath {
        DataPath::new(name).unwrap()
    }

    fn listed(files: Vec<(&'static str, Option<u64>)>) -> Result<SourceFiles, RewindError> {
        let entries = files.into_iter().map(|(name, bytes)| FileEntry { path: path(name), bytes });
        check_list(entries.collect(), &control())
    }

    fn without(name: &str) -> Result<SourceFiles, RewindError> {
        let mut files = least_files();
        files.retain(|(file, _)| *file != name);
        listed(files)
    }

    #[test]
    fn a_list_that_lacks_what_every_cluster_has_is_not_believed() {
        assert!(listed(least_files()).is_ok());
        assert!(listed(Vec::new()).is_err(), "an empty list is no cluster");
        for name in ["PG_VERSION", "global/pg_filenode.map"] {
            assert_eq!(without(name).unwrap_err().class(), Class::Other, "{name}");
        }
        let mut no_database = least_files();
        no_database.retain(|(name, _)| !name.starts_with("base/5"));
        assert_eq!(listed(no_database).unwrap_err().class(), Class::Other);
    }

    #[test]
    fn a_database_without_its_map_or_version_is_asked_for_again() {
        let whole = target(&["base/5/PG_VERSION", "base/5/pg_filenode.map", "base/5/1259"]);
        for name in ["base/5/PG_VERSION", "base/5/pg_filenode.map"] {
            let files = without(name).unwrap();
            assert_eq!(check_databases(&files, &whole).unwrap_err().remedy(), CHANGED);
            // One that the target does not have may be what a server that crashed has left.
            assert!(check_databases(&files, &TargetFiles::new()).is_ok(), "{name}");
        }
        // In another tablespace a database has relations alone.
        let mut spread = least_files();
        spread.push(("pg_tblspc/9/PG_15_202209061/5/16384", Some(8192)));
        assert!(check_databases(&listed(spread).unwrap(), &whole).is_ok());
    }

    /// Files of the target, each of a few bytes.
    fn target(names: &[&str]) -> TargetFiles {
        names.iter().map(|name| (path(name), entry(name, 8192))).collect()
    }

    fn entry(name: &str, bytes: u64) -> data_dir::Entry {
        data_dir::Entry {
            path: path(name),
            kind: data_dir::EntryKind::File { bytes },
            mode: 0o600,
            inode: 1,
            modified: (0, 0),
        }
    }

    #[test]
    fn a_path_is_listed_once_and_as_one_thing() {
        for more in [
            ("base/5/1259", Some(0)),
            ("base/5/1259", None),
            ("base/5", Some(8192)),
            ("base/5/1259/1", Some(8192)),
        ] {
            let mut files = least_files();
            files.push(more);
            assert_eq!(listed(files).unwrap_err().class(), Class::Other, "{more:?}");
        }
    }

    #[test]
    fn a_database_that_would_nearly_vanish_is_not_taken_away() {
        let target =
            |bytes| TargetFiles::from([(path("base/5/16384"), entry("base/5/16384", bytes))]);
        let source = |bytes| SourceFiles::from([(path("base/5/16400"), Some(bytes))]);
        assert!(check_shrink(&target(1 << 30), &source(1 << 20)).is_err());
        assert!(check_shrink(&target(1 << 30), &source(1 << 29)).is_ok());
        // What was listed is believed only as far as it comes.
        let planned = |name: &str| PlannedFile {
            path: path(name),
            action: FileAction::Patch { bytes: 1 << 30 },
        };
        let planned = planned("base/5/16400");
        let came =
            |shorter| FinalFile { planned: &planned, bytes_before: None, shorter, is_gone: false };
        let left = |shorter| what_is_left(&source(1 << 30), &[came(shorter)]);
        assert!(check_shrink(&target(1 << 30), &left(None)).is_ok());
        assert!(check_shrink(&target(1 << 30), &left(Some(0))).is_err());
        // A database that the source has not is dropped, which is nothing strange.
        assert!(check_shrink(&target(1 << 30), &SourceFiles::new()).is_ok());
    }

    #[test]
    fn versions_and_relation_maps_are_judged_by_their_content() {
        use crate::plan::file_actions::BytesWanted;
        let major = Major::new(15).unwrap();
        let file = |name: &str| PlannedFile {
            path: path(name),
            action: FileAction::Replace { bytes: None },
        };
        let plan = Plan {
            files: vec![file("PG_VERSION"), file("global/pg_filenode.map")],
            whole: (0..2).map(|file| BytesWanted { file, bytes: 3 }).collect(),
            ..Plan::default()
        };
        let listed = listed(least_files()).unwrap();
        let mut map = 0x59_2717_i32.to_le_bytes().to_vec();
        map.extend(1_i32.to_le_bytes());
        map.extend(1262_u32.to_le_bytes());
        map.extend(1262_u32.to_le_bytes());
        map.resize(504, 0);
        map.extend(crc32c::crc32c(&map).to_le_bytes());
        map.resize(512, 0);
        let check = |version: &[u8], map: &[u8], listed: &SourceFiles| {
            let contents = BTreeMap::from([(0, version.to_vec()), (1, map.to_vec())]);
            check_contents(&plan, listed, &contents, &BTreeSet::new(), major)
        };
        assert!(check(b"15\n", &map, &listed).is_ok());
        assert!(check(b"14\n", &map, &listed).is_err());
        assert!(check(b"15\n", &[7; 512], &listed).is_err());
        let mut fewer = listed.clone();
        fewer.remove(&path("global/1262"));
        assert_eq!(check(b"15\n", &map, &fewer).unwrap_err().remedy(), CHANGED);
        let gone = check_contents(&plan, &listed, &BTreeMap::new(), &BTreeSet::from([0, 1]), major);
        assert!(gone.is_err(), "what every cluster has cannot be gone");
    }
}
