//! Recognizes targets that need no rewind, and does what remains to be done for them.

use std::ops::ControlFlow;
use std::sync::Arc;

use data_dir::wal::digest;
use pg_format::wal::Start;
use pg_format::{Lsn, TimelineHistory};
use proto::fetch::{ItemBody, ProofStart, Unit, UnitKind};

use crate::config::Config;
use crate::divergence::Divergence;
use crate::error::{Remedy, Replan, RewindError, Unanswered};
use crate::outcome::{Outcome, Result as Ended};
use crate::plan::{Strategy, StrategyChoice};
use crate::prepare::claim::{Claim, Kept};
use crate::source::{Snapshot, Source};
use crate::target::{Target, recovery_conf, wal_context};
use crate::task::{Context, blocking};

/// The target's own records of a range, and their CRCs.
fn records(
    target: &Target,
    history: &TimelineHistory,
    start: Lsn,
    end: Lsn,
) -> Result<Vec<(Lsn, u32)>, RewindError> {
    let context = wal_context(&target.control.file);
    let wal = data_dir::wal::LocalWal { directory: &target.directory, history, context };
    let mut records = Vec::new();
    digest::records(&wal, context, Start::FirstAfter(start), end, &mut |lsn, crc| {
        records.push((lsn, crc));
        ControlFlow::Continue(())
    })?;
    Ok(records)
}

/// Whether the operator asks for a comparison, which is then made in any case.
fn wants_to_compare(config: &Config) -> bool {
    config.strategy == StrategyChoice::Only(Strategy::Compare)
}

/// The outcome for a target that has nothing the source lacks, as long as the source still has the WAL that
/// the target needs to catch up; `None` if the target must be rewound.
pub fn nothing_to_do(
    cx: &Context,
    config: &Config,
    target: &Target,
    source: &Snapshot,
    divergence: &Divergence,
) -> Result<Option<Outcome>, RewindError> {
    let (Some(fork), Some(end)) = (divergence.fork, divergence.target_end) else {
        return Ok(None);
    };
    if wants_to_compare(config) || end > fork.lsn {
        return Ok(None);
    }
    if let Some(name) = foreign_history(target, source)? {
        cx.monitor.note(&format!(
            "the target has not diverged, but its pg_wal has {name}, which is not part of the \
             source's history: rewinding it anyway"
        ));
        return Ok(None);
    }
    if !source.has_wal_from(end) {
        cx.monitor.note(&format!(
            "the target has not diverged, but the source no longer has the WAL from {end} on: \
             rewinding it anyway"
        ));
        return Ok(None);
    }
    let reason = format!(
        "no rewind required: the target's WAL ends at {end} and is part of the source's history"
    );
    let mut outcome = Outcome::new(Ended::NothingToDo, reason);
    outcome.fork = Some((fork.lsn, fork.timeline));
    Ok(Some(outcome))
}

/// The outcome for a target that was rewound before and not started since, as long as it can follow the
/// source from where its replay will end; `None` if it must be rewound again.
pub async fn already_rewound(
    cx: &Context,
    config: &Config,
    target: &Arc<Target>,
    source: &Source,
) -> Result<Option<Outcome>, RewindError> {
    if !target.unstarted || wants_to_compare(config) {
        return Ok(None);
    }
    let control = &target.control.file;
    let end = control.min_recovery_point;
    let last = Lsn::new(end.as_u64().saturating_sub(1));
    let snapshot = &source.snapshot;
    let timeline = snapshot.description.node.timeline;
    let same_timeline = timeline.get() == control.min_recovery_timeline
        && snapshot.history.timeline_of(last) == timeline;
    let follows = same_timeline
        && snapshot.has_wal_from(end)
        && foreign_history(target, snapshot)?.is_none()
        && ends_alike(target, source, end).await?;
    if !follows {
        cx.monitor.note(&format!(
            "the target was rewound before and not started since, but the source, now on timeline \
             {timeline}, has different WAL, or none from {end} on: rewinding it again"
        ));
        return Ok(None);
    }
    let reason = format!(
        "already rewound: PostgreSQL has not been started since; replay will end at {end} on \
         timeline {timeline}"
    );
    Ok(Some(Outcome::new(Ended::AlreadyRewound, reason)))
}

/// Whether both nodes have the same records, and at least one, in the segment in which replay will end. An
/// equal timeline number proves nothing.
async fn ends_alike(target: &Arc<Target>, source: &Source, end: Lsn) -> Result<bool, RewindError> {
    let size = target.control.file.wal_segment_size;
    let start = size.start_of(size.segment_of(Lsn::new(end.as_u64().saturating_sub(1))));
    let unit = UnitKind::Proof { from: ProofStart::Segment(start), to: end, each_record: true };
    let mut session = source.session.clone();
    let answer = match session.ask(vec![Unit::single(unit)]).await {
        Ok(answer) => answer,
        // The source no longer has this WAL: nothing is proven.
        Err(error) => match error.remedy() {
            Remedy::DoWithout(Unanswered::WalMissing) | Remedy::Replan(Replan::WalUnavailable) => {
                return Ok(false);
            }
            _ => return Err(error),
        },
    };
    let theirs = answer.items.iter().filter_map(|item| match item.body {
        ItemBody::RecordCrc { lsn, crc } => Some((lsn, crc)),
        _ => None,
    });
    let theirs: Vec<(Lsn, u32)> = theirs.collect();
    let (target, snapshot) = (Arc::clone(target), Arc::clone(&source.snapshot));
    let ours = blocking(move || records(&target, &snapshot.history, start, end)).await?;
    Ok(!ours.is_empty() && ours == theirs)
}

/// Name of a history file of the target whose timeline is not in the source's history, or whose content is
/// not that of the source's file: recovery would look for that timeline. A file that the source merely lacks
/// is not foreign, since not every node has the files of all its ancestors.
fn foreign_history(target: &Target, source: &Snapshot) -> Result<Option<String>, RewindError> {
    let ours = target.directory.history_files()?;
    let theirs = &source.description.node.histories;
    let foreign = ours.into_iter().find(|(timeline, text)| {
        let same = theirs.iter().find(|(other, _)| other == timeline);
        !source.history.contains(*timeline) || same.is_some_and(|(_, other)| other != text)
    });
    Ok(foreign.map(|(timeline, _)| timeline.history_file_name()))
}

/// Makes a target that has not diverged a standby, if that was asked for.
pub fn make_standby(cx: &Context, config: &Config, target: &Target) -> Result<(), RewindError> {
    if config.dry_run {
        return Ok(());
    }
    if recovery_conf::is_wanted(config) {
        let _claim = Claim::take(target, &cx.monitor, Kept::Nothing, 0)?;
        recovery_conf::write_alone(config, target, &*target.disk)?;
    } else if !target.directory.has("standby.signal") {
        cx.monitor.warning(
            "the target has no standby.signal: if it is started now, it runs as a primary on its \
             old timeline; use -R",
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use pg_format::TimelineId;

    use super::*;
    use crate::error::NotPossible;
    use crate::plan::ForkPoint;
    use crate::task::Stop;
    use crate::test_values::{EmptyTarget, RecordingMonitor, config, snapshot};

    const MB_16: u64 = 16 << 20;

    fn cx() -> (Context, Arc<RecordingMonitor>) {
        let recorded = Arc::new(RecordingMonitor::default());
        (Context::new(Arc::clone(&recorded) as _, Stop::default()), recorded)
    }

    /// Nodes whose histories part at `fork`, of which the target's WAL ends at `end`.
    fn divergence(fork: u64, end: u64) -> Divergence {
        let timeline = TimelineId::new(1).unwrap();
        Divergence {
            fork: Some(ForkPoint { lsn: Lsn::new(fork), timeline }),
            target_end: Some(Lsn::new(end)),
            ..Divergence::unknown(NotPossible::new("not needed"))
        }
    }

    fn judge(config: &Config, source: &Snapshot, divergence: &Divergence) -> Option<Outcome> {
        let target = EmptyTarget::new();
        nothing_to_do(&cx().0, config, &target.target, source, divergence).unwrap()
    }

    #[test]
    fn a_target_that_lost_nothing_needs_no_rewind() {
        let source = snapshot(3..9, Lsn::new(3 * MB_16));
        let fork = 5 * MB_16 + 1000;
        let outcome = judge(&config(), &source, &divergence(fork, fork)).expect("nothing to do");
        assert_eq!(outcome.result, Ended::NothingToDo);
        assert!(judge(&config(), &source, &divergence(fork, fork + 8)).is_none(), "it diverged");
        let unproven = Divergence { fork: None, ..divergence(fork, fork) };
        assert!(judge(&config(), &source, &unproven).is_none());
        let unread = Divergence { target_end: None, ..divergence(fork, fork) };
        assert!(judge(&config(), &source, &unread).is_none());
    }

    #[test]
    fn whoever_asks_for_a_comparison_gets_one() {
        let source = snapshot(3..9, Lsn::new(3 * MB_16));
        let strategy = StrategyChoice::Only(Strategy::Compare);
        let config = Config { strategy, ..config() };
        assert!(judge(&config, &source, &divergence(5 * MB_16, 5 * MB_16)).is_none());
    }

    #[test]
    fn a_target_that_cannot_catch_up_is_rewound() {
        let source = snapshot(7..9, Lsn::new(7 * MB_16));
        let target = EmptyTarget::new();
        let (cx, recorded) = cx();
        let parted = divergence(5 * MB_16 + 8, 5 * MB_16 + 8);
        let outcome = nothing_to_do(&cx, &config(), &target.target, &source, &parted).unwrap();
        assert!(outcome.is_none());
        assert!(recorded.all()[0].contains("no longer has the WAL from"), "{:?}", recorded.all());
    }

    #[test]
    fn a_history_of_a_branch_that_the_source_is_not_on_means_rewinding() {
        let source = snapshot(3..9, Lsn::new(3 * MB_16));
        let target = EmptyTarget::new();
        let path = target.home.path().join("pg_wal/00000007.history");
        std::fs::File::create(path).unwrap();
        let (cx, recorded) = cx();
        let parted = divergence(5 * MB_16, 5 * MB_16);
        let outcome = nothing_to_do(&cx, &config(), &target.target, &source, &parted).unwrap();
        assert!(outcome.is_none());
        assert!(recorded.all()[0].contains("00000007.history"), "{:?}", recorded.all());
    }

    #[test]
    fn a_target_without_a_signal_file_is_warned_about() {
        let target = EmptyTarget::new();
        let (cx, recorded) = cx();
        make_standby(&cx, &config(), &target.target).unwrap();
        assert!(recorded.all()[0].starts_with("warning: the target has no standby.signal"));
        std::fs::File::create(target.home.path().join("standby.signal")).unwrap();
        make_standby(&cx, &config(), &target.target).unwrap();
        assert_eq!(recorded.all().len(), 1);
    }

    #[test]
    fn a_dry_run_makes_no_standby() {
        let target = EmptyTarget::new();
        let before = target.names();
        let config = Config { dry_run: true, start: true, ..config() };
        make_standby(&cx().0, &config, &target.target).unwrap();
        assert_eq!(target.names(), before);
    }

    #[test]
    fn a_standby_is_made_where_a_start_was_asked_for_and_nothing_else_is_left() {
        let target = EmptyTarget::new();
        let config = Config { start: true, ..config() };
        let mut expected = target.names();
        make_standby(&cx().0, &config, &target.target).unwrap();
        expected.push("standby.signal".to_owned());
        expected.sort();
        assert_eq!(target.names(), expected);
    }
}
