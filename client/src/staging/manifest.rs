//! Everything that is needed to finish a rewind or to take it back, in one checked file.

use std::io;

use data_dir::DataDir;
use pg_format::DataPath;
use pg_format::relation::is_oid;
use serde::{Deserialize, Serialize};

use crate::plan::pg_wal::{SmallFile, WalChanges};
use crate::plan::{FileAction, FinalFile, PlannedFile};
use crate::staging::disk::FileStat;
use crate::staging::external::Staging;
use crate::staging::header::{self, HeaderError};
use crate::staging::layout::trash;

/// A staged file as it was when it was sealed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackDigest {
    /// Its name.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// CRC-32C of its content.
    pub crc: u32,
}

/// A small file as it was before it was written or removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OldFile {
    /// Where it is.
    pub path: DataPath,
    /// Its content and permission bits; `None` if there was none.
    pub content: Option<(Vec<u8>, u32)>,
}

/// What a rollback needs, except for the files that were moved aside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Undo {
    /// Images of what is overwritten or cut.
    pub images: Vec<PackDigest>,
    /// Small files that are written or removed.
    pub small: Vec<OldFile>,
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Program that wrote it.
    pub program_version: String,
    /// The target's `pg_control` when the plan was made: if another is found, somebody started the
    /// server and the plan is void.
    pub old_control: Vec<u8>,
    /// The `pg_control` that makes it a rewound node.
    pub new_control: Vec<u8>,
    /// The target's files.
    pub files: Vec<PlannedFile>,
    /// Each of them as it was when the plan was made; `None` if there was no such file.
    pub before: Vec<Option<FileStat>>,
    /// The packs.
    pub packs: Vec<PackDigest>,
    /// The staged WAL segments.
    pub segments: Vec<PackDigest>,
    /// Where packs and WAL are staged, if not in the state directory.
    pub staging: Option<Staging>,
    /// Files that were shorter on the source when they were read than when they were listed: index
    /// and bytes.
    ///
    /// In the order of their index.
    pub shorter: Vec<(usize, u64)>,
    /// Files that were gone when they were read.
    ///
    /// In order.
    pub vanished: Vec<usize>,
    /// Changes in `pg_wal`.
    pub wal: WalChanges,
    /// Settings and signal files, in the order they are written.
    pub settings: Vec<SmallFile>,
    /// Top-level files that are removed.
    pub remove: Vec<DataPath>,
    /// The `backup_label`, which says where replay begins. It is written last before `pg_control`.
    pub backup_label: Vec<u8>,
    /// What a rollback needs; `None` if no undo images were saved.
    pub undo: Option<Undo>,
    /// Whether changes are made durable.
    pub sync: bool,
    /// What the operator is told at the end.
    pub summary: String,
}

/// Why a manifest cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// It is damaged, or another release wrote it.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// It cannot be encoded or decoded.
    #[error("its content could not be encoded or decoded")]
    Content(#[from] postcard::Error),
    /// Its lists of files are not in order.
    #[error("its lists of files are not in order")]
    Order,
}

impl Manifest {
    /// The file's content.
    pub fn encode(&self) -> Result<Vec<u8>, ManifestError> {
        Ok(header::seal(&postcard::to_stdvec(self)?))
    }

    /// Reads and checks the file.
    pub fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
        let manifest: Self = postcard::from_bytes(header::open(bytes)?)?;
        let in_order =
            manifest.vanished.is_sorted() && manifest.shorter.is_sorted_by_key(|(index, _)| *index);
        if in_order { Ok(manifest) } else { Err(ManifestError::Order) }
    }

    /// The length a planned file has at the end.
    pub fn final_bytes(&self, index: usize, planned: u64) -> u64 {
        self.shorter(index).map_or(planned, |shorter| planned.min(shorter))
    }

    /// The length that the file had on the source when it was read, if that was less than listed.
    fn shorter(&self, index: usize) -> Option<u64> {
        let found = self.shorter.binary_search_by_key(&index, |(of, _)| *of).ok()?;
        self.shorter.get(found).map(|(_, bytes)| *bytes)
    }

    /// A planned file as it was; `None` if there was no such file.
    pub fn before(&self, index: usize) -> Option<&FileStat> {
        self.before.get(index).and_then(Option::as_ref)
    }

    /// Every planned file, as it will be at the end.
    pub fn final_files(&self) -> Vec<FinalFile<'_>> {
        let files = self.files.iter().enumerate();
        let files = files.map(|(index, planned)| FinalFile {
            planned,
            bytes_before: self.before(index).map(|before| before.bytes),
            shorter: self.shorter(index),
            is_gone: self.is_gone(index),
        });
        files.collect()
    }

    /// Whether a planned file was gone on the source when it was read.
    pub fn is_gone(&self, index: usize) -> bool {
        self.vanished.binary_search(&index).is_ok()
    }
}

/// Opens a target again after its links have changed. A tablespace that is removed is reached through its
/// link, which was moved aside, so that its files can be restored or removed with it.
pub fn reopen(directory: &DataDir, manifest: &Manifest) -> io::Result<DataDir> {
    let mut opened = DataDir::open(directory.path()).map_err(io::Error::other)?;
    for (index, file) in manifest.files.iter().enumerate() {
        let oid = file.path.as_str().strip_prefix("pg_tblspc/").filter(|oid| is_oid(oid));
        let Some(oid) = oid.filter(|_| file.action == FileAction::Remove) else {
            continue;
        };
        let trash = trash(directory, &file.path, index);
        opened.adopt_tablespace(oid, &trash)?;
    }
    Ok(opened)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_values::manifest;

    fn with_files() -> Manifest {
        let file = |name: &str| PlannedFile {
            path: DataPath::new(name).unwrap(),
            action: FileAction::Patch { bytes: 8192 },
        };
        let before = FileStat { bytes: 16384, mode: 0o600, inode: 7, modified: (1, 2) };
        Manifest {
            files: vec![file("base/5/1"), file("base/5/2"), file("base/5/3")],
            before: vec![Some(before), None, Some(before)],
            shorter: vec![(0, 4096)],
            vanished: vec![2],
            ..manifest()
        }
    }

    #[test]
    fn a_manifest_is_read_as_it_was_written_and_not_where_it_is_damaged() {
        let mut bytes = with_files().encode().unwrap();
        assert_eq!(Manifest::decode(&bytes).unwrap(), with_files());
        *bytes.last_mut().unwrap() ^= 1;
        assert!(Manifest::decode(&bytes).is_err());
        assert!(Manifest::decode(&bytes[..20]).is_err());
    }

    #[test]
    fn files_are_as_the_source_had_them_when_they_were_read() {
        let manifest = with_files();
        let files = manifest.final_files();
        let lengths: Vec<u64> = files.iter().map(|file| file.bytes(8192)).collect();
        assert_eq!(lengths, [4096, 8192, 8192]);
        let gone: Vec<bool> = files.iter().map(|file| file.is_gone).collect();
        assert_eq!(gone, [false, false, true]);
        let before: Vec<_> = files.iter().map(|file| file.bytes_before).collect();
        assert_eq!(before, [Some(16384), None, Some(16384)]);
        assert_eq!(manifest.final_bytes(0, 8192), 4096);
        assert!(manifest.is_gone(2) && !manifest.is_gone(0));
    }
}
