//! The input of a search for the fork point.
//!
//! The search reads much WAL, on a blocking thread, and asks the source from that thread.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use pg_format::Lsn;
use pg_format::wal::SegmentName;
use proto::fetch::{Item, ItemBody, Unit, UnitKind};
use proto::limits::UNIT_BYTES_MAX;
use tokio::runtime::Handle;

use crate::error::RewindError;
use crate::source::Source;
use crate::target::Target;
use crate::target::wal_archive::nameless_file;

/// See the module.
#[derive(Debug)]
pub struct Search<'a> {
    /// The target.
    pub target: &'a Target,
    /// The source.
    pub source: &'a Source,
    /// The runtime on which requests to the source run.
    pub runtime: Handle,
    /// `--wal-archive`
    pub wal_archive: Option<PathBuf>,
    /// `--restore-command`, else the target's own.
    pub restore_command: Option<String>,
}

impl Search<'_> {
    /// Asks the source, from a blocking thread.
    pub fn ask(&self, unit: UnitKind) -> Result<Vec<Item>, RewindError> {
        let mut session = self.source.session.clone();
        let units = vec![Unit::single(unit)];
        self.runtime.block_on(async move { session.collect(units).await })
    }

    /// A whole segment of the source in memory; `None` if it does not have it.
    ///
    /// # Errors
    /// The cause is a [`RewindError`] if the source could not be asked.
    pub fn fetch_segment(&self, number: u64) -> io::Result<Option<File>> {
        let Some(SegmentName { timeline, number }) = self.source.snapshot.segment(number) else {
            return Ok(None);
        };
        let size = self.source.snapshot.segment_size();
        let file = nameless_file()?;
        let mut offset = 0;
        while offset < size.bytes() {
            let length = UNIT_BYTES_MAX.min(size.bytes() - offset);
            let items = self.ask(UnitKind::Wal { timeline, number, offset, length });
            for item in items.map_err(io::Error::other)? {
                match item.body {
                    ItemBody::Chunk(chunk) => file.write_all_at(chunk.data(), chunk.offset())?,
                    ItemBody::End { vanished: true, .. } => return Ok(None),
                    _ => {}
                }
            }
            offset += length;
        }
        file.set_len(size.bytes())?;
        Ok(Some(file))
    }

    /// Number of the last segment of the unbroken sequence in the target's `pg_wal` that begins with the
    /// segment of `start`.
    pub fn last_here(&self, start: Lsn) -> u64 {
        let size = self.target.control.file.wal_segment_size;
        let names = self.target.directory.wal_segments(size).unwrap_or_default();
        let numbers: std::collections::BTreeSet<u64> = names.iter().map(|n| n.number).collect();
        let first = size.segment_of(start);
        let here = (first..).take_while(|number| numbers.contains(number));
        here.last().unwrap_or(first)
    }
}
