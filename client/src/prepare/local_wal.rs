//! Stages the WAL that need not be fetched: what the target has of the common history.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use data_dir::wal::Segments as _;
use pg_format::WalSegmentSize;
use pg_format::wal::SegmentName;

use super::prefetch::EarlyWal;
use super::wal_follower::WalFollower;
use crate::error::RewindError;
use crate::plan::Planned;
use crate::source::Source;
use crate::staging::disk::Disk;
use crate::staging::{layout, own_wal_error, read_back_error, staging_error};
use crate::target::wal_archive::RestoredSegment;
use crate::target::{Target, local_wal};
use crate::task::Signals;

/// Stages the common WAL that came from an archive or the source, the target's own part of the segment with
/// the fork point, and the WAL that was asked for early. The follower fetches the rest.
pub fn stage(
    signals: &Signals,
    target: &Target,
    source: &Source,
    planned: &Planned,
    restored: &[RestoredSegment],
    early: &EarlyWal,
) -> Result<WalFollower, RewindError> {
    let local = local_wal(target);
    let context = local.context;
    let size = context.segment_size;
    let copy = Copy { signals, disk: &*target.disk, size };
    let start_segment = size.segment_of(planned.start.redo);
    let fork_segment = planned.fork_segment(size).unwrap_or(start_segment);
    let mut adopted = Vec::new();
    let mut first = start_segment.max(fork_segment);
    for number in start_segment..fork_segment {
        if local.open(number).map_err(own_wal_error)?.is_some() {
            continue;
        }
        match restored.iter().find(|segment| segment.name.number == number) {
            Some(RestoredSegment { name, file }) => {
                copy.segment(*name, file, size.bytes())?;
                adopted.push(*name);
            }
            None => {
                first = number;
                break;
            }
        }
    }
    let mut from = size.start_of(first);
    let own = planned.fork.filter(|_| first == fork_segment && start_segment <= first);
    if let Some(fork) = own
        && let Some(file) = local.open(fork_segment).map_err(own_wal_error)?
    {
        let timeline = source.snapshot.history.timeline_of_segment(fork_segment, size);
        let name = SegmentName { timeline, number: fork_segment };
        let common = size.offset_of(fork.lsn.page_start());
        if common > 0 {
            copy.segment(name, &file, common)?;
            adopted.push(name);
            from = fork.lsn.page_start();
        }
    }
    let mut follower = WalFollower::new(source, &target.disk, context, from);
    adopted.into_iter().for_each(|name| follower.adopt(name));
    if let Some(name) = early.name.filter(|name| name.number >= first) {
        follower.take_early(name, &early.answer).map_err(staging_error)?;
    }
    follower.recover().map_err(read_back_error)?;
    Ok(follower)
}

/// Copies WAL into staging.
#[derive(Debug, Clone, Copy)]
pub struct Copy<'a> {
    /// Ends the copying when the run must stop.
    pub signals: &'a Signals,
    /// The disk with the state directory.
    pub disk: &'a dyn Disk,
    /// Size of a segment.
    pub size: WalSegmentSize,
}

impl Copy<'_> {
    /// Stages the first `bytes` of a segment.
    pub fn segment(self, name: SegmentName, file: &File, bytes: u64) -> Result<(), RewindError> {
        let path = layout::staged_wal(&name.file_name(self.size));
        // An earlier run may have fetched what follows.
        if self.disk.stat(&path).map_err(staging_error)?.is_none() {
            self.disk.create_file(&path).map_err(staging_error)?;
        }
        let mut buffer = vec![0; 1 << 20];
        let mut offset = 0;
        while offset < bytes {
            self.signals.check()?;
            let wanted = usize::try_from(bytes - offset).unwrap_or(usize::MAX).min(buffer.len());
            let part = buffer.get_mut(..wanted).unwrap_or_default();
            file.read_exact_at(part, offset).map_err(own_wal_error)?;
            self.disk.write_at(&path, offset, part).map_err(staging_error)?;
            offset += wanted as u64;
        }
        Ok(())
    }
}
