//! The class of each file in a data directory, decided from its path alone.
//!
//! The lists are those of `basebackup.c` and `pg_rewind/filemap.c`, the same in 13 to 19.

use crate::relation::parse_oid;
use crate::{DataPath, RelationSegment};

/// Name of the directory in which pgrejoin keeps its own state; never listed, served or planned.
pub const OWN_DIRECTORY: &str = ".pgrejoin";

/// Directories whose content no other node can use: emptied on the target, never transferred.
pub const EMPTIED_DIRECTORIES: [&str; 8] = [
    // Statistics: removed by the server when it starts in recovery anyway.
    "pg_stat_tmp",
    "pg_stat",
    // A slot is a promise of one node to its own followers.
    "pg_replslot",
    // Shared memory, notifications and SSI state of a running server.
    "pg_dynshmem",
    "pg_notify",
    "pg_serial",
    "pg_snapshots",
    // Zeroed at every start.
    "pg_subtrans",
];

const PAGED_DIRECTORIES: [&str; 4] =
    ["pg_xact", "pg_multixact/offsets", "pg_multixact/members", "pg_commit_ts"];

const CONFIGURATION: [&str; 4] =
    ["postgresql.conf", "postgresql.auto.conf", "pg_hba.conf", "pg_ident.conf"];

/// The kinds of file that are treated differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileClass {
    /// `global/pg_control`: written last.
    Control,
    /// A segment of a relation fork.
    Relation(RelationSegment),
    /// A segment of an SLRU (transaction status, multixacts, commit timestamps). WAL does not name its pages,
    /// so every page is compared with the source's.
    Slru,
    /// Small state that is always made equal to the source's: relation maps, `PG_VERSION`,
    /// two-phase files, logical decoding state.
    State,
    /// Anything below `pg_wal`.
    Wal,
    /// Of no use to another node: removed from the target, never transferred.
    Discarded,
    /// A file that tells a starting server what to do; written by the rewind itself.
    Signal,
    /// `postmaster.pid` and `postmaster.opts`: belong to the running server.
    Runtime,
    /// Configuration that PostgreSQL ships.
    Configuration,
    /// Server logs: never transferred, never removed.
    Log,
    /// Below [`OWN_DIRECTORY`].
    Own,
    /// Not PostgreSQL's.
    Unknown,
}

impl FileClass {
    /// The class of a path below the data directory.
    pub fn of(path: &DataPath) -> Self {
        let name = path.file_name();
        if path.components().any(|part| part == OWN_DIRECTORY) {
            return Self::Own;
        }
        if path.as_str() == "global/pg_control" {
            return Self::Control;
        }
        if path.is_within("pg_wal") {
            return Self::Wal;
        }
        if let Some(segment) = RelationSegment::parse(path) {
            return Self::Relation(segment);
        }
        if is_discarded(path, name) {
            return Self::Discarded;
        }
        if PAGED_DIRECTORIES.iter().any(|directory| path.is_within(directory)) {
            return Self::Slru;
        }
        if is_state(path, name) {
            return Self::State;
        }
        match path.as_str() {
            "standby.signal" | "recovery.signal" | "backup_label" | "tablespace_map" => {
                Self::Signal
            }
            "postmaster.pid" | "postmaster.opts" => Self::Runtime,
            text if CONFIGURATION.contains(&text) => Self::Configuration,
            _ if path.is_within("log") || path.is_within("pg_log") => Self::Log,
            _ => Self::Unknown,
        }
    }
}

fn is_state(path: &DataPath, name: &str) -> bool {
    if path.is_within("pg_twophase") || path.is_within("pg_logical") {
        return true;
    }
    let in_database = path.is_within("base") || path.is_within("pg_tblspc");
    match name {
        "PG_VERSION" => in_database || path.parent().is_none(),
        "pg_filenode.map" => in_database || path.as_str() == "global/pg_filenode.map",
        _ => false,
    }
}

/// PostgreSQL's lists match these names at any depth. Here they count only where PostgreSQL puts such files:
/// elsewhere a file of the same name belongs to the user.
fn is_discarded(path: &DataPath, name: &str) -> bool {
    let emptied = EMPTIED_DIRECTORIES
        .iter()
        .any(|directory| path.is_within(directory) && path.as_str() != *directory);
    let at_the_top = path.parent().is_none()
        && matches!(name, "postgresql.auto.conf.tmp" | "current_logfiles.tmp" | "backup_manifest");
    let among_relations =
        ["base", "global", "pg_tblspc"].iter().any(|directory| path.is_within(directory));
    let caches = among_relations
        && (name.starts_with("pg_internal.init")
            || path.components().any(|part| part.starts_with("pgsql_tmp")));
    emptied || at_the_top || caches || is_temporary_relation(path, name)
}

/// `t<backend>_<number>` in a database directory, with any fork and segment.
fn is_temporary_relation(path: &DataPath, name: &str) -> bool {
    let in_database = path.is_within("base") || path.is_within("pg_tblspc");
    let parts = name.strip_prefix('t').and_then(|rest| rest.split_once('_'));
    let Some((backend, number)) = parts.filter(|_| in_database) else {
        return false;
    };
    let digits = number.split(['_', '.']).next().unwrap_or_default();
    !backend.is_empty()
        && backend.bytes().all(|b| b.is_ascii_digit())
        && parse_oid(digits).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_told_by_its_path() {
        let cases = [
            ("global/pg_control", FileClass::Control),
            ("pg_wal/000000010000000000000001", FileClass::Wal),
            ("pg_xact/0000", FileClass::Slru),
            ("pg_multixact/members/0000", FileClass::Slru),
            ("pg_multixact", FileClass::Unknown),
            ("base/5/pg_filenode.map", FileClass::State),
            ("base/5/PG_VERSION", FileClass::State),
            ("PG_VERSION", FileClass::State),
            ("mine/PG_VERSION", FileClass::Unknown),
            ("pg_twophase/000002F1", FileClass::State),
            ("pg_logical/replorigin_checkpoint", FileClass::State),
            ("pg_replslot/a/state", FileClass::Discarded),
            ("pg_replslot", FileClass::Unknown),
            ("base/pgsql_tmp/pgsql_tmp12.0", FileClass::Discarded),
            ("base/5/t3_16400_fsm.1", FileClass::Discarded),
            ("base/5/table_1", FileClass::Unknown),
            ("global/pg_internal.init.12", FileClass::Discarded),
            ("backup_manifest", FileClass::Discarded),
            ("backups/monday/backup_manifest", FileClass::Unknown),
            ("mine/pgsql_tmp_old/x", FileClass::Unknown),
            ("standby.signal", FileClass::Signal),
            ("mine/standby.signal", FileClass::Unknown),
            ("postmaster.pid", FileClass::Runtime),
            ("pg_hba.conf", FileClass::Configuration),
            ("conf.d/extra.conf", FileClass::Unknown),
            ("log/postgresql.log", FileClass::Log),
            (".pgrejoin/plan", FileClass::Own),
            ("pg_tblspc/16400/.pgrejoin/x", FileClass::Own),
        ];
        for (path, class) in cases {
            assert_eq!(FileClass::of(&DataPath::new(path).unwrap()), class, "{path}");
        }
    }
}
