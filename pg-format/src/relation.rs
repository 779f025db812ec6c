//! Relations on disk: which file holds which blocks of which fork.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{DataPath, FormatError, RELATION_SEGMENT_BLOCKS};

/// OID of `pg_default` (`catalog/pg_tablespace.dat`): its relations lie below `base`.
pub const DEFAULT_TABLESPACE: u32 = 1663;
/// OID of `pg_database`, which the shared relation map must name (`DatabaseRelationId`).
pub const PG_DATABASE: u32 = 1262;
/// OID of `pg_class`, which the relation map of each database must name (`RelationRelationId`).
pub const PG_CLASS: u32 = 1259;
/// OID of `pg_global`: its relations lie in `global`.
pub const GLOBAL_TABLESPACE: u32 = 1664;

/// One of the files a relation consists of (`common/relpath.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Fork {
    /// The data itself.
    Main,
    /// Free space map.
    FreeSpaceMap,
    /// Visibility map.
    VisibilityMap,
    /// Empty image of an unlogged relation.
    Init,
}

impl Fork {
    /// The fork a WAL record names by this number.
    pub fn from_number(number: u8) -> Option<Self> {
        [Self::Main, Self::FreeSpaceMap, Self::VisibilityMap, Self::Init]
            .get(usize::from(number))
            .copied()
    }

    fn suffix(self) -> &'static str {
        match self {
            Self::Main => "",
            Self::FreeSpaceMap => "_fsm",
            Self::VisibilityMap => "_vm",
            Self::Init => "_init",
        }
    }
}

/// A relation's place: tablespace, database and file number (`RelFileLocator`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RelationPath {
    /// Tablespace OID.
    pub tablespace: u32,
    /// Database OID; 0 for shared relations.
    pub database: u32,
    /// Relation file number.
    pub number: u32,
}

impl fmt::Display for RelationPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.tablespace, self.database, self.number)
    }
}

/// One segment file of one fork of a relation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RelationSegment {
    /// The relation.
    pub relation: RelationPath,
    /// The fork.
    pub fork: Fork,
    /// Segment number, 0 for the file without suffix.
    pub segment: u32,
}

/// Name of the directory a major makes inside each tablespace (`TABLESPACE_VERSION_DIRECTORY`).
pub fn tablespace_version_directory(major: crate::Major, catalog_version: u32) -> String {
    format!("PG_{major}_{catalog_version}")
}

/// The directory of one database inside one tablespace, as PostgreSQL names it from the data
/// directory.
pub fn database_directory(
    tablespace: u32,
    database: u32,
    version_directory: &str,
) -> Result<DataPath, FormatError> {
    DataPath::new(match tablespace {
        GLOBAL_TABLESPACE => "global".to_owned(),
        DEFAULT_TABLESPACE => format!("base/{database}"),
        _ => format!("pg_tblspc/{tablespace}/{version_directory}/{database}"),
    })
}

impl RelationSegment {
    /// The segment that holds `block`, and the block's number inside it.
    pub fn of_block(relation: RelationPath, fork: Fork, block: u32) -> (Self, u32) {
        let segment = Self { relation, fork, segment: block / RELATION_SEGMENT_BLOCKS };
        (segment, block % RELATION_SEGMENT_BLOCKS)
    }

    /// Number, in the whole relation, of this segment's first block.
    pub fn first_block(&self) -> u32 {
        self.segment.saturating_mul(RELATION_SEGMENT_BLOCKS)
    }

    /// Its path below the data directory.
    pub fn path(&self, version_directory: &str) -> Result<DataPath, FormatError> {
        let RelationPath { tablespace, database, number } = self.relation;
        let directory = database_directory(tablespace, database, version_directory)?;
        let suffix = self.fork.suffix();
        match self.segment {
            0 => directory.join(&format!("{number}{suffix}")),
            segment => directory.join(&format!("{number}{suffix}.{segment}")),
        }
    }

    /// The segment a path names, if it is one: the name must be exactly as PostgreSQL writes it.
    pub fn parse(path: &DataPath) -> Option<Self> {
        let parts: Vec<&str> = path.components().collect();
        let (tablespace, database, name) = match parts[..] {
            ["global", name] => (GLOBAL_TABLESPACE, 0, name),
            ["base", database, name] => (DEFAULT_TABLESPACE, parse_oid(database)?, name),
            ["pg_tblspc", tablespace, version, database, name] if version.starts_with("PG_") => {
                (parse_oid(tablespace)?, parse_oid(database)?, name)
            }
            _ => return None,
        };
        let (name, segment) = match name.split_once('.') {
            Some((name, segment)) => (name, parse_oid(segment)?),
            None => (name, 0),
        };
        let (number, fork) = match name.split_once('_') {
            None => (name, Fork::Main),
            Some((number, "fsm")) => (number, Fork::FreeSpaceMap),
            Some((number, "vm")) => (number, Fork::VisibilityMap),
            Some((number, "init")) => (number, Fork::Init),
            Some(_) => return None,
        };
        let relation = RelationPath { tablespace, database, number: parse_oid(number)? };
        Some(Self { relation, fork, segment })
    }
}

/// Whether a path lies in the part of a tablespace that belongs to this version. Clusters of other
/// versions may use the same tablespace directory, each in a directory of its own.
pub fn is_of_version(path: &DataPath, version_directory: &str) -> bool {
    let mut parts = path.components();
    parts.next() != Some("pg_tblspc") || parts.nth(1).is_none_or(|part| part == version_directory)
}

/// Whether a name is an OID as PostgreSQL writes it.
pub fn is_oid(name: &str) -> bool {
    parse_oid(name).is_some()
}

/// A decimal OID as PostgreSQL writes it: digits alone, no leading zero, not 0.
pub(crate) fn parse_oid(text: &str) -> Option<u32> {
    let plain = text.bytes().all(|b| b.is_ascii_digit()) && !text.starts_with('0');
    if plain { text.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(path: &str) -> Option<RelationSegment> {
        RelationSegment::parse(&DataPath::new(path).unwrap())
    }

    #[test]
    fn paths_round_trip() {
        let version = "PG_15_202209061";
        for path in [
            "global/1262",
            "base/5/16384",
            "base/5/16384.7",
            "base/5/16384_fsm.2",
            "base/5/16384_vm",
            "base/5/16384_init",
            "pg_tblspc/16400/PG_15_202209061/5/16401.1",
        ] {
            let segment = parse(path).unwrap_or_else(|| panic!("{path}"));
            assert_eq!(segment.path(version).unwrap().as_str(), path);
        }
    }

    #[test]
    fn other_files_are_no_relations() {
        for path in [
            "base/5/t3_16384",
            "base/5/016384",
            "base/5/16384.0",
            "base/5/16384_x",
            "base/5/0",
            "base/5/PG_VERSION",
            "base/x/1",
            "1262",
            "global/pg_control",
            "base/5/16384.1.2",
            "base/5/99999999999",
            "pg_tblspc/1/x/5/1",
            "base/5/16384_fsm_vm",
        ] {
            assert_eq!(parse(path), None, "{path}");
        }
    }

    #[test]
    fn blocks_fall_into_their_segment() {
        let relation = RelationPath { tablespace: 1663, database: 5, number: 9 };
        let (segment, block) = RelationSegment::of_block(relation, Fork::Main, 131_073);
        assert_eq!((segment.segment, block, segment.first_block()), (1, 1, 131_072));
    }
}
