//! Whether a plan can be carried out on this node's disks. Checked before anything is fetched, and again
//! before the seal.

use std::collections::BTreeSet;

use pg_format::wal::SegmentName;

use crate::apply::preflight::{self, NeededSpace};
use crate::config::Config;
use crate::error::RewindError;
use crate::monitor::Monitor;
use crate::plan::before_images::{bytes_of, images};
use crate::plan::summary::Totals;
use crate::plan::{Plan, Planned};
use crate::source::Snapshot;
use crate::staging::manifest::Manifest;
use crate::staging::staged_bytes::StagedBytes;
use crate::target::Target;

/// Whether undo images of what will be overwritten are saved, so that the rewind can be rolled back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BeforeImages {
    /// They are saved.
    Saved,
    /// They are not saved: the operator does not want them, or there is too little disk space.
    NotSaved,
}

/// Refuses a plan that would fail halfway. Decides whether there is disk space for undo images.
pub fn check_plan(
    config: &Config,
    monitor: &dyn Monitor,
    target: &Target,
    source: &Snapshot,
    planned: &Planned,
    staged: StagedBytes,
) -> Result<BeforeImages, RewindError> {
    let Target { directory, files, .. } = target;
    let plan = &planned.plan;
    let wal_bytes = wal_bytes(source, planned);
    let staging = config.staging_dir.as_deref();
    preflight::check_permissions(directory, plan)?;
    preflight::check_mounts(directory, plan)?;
    let copied = staging.is_some() || directory.wal_is_elsewhere();
    let mut needed = NeededSpace {
        // Staged pages are compressed; half of their size is what rows that compress badly need.
        staged_bytes: (Totals::of(plan).bytes() / 2).saturating_sub(staged.packs),
        wal_bytes: wal_bytes.saturating_sub(staged.wal),
        copied_wal_bytes: if copied { wal_bytes } else { 0 },
        ..NeededSpace::on(directory, staging)
    };
    needed.check(plan, files)?;
    if !config.undo {
        return Ok(BeforeImages::NotSaved);
    }
    needed.keeps_cut = true;
    needed.undo_bytes = bytes_of(&images(plan, files)).saturating_sub(staged.undo);
    let Err(short) = needed.check(plan, files) else {
        return Ok(BeforeImages::Saved);
    };
    monitor.warning(&format!(
        "no undo images are saved, so an interrupted rewind can be resumed, but not rolled back: \
         {}",
        short.chain()
    ));
    Ok(BeforeImages::NotSaved)
}

/// Bytes of the WAL segments that replay needs and the source has now.
fn wal_bytes(source: &Snapshot, planned: &Planned) -> u64 {
    let segments = &source.description.wal_segments;
    let newest = segments.iter().map(|name| name.number).max().unwrap_or(0);
    let size = source.segment_size();
    let count = newest.saturating_sub(size.segment_of(planned.start.redo)).saturating_add(1);
    count.saturating_mul(size.bytes())
}

/// Checks again, with what is staged by now, whether there is disk space for the change itself.
pub fn check_staged(
    config: &Config,
    target: &Target,
    source: &Snapshot,
    manifest: &Manifest,
    wal: &BTreeSet<SegmentName>,
) -> Result<(), RewindError> {
    let staging = config.staging_dir.as_deref();
    let directory = &target.directory;
    let mut needed = NeededSpace::on(directory, staging);
    // What is staged already needs no more space, unless it must be copied to be put in place.
    if staging.is_some() || directory.wal_is_elsewhere() {
        needed.copied_wal_bytes = source.segment_size().bytes().saturating_mul(wal.len() as u64);
    }
    needed.keeps_cut = manifest.undo.is_some();
    let plan = Plan { files: manifest.files.clone(), ..Plan::default() };
    needed.check(&plan, &target.files)
}
