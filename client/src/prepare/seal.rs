//! From what is staged to a sealed manifest: follows the WAL to its end, checks that all of it fits together, and
//! makes it durable.

use pg_format::{DataPath, FileClass, RelationSegment};
use proto::fetch::{ItemBody, Unit, UnitKind};
use proto::model::{Description, Sealed};

use super::build_manifest::{self, Parts};
use super::claim::Claim;
use super::disk_space::{self, BeforeImages};
use super::replay_check::{self, Expected, Replayed};
use super::save_before_images::{self, Which};
use super::stage::{Job, Staged};
use super::{hazards, timeline_ends};
use crate::error::{Abort, Class, Replan, RewindError};
use crate::outcome::Outcome;
use crate::plan::before_images::cut_images;
use crate::plan::{Planned, Strategy, StrategyChoice};
use crate::source::{Snapshot, Source};
use crate::source_checks::{check_contents, check_seal, check_shrink, what_is_left};
use crate::staging::manifest::Manifest;
use crate::staging::{marks, reserve, staging_error};
use crate::task::{Context, begin};

/// A complete staged set: the rewind can be finished from it without the source.
#[derive(Debug)]
pub struct SealedRewind {
    /// Everything that will be changed.
    pub manifest: Manifest,
    /// What is reported of it.
    pub outcome: Outcome,
}

/// R8: asks for a new plan if the source has entered another life, or if another node answers at its address.
pub fn check_same_life(source: &Snapshot, now: &Sealed) -> Result<(), Abort> {
    if now.node.same_life(&source.description.node) {
        return Ok(());
    }
    let why = "the source was restarted, promoted or stopped while it was read";
    Err(Abort::replan(Replan::SourceChanged, why))
}

/// Seals what is staged.
pub async fn seal(
    cx: &Context,
    job: Job<'_>,
    claim: &Claim,
    before_images: BeforeImages,
    mut staged: Staged,
) -> Result<SealedRewind, Abort> {
    let Job { config, target, source, planned } = job;
    source.session.waited();
    // Only for the report. If the source cannot be reached any more, the staged set is complete all the same.
    let mut session = source.session.clone();
    let described = begin(async move { session.describe().await });
    let sealed = source.session.clone().seal().await?;
    check_same_life(&source.snapshot, &sealed)?;
    check_seal(&source.snapshot.description, &sealed)?;
    replay_check::check_end(&source.snapshot.history, &sealed, planned.start.checkpoint)?;
    let notes = &staged.fetched.notes;
    let major = source.snapshot.control().major;
    check_contents(&planned.plan, &planned.listed, &notes.contents, &notes.vanished, major)?;
    disk_space::check_wal(config, target, staged.follower.missing_bytes(sealed.end))?;
    staged.follower.advance_to(sealed.end).await?;
    staged.follower.finish(sealed.end).map_err(staging_error)?;
    check_replay(cx, job, &staged, &sealed).await?;
    let auto_conf = source_auto_conf(job).await?;
    let (start, end) = (planned.start.redo, sealed.end);
    let (signals, history) = (&*cx.stop.signals, &source.snapshot.history);
    let wal = timeline_ends::stage(signals, target, history, staged.follower.staged(), start, end)?;
    let parts = Parts { wal: &wal, auto_conf };
    let mut manifest =
        build_manifest::manifest(config, target, source, planned, &sealed, &staged, parts)?;
    let cut = cut_images(&manifest.final_files(), planned.plan.files.len());
    let cut = save_before_images::save(target, claim, before_images, Which::Cut, cut).await?;
    if !config.accept_shrink {
        // What came may be less than what was listed.
        check_shrink(&target.files, &what_is_left(&planned.listed, &manifest.final_files()))?;
    }
    if before_images == BeforeImages::Saved {
        let images = std::mem::take(&mut staged.images).into_iter().chain(cut).collect();
        manifest.undo = Some(save_before_images::undo(target, &manifest, images)?);
    }
    disk_space::check_staged(config, target, &source.snapshot, &manifest, &wal)?;
    make_durable(job, &manifest)?;
    let described: Option<Description> = described.await.ok().and_then(Result::ok);
    let described = described.as_ref();
    let outcome =
        build_manifest::outcome(target, source, planned, &sealed, &staged, &manifest, described);
    Ok(SealedRewind { manifest, outcome })
}

/// Writes the manifest: from here on the rewind can be finished without the source.
fn make_durable(job: Job<'_>, manifest: &Manifest) -> Result<(), RewindError> {
    let (disk, directory) = (&*job.target.disk, &job.target.directory);
    reserve::take(disk, directory, manifest).map_err(staging_error)?;
    let bytes = manifest.encode().map_err(|error| {
        RewindError::because(Class::Other, "could not encode the manifest", error)
    })?;
    marks::seal(disk, &bytes).map_err(staging_error)
}

/// Reads all WAL that will be replayed and checks that its replay does what was planned.
async fn check_replay(
    cx: &Context,
    job: Job<'_>,
    staged: &Staged,
    sealed: &Sealed,
) -> Result<(), Abort> {
    let Job { config, target, source, planned } = job;
    let segments = staged.follower.staged().clone();
    let replayed = replay_check::read(cx, target, planned, segments, sealed.end).await?;
    hazards::check(config, source, planned, &replayed.hazards).await?;
    check_fork_fits(config.strategy, planned.strategy, &replayed, sealed)?;
    let torn = torn(planned, &staged.fetched.notes.torn);
    let expected = Expected { end: sealed.end, covered: &staged.covered, torn: &torn };
    Ok(replay_check::check(&replayed, &expected, &source.snapshot, planned.source_redo)?)
}

/// If the WAL around the fork point does not fit together, another strategy is tried, unless the operator
/// insists on *fork*.
fn check_fork_fits(
    wanted: StrategyChoice,
    strategy: Strategy,
    replayed: &Replayed,
    sealed: &Sealed,
) -> Result<(), Abort> {
    let can_do_without = strategy == Strategy::Fork && wanted == StrategyChoice::Auto;
    if replayed.end >= sealed.end || !can_do_without {
        return Ok(());
    }
    let why = format!("the WAL around the fork point has a gap at {}", replayed.end);
    Err(Abort::replan(Replan::ForkImpossible, why))
}

/// Blocks of relations that were torn whenever they were read, by their place in the plan.
fn torn(planned: &Planned, torn: &[(usize, u32)]) -> Vec<(RelationSegment, u32)> {
    let torn = torn.iter().filter_map(|(file, block)| {
        match FileClass::of(&planned.plan.files.get(*file)?.path) {
            FileClass::Relation(segment) => Some((segment, *block)),
            _ => None,
        }
    });
    torn.collect()
}

/// The source's `postgresql.auto.conf`, if it replaces the target's: the recovery settings are added to it.
async fn source_auto_conf(job: Job<'_>) -> Result<Option<Vec<u8>>, RewindError> {
    if !job.config.config_from_source {
        return Ok(None);
    }
    let path = DataPath::of("postgresql.auto.conf");
    let kind = UnitKind::File { path, offset: 0, length: 1 << 20 };
    let mut text = Vec::new();
    for item in ask(job.source, kind).await? {
        if let ItemBody::Chunk(chunk) = item {
            text.extend_from_slice(chunk.data());
        }
    }
    Ok(Some(text))
}

async fn ask(source: &Source, kind: UnitKind) -> Result<Vec<ItemBody>, RewindError> {
    let items = source.session.clone().collect(vec![Unit::single(kind)]).await?;
    Ok(items.into_iter().map(|item| item.body).collect())
}

#[cfg(test)]
mod tests;
