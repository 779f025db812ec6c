//! Holds a file list to local facts: what no source serves is not believed.

use pg_format::relation::{is_of_version, tablespace_version_directory};
use pg_format::{BLOCK_BYTES, ControlFile, FileClass, RELATION_SEGMENT_BLOCKS};
use proto::model::FileEntry;

/// Largest segment file of a relation; those of transaction status are smaller.
const SEGMENT_BYTES_MAX: u64 = RELATION_SEGMENT_BLOCKS as u64 * BLOCK_BYTES;

/// Checks one entry; the error says what is wrong with it.
pub(super) fn check(entry: &FileEntry, control: &ControlFile) -> Result<(), String> {
    let path = &entry.path;
    let version = tablespace_version_directory(control.major, control.catalog_version);
    let directory = entry.bytes.is_none();
    let served = match FileClass::of(path) {
        FileClass::Relation(_) | FileClass::Slru => {
            entry.bytes.is_none_or(|bytes| bytes <= SEGMENT_BYTES_MAX)
        }
        FileClass::State | FileClass::Configuration | FileClass::Unknown => true,
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
    Err(format!("it lists {path} as a {what}, which no source serves"))
}

#[cfg(test)]
mod tests {
    use pg_format::DataPath;

    use super::*;

    fn control() -> ControlFile {
        let mut bytes = vec![0; 8192];
        let mut put = |at: usize, value: &[u8]| {
            for (byte, new) in bytes.iter_mut().skip(at).zip(value) {
                *byte = *new;
            }
        };
        put(8, &1300_u32.to_le_bytes());
        put(12, &202_209_061_u32.to_le_bytes());
        put(48, &1_u32.to_le_bytes());
        put(172, &1_i32.to_le_bytes());
        put(204, &8_u32.to_le_bytes());
        put(208, &1_234_567.0_f64.to_le_bytes());
        put(216, &8192_u32.to_le_bytes());
        put(220, &131_072_u32.to_le_bytes());
        put(224, &8192_u32.to_le_bytes());
        put(228, &(16_u32 << 20).to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..288]).to_le_bytes();
        bytes[288..292].copy_from_slice(&crc);
        ControlFile::parse(&bytes).unwrap()
    }

    #[test]
    fn what_no_source_serves_is_not_believed() {
        let check = |path: &str, bytes: Option<u64>| {
            check(&FileEntry { path: DataPath::new(path).unwrap(), bytes }, &control())
        };
        assert_eq!(check("base/5/16384", Some(1 << 30)), Ok(()));
        assert_eq!(check("pg_wal", None), Ok(()));
        assert_eq!(check("mine/notes", Some(1 << 40)), Ok(()));
        assert_eq!(check("pg_tblspc/9/PG_15_202209061/5/16384", Some(0)), Ok(()));
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
}
