//! Where the WAL that is fetched begins: what of it the target has itself.

use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use data_dir::wal::Segments as _;
use pg_format::wal::SegmentName;

use crate::error::RewindError;
use crate::prepare::prefetch::WalAhead;
use crate::prepare::seal::Sealing;
use crate::prepare::wal_follower::WalFollower;
use crate::staging::{layout, staging};
use crate::target::local_wal;

impl Sealing<'_> {
    /// Stages the common WAL that came from elsewhere and the target's own part of the fork's
    /// segment; the rest is left to the follower.
    pub(crate) fn follower(&self) -> Result<WalFollower, RewindError> {
        let local = local_wal(self.target);
        let context = local.context;
        let size = context.segment_size;
        let fork_segment = self.fork_segment();
        let start_segment = size.segment_of(self.choice.start.redo);
        let mut adopted = Vec::new();
        let mut first = start_segment.max(fork_segment);
        for number in start_segment..fork_segment {
            if local.open(number).map_err(staging)?.is_some() {
                continue;
            }
            let found = self.analysis.fetched.iter().find(|(name, _)| name.number == number);
            match found {
                Some((name, file)) => {
                    self.copy_wal(*name, file, size.bytes())?;
                    adopted.push(*name);
                }
                None => {
                    first = number;
                    break;
                }
            }
        }
        let mut from = size.start_of(first);
        let own = self.analysis.fork.filter(|_| first == fork_segment && start_segment <= first);
        if let Some(fork) = own
            && let Some(file) = local.open(fork_segment).map_err(staging)?
        {
            let name = SegmentName {
                timeline: self.history.timeline_of_segment(fork_segment, size),
                number: fork_segment,
            };
            let common = size.offset_of(fork.lsn.page_start());
            if common > 0 {
                self.copy_wal(name, &file, common)?;
                adopted.push(name);
                from = fork.lsn.page_start();
            }
        }
        let disk = Arc::clone(self.disk);
        let history = self.history.clone();
        let mut follower = WalFollower::new(self.session.clone(), disk, history, context, from);
        adopted.into_iter().for_each(|name| follower.adopt(name));
        let WalAhead { name, answer } = &self.ahead;
        if let Some(name) = name.filter(|name| name.number >= first) {
            follower.take_ahead(name, answer).map_err(staging)?;
        }
        follower.recover().map_err(staging)?;
        Ok(follower)
    }

    /// Stages the first `bytes` of a segment.
    pub(crate) fn copy_wal(
        &self,
        name: SegmentName,
        file: &std::fs::File,
        bytes: u64,
    ) -> Result<(), RewindError> {
        let size = self.source.node.control.wal_segment_size;
        let path = layout::staged_wal(&name.file_name(size));
        // An earlier run may have fetched what follows.
        if self.disk.stat(&path).map_err(staging)?.is_none() {
            self.disk.create_file(&path).map_err(staging)?;
        }
        let mut buffer = vec![0; 1 << 20];
        let mut offset = 0;
        while offset < bytes {
            self.go_on()?;
            let wanted = usize::try_from(bytes - offset).unwrap_or(usize::MAX).min(buffer.len());
            let part = buffer.get_mut(..wanted).unwrap_or_default();
            file.read_exact_at(part, offset).map_err(staging)?;
            self.disk.write_at(&path, offset, part).map_err(staging)?;
            offset += wanted as u64;
        }
        Ok(())
    }
}
