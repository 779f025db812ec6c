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

/// Refuses an end of WAL that is so far away that its WAL cannot be staged: a source that names a position out of the
/// blue must not fill a disk.
pub fn check_wal(config: &Config, target: &Target, missing_bytes: u64) -> Result<(), RewindError> {
    let staging = config.staging_dir.as_deref();
    let directory = &target.directory;
    let elsewhere = staging.is_some() || directory.wal_is_elsewhere();
    let needed = NeededSpace {
        wal_bytes: missing_bytes,
        copied_wal_bytes: if elsewhere { missing_bytes } else { 0 },
        ..NeededSpace::on(directory, staging)
    };
    needed.check(&Plan::default(), &target.files)
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

#[cfg(test)]
mod tests {
    use data_dir::{Entry, EntryKind};
    use pg_format::{DataPath, Lsn};

    use super::*;
    use crate::error::Class;
    use crate::plan::{FileAction, PlannedFile};
    use crate::test_values::{
        EmptyTarget, RecordingMonitor, config, manifest, planned, put_file, snapshot,
    };

    const MB_16: u64 = 16 << 20;
    /// More than any disk has.
    const TOO_MUCH: u64 = 1 << 60;

    /// A plan with one file.
    struct Case {
        home: EmptyTarget,
        planned: Planned,
    }

    struct Checked {
        result: Result<BeforeImages, Class>,
        warnings: Vec<String>,
    }

    impl Case {
        /// The file has `before` bytes on the target.
        fn new(before: u64, action: FileAction) -> Self {
            let path = DataPath::of("base/16384");
            let kind = EntryKind::File { bytes: before };
            let entry = Entry { path: path.clone(), kind, mode: 0o600, inode: 7, modified: (1, 2) };
            let mut planned = planned();
            planned.plan.files.push(PlannedFile { path: path.clone(), action });
            let home = EmptyTarget::with_files([(path, entry)].into());
            put_file(&home.home.path().join("base/16384"), b"");
            Self { home, planned }
        }

        fn check(&self, config: &Config) -> Checked {
            let monitor = RecordingMonitor::default();
            let source = snapshot(3..4, Lsn::new(3 * MB_16));
            let (target, staged) = (&self.home.target, StagedBytes::default());
            let checked = check_plan(config, &monitor, target, &source, &self.planned, staged);
            Checked { result: checked.map_err(|error| error.class()), warnings: monitor.all() }
        }
    }

    #[test]
    fn undo_images_are_saved_unless_the_operator_does_not_want_them() {
        let case = Case::new(8192, FileAction::Patch { bytes: 8192 });
        let saved = case.check(&config());
        assert_eq!(saved.result, Ok(BeforeImages::Saved));
        let unwanted = Config { undo: false, ..config() };
        let unwanted = case.check(&unwanted);
        assert_eq!(unwanted.result, Ok(BeforeImages::NotSaved));
        assert!(unwanted.warnings.is_empty());
    }

    #[test]
    fn where_there_is_no_space_for_undo_images_the_rewind_goes_without_and_says_so() {
        // Nearly all of a very large file is cut.
        let case = Case::new(TOO_MUCH, FileAction::Patch { bytes: 8192 });
        let without = case.check(&config());
        assert_eq!(without.result, Ok(BeforeImages::NotSaved));
        let said = without.warnings.join("\n");
        assert!(said.contains("can be resumed, but not rolled back"), "{said}");
    }

    #[test]
    fn a_plan_that_does_not_fit_is_refused() {
        let case = Case::new(0, FileAction::Replace { bytes: Some(TOO_MUCH) });
        let refused = case.check(&config());
        assert_eq!(refused.result, Err(Class::Preflight));
    }

    #[test]
    fn wal_counts_from_the_start_of_replay_to_the_newest_segment_of_the_source() {
        let bytes = |segments| wal_bytes(&snapshot(segments, Lsn::new(3 * MB_16)), &planned());
        assert_eq!(bytes(3..4), MB_16);
        assert_eq!(bytes(0..6), 3 * MB_16);
        assert_eq!(bytes(0..0), MB_16, "one is written at least");
    }

    #[test]
    fn an_end_of_wal_out_of_the_blue_is_refused_before_it_is_followed() {
        let home = EmptyTarget::new();
        assert!(check_wal(&config(), &home.target, MB_16).is_ok());
        let refused = check_wal(&config(), &home.target, TOO_MUCH).unwrap_err();
        assert_eq!(refused.class(), Class::Preflight);
    }

    #[test]
    fn before_the_seal_the_change_itself_must_still_fit() {
        let case = Case::new(0, FileAction::Replace { bytes: Some(8192) });
        let source = snapshot(3..4, Lsn::new(3 * MB_16));
        let check = |bytes| {
            let path = DataPath::of("base/16384");
            let action = FileAction::Replace { bytes: Some(bytes) };
            let manifest = Manifest { files: vec![PlannedFile { path, action }], ..manifest() };
            let checked =
                check_staged(&config(), &case.home.target, &source, &manifest, &BTreeSet::new());
            checked.map_err(|error| error.class())
        };
        assert_eq!(check(8192), Ok(()));
        assert_eq!(check(TOO_MUCH), Err(Class::Preflight));
    }
}
