//! What one record changes beyond the blocks it names: the only list of resource managers.

use super::record::{EXTENSIONS, Record, RecordBody};
use crate::bytes::Fields;
use crate::control_file::{CheckPoint, WalLevel};
use crate::{FormatError, Lsn, RelationPath, WalFormat};

const XLOG: u8 = 0;
const XACT: u8 = 1;
const SMGR: u8 = 2;
const DBASE: u8 = 4;
const TBLSPC: u8 = 5;
const XLOG2: u8 = 22;

/// An effect that matters to a rewind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Nothing beyond its blocks.
    None,
    /// A checkpoint completed (on a primary) or may become a restartpoint (on a standby).
    Checkpoint {
        /// Whether the server was shut down by it, or recovery ended with it.
        shutdown: bool,
        /// What it says.
        checkpoint: CheckPoint,
    },
    /// A standby became a primary.
    EndOfRecovery {
        /// The timeline that begins.
        timeline: u32,
    },
    /// Settings changed at a restart.
    ParameterChange {
        /// `wal_level` from here on.
        wal_level: WalLevel,
        /// `wal_log_hints` from here on.
        wal_log_hints: bool,
    },
    /// `full_page_writes` changed.
    FullPageWrites(bool),
    /// Page checksums were switched off or on while the server ran (19).
    ChecksumsChanged,
    /// Segment switch: the rest of the segment has no records.
    Switch,
    /// A record that a crash cut off is not continued (`OVERWRITE_CONTRECORD`).
    OverwriteContrecord,
    /// A fork of a relation was created.
    CreateRelation {
        /// The relation.
        relation: RelationPath,
        /// The fork's number.
        fork: u32,
    },
    /// A relation was truncated.
    Truncate {
        /// The relation.
        relation: RelationPath,
        /// The new length, in blocks.
        blocks: u32,
        /// Whether the main fork was truncated.
        main_fork: bool,
    },
    /// A database was copied file by file (`CREATE DATABASE … STRATEGY file_copy`, or
    /// `ALTER DATABASE … SET TABLESPACE`): replay copies whatever the directory then holds.
    CopyDatabase {
        /// The new directory's database.
        database: u32,
        /// The new directory's tablespace.
        tablespace: u32,
        /// The database copied.
        source_database: u32,
        /// The tablespace copied from.
        source_tablespace: u32,
    },
    /// A database directory was made, its blocks are logged.
    CreateDatabase {
        /// The database.
        database: u32,
        /// The tablespace.
        tablespace: u32,
    },
    /// Database directories were removed.
    DropDatabase {
        /// The database.
        database: u32,
        /// The tablespaces it was removed from.
        tablespaces: Vec<u32>,
    },
    /// A tablespace was created or dropped.
    Tablespace {
        /// Its OID.
        tablespace: u32,
        /// Where it was created, as the server was told; `None` if it was dropped.
        location: Option<String>,
    },
    /// A transaction was committed, also one that had been prepared.
    Commit,
    /// A record of an extension's own resource manager: only the blocks that it names are known.
    Extension,
}

/// The effect of `record`, decoded as `body`.
pub fn effect(
    record: &Record<'_>,
    body: &RecordBody,
    format: WalFormat,
) -> Result<Effect, FormatError> {
    let info = record.info() & 0xF0;
    let data = record.main_data(body);
    match record.resource_manager() {
        XLOG => xlog(info, data, format),
        // XLOG_XACT_COMMIT and XLOG_XACT_COMMIT_PREPARED.
        XACT if matches!(record.info() & 0x70, 0x00 | 0x30) => Ok(Effect::Commit),
        SMGR => smgr(info, data),
        DBASE => database(info, data, format),
        TBLSPC => tablespace(info, data),
        XLOG2 => Ok(if info == 0 { Effect::ChecksumsChanged } else { Effect::None }),
        EXTENSIONS.. => Ok(Effect::Extension),
        _ => Ok(Effect::None),
    }
}

/// The record that an `OVERWRITE_CONTRECORD` record gives up; `None` for other records.
pub(super) fn overwritten_record(record: &Record<'_>, body: &RecordBody) -> Option<Lsn> {
    let announces = record.resource_manager() == XLOG && record.info() & 0xF0 == 0xD0;
    let data = record.main_data(body);
    announces.then(|| Fields::new("overwrite record", data).u64(0).ok().map(Lsn::new)).flatten()
}

fn xlog(info: u8, data: &[u8], format: WalFormat) -> Result<Effect, FormatError> {
    let fields = Fields::new("XLOG record", data);
    Ok(match info {
        0x00 | 0x10 => Effect::Checkpoint {
            shutdown: info == 0x00,
            checkpoint: CheckPoint::parse(data, format.major())?,
        },
        0x40 => Effect::Switch,
        0x60 => Effect::ParameterChange {
            wal_level: WalLevel::from_i32(fields.i32(20)?)?,
            wal_log_hints: fields.bool(24)?,
        },
        0x80 => Effect::FullPageWrites(fields.bool(0)?),
        0x90 => Effect::EndOfRecovery { timeline: fields.u32(8)? },
        0xD0 => Effect::OverwriteContrecord,
        _ => Effect::None,
    })
}

fn smgr(info: u8, data: &[u8]) -> Result<Effect, FormatError> {
    let fields = Fields::new("SMGR record", data);
    let relation = |at: usize| {
        Ok::<_, FormatError>(RelationPath {
            tablespace: fields.u32(at)?,
            database: fields.u32(at + 4)?,
            number: fields.u32(at + 8)?,
        })
    };
    Ok(match info {
        0x10 => Effect::CreateRelation { relation: relation(0)?, fork: fields.u32(12)? },
        0x20 => Effect::Truncate {
            relation: relation(4)?,
            blocks: fields.u32(0)?,
            main_fork: fields.u32(16)? & 1 != 0,
        },
        _ => Effect::None,
    })
}

fn database(info: u8, data: &[u8], format: WalFormat) -> Result<Effect, FormatError> {
    let fields = Fields::new("database record", data);
    let drop = if format.has_wal_logged_create_database() { 0x20 } else { 0x10 };
    match info {
        0x00 => Ok(Effect::CopyDatabase {
            database: fields.u32(0)?,
            tablespace: fields.u32(4)?,
            source_database: fields.u32(8)?,
            source_tablespace: fields.u32(12)?,
        }),
        _ if info == drop => {
            let count = fields.u32(4)? as usize;
            let tablespaces = (0..count.min(data.len())).map(|i| fields.u32(8 + 4 * i));
            Ok(Effect::DropDatabase {
                database: fields.u32(0)?,
                tablespaces: tablespaces.collect::<Result<_, _>>()?,
            })
        }
        0x10 => Ok(Effect::CreateDatabase { database: fields.u32(0)?, tablespace: fields.u32(4)? }),
        _ => Ok(Effect::None),
    }
}

fn tablespace(info: u8, data: &[u8]) -> Result<Effect, FormatError> {
    let fields = Fields::new("tablespace record", data);
    let tablespace = fields.u32(0)?;
    Ok(match info {
        0x00 => {
            let path = data.get(4..).unwrap_or_default();
            let path = path.split(|byte| *byte == 0).next().unwrap_or_default();
            let location = Some(String::from_utf8_lossy(path).into_owned());
            Effect::Tablespace { tablespace, location }
        }
        _ => Effect::Tablespace { tablespace, location: None },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Major;

    /// A record of a resource manager with a full-page image of one block.
    fn with_image(resource_manager: u8) -> Vec<u8> {
        let mut bytes = vec![0; 24];
        bytes[17] = resource_manager;
        // Block 0: main fork, image; 8192 bytes without a hole, to be applied.
        bytes.extend([0, 0x10, 0, 0]);
        bytes.extend(8192_u16.to_le_bytes());
        bytes.extend([0, 0, 0x02]);
        for number in [1663_u32, 5, 16384, 7] {
            bytes.extend(number.to_le_bytes());
        }
        bytes.resize(bytes.len() + 8192, 0);
        let total = u32::try_from(bytes.len()).unwrap();
        bytes[..4].copy_from_slice(&total.to_le_bytes());
        bytes
    }

    #[test]
    fn what_an_extension_does_with_a_page_is_not_known() {
        let format = Major::new(15).unwrap().wal_format();
        let decoded = |bytes: &[u8]| {
            let record = Record { lsn: Lsn::new(40), end: Lsn::new(9000), bytes };
            let mut body = RecordBody::default();
            body.decode(&record, format).unwrap();
            (body.blocks[0].rebuilds(), effect(&record, &body, format).unwrap())
        };
        assert_eq!(decoded(&with_image(10)), (true, Effect::None), "a heap record");
        assert_eq!(decoded(&with_image(EXTENSIONS)), (false, Effect::Extension));
        assert_eq!(decoded(&with_image(255)), (false, Effect::Extension));
    }
}
