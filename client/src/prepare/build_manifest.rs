//! Builds the manifest, with everything that will be changed, and the report about it.

use std::collections::BTreeSet;
use std::io;

use pg_format::backup_label::backup_label;
use pg_format::control_file::control_file_for_recovery;
use pg_format::wal::SegmentName;
use pg_format::{DataPath, TimelineId};
use proto::model::{Description, Sealed};

use super::planning::removed_slots;
use super::stage::Staged;
use crate::apply::pg_wal;
use crate::config::Config;
use crate::error::{Class, RewindError};
use crate::outcome::{Outcome, Result as Ended, SourceWal, utc_now};
use crate::plan::Planned;
use crate::plan::pg_wal::{WalChanges, WalFacts, WalNames, changes};
use crate::plan::short_segments::{Read, final_lengths};
use crate::plan::summary::Totals;
use crate::source::Source;
use crate::staging::disk::{Disk, FileStat};
use crate::staging::manifest::{Manifest, PackDigest};
use crate::staging::{layout, staging_error};
use crate::target::unstarted::label;
use crate::target::{Target, recovery_conf};

fn wal_changes(
    config: &Config,
    target: &Target,
    source: &Source,
    planned: &Planned,
    sealed: &Sealed,
    staged: &BTreeSet<SegmentName>,
) -> Result<WalChanges, RewindError> {
    let below = |directory: &str| -> Vec<String> {
        let inside = target
            .files
            .keys()
            .filter(|path| path.parent().is_some_and(|parent| parent.as_str() == directory));
        inside.map(|path| path.file_name().to_owned()).collect()
    };
    let there = WalNames {
        names: below("pg_wal"),
        statuses: below("pg_wal/archive_status"),
        summaries: below("pg_wal/summaries"),
    };
    let facts = WalFacts {
        there: &there,
        size: source.snapshot.segment_size(),
        history: &source.snapshot.history,
        histories: &sealed.node.histories,
        fork: planned.fork.map(|fork| fork.lsn),
        target_end: planned.target_end,
        start: planned.start.redo,
        staged,
        end: sealed.end,
        keep_as: config.keep_diverged.then(|| diverged_name(target, planned)),
    };
    changes(&facts).map_err(|error| {
        RewindError::because(
            Class::Other,
            "could not plan the changes of the target's pg_wal",
            error,
        )
    })
}

/// `<timeline>-<fork point>`, with a number if an earlier rewind has used that name.
fn diverged_name(target: &Target, planned: &Planned) -> String {
    let taken = |name: &str| {
        let path = layout::diverged(&target.directory, name, "x");
        path.parent().is_some_and(|path| matches!(target.disk.is_directory(&path), Ok(Some(_))))
    };
    let fork = planned.fork.map_or(0, |fork| fork.lsn.as_u64());
    free_name(target.history.tip(), fork, taken)
}

fn free_name(timeline: TimelineId, fork: u64, taken: impl Fn(&str) -> bool) -> String {
    let plain = format!("{timeline}-{fork:X}");
    let mut name = plain.clone();
    let mut number = 2;
    while taken(&name) {
        name = format!("{plain}-{number}");
        number += 1;
    }
    name
}

fn segment_digests(
    disk: &dyn Disk,
    source: &Source,
    staged: &BTreeSet<SegmentName>,
) -> io::Result<Vec<PackDigest>> {
    let size = source.snapshot.segment_size();
    staged.iter().map(|name| pg_wal::digest(disk, &name.file_name(size))).collect()
}

fn summary(sealed: &Sealed) -> String {
    format!("the target is rewound and follows timeline {}", sealed.node.timeline)
}

/// The manifest without what a rollback needs, which is added last.
pub fn manifest(
    config: &Config,
    target: &Target,
    source: &Source,
    planned: &Planned,
    sealed: &Sealed,
    staged: &Staged,
    parts: Parts<'_>,
) -> Result<Manifest, RewindError> {
    let fault =
        |error| RewindError::because(Class::Other, "could not make the new pg_control", error);
    let Parts { wal, auto_conf } = parts;
    let size = source.snapshot.segment_size();
    let control = &sealed.node.control_bytes;
    let new_control =
        control_file_for_recovery(control, sealed.end, sealed.end_timeline).map_err(fault)?;
    let remove = ["recovery.signal", "tablespace_map"].map(DataPath::new);
    let remove: Result<Vec<_>, _> = remove.into_iter().collect();
    let notes = &staged.fetched.notes;
    let read = Read { shorter: &notes.shorter, vanished: &notes.vanished };
    let (files, shorter) = final_lengths(&planned.plan.files, &planned.listed, &target.files, read);
    let before = files.iter().map(|file| FileStat::of(target.files.get(&file.path)?));
    let label = label(&new_control);
    Ok(Manifest {
        program_version: env!("CARGO_PKG_VERSION").to_owned(),
        old_control: target.control.bytes.clone(),
        backup_label: backup_label(planned.start, size, &utc_now(), &label).into_bytes(),
        new_control,
        before: before.collect(),
        files,
        packs: staged.fetched.packs.clone(),
        staging: target.staging.clone(),
        segments: segment_digests(&*target.disk, source, wal).map_err(staging_error)?,
        shorter: shorter.into_iter().collect(),
        vanished: notes.vanished.iter().copied().collect(),
        wal: wal_changes(config, target, source, planned, sealed, wal)?,
        settings: recovery_conf::files(config, target, auto_conf)?,
        remove: remove.map_err(fault)?,
        undo: None,
        sync: config.sync,
        summary: summary(sealed),
    })
}

/// Parts of the manifest that were staged last.
#[derive(Debug)]
pub struct Parts<'a> {
    /// All WAL segments.
    pub wal: &'a BTreeSet<SegmentName>,
    /// The source's `postgresql.auto.conf`, if it replaces the target's.
    pub auto_conf: Option<Vec<u8>>,
}

/// The report about a sealed rewind.
pub fn outcome(
    target: &Target,
    source: &Source,
    planned: &Planned,
    sealed: &Sealed,
    staged: &Staged,
    manifest: &Manifest,
    described: Option<&Description>,
) -> Outcome {
    let fetched = &staged.fetched;
    let mut outcome = Outcome::new(Ended::Rewound, summary(sealed));
    outcome.fork = planned.fork.map(|fork| (fork.lsn, fork.timeline));
    outcome.strategy = Some((planned.strategy.name(), planned.why.clone()));
    outcome.totals = Totals::of(&planned.plan);
    outcome.carriage.hashes = planned.hash_bytes;
    let wal = fetched.wal_payload_bytes;
    outcome.carriage.data = fetched.carried.total().saturating_sub(wal);
    outcome.carriage.wal_payload = wal + staged.early_wal_bytes;
    outcome.carriage.signatures = fetched.signature_bytes;
    outcome.carriage.frames = fetched.carried.frames;
    outcome.carriage.pages = fetched.notes.pages - fetched.recovered_pages;
    outcome.carriage.recovered = fetched.recovered_pages;
    outcome.carriage.covered = fetched.covered_pages;
    outcome.carriage.reconnects = fetched.carried.reconnects;
    let used = fetched.carried.payload_bytes.iter().filter(|bytes| **bytes > 0);
    outcome.carriage.connections = used.count();
    outcome.carriage.round_trips = source.session.waits();
    let congestion_control = &source.snapshot.description.congestion_control;
    outcome.carriage.congestion_control.clone_from(congestion_control);
    let images = manifest.undo.iter().flat_map(|undo| &undo.images);
    outcome.carriage.undo = images.map(|digest| digest.bytes).sum();
    outcome.carriage.wal = staged.follower.fetched_bytes();
    outcome.replay = Some((planned.start.redo, sealed.end));
    let now = time::OffsetDateTime::now_utc().unix_timestamp();
    outcome.source_wal = described.and_then(|source| SourceWal::of(source, sealed.end, now));
    outcome.kept = removed_slots(planned);
    outcome.kept.extend(kept_wal(target, manifest));
    outcome
}

/// Messages about WAL that stays although this rewind does not need it.
fn kept_wal(target: &Target, manifest: &Manifest) -> Vec<String> {
    let mut kept = Vec::new();
    if let (Some(name), false) = (&manifest.wal.keep_as, manifest.wal.diverged.is_empty()) {
        let place = layout::diverged(&target.directory, name, "x").parent();
        kept.push(format!(
            "WAL of lost transactions ({} files) is kept in {} until you remove it",
            manifest.wal.diverged.len(),
            place.map_or_else(String::new, |place| place.to_string())
        ));
    }
    let waiting = &manifest.wal.waiting;
    if !waiting.is_empty() {
        kept.push(format!(
            "{} WAL segments older than the start of replay are kept, from the oldest one on that \
             waits to be archived (.ready files in pg_wal/archive_status)",
            waiting.len()
        ));
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_wal_is_kept_under_a_name_that_no_earlier_rewind_has_used() {
        let timeline = TimelineId::new(3).unwrap();
        let name = |taken: &[&str]| free_name(timeline, 0x300_0100, |name| taken.contains(&name));
        assert_eq!(name(&[]), "3-3000100");
        assert_eq!(name(&["3-3000100"]), "3-3000100-2");
        assert_eq!(name(&["3-3000100", "3-3000100-2"]), "3-3000100-3");
    }
}
