//! Whether the target's WAL names every page whose hints it set, and from where on.
//!
//! A hint (what became of a row's transaction, or that an index entry leads nowhere) is logged only where
//! `wal_log_hints` or checksums are on, and then only by the first change of a page that is clean
//! (`MarkBufferDirtyHint`). In recovery it is never logged, and yet reaches the disk with a page that replay has
//! already changed. docs/RULES.md, R1.

use std::ops::ControlFlow;
use std::time::Duration;

use data_dir::dir::read_at;
use data_dir::wal::summarize::checkpoints_before;
use data_dir::wal::summary::{Checkpoint, WalSummary};
use data_dir::{Entry, EntryKind};
use pg_format::control_file::WalLevel;
use pg_format::page::Page;
use pg_format::wal::SegmentName;
use pg_format::{
    BLOCK_BYTES, BLOCK_SIZE, ClusterState, ControlFile, FileClass, Fork, Lsn, TimelineHistory,
};

use super::undecided::Undecided;
use crate::error::NotPossible;
use crate::plan::TargetFiles;
use crate::target::Target;
use crate::target::wal_archive::TargetWal;

/// Longest time between the last writes of the newest WAL and of `pg_control` by a server that is shut down
/// cleanly: it writes one right after the other.
const CLEAN_STOP: Duration = Duration::from_secs(3);
/// Number of pages that are read at most to find one with an old checksum.
const OLD_PAGES_MAX: usize = 64;

/// The target's role since the start of replay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Past {
    /// Whether it replayed another node's WAL at some time since: hints of that time were not logged.
    pub(crate) was_standby: bool,
    /// Where it was promoted last, if it was.
    pub(crate) promoted_at: Option<Lsn>,
}

impl Past {
    /// Decides from the target's state, its WAL since the start of replay, and its history. A standby that is
    /// started without its signal file ends recovery with a shutdown checkpoint on the same timeline
    /// (`PerformRecoveryXLogAction`), as crash recovery does. So a node with a shutdown checkpoint behind the
    /// fork point, other than that of its own last stop, may have been a standby.
    pub(crate) fn since(
        start: Lsn,
        fork: Lsn,
        control: &ControlFile,
        wal_summary: &WalSummary,
        history: &TimelineHistory,
    ) -> Self {
        let ends = wal_summary.promotions.iter().copied();
        let timelines = history.spans().iter().map(|span| span.begin);
        let promoted_at = ends.chain(timelines).filter(|at| *at > start).max();
        let in_recovery = matches!(
            control.state,
            ClusterState::InArchiveRecovery
                | ClusterState::ShutDownInRecovery
                | ClusterState::InCrashRecovery
        );
        let recovered = shutdowns_within(wal_summary, control).any(|lsn| lsn >= fork);
        Self { was_standby: in_recovery || recovered || promoted_at.is_some(), promoted_at }
    }
}

/// Shutdown checkpoints behind the start of the WAL summary after which the node ran again. They are written
/// when a server stops and when recovery ends.
fn shutdowns_within<'w>(
    wal_summary: &'w WalSummary,
    control: &'w ControlFile,
) -> impl Iterator<Item = Lsn> + 'w {
    let shutdowns = wal_summary.checkpoints.iter().filter(|checkpoint| checkpoint.shutdown);
    let last = control.checkpoint;
    let is_stopped = control.state == ClusterState::ShutDown;
    let lsns = shutdowns.map(|checkpoint| checkpoint.lsn).filter(|lsn| *lsn > wal_summary.start);
    lsns.filter(move |lsn| !is_stopped || *lsn != last)
}

/// The position from which the WAL must be read so that it names every page with hints of a lost transaction:
/// the redo position of a checkpoint before which no transaction began that was still open at `last`, the
/// checkpoint where replay begins.
pub(crate) fn before_open_transactions(
    wal: &TargetWal<'_>,
    last: Checkpoint,
) -> Result<Lsn, Undecided> {
    let mut oldest_active = None;
    let mut found = None;
    let mut search = |checkpoint: &Checkpoint| {
        match oldest_active {
            None => {
                // A shutdown checkpoint does not say which transactions were open.
                oldest_active = checkpoint.oldest_active();
                if oldest_active == Some(checkpoint.checkpoint.next_xid) {
                    found = Some(checkpoint.checkpoint.redo);
                }
            }
            Some(oldest) if checkpoint.checkpoint.next_xid <= oldest => {
                found = Some(checkpoint.checkpoint.redo);
            }
            Some(_) => {}
        }
        if found.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    if search(&last).is_continue() {
        checkpoints_before(wal, wal.local().context, last.lsn, &mut search)?;
    }
    found.ok_or_else(|| {
        Undecided::new(format!(
            "the target was a standby after the fork point, and its WAL does not reach back to a \
             checkpoint older than the transactions that were open at {}",
            last.lsn
        ))
    })
}

/// Refuses a target that was promoted and then committed a lost transaction before its first checkpoint as a
/// primary was complete: until then marks of rows that the transaction deleted may get into index pages that
/// replay had changed, without WAL.
pub(crate) fn check_promotion(past: Past, wal_summary: &WalSummary) -> Result<(), NotPossible> {
    let (Some(promoted), Some(commit)) = (past.promoted_at, wal_summary.first_commit) else {
        return Ok(());
    };
    let own = wal_summary.checkpoints.iter().find(|checkpoint| checkpoint.lsn > promoted);
    let flushed = own.map_or(Lsn::MAX, |checkpoint| checkpoint.lsn);
    if commit >= flushed {
        return Ok(());
    }
    Err(NotPossible::new(format!(
        "the target was promoted at {promoted}, and a transaction was committed at {commit}, \
         before its first checkpoint as a primary was complete: hint bits in index pages may not \
         have been logged"
    )))
}

/// Whether hints were logged throughout a WAL summary, and `wal_level` was high enough.
pub(crate) fn check_summary(wal_summary: &WalSummary, target: &Target) -> Result<(), Undecided> {
    let control = &target.control.file;
    let refuse = |why: String| Err(Undecided::new(why));
    if !control.logs_hints() {
        return refuse(
            "neither data checksums nor wal_log_hints are enabled on the target: its WAL does not \
             name every page that it changed"
                .to_owned(),
        );
    }
    if !control.wal_log_hints || wal_summary.settings_changed_at.is_some() {
        if let Some(at) = wal_summary.settings_changed_at.filter(|_| !control.writes_checksums()) {
            return refuse(format!(
                "settings changed on the target at {at}, wal_log_hints may have been off before"
            ));
        }
        check_checksums(wal_summary, target)?;
    }
    if control.wal_level == WalLevel::Minimal {
        return refuse(
            "wal_level is minimal on the target: its WAL does not name every page".to_owned(),
        );
    }
    if let Some(at) = wal_summary.minimal_at {
        return refuse(format!("wal_level was minimal on the target at {at}"));
    }
    if let Some(at) = wal_summary.checksums_changed_at {
        return refuse(format!("data checksums were switched on or off on the target at {at}"));
    }
    if let Some(at) = wal_summary.extension_at {
        return refuse(format!(
            "the target's WAL has a record of a custom resource manager at {at}: only its \
             extension knows what it changes (files that the extension keeps in the data directory \
             are not touched without --extra-files mirror)"
        ));
    }
    match wal_summary.unknown_at {
        Some(at) => {
            refuse(format!("the target's WAL has a record at {at} whose effect is not known"))
        }
        None => Ok(()),
    }
}

/// Checks that data checksums were on throughout, where hints are logged because of them alone.
/// `pg_checksums` works on a stopped node and writes pages and `pg_control`, but no WAL. It writes each page
/// that has no valid checksum: where it was run, no file with a valid checksum is older than that run.
fn check_checksums(wal_summary: &WalSummary, target: &Target) -> Result<(), Undecided> {
    let control = &target.control.file;
    // A page that was written in the same second as a running node's checkpoint may have been written after
    // it.
    let times = wal_summary.checkpoints.iter().map(|checkpoint| {
        checkpoint.checkpoint.time.saturating_add(i64::from(checkpoint.shutdown))
    });
    if let Some(first) = times.min()
        && has_checksum_from_before(target, first)?
    {
        return Ok(());
    }
    if let Some(at) = shutdowns_within(wal_summary, control).next() {
        return Err(not_known(&format!("it was stopped at {at} and started again")).into());
    }
    match control.state {
        ClusterState::InArchiveRecovery | ClusterState::ShutDownInRecovery => {
            Err(not_known("the WAL of a standby does not show when it was stopped").into())
        }
        ClusterState::ShutDown => Ok(check_last_stop(control, &target.files)?),
        _ => Ok(()),
    }
}

fn not_known(why: &str) -> NotPossible {
    NotPossible::new(format!(
        "it is not known whether hint bits were logged on the target: {why} (pg_checksums may have \
         been run, or a copy did not keep the modification times of files)"
    ))
}

/// Whether there is a page with a right checksum in a file that was written last before `time`, in seconds since
/// 1970.
fn has_checksum_from_before(target: &Target, time: i64) -> Result<bool, Undecided> {
    let old = target.files.values().filter(|entry| entry.modified.0 < time);
    let mut read = 0;
    for entry in old {
        let (FileClass::Relation(segment), EntryKind::File { bytes }) =
            (FileClass::of(&entry.path), &entry.kind)
        else {
            continue;
        };
        if segment.fork != Fork::Main || *bytes < BLOCK_BYTES {
            continue;
        }
        let mut page = vec![0; BLOCK_SIZE];
        let file = target.directory.open_file(&entry.path);
        let got = file
            .and_then(|file| read_at(&file, &mut page, 0))
            .map_err(Undecided::unreadable(entry.path.as_str()))?;
        let page = Page::new(&page).filter(|page| got == BLOCK_SIZE && !page.is_new());
        if page.is_some_and(|page| page.checksum_fits(segment.first_block())) {
            return Ok(true);
        }
        read += 1;
        if read == OLD_PAGES_MAX {
            break;
        }
    }
    Ok(false)
}

/// Checks that nobody wrote to the target after its last stop. A primary that stops writes its newest WAL
/// last, except for `pg_control` and statistics, so a page that was written later is from another program.
fn check_last_stop(control: &ControlFile, files: &TargetFiles) -> Result<(), NotPossible> {
    let newest = |wanted: &dyn Fn(&Entry) -> bool| {
        let written = files.values().filter(|entry| matches!(entry.kind, EntryKind::File { .. }));
        written.filter(|entry| wanted(entry)).map(|entry| entry.modified).max()
    };
    let Some(last) = newest(&|entry| is_segment(entry, control)) else {
        return Err(not_known("it has no WAL that shows when it was stopped"));
    };
    let apart = control.time.abs_diff(last.0);
    if Duration::from_secs(apart) > CLEAN_STOP {
        return Err(not_known("pg_control and the newest WAL were not written at the same time"));
    }
    let is_data = |entry: &Entry| matches!(FileClass::of(&entry.path), FileClass::Relation(_));
    if newest(&is_data).is_some_and(|data| data > last) {
        return Err(not_known("pages were written after its newest WAL"));
    }
    Ok(())
}

fn is_segment(entry: &Entry, control: &ControlFile) -> bool {
    let name = entry.path.as_str().strip_prefix("pg_wal/");
    name.is_some_and(|name| SegmentName::parse(name, control.wal_segment_size).is_some())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use pg_format::{DataPath, TimelineId};

    use super::*;
    use crate::test_values::control;

    fn lsn(position: u64) -> Lsn {
        Lsn::new(position)
    }

    fn checkpoint(at: u64, shutdown: bool) -> Checkpoint {
        Checkpoint { lsn: lsn(at), shutdown, checkpoint: control().checkpoint_copy }
    }

    /// WAL from 100 to 900 with these checkpoints.
    fn wal_summary(checkpoints: &[Checkpoint]) -> WalSummary {
        let checkpoints = checkpoints.to_vec();
        WalSummary { start: lsn(100), end: lsn(900), checkpoints, ..WalSummary::default() }
    }

    fn first() -> TimelineHistory {
        TimelineHistory::first(TimelineId::new(1).unwrap())
    }

    /// A node whose WAL begins at 100 and parts from the source's at 500.
    fn past(control: &ControlFile, wal_summary: &WalSummary, history: &TimelineHistory) -> Past {
        Past::since(lsn(100), lsn(500), control, wal_summary, history)
    }

    fn primary() -> ControlFile {
        ControlFile { state: ClusterState::InProduction, checkpoint: lsn(800), ..control() }
    }

    #[test]
    fn a_primary_since_then_was_no_standby() {
        let was = past(&primary(), &wal_summary(&[checkpoint(300, false)]), &first());
        assert_eq!(was, Past { was_standby: false, promoted_at: None });
        // It was stopped and started before the fork, as crash recovery does.
        let was = past(&primary(), &wal_summary(&[checkpoint(300, true)]), &first());
        assert!(!was.was_standby);
    }

    #[test]
    fn its_state_tells_a_standby() {
        for state in [
            ClusterState::InArchiveRecovery,
            ClusterState::ShutDownInRecovery,
            ClusterState::InCrashRecovery,
        ] {
            let control = ControlFile { state, ..primary() };
            assert!(past(&control, &wal_summary(&[]), &first()).was_standby, "{state:?}");
        }
    }

    #[test]
    fn a_promotion_tells_a_standby_and_when_it_ended() {
        let promoted = WalSummary { promotions: vec![lsn(600)], ..wal_summary(&[]) };
        let was = past(&primary(), &promoted, &first());
        assert_eq!(was, Past { was_standby: true, promoted_at: Some(lsn(600)) });
        // The record may be gone; the history has the switch.
        let two = TimelineId::new(2).unwrap();
        let history = TimelineHistory::parse(two, b"1\t0/258\tx\n").unwrap();
        assert_eq!(past(&primary(), &wal_summary(&[]), &history).promoted_at, Some(lsn(0x258)));
        let earlier = TimelineHistory::parse(two, b"1\t0/50\tx\n").unwrap();
        assert_eq!(past(&primary(), &wal_summary(&[]), &earlier).promoted_at, None);
    }

    #[test]
    fn a_standby_without_its_signal_file_is_told_by_its_shutdown_checkpoint() {
        let running = wal_summary(&[checkpoint(600, true)]);
        assert!(past(&primary(), &running, &first()).was_standby);
        // The last word of a node that is stopped is its own stop.
        let stopped =
            ControlFile { state: ClusterState::ShutDown, checkpoint: lsn(600), ..control() };
        assert!(!past(&stopped, &running, &first()).was_standby);
        let later = ControlFile { checkpoint: lsn(800), ..stopped };
        assert!(past(&later, &running, &first()).was_standby);
    }

    #[test]
    fn commits_before_the_first_own_checkpoint_may_have_left_marks() {
        let promoted = Past { was_standby: true, promoted_at: Some(lsn(500)) };
        let commits = |at: Option<u64>, checkpoints: &[Checkpoint]| {
            let wal_summary = WalSummary { first_commit: at.map(lsn), ..wal_summary(checkpoints) };
            check_promotion(promoted, &wal_summary)
        };
        let own = [checkpoint(400, false), checkpoint(700, false)];
        assert!(commits(Some(650), &own).is_err());
        assert!(commits(Some(650), &[]).is_err(), "it has not made one yet");
        assert!(commits(Some(750), &own).is_ok(), "after it");
        assert!(commits(None, &own).is_ok(), "nothing was lost");
        let never = Past { was_standby: true, promoted_at: None };
        let wal_summary = WalSummary { first_commit: Some(lsn(650)), ..wal_summary(&own) };
        assert!(check_promotion(never, &wal_summary).is_ok());
    }

    #[test]
    fn shutdowns_after_which_a_node_ran_again_are_told_from_its_last() {
        let wal_summary =
            wal_summary(&[checkpoint(100, true), checkpoint(300, true), checkpoint(600, true)]);
        let running = |control: &ControlFile| shutdowns_within(&wal_summary, control).count();
        assert_eq!(running(&primary()), 2, "the one at the wal_summary's start does not count");
        let stopped =
            ControlFile { state: ClusterState::ShutDown, checkpoint: lsn(600), ..control() };
        assert_eq!(running(&stopped), 1);
    }

    /// Files of a node, each with the second in which it was written last.
    fn files(written: &[(&str, i64)]) -> TargetFiles {
        let entry = |(name, second): &(&str, i64)| {
            let path = DataPath::new(*name).unwrap();
            let kind = EntryKind::File { bytes: 8192 };
            let modified = (*second, 0);
            (path.clone(), Entry { path, kind, mode: 0o600, inode: 1, modified })
        };
        written.iter().map(entry).collect::<BTreeMap<_, _>>()
    }

    #[test]
    fn a_clean_stop_writes_pg_control_right_after_its_newest_wal() {
        let stopped = ControlFile { time: 1000, ..control() };
        let segment = "pg_wal/000000010000000000000001";
        let judge = |written: &[(&str, i64)]| check_last_stop(&stopped, &files(written));
        assert!(judge(&[(segment, 999), ("base/5/16384", 990)]).is_ok());
        assert!(judge(&[(segment, 960), ("base/5/16384", 950)]).is_err(), "pg_control is later");
        assert!(judge(&[(segment, 999), ("base/5/16384", 1001)]).is_err(), "pages are later");
        assert!(judge(&[("base/5/16384", 990)]).is_err(), "there is no WAL to tell");
        // What is no page may be written later, as statistics are.
        assert!(judge(&[(segment, 999), ("pg_stat/global.stat", 1001)]).is_ok());
    }
}
