//! Targets that need no rewind: whether it is so, and what is done for them all the same.

use pg_format::TimelineHistory;
use proto::model::Description;

use crate::analysis::{Analysis, source_segment};
use crate::cli::StrategyArg;
use crate::error::RewindError;
use crate::outcome::{Outcome, Result as Ended};
use crate::recovery;
use crate::rewind::Run;

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
        let size = source.node.control.wal_segment_size;
        if source_segment(source, history, size.segment_of(end)).is_none() {
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
        if recovery::is_wanted(&self.config) {
            self.take_target(false)?;
            recovery::write_alone(&self.config, &self.target, &*self.disk)?;
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
