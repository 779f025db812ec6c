//! `global/pg_control`: the cluster's identity, its state and its last checkpoint.
//!
//! Offsets are those of `catalog/pg_control.h` on 8-byte-aligned little-endian machines, computed
//! with a compiler for each layout and checked against `pg_controldata`.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::bytes::Fields;
use crate::{
    BLOCK_SIZE, FormatError, Lsn, Major, RELATION_SEGMENT_BLOCKS, TimelineId, WalSegmentSize,
};

/// Bytes in the file; only the first few hundred are used.
pub const CONTROL_FILE_BYTES: usize = 8192;

const WHAT: &str = "pg_control";

/// What the server was doing when it last wrote the file (`DBState`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names are PostgreSQL's own")]
pub enum ClusterState {
    Startup,
    ShutDown,
    ShutDownInRecovery,
    ShuttingDown,
    InCrashRecovery,
    InArchiveRecovery,
    InProduction,
}

impl ClusterState {
    const ALL: [Self; 7] = [
        Self::Startup,
        Self::ShutDown,
        Self::ShutDownInRecovery,
        Self::ShuttingDown,
        Self::InCrashRecovery,
        Self::InArchiveRecovery,
        Self::InProduction,
    ];

    fn from_i32(number: i32) -> Result<Self, FormatError> {
        let state = usize::try_from(number).ok().and_then(|index| Self::ALL.get(index));
        state.copied().ok_or_else(|| FormatError::invalid(WHAT, format!("state {number}")))
    }
}

impl fmt::Display for ClusterState {
    /// The state as `pg_controldata` prints it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Startup => "starting up",
            Self::ShutDown => "shut down",
            Self::ShutDownInRecovery => "shut down in recovery",
            Self::ShuttingDown => "shutting down",
            Self::InCrashRecovery => "in crash recovery",
            Self::InArchiveRecovery => "in archive recovery",
            Self::InProduction => "in production",
        })
    }
}

/// The `wal_level` setting as the file and WAL records hold it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names are PostgreSQL's own")]
pub enum WalLevel {
    Minimal,
    Replica,
    Logical,
}

impl WalLevel {
    pub(crate) fn from_i32(number: i32) -> Result<Self, FormatError> {
        match number {
            0 => Ok(Self::Minimal),
            1 => Ok(Self::Replica),
            2 => Ok(Self::Logical),
            other => Err(FormatError::invalid("wal_level", other.to_string())),
        }
    }
}

/// What a checkpoint recorded: in `pg_control` and in checkpoint records of the WAL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckPoint {
    /// Redo position: where replay from this checkpoint begins.
    pub redo: Lsn,
    /// The timeline it was written on.
    pub timeline: TimelineId,
    /// The timeline before, if this record ended recovery; the same otherwise.
    pub previous_timeline: u32,
    /// Whether `full_page_writes` was on.
    pub full_page_writes: bool,
    /// Next transaction id with its epoch.
    pub next_xid: u64,
    /// Next object id.
    pub next_oid: u32,
    /// Next multixact id.
    pub next_multi: u32,
    /// Next multixact member offset.
    pub next_multi_offset: u64,
    /// Oldest transaction id still in use anywhere.
    pub oldest_xid: u32,
    /// Oldest multixact id still in use anywhere.
    pub oldest_multi: u32,
    /// Wall clock, seconds since 1970.
    pub time: i64,
    /// Oldest transaction id with a commit timestamp, 0 if none.
    pub oldest_commit_ts_xid: u32,
    /// Newest transaction id with a commit timestamp, 0 if none.
    pub newest_commit_ts_xid: u32,
    /// Oldest transaction still running; 0 in shutdown checkpoints, which do not fill it.
    pub oldest_active_xid: u32,
}

impl CheckPoint {
    /// Reads the structure as `major` writes it.
    pub fn parse(bytes: &[u8], major: Major) -> Result<Self, FormatError> {
        let fields = Fields::new("checkpoint", bytes);
        // 19 put logicalDecodingEnabled before nextXid and widened nextMultiOffset to 8 bytes.
        let wide = major.number() >= 19;
        let at = |old: usize| if wide { old + 8 } else { old };
        Ok(Self {
            redo: Lsn::new(fields.u64(0)?),
            timeline: TimelineId::new(fields.u32(8)?)?,
            previous_timeline: fields.u32(12)?,
            full_page_writes: fields.bool(16)?,
            next_xid: fields.u64(at(24))?,
            next_oid: fields.u32(at(32))?,
            next_multi: fields.u32(at(36))?,
            next_multi_offset: if wide { fields.u64(48)? } else { u64::from(fields.u32(40)?) },
            oldest_xid: fields.u32(if wide { 56 } else { 44 })?,
            oldest_multi: fields.u32(if wide { 64 } else { 52 })?,
            time: fields.i64(at(64))?,
            oldest_commit_ts_xid: fields.u32(at(72))?,
            newest_commit_ts_xid: fields.u32(at(76))?,
            oldest_active_xid: fields.u32(at(80))?,
        })
    }
}

/// The settings a standby must not have lower than its primary (`CheckRequiredParameterValues`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequiredSettings {
    /// `max_connections`
    pub max_connections: i32,
    /// `max_worker_processes`
    pub max_worker_processes: i32,
    /// `max_wal_senders`
    pub max_wal_senders: i32,
    /// `max_prepared_transactions`
    pub max_prepared_transactions: i32,
    /// `max_locks_per_transaction`
    pub max_locks_per_transaction: i32,
}

impl RequiredSettings {
    /// Each value with the name of its setting.
    pub fn named(&self) -> [(&'static str, i32); 5] {
        [
            ("max_connections", self.max_connections),
            ("max_worker_processes", self.max_worker_processes),
            ("max_wal_senders", self.max_wal_senders),
            ("max_prepared_transactions", self.max_prepared_transactions),
            ("max_locks_per_transaction", self.max_locks_per_transaction),
        ]
    }
}

/// A decoded, checked `pg_control`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlFile {
    /// Made by initdb, the same on all nodes of one cluster.
    pub system_identifier: u64,
    /// Layout number of this file (`PG_CONTROL_VERSION`).
    pub control_version: u32,
    /// Catalog version, part of tablespace directory names.
    pub catalog_version: u32,
    /// The major that writes this catalog version.
    pub major: Major,
    /// What the server was doing.
    pub state: ClusterState,
    /// When the file was last written, seconds since 1970.
    pub time: i64,
    /// Position of the last checkpoint record (of the last restartpoint's, on a standby).
    pub checkpoint: Lsn,
    /// Copy of that checkpoint.
    pub checkpoint_copy: CheckPoint,
    /// Fake LSN counter of unlogged relations.
    pub unlogged_lsn: Lsn,
    /// Replay must reach this position before the node may be used; 0 on a primary.
    pub min_recovery_point: Lsn,
    /// The timeline of [`Self::min_recovery_point`]; 0 when there is none.
    pub min_recovery_timeline: u32,
    /// Start of the base backup that is being recovered; 0 if none is.
    pub backup_start_point: Lsn,
    /// The end of that backup, where its recovery becomes consistent, if it was taken from a standby; 0
    /// otherwise.
    pub backup_end_point: Lsn,
    /// Whether that recovery waits for the end-of-backup record.
    pub backup_end_required: bool,
    /// `wal_level` at the last change.
    pub wal_level: WalLevel,
    /// `wal_log_hints` at the last change.
    pub wal_log_hints: bool,
    /// Values a standby needs.
    pub required_settings: RequiredSettings,
    /// `track_commit_timestamp` at the last change.
    pub track_commit_timestamp: bool,
    /// Bytes of a WAL segment.
    pub wal_segment_size: WalSegmentSize,
    /// 0 off, 1 on; 19 adds 2 (being switched off) and 3 (being switched on).
    pub data_checksum_version: u32,
}

/// Offsets of the fields whose position differs between layouts.
#[derive(Debug, Clone, Copy)]
struct Layout {
    /// Start of `unloggedLSN`; the fields up to `xlog_seg_size` follow at fixed distances but for
    /// the SLRU size of 19.
    unlogged_lsn: usize,
    xlog_blcksz: usize,
    data_checksum_version: usize,
    crc: usize,
}

impl Layout {
    fn of(control_version: u32) -> Result<Self, FormatError> {
        let (unlogged_lsn, xlog_blcksz, data_checksum_version, crc) = match control_version {
            // 17 filled a hole of the checkpoint with wal_level; nothing else moved.
            1300 | 1700 => (128, 224, 252, 288),
            1800 => (128, 224, 252, 292),
            1902 => (136, 236, 264, 304),
            1903 => (136, 236, 268, 308),
            version => {
                return Err(FormatError::UnknownVersion { what: WHAT, version });
            }
        };
        Ok(Self { unlogged_lsn, xlog_blcksz, data_checksum_version, crc })
    }
}

impl ControlFile {
    /// Reads and checks the file. A CRC error may be a read torn by a concurrent write: on a live
    /// node read again before believing it.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let fields = Fields::new(WHAT, bytes);
        let control_version = fields.u32(8)?;
        let layout = Layout::of(control_version)?;
        let body = bytes.get(..layout.crc).ok_or(FormatError::TooShort {
            what: WHAT,
            expected: layout.crc + 4,
            actual: bytes.len(),
        })?;
        let (stored, computed) = (fields.u32(layout.crc)?, crc32c::crc32c(body));
        if stored != computed {
            return Err(FormatError::Crc { what: WHAT, stored, computed });
        }
        let catalog_version = fields.u32(12)?;
        let major = Major::from_catalog_version(catalog_version)?;
        check_build(fields, layout)?;
        let base = layout.unlogged_lsn;
        Ok(Self {
            system_identifier: fields.u64(0)?,
            control_version,
            catalog_version,
            major,
            state: ClusterState::from_i32(fields.i32(16)?)?,
            time: fields.i64(24)?,
            checkpoint: Lsn::new(fields.u64(32)?),
            checkpoint_copy: CheckPoint::parse(bytes.get(40..).unwrap_or_default(), major)?,
            unlogged_lsn: Lsn::new(fields.u64(base)?),
            min_recovery_point: Lsn::new(fields.u64(base + 8)?),
            min_recovery_timeline: fields.u32(base + 16)?,
            backup_start_point: Lsn::new(fields.u64(base + 24)?),
            backup_end_point: Lsn::new(fields.u64(base + 32)?),
            backup_end_required: fields.bool(base + 40)?,
            wal_level: WalLevel::from_i32(fields.i32(base + 44)?)?,
            wal_log_hints: fields.bool(base + 48)?,
            required_settings: RequiredSettings {
                max_connections: fields.i32(base + 52)?,
                max_worker_processes: fields.i32(base + 56)?,
                max_wal_senders: fields.i32(base + 60)?,
                max_prepared_transactions: fields.i32(base + 64)?,
                max_locks_per_transaction: fields.i32(base + 68)?,
            },
            track_commit_timestamp: fields.bool(base + 72)?,
            wal_segment_size: WalSegmentSize::new(fields.u32(layout.xlog_blcksz + 4)?)?,
            data_checksum_version: fields.u32(layout.data_checksum_version)?,
        })
    }

    /// The timeline the node is on: the later of its last checkpoint's and its minimum recovery
    /// point's. The first lags behind after a promotion until the next checkpoint.
    pub fn timeline(&self) -> TimelineId {
        let minimum = TimelineId::new(self.min_recovery_timeline);
        minimum.map_or(self.checkpoint_copy.timeline, |t| t.max(self.checkpoint_copy.timeline))
    }

    /// Whether data pages carry checksums, in words (`ChecksumStateType` in `storage/checksum.h` of 19).
    pub fn checksum_state(&self) -> &'static str {
        match self.data_checksum_version {
            0 => "off",
            1 => "on",
            2 => "being switched off",
            3 => "being switched on",
            _ => "unknown",
        }
    }

    /// Whether data pages carry checksums at all (being switched off or on included).
    pub fn writes_checksums(&self) -> bool {
        self.data_checksum_version != 0
    }

    /// Whether every data page has a valid checksum.
    pub fn has_checksums(&self) -> bool {
        self.data_checksum_version == 1
    }

    /// Whether hint-bit changes are logged, by the last known settings (`XLogHintBitIsNeeded`).
    pub fn logs_hints(&self) -> bool {
        self.wal_log_hints || self.writes_checksums()
    }
}

/// The bytes of a `pg_control` that makes PostgreSQL replay up to `min_recovery_point` before the
/// node may be used: those of `source`, with the state of a standby that was not shut down.
pub fn control_file_for_recovery(
    source: &[u8],
    min_recovery_point: Lsn,
    timeline: TimelineId,
) -> Result<Vec<u8>, FormatError> {
    let parsed = ControlFile::parse(source)?;
    let layout = Layout::of(parsed.control_version)?;
    let mut bytes = source.to_vec();
    bytes.resize(CONTROL_FILE_BYTES, 0);
    let mut put = |at: usize, value: &[u8]| {
        if let Some(field) = bytes.get_mut(at..at + value.len()) {
            field.copy_from_slice(value);
        }
    };
    put(16, &5_i32.to_le_bytes());
    put(layout.unlogged_lsn + 8, &min_recovery_point.as_u64().to_le_bytes());
    put(layout.unlogged_lsn + 16, &timeline.get().to_le_bytes());
    let crc = crc32c::crc32c(bytes.get(..layout.crc).unwrap_or_default());
    if let Some(field) = bytes.get_mut(layout.crc..layout.crc + 4) {
        field.copy_from_slice(&crc.to_le_bytes());
    }
    // Check what was made as strictly as what is read.
    ControlFile::parse(&bytes)?;
    Ok(bytes)
}

/// Refuses builds whose files this program would misread.
fn check_build(fields: Fields<'_>, layout: Layout) -> Result<(), FormatError> {
    let base = layout.unlogged_lsn;
    let page_sizes = [
        ("alignment", fields.u32(base + 76)?, 8),
        ("block size", fields.u32(base + 88)?, 8192),
        ("relation segment size", fields.u32(base + 92)?, RELATION_SEGMENT_BLOCKS),
        ("WAL block size", fields.u32(layout.xlog_blcksz)?, 8192),
    ];
    debug_assert_eq!(BLOCK_SIZE, 8192);
    for (name, found, expected) in page_sizes {
        if found != expected {
            let why = format!("{name} is {found}, this program supports {expected} only");
            return Err(FormatError::invalid(WHAT, why));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_and_unknown_files_are_typed_errors() {
        assert!(matches!(ControlFile::parse(&[]), Err(FormatError::TooShort { .. })));
        let mut bytes = vec![0; CONTROL_FILE_BYTES];
        bytes[8..12].copy_from_slice(&2001_u32.to_le_bytes());
        let error = ControlFile::parse(&bytes).unwrap_err();
        assert_eq!(error, FormatError::UnknownVersion { what: WHAT, version: 2001 });
        bytes[8..12].copy_from_slice(&1300_u32.to_le_bytes());
        assert!(matches!(ControlFile::parse(&bytes), Err(FormatError::Crc { .. })));
    }
}
