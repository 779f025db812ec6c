//! The plan of a run: that of an earlier one, if it still holds, or a new one.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use data_dir::window::Window;
use pg_format::{Lsn, TimelineHistory};
use proto::model::Description;

use crate::apply::preflight;
use crate::cli::StrategyArg;
use crate::commands::rewind::Run;
use crate::divergence::common_wal::{Analysis, source_start};
use crate::divergence::source_changes;
use crate::error::RewindError;
use crate::monitor::Step;
use crate::outcome::{Checkpointed, Outcome, Result as Ended};
use crate::plan::before_images::{bytes_of, images};
use crate::plan::cost::Prices;
use crate::plan::file_actions::{build, comparisons};
use crate::plan::input::{Choices, Differences, Facts};
use crate::plan::summary::{Totals, changes};
use crate::plan::{Plan, SourceFiles, Strategy};
use crate::prepare::plan_reuse;
use crate::prepare::prefetch::{Assumed, Compared};
use crate::prepare::seal::Attempt;
use crate::source::{Session, compare};
use crate::source_checks::{check_databases, check_shrink};
use crate::staging::saved_plan::SavedPlan;
use crate::staging::staged_bytes::{self, StagedBytes};
use crate::staging::{marks, state_error};
use crate::strategy::candidates::{Candidates, Choice, Ways, new_tablespaces};
use crate::strategy::estimate::Known;
use crate::target;
use crate::task::blocking;

/// How often the source is looked at while its next checkpoint is waited for.
const CHECKPOINT_POLL: Duration = Duration::from_secs(1);

/// What will be done, and how it is known.
pub(crate) struct Planned<'a> {
    pub(crate) choice: Choice<'a>,
    /// Redo position of the source's newest checkpoint before anything was read from it.
    pub(crate) source_redo: Lsn,
    pub(crate) plan: Plan,
    pub(crate) files: SourceFiles,
    pub(crate) hash_bytes: u64,
    /// Whether it is the plan of an earlier run.
    pub(crate) again: bool,
}

impl Run {
    /// The plan of an earlier run, if it still holds.
    pub(crate) fn go_on<'a>(
        &mut self,
        source: &Description,
        analysis: &'a Analysis,
    ) -> Result<Option<Planned<'a>>, RewindError> {
        let Some(stored) = self.stored.take() else {
            return Ok(None);
        };
        let obstacle = plan_reuse::obstacle(&stored, &self.target, &source.node, &self.config);
        let strategy = Strategy::named(&stored.strategy.0);
        let needs_window = strategy != Some(Strategy::Compare);
        let lost = needs_window && analysis.rewindable.is_err();
        let obstacle = obstacle.or(lost.then_some("the target's WAL changed"));
        let (Some(strategy), None) = (strategy, obstacle) else {
            let why = obstacle.unwrap_or("its strategy is unknown");
            self.monitor.note(&format!(
                "the plan of an earlier run does not hold ({why}): what it fetched is compared with \
                 the source before it is used"
            ));
            self.prepared = true;
            // Without its packs it would not be complete.
            marks::unseal(&*self.disk).map_err(state_error)?;
            self.retire();
            return Ok(None);
        };
        let SavedPlan { start, source_redo, plan, listed: files, hash_bytes, .. } = stored;
        let choice = Choice { strategy, window: None, start, why: stored.strategy.1 };
        let staged = staged_bytes::staged_bytes(&*self.disk).map_err(state_error)?;
        self.undo = self.check(&plan, source, (&choice, staged))?;
        self.monitor.note("going on with what an earlier run had fetched");
        Ok(Some(Planned { choice, source_redo, plan, files, hash_bytes, again: true }))
    }

    /// What either side changed since the fork, if the way that needs it may be chosen.
    pub(crate) async fn changes(
        &self,
        session: &Session,
        (source, history): (&Description, &TimelineHistory),
        asked: Option<(&Analysis, Option<Assumed>)>,
    ) -> Result<Result<Window, String>, RewindError> {
        match asked.filter(|_| self.wants_changes()) {
            Some(asked) => source_changes::since_fork(session, source, history, asked).await,
            None => Ok(Err("it was not asked for".to_owned())),
        }
    }

    /// Whether a way may be gone that needs to know what the source changed.
    pub(crate) fn wants_changes(&self) -> bool {
        let by_name = matches!(self.config.strategy, StrategyArg::Auto | StrategyArg::Latest);
        // A dry run tells what every way would cost.
        by_name || self.config.dry_run
    }

    /// Chooses the way and decides, file by file; the end of the attempt if it ends here.
    pub(crate) async fn plan_anew<'a>(
        &mut self,
        session: &Session,
        (source, history): (&Description, &TimelineHistory),
        (files, compared): (SourceFiles, Compared),
        ways: Ways<'a>,
    ) -> Result<Result<Planned<'a>, Attempt>, RewindError> {
        if let Some(oid) = unknown_tablespace(&files, source) {
            let why = format!("tablespace {oid} was created on the source meanwhile");
            return Ok(Err(Attempt::Again { why, without_fork: None }));
        }
        check_databases(&files, &self.target.files)?;
        if !self.config.accept_shrink {
            check_shrink(&self.target.files, &files)?;
        }
        let candidates = Candidates::new(ways, source, history);
        let prices = self.prices(source, &files, (ways, &candidates), &Known::default())?;
        let choice = candidates.choose(self.config.strategy, &prices)?;
        if let Some(again) = self.wait_for_checkpoint(session, source, &choice, &prices).await? {
            return Ok(Err(again));
        }
        let (plan, differences, hash_bytes) =
            self.plan(session, source, (&files, compared), &choice).await?;
        self.undo = self.check(&plan, source, (&choice, StagedBytes::default()))?;
        if self.config.dry_run {
            changes(&plan).iter().for_each(|change| self.monitor.planned(change));
            let mut outcome = self.dry_outcome(ways.analysis, &choice, &plan);
            let known = Known::of(differences, hash_bytes);
            let known = self.sampled(
                session,
                (source, history),
                (ways, &candidates),
                (&choice, &plan, known),
            );
            let known = known.await?;
            outcome.prices = Some(self.prices(source, &files, (ways, &candidates), &known)?);
            outcome.checkpoint = Some(Checkpointed::of(source, ways.end));
            return Ok(Err(Attempt::Finished(Box::new(outcome))));
        }
        let source_redo = source_start(source).redo;
        Ok(Ok(Planned { choice, source_redo, plan, files, hash_bytes, again: false }))
    }

    pub(crate) fn choices(&self) -> Choices {
        Choices {
            config_from_source: self.config.config_from_source,
            mirror_extra_files: self.config.mirror_extra_files,
        }
    }

    /// Waits for the source's next checkpoint if that was asked for and most of what would be carried is
    /// WAL that it makes superfluous; then it is planned anew.
    async fn wait_for_checkpoint(
        &mut self,
        session: &Session,
        source: &Description,
        choice: &Choice<'_>,
        prices: &Prices,
    ) -> Result<Option<Attempt>, RewindError> {
        let pays = prices.of(choice.strategy).is_some_and(|price| price.is_mostly_wal());
        let Some(limit) = self.config.wait_checkpoint.take().filter(|_| pays) else {
            return Ok(None);
        };
        if self.config.dry_run
            || !matches!(self.config.strategy, StrategyArg::Auto | StrategyArg::Latest)
        {
            return Ok(None);
        }
        self.monitor.note(&format!(
            "waiting up to {} seconds for the source's next checkpoint: most of what would be fetched is \
             WAL since the last one",
            limit.as_secs()
        ));
        let (since, before) = (Instant::now(), source_start(source).redo);
        while since.elapsed() < limit {
            tokio::time::sleep(CHECKPOINT_POLL.min(limit)).await;
            if source_start(&session.clone().describe().await?).redo > before {
                let why = "the source made a checkpoint".to_owned();
                return Ok(Some(Attempt::Again { why, without_fork: None }));
            }
        }
        self.monitor.note("the source made no checkpoint meanwhile: going on without");
        Ok(None)
    }

    fn dry_outcome(&mut self, analysis: &Analysis, choice: &Choice<'_>, plan: &Plan) -> Outcome {
        let mut outcome = Outcome::new(Ended::WouldRewind, "dry run: nothing was changed");
        outcome.fork = analysis.fork.map(|fork| (fork.lsn, fork.timeline));
        outcome.strategy = Some((choice.strategy.name(), choice.why.clone()));
        outcome.totals = Totals::of(plan);
        outcome.kept = self.kept(plan);
        outcome.times = self.steps.end();
        outcome
    }

    async fn plan(
        &mut self,
        session: &Session,
        source: &Description,
        (files, compared): (&SourceFiles, Compared),
        choice: &Choice<'_>,
    ) -> Result<(Plan, Differences, u64), RewindError> {
        let control = &source.node.control;
        let version_directory = pg_format::relation::tablespace_version_directory(
            control.major,
            control.catalog_version,
        );
        let places = new_tablespaces(
            &self.target,
            source,
            &self.config.tablespace_mapping,
            choice.strategy,
        )?;
        let target = Arc::clone(&self.target);
        let keys = match self.config.mirror_extra_files {
            true => blocking(move || Ok(target::private_keys(&target))).await?,
            false => BTreeSet::new(),
        };
        let facts = Facts {
            target: &self.target.files,
            source: files,
            window: choice.window,
            version_directory: &version_directory,
            choices: self.choices(),
            new_tablespaces: &places,
            keys: &keys,
        };
        self.steps.begin(Step::Compare);
        let Compared { mut differences, payload_bytes } = compared;
        let mut list = comparisons(&facts)?;
        list.retain(|comparison| !differences.contains_key(&comparison.path));
        let monitor = Arc::clone(&self.monitor);
        let directory = Arc::clone(&self.directory);
        let (others, carried) = compare::compare(session, directory, &list, monitor).await?;
        differences.extend(others);
        self.steps.begin(Step::Plan);
        let plan = build(&facts, &differences)?;
        Ok((plan, differences, payload_bytes + carried.total()))
    }

    /// Refuses a plan that would fail half way. Whether there is room for undo images too.
    fn check(
        &self,
        plan: &Plan,
        source: &Description,
        (choice, staged): (&Choice<'_>, StagedBytes),
    ) -> Result<bool, RewindError> {
        let newest = source.wal_segments.iter().map(|name| name.number).max().unwrap_or(0);
        let size = source.node.control.wal_segment_size;
        let segments = newest.saturating_sub(size.segment_of(choice.start.redo)).saturating_add(1);
        let staging = self.config.staging_dir.as_deref();
        let wal_bytes = segments.saturating_mul(size.bytes());
        preflight::check_permissions(&self.directory, plan)?;
        preflight::check_mounts(&self.directory, plan)?;
        let copied = staging.is_some() || self.directory.wal_is_elsewhere();
        let mut room = preflight::Room {
            // Staged pages are compressed; half of their size is what rows that compress badly need.
            staged_bytes: (Totals::of(plan).bytes() / 2).saturating_sub(staged.packs),
            wal_bytes: wal_bytes.saturating_sub(staged.wal),
            copied_wal_bytes: if copied { wal_bytes } else { 0 },
            ..preflight::Room::on(&self.directory, staging)
        };
        room.check(plan, &self.target.files)?;
        if !self.config.undo {
            return Ok(false);
        }
        room.keeps_cut = true;
        room.undo_bytes = bytes_of(&images(plan, &self.target.files)).saturating_sub(staged.undo);
        let short = room.check(plan, &self.target.files).err();
        if let Some(short) = &short {
            self.monitor.warning(&format!(
                "no undo images are saved, an interrupted rewind can be finished but not taken \
                 back: {}",
                short.chain()
            ));
        }
        Ok(short.is_none())
    }
}

/// A tablespace the list has and the description has not: created between the two.
fn unknown_tablespace(files: &SourceFiles, source: &Description) -> Option<u32> {
    let listed = files.keys().filter_map(|path| path.as_str().strip_prefix("pg_tblspc/"));
    let mut oids = listed.filter_map(|rest| rest.parse().ok());
    oids.find(|oid| !source.tablespaces.iter().any(|tablespace| tablespace.oid == *oid))
}
