//! Targets that need no rewind: whether it is so, and what is done for them all the same.

use std::ops::ControlFlow;
use std::sync::Arc;

use data_dir::proof;
use data_dir::wal::LocalWal;
use pg_format::wal::Start;
use pg_format::{Lsn, TimelineHistory};
use proto::fetch::{ItemBody, ProofStart, Unit, UnitKind};
use proto::model::Description;

use crate::cli::StrategyArg;
use crate::commands::rewind::Run;
use crate::divergence::common_wal::{Analysis, source_segment};
use crate::error::{Class, RewindError};
use crate::outcome::{Outcome, Result as Ended};
use crate::source::Session;
use crate::target::{Target, recovery_conf, wal_context};
use crate::task::blocking;

/// Whether the source can send its WAL from a position on, as soon as it has more.
fn has_wal_from(source: &Description, history: &TimelineHistory, from: Lsn) -> bool {
    let size = source.node.control.wal_segment_size;
    let number = size.segment_of(from);
    // WAL that ends with a segment may have no next one yet.
    let newest = source.wal_segments.iter().map(|name| name.number).max();
    let is_next = size.offset_of(from) == 0 && newest.is_some_and(|newest| newest + 1 == number);
    is_next || source_segment(source, history, number).is_some()
}

/// The target's own records of a range, and their CRCs.
fn records(
    target: &Target,
    history: &TimelineHistory,
    start: Lsn,
    end: Lsn,
) -> Result<Vec<(Lsn, u32)>, RewindError> {
    let context = wal_context(&target.control.file);
    let wal = LocalWal { directory: &target.directory, history, context };
    let mut records = Vec::new();
    proof::records(&wal, context, Start::FirstAfter(start), end, &mut |lsn, crc| {
        records.push((lsn, crc));
        ControlFlow::Continue(())
    })?;
    Ok(records)
}

impl Run {
    /// A target that has nothing the source lacks needs no rewind, as long as the WAL it needs to
    /// catch up is still there.
    pub(crate) fn nothing_to_do(
        &mut self,
        analysis: &Analysis,
        source: &Description,
        history: &TimelineHistory,
    ) -> Result<Option<Outcome>, RewindError> {
        // Whoever asks for a comparison gets one.
        if self.config.strategy == StrategyArg::Compare {
            return Ok(None);
        }
        let (Some(fork), Some(end)) = (analysis.fork, analysis.target_end) else {
            return Ok(None);
        };
        if end > fork.lsn {
            return Ok(None);
        }
        if let Some(name) = self.foreign_history(source, history)? {
            self.monitor.note(&format!(
                "the target has not diverged, but its pg_wal has {name}, which the source does not \
                 know: resynchronising"
            ));
            return Ok(None);
        }
        if !has_wal_from(source, history, end) {
            self.monitor.note(&format!(
                "the target has not diverged, but the source no longer has the WAL from {end} on: \
                 resynchronising"
            ));
            return Ok(None);
        }
        let reason = format!(
            "no rewind required: the target's WAL ends at {end} and is part of the source's history"
        );
        let mut outcome = Outcome::new(Ended::NothingToDo, reason);
        outcome.fork = Some((fork.lsn, fork.timeline));
        self.pg_ctl = self.find_pg_ctl()?;
        self.follow_without_rewind()?;
        outcome.times = self.steps.end();
        Ok(Some(outcome))
    }

    /// A target that was rewound before and not started since need not be rewound again, as long as it can follow
    /// the source from where its replay will end.
    pub(crate) async fn already_rewound(
        &mut self,
        session: &Session,
        source: &Description,
        history: &Arc<TimelineHistory>,
    ) -> Result<Option<Outcome>, RewindError> {
        if !self.target.unstarted || self.config.strategy == StrategyArg::Compare {
            return Ok(None);
        }
        let control = &self.target.control.file;
        let end = control.min_recovery_point;
        let last = Lsn::new(end.as_u64().saturating_sub(1));
        let same_timeline = source.node.timeline.get() == control.min_recovery_timeline
            && history.timeline_of(last) == source.node.timeline;
        let follows = same_timeline
            && has_wal_from(source, history, end)
            && self.foreign_history(source, history)?.is_none()
            && self.ends_alike(session, history, end).await?;
        if !follows {
            self.monitor.note(&format!(
                "the target was rewound before and not started since, but the source is on timeline {} with other \
                 WAL, or has none from {end} on: rewinding again",
                source.node.timeline
            ));
            return Ok(None);
        }
        let reason = format!(
            "already rewound: replay will end at {end} on timeline {}, and PostgreSQL was not started yet",
            source.node.timeline
        );
        let mut outcome = Outcome::new(Ended::AlreadyRewound, reason);
        self.pg_ctl = self.find_pg_ctl()?;
        self.follow_without_rewind()?;
        outcome.times = self.steps.end();
        Ok(Some(outcome))
    }

    /// Whether both nodes have the same records in the segment that replay will end in, and some: an equal timeline
    /// number proves nothing.
    async fn ends_alike(
        &self,
        session: &Session,
        history: &Arc<TimelineHistory>,
        end: Lsn,
    ) -> Result<bool, RewindError> {
        let size = self.target.control.file.wal_segment_size;
        let start = size.start_of(size.segment_of(Lsn::new(end.as_u64().saturating_sub(1))));
        let unit = UnitKind::Proof { from: ProofStart::Segment(start), to: end, each_record: true };
        let mut session = session.clone();
        let answer = match session.ask(vec![Unit { id: 0, kind: unit }]).await {
            // Removed or unreadable there: nothing is proven.
            Err(error) if matches!(error.class(), Class::Rebuild | Class::WalUnavailable) => {
                return Ok(false);
            }
            answer => answer?,
        };
        let theirs = answer.items.iter().filter_map(|item| match item.body {
            ItemBody::RecordCrc { lsn, crc } => Some((lsn, crc)),
            _ => None,
        });
        let theirs: Vec<(Lsn, u32)> = theirs.collect();
        let (target, history) = (Arc::clone(&self.target), Arc::clone(history));
        let ours = blocking(move || records(&target, &history, start, end)).await?;
        Ok(!ours.is_empty() && ours == theirs)
    }

    /// A history file of a branch the source is not on: recovery would look for that branch.
    /// Not every node has the files of all its ancestors.
    fn foreign_history(
        &self,
        source: &Description,
        history: &TimelineHistory,
    ) -> Result<Option<String>, RewindError> {
        let ours = self.directory.history_files()?;
        let theirs = &source.node.histories;
        let foreign = ours.into_iter().find(|(timeline, text)| {
            let same = theirs.iter().find(|(other, _)| other == timeline);
            !history.contains(*timeline) || same.is_some_and(|(_, other)| other != text)
        });
        Ok(foreign.map(|(timeline, _)| timeline.history_file_name()))
    }

    /// Makes a target that lost nothing a standby, if that was asked for.
    fn follow_without_rewind(&mut self) -> Result<(), RewindError> {
        if self.config.dry_run {
            return Ok(());
        }
        if recovery_conf::is_wanted(&self.config) {
            self.take_target(false)?;
            recovery_conf::write_alone(&self.config, &self.target, &*self.disk)?;
            self.abandon();
        } else if !self.directory.has("standby.signal") {
            self.monitor.warning(
                "the target has no standby.signal: started as it is, it would take writes on its \
                 old timeline; use -R",
            );
        }
        Ok(())
    }
}
