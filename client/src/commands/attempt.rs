//! One attempt at a rewind: decides what is to be done, and fetches and seals what that takes.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pg_format::{DataPath, Lsn};
use proto::model::Sealed;

use super::follow;
use crate::config::Config;
use crate::divergence::find::find;
use crate::divergence::source_changes::ChangesOfBoth;
use crate::divergence::{Divergence, compat};
use crate::error::{Abort, Class, NotPossible, Replan, RewindError};
use crate::monitor::Step;
use crate::outcome::Outcome;
use crate::plan::units::units;
use crate::plan::{Planned, Strategy, StrategyChoice};
use crate::prepare::claim::{Claim, Kept, Leftover, PageCache};
use crate::prepare::disk_space::{self, BeforeImages};
use crate::prepare::planning;
use crate::prepare::prefetch::{EarlyWal, Listed, Prefetch, wants_changes};
use crate::prepare::seal::{SealedRewind, check_same_life, seal};
use crate::prepare::stage::{Job, stage};
use crate::prepare::{local_wal, page_cache, plan_reuse};
use crate::source::{self, Answering, Patience, Source};
use crate::staging::staged_bytes::{StagedBytes, staged_bytes};
use crate::staging::state_error;
use crate::strategy::estimate::Basis;
use crate::strategy::tablespaces;
use crate::target::wal_archive::RestoredSegment;
use crate::target::{Target, start};
use crate::task::{Context, Pending, begin, blocking, joined};

/// An answer of the source that is older than this is asked for again: how long the target is inspected must
/// not decide how old the checkpoint is from which replay begins.
const FRESH: Duration = Duration::from_secs(2);

/// The source, to which the program connects while the target is inspected.
#[derive(Debug)]
pub struct Opening {
    since: Instant,
    source: Pending<Answering>,
}

impl Opening {
    /// Begins to connect to the source.
    pub fn begin(config: &Config) -> Self {
        let source = begin(source::connect(config.clone(), Patience::None));
        Self { since: Instant::now(), source }
    }
}

/// What one attempt leaves to the next.
#[derive(Debug)]
pub struct Attempts {
    /// What is in the state directory.
    pub leftover: Leftover,
    /// Number of runs and attempts for this rewind so far.
    runs: u32,
    /// Why *fork* is not possible, as an earlier attempt showed.
    without_fork: Option<NotPossible>,
    /// How long the source's next checkpoint may be waited for.
    may_wait: Option<Duration>,
    opening: Option<Opening>,
    number: u32,
}

impl Attempts {
    /// The values for the first attempt. A dry run does not touch what an earlier run has prepared.
    pub fn new(config: &Config, target: &Target, opening: Opening) -> Result<Self, RewindError> {
        let leftover = match config.dry_run {
            true => Leftover::Nothing,
            false => Leftover::of_an_earlier_run(&*target.disk).map_err(state_error)?,
        };
        Ok(Self {
            runs: leftover.runs(),
            leftover,
            without_fork: None,
            may_wait: config.wait_checkpoint,
            opening: Some(opening),
            number: 0,
        })
    }

    /// Takes into account why the last attempt came to no result.
    pub fn learn(&mut self, reason: Replan, why: String) {
        match reason {
            Replan::ForkImpossible => self.without_fork = Some(NotPossible::as_asked(why)),
            Replan::NewCheckpoint => self.may_wait = None,
            Replan::SourceChanged | Replan::WalUnavailable => {}
        }
    }

    /// Ends the attempts with an error: what was fetched is kept only where running again can succeed.
    pub fn give_up(self, error: &RewindError) {
        self.leftover.give_up(error);
    }

    /// The source as it is now; only the first attempt fails at once if it cannot be reached.
    async fn source(&mut self, config: &Config, target: &Target) -> Result<Source, RewindError> {
        self.number += 1;
        let fresh = self.opening.take().filter(|opening| opening.since.elapsed() < FRESH);
        let patience = if self.number == 1 { Patience::None } else { Patience::UntilTimeout };
        let answering = match fresh {
            Some(opening) => joined(opening.source).await?,
            None => source::connect(config.clone(), patience).await?,
        };
        // Checked first, so that a node of another cluster is reported as that, whatever else is wrong with
        // it.
        compat::check(target, &answering.description)?;
        answering.judged()
    }
}

/// The result of an attempt that neither failed nor needs a new plan.
#[derive(Debug)]
pub enum Attempted {
    /// Nothing is to be changed.
    Report(Box<Outcome>),
    /// Everything is staged and sealed.
    Sealed(Box<Ready>),
}

/// A claimed target, and everything that is needed to rewind it.
#[derive(Debug)]
pub struct Ready {
    /// Keeps servers from starting on the target.
    pub claim: Claim,
    /// What will be changed.
    pub rewind: SealedRewind,
    /// Path of the `pg_ctl` that will start the node, found before anything changes.
    pub pg_ctl: Option<PathBuf>,
}

/// What is to be done.
enum Decision {
    /// Only report this outcome.
    Report(Box<Outcome>),
    /// Rewind by this plan.
    Rewind(Box<Decided>),
}

/// A plan, and what is already known or fetched for it.
struct Decided {
    planned: Planned,
    /// Whether it is the plan of an earlier run.
    is_reused: bool,
    before_images: BeforeImages,
    /// Where the source's WAL ended before anything was copied.
    announced: Sealed,
    early_wal: EarlyWal,
    /// Segments of the common history that came from an archive or from the source.
    restored: Vec<RestoredSegment>,
    pg_ctl: Option<PathBuf>,
}

/// Makes one attempt: decides what to do and, if that is a rewind, fetches and seals what it needs.
///
/// # Errors
/// [`Abort::Replan`] if another attempt may come to a result, else [`Abort::Failed`].
pub async fn attempt(
    cx: &Context,
    config: &Config,
    target: &Arc<Target>,
    attempts: &mut Attempts,
) -> Result<Attempted, Abort> {
    let source = cx.stop.unless(Box::pin(attempts.source(config, target))).await?;
    let decision = Box::pin(decide(cx, config, target, &source, attempts));
    let decided = match cx.stop.unless(decision).await? {
        Decision::Report(outcome) => {
            find_pg_ctl(config, target)?;
            // What an earlier run had prepared is not needed any more.
            attempts.leftover.take().discard(target, &*cx.monitor);
            follow::make_standby(cx, config, target)?;
            return Ok(Attempted::Report(outcome));
        }
        Decision::Rewind(decided) => *decided,
    };
    let (kept, cache) = match attempts.leftover.take() {
        Leftover::Cache(PageCache { files, prepared }) => (Kept::Cache(prepared), Some(files)),
        Leftover::Nothing | Leftover::Plan(_) if decided.is_reused => (Kept::Plan, None),
        Leftover::Nothing | Leftover::Plan(_) => (Kept::Nothing, None),
    };
    attempts.runs += 1;
    let claim = Claim::take(target, &cx.monitor, kept, attempts.runs)?;
    let (strategy, pg_ctl) = (decided.planned.strategy, decided.pg_ctl.clone());
    let prepared = prepare(cx, config, target, &source, &claim, decided, cache);
    match cx.stop.unless(Box::pin(prepared)).await {
        Ok(rewind) => Ok(Attempted::Sealed(Box::new(Ready { claim, rewind, pg_ctl }))),
        Err(abort) => {
            attempts.leftover = claim.settle(&abort);
            Err(or_without_fork(abort, strategy, config.strategy))
        }
    }
}

/// Says that the node would follow another timeline than the source's; it must not be started then.
fn warn_of_a_dead_branch(
    cx: &Context,
    config: &Config,
    found: Option<String>,
) -> Result<(), RewindError> {
    match found {
        Some(message) if config.start => Err(RewindError::new(Class::Preflight, message)),
        Some(message) => {
            cx.monitor.warning(&message);
            Ok(())
        }
        None => Ok(()),
    }
}

/// Finds where the histories part, and decides what is to be done.
async fn decide(
    cx: &Context,
    config: &Config,
    target: &Arc<Target>,
    source: &Source,
    attempts: &mut Attempts,
) -> Result<Decision, Abort> {
    let description = &source.snapshot.description;
    compat::check_settings(target, description, config.start, &*cx.monitor)?;
    cx.steps.begin(Step::Fork);
    let has_plan = matches!(attempts.leftover, Leftover::Plan(_));
    let early = Prefetch::start(config, target, source, &cx.monitor, has_plan);
    let (asked, timeline) = (Arc::clone(target), source.snapshot.description.node.timeline);
    let archive = begin(blocking(move || Ok(compat::dead_branch(&asked, timeline))));
    if let Some(outcome) = follow::already_rewound(cx, config, target, source).await? {
        return Ok(Decision::Report(Box::new(outcome)));
    }
    let divergence = find(config, target, source).await?;
    warn_of_a_dead_branch(cx, config, joined(archive).await?)?;
    let snapshot = &source.snapshot;
    if let Some(outcome) = follow::nothing_to_do(cx, config, target, snapshot, &divergence)? {
        return Ok(Decision::Report(Box::new(outcome)));
    }
    let pg_ctl = find_pg_ctl(config, target)?;
    let reused = reuse_plan(cx, config, target, source, &divergence, attempts)?;
    let is_reused = reused.is_some();
    let changes = async {
        match !is_reused && wants_changes(config) {
            true => ChangesOfBoth::find(source, &divergence, early.changes).await,
            false => Ok(ChangesOfBoth::not_asked_for()),
        }
    };
    let (announced, changes) = tokio::try_join!(joined(early.announced), changes)?;
    let CheckedPlan { planned, before_images } = match reused {
        Some(reused) => reused,
        None => {
            cx.steps.begin(Step::List);
            let listed = joined(early.listed).await?;
            let end = announced.sealed.end;
            let found = AttemptFindings { divergence: &divergence, changes: &changes, listed, end };
            match plan_anew(cx, config, target, source, found, attempts).await? {
                NewPlan::Report(outcome) => return Ok(Decision::Report(outcome)),
                NewPlan::Made(made) => *made,
            }
        }
    };
    let early_wal = joined(announced.wal).await?;
    Ok(Decision::Rewind(Box::new(Decided {
        planned,
        is_reused,
        before_images,
        announced: announced.sealed,
        early_wal,
        restored: divergence.restored,
        pg_ctl,
    })))
}

/// A plan for which there is enough disk space.
struct CheckedPlan {
    planned: Planned,
    before_images: BeforeImages,
}

/// The plan of an earlier run, if it still holds; if not, what was fetched for it becomes a cache.
fn reuse_plan(
    cx: &Context,
    config: &Config,
    target: &Target,
    source: &Source,
    divergence: &Divergence,
    attempts: &mut Attempts,
) -> Result<Option<CheckedPlan>, RewindError> {
    let saved = match attempts.leftover.take() {
        Leftover::Plan(saved) => *saved,
        leftover => {
            attempts.leftover = leftover;
            return Ok(None);
        }
    };
    let node = &source.snapshot.description.node;
    let planned = match plan_reuse::reusable(&saved, config, target, node, divergence) {
        Ok(planned) => planned,
        Err(why) => {
            cx.monitor.note(&format!(
                "the plan of an earlier run is no longer valid ({why}): the data it fetched is \
                 compared with the source before it is used"
            ));
            attempts.leftover = Leftover::retire_plan(saved, target, &cx.monitor)?;
            return Ok(None);
        }
    };
    let staged = staged_bytes(&*target.disk).map_err(state_error)?;
    let before_images =
        disk_space::check_plan(config, &*cx.monitor, target, &source.snapshot, &planned, staged)?;
    cx.monitor.note("resuming the transfer of an earlier run");
    Ok(Some(CheckedPlan { planned, before_images }))
}

/// What is known of both nodes.
struct AttemptFindings<'a> {
    divergence: &'a Divergence,
    changes: &'a ChangesOfBoth,
    listed: Listed,
    /// Where the source's WAL ends now.
    end: Lsn,
}

enum NewPlan {
    /// The plan is only reported: a dry run.
    Report(Box<Outcome>),
    Made(Box<CheckedPlan>),
}

/// Chooses a strategy and decides, file by file.
async fn plan_anew(
    cx: &Context,
    config: &Config,
    target: &Arc<Target>,
    source: &Source,
    found: AttemptFindings<'_>,
    attempts: &mut Attempts,
) -> Result<NewPlan, Abort> {
    let AttemptFindings { divergence, changes, listed, end } = found;
    let snapshot = &source.snapshot;
    let mapping = &config.tablespace_mapping;
    let tablespaces = || tablespaces::against_fork(&target.files, &snapshot.description, mapping);
    let without_fork = attempts.without_fork.clone().or_else(tablespaces);
    let fork = divergence.fork_lsn();
    let choices = config.file_choices();
    let basis = Basis { target, source: snapshot, listed: &listed.files, choices, fork, end };
    let without_fork = without_fork.as_ref();
    let choice = planning::choose(config, basis, divergence, changes, without_fork)?;
    // Only the first plan waits for a checkpoint, if it waits at all.
    if let Some(limit) = attempts.may_wait.take()
        && choice.waiting_pays(config)
    {
        planning::wait_for_checkpoint(cx, source, limit).await?;
    }
    let chosen = &choice.chosen;
    let made = planning::make(cx, config, target, source, divergence, chosen, listed).await?;
    let none = StagedBytes::default();
    let planned = &made.planned;
    let before_images =
        disk_space::check_plan(config, &*cx.monitor, target, snapshot, planned, none)?;
    if config.dry_run {
        let listed = &made.planned.listed.clone();
        let basis = Basis { target, source: snapshot, listed, choices, fork, end };
        let outcome = planning::dry_run(cx, source, basis, &choice, made).await?;
        return Ok(NewPlan::Report(Box::new(outcome)));
    }
    Ok(NewPlan::Made(Box::new(CheckedPlan { planned: made.planned, before_images })))
}

/// Fetches everything that the plan needs, and seals it.
async fn prepare(
    cx: &Context,
    config: &Config,
    target: &Arc<Target>,
    source: &Source,
    claim: &Claim,
    decided: Decided,
    cache: Option<Vec<DataPath>>,
) -> Result<SealedRewind, Abort> {
    let Decided { planned, before_images, announced, early_wal, restored, .. } = decided;
    claim.save_plan(config, target, source.snapshot.description.node.life(), &planned)?;
    cx.steps.begin(Step::Fetch);
    let signals = &cx.stop.signals;
    let follower = local_wal::stage(signals, target, source, &planned, &restored, &early_wal)?;
    check_same_life(&source.snapshot, &announced)?;
    let cache_bytes = match cache {
        Some(files) => {
            let units = units(&planned.plan);
            let (session, disk) = (&source.session, &target.disk);
            page_cache::take_over(cx, session, disk, files, &units, claim.run()).await?
        }
        None => 0,
    };
    let planned = Planned { hash_bytes: planned.hash_bytes + cache_bytes, ..planned };
    let job = Job { config, target, source, planned: &planned };
    let early_bytes = early_wal.answer.payload_bytes;
    let staged = stage(cx, job, claim, before_images, follower, announced.end, early_bytes).await?;
    cx.steps.begin(Step::Seal);
    seal(cx, job, claim, before_images, staged).await
}

/// If `auto` had chosen *fork*, and its WAL cannot be had, the next attempt tries the other strategies.
fn or_without_fork(abort: Abort, strategy: Strategy, wanted: StrategyChoice) -> Abort {
    match abort {
        Abort::Replan { reason: Replan::WalUnavailable, why }
            if strategy == Strategy::Fork && wanted == StrategyChoice::Auto =>
        {
            Abort::Replan { reason: Replan::ForkImpossible, why }
        }
        abort => abort,
    }
}

/// Path of the `pg_ctl` that will start the node, found before anything changes; `None` without `--start`.
fn find_pg_ctl(config: &Config, target: &Target) -> Result<Option<PathBuf>, RewindError> {
    if !config.start {
        return Ok(None);
    }
    let major = target.control.file.major;
    start::find_pg_ctl(config, &target.directory, major).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wal_that_cannot_be_had_rules_out_the_fork_where_another_strategy_may_be_chosen() {
        let reason = |reason, strategy, wanted| {
            let abort = or_without_fork(Abort::replan(reason, "why"), strategy, wanted);
            match abort {
                Abort::Replan { reason, why } => {
                    assert_eq!(why, "why");
                    reason
                }
                Abort::Failed(error) => panic!("{error}"),
            }
        };
        use Replan::{ForkImpossible, SourceChanged, WalUnavailable};
        use Strategy::{Fork, Latest};
        use StrategyChoice::{Auto, Only};
        assert_eq!(reason(WalUnavailable, Fork, Auto), ForkImpossible);
        assert_eq!(reason(WalUnavailable, Fork, Only(Fork)), WalUnavailable);
        assert_eq!(reason(WalUnavailable, Latest, Auto), WalUnavailable);
        assert_eq!(reason(SourceChanged, Fork, Auto), SourceChanged);
    }
}
