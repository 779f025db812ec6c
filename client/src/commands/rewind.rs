//! The pipeline: from a locked target to a rewound one. Reads like the list of its steps.

use std::sync::Arc;
use std::time::{Duration, Instant};

use data_dir::DataDir;
use pg_format::{DataPath, TimelineHistory};
use proto::model::Description;
use tokio_util::task::AbortOnDropHandle;

use crate::apply::before_images::Gate;
use crate::apply::change::Change;
use crate::cli::StrategyArg;
use crate::commands::recover::{clear_away, earlier};
use crate::commands::status::by_marks;
use crate::config::Config;
use crate::divergence::common_wal::{Analysis, Subject};
use crate::divergence::compat;
use crate::error::{Class, RewindError};
use crate::monitor::steps::Steps;
use crate::monitor::{Monitor, Step};
use crate::outcome::Outcome;
use crate::plan::{Plan, Strategy};
use crate::prepare::plan_reuse;
use crate::prepare::planning::Planned;
use crate::prepare::seal::{Attempt, Sealing};
use crate::source::Session;
use crate::source::session::{Buffers, Link};
use crate::source_checks::check_description;
use crate::staging::disk::{Disk, RealDisk};
use crate::staging::external::Staging;
use crate::staging::saved_plan::SavedPlan;
use crate::staging::state_directory::{self, Keep};
use crate::staging::{marks, pid_file, staged_bytes, state_error};
use crate::strategy::candidates::{Ways, tablespaces_against_fork};
use crate::target::{self, Target, recovery_conf};
use crate::task::{Asked, Stop, blocking, joined};

/// What the source said longer ago is asked again: how long the target is looked at must not decide how
/// old the checkpoint is that replay begins at.
const FRESH: Duration = Duration::from_secs(2);

/// Plans made anew when the source changed under a run.
const ATTEMPTS_MAX: u32 = 3;
/// How long is waited before it.
const PAUSE: Duration = Duration::from_millis(500);

/// Where packs and WAL are staged, if not in the state directory: where an earlier run that staged in the same
/// directory did, or in a new one of ours.
fn staging_of(directory: &Arc<DataDir>, config: &Config) -> Result<Option<Staging>, RewindError> {
    let Some(wanted) = &config.staging_dir else {
        return Ok(None);
    };
    let plain = RealDisk::new(Arc::clone(directory), None, config.sync).map_err(state_error)?;
    let known = state_directory::staging(&plain).map_err(state_error)?;
    let staging = match known.filter(|known| known.directory == *wanted) {
        Some(known) => Ok(known),
        None => Staging::new(wanted),
    };
    staging.map(Some).map_err(state_error)
}

/// The disk of a locked target.
fn disk_of(
    directory: &Arc<DataDir>,
    config: &Config,
    staging: Option<Staging>,
) -> Result<Arc<dyn Disk>, RewindError> {
    let disk = RealDisk::new(Arc::clone(directory), staging, config.sync);
    disk.map(|disk| Arc::new(disk) as Arc<dyn Disk>).map_err(state_error)
}

/// Rewinds, or says why not.
pub async fn rewind(
    config: Config,
    monitor: Arc<dyn Monitor>,
    stop: Stop,
) -> Result<Outcome, RewindError> {
    let target = config.target.clone();
    by_marks(&target, Box::pin(rewind_locked(config, monitor, stop)).await)
}

async fn rewind_locked(
    config: Config,
    monitor: Arc<dyn Monitor>,
    stop: Stop,
) -> Result<Outcome, RewindError> {
    let mut steps = Steps::new(Arc::clone(&monitor));
    steps.begin(Step::Inspect);
    recovery_conf::check(&config)?;
    let path = config.target.clone();
    let directory = Arc::new(blocking(move || target::lock(&path)).await?);
    if let Some(mut outcome) = earlier(&directory, &config, &monitor, &stop).await? {
        start_if_asked(&config, &directory, None, (&mut steps, &stop)).await?;
        outcome.times = steps.end();
        return Ok(outcome);
    }
    let staging = staging_of(&directory, &config)?;
    let disk = disk_of(&directory, &config, staging.clone())?;
    let stored = match config.dry_run {
        true => None,
        false => SavedPlan::read(&*disk).map_err(state_error)?,
    };
    let opening = AbortOnDropHandle::new(tokio::spawn(open(config.clone(), 1)));
    let opening = Some((Instant::now(), opening));
    let looked = Arc::clone(&directory);
    let looked_config = config.clone();
    let looked_disk = Arc::clone(&disk);
    let looking = blocking(move || target::inspect(&looked, &*looked_disk, &looked_config));
    let target = tokio::select! {
        target = looking => target?,
        () = stop.cancelled.cancelled() => return Err(interrupted()),
    };
    let target = Arc::new(target);
    let (checked, checked_config) = (Arc::clone(&target), config.clone());
    let told = Arc::clone(&monitor);
    let checking = blocking(move || recovery_conf::check_target(&checked_config, &checked, &*told));
    tokio::select! {
        checked = checking => checked?,
        () = stop.cancelled.cancelled() => return Err(interrupted()),
    }
    let run = Run {
        undo: config.undo,
        gate: Arc::default(),
        config,
        target,
        directory,
        disk,
        staging,
        monitor,
        steps,
        stop,
        prepared: false,
        found: stored.is_some(),
        runs: stored.as_ref().map_or(0, |stored| stored.run),
        cache: None,
        stored,
        opening,
        pg_ctl: None,
    };
    run.run().await
}

/// Connects and learns what the source is.
async fn open(config: Config, attempt: u32) -> Result<(Session, Description), RewindError> {
    let link = Link {
        connections: config.connections,
        patience: config.timeout,
        max_rate: config.max_rate,
        buffers: Buffers::default(),
    };
    let opened = match attempt {
        1 => Session::open(config.source, link).await,
        _ => Session::open_again(&config.source, link).await,
    };
    let (session, mut source) = opened?;
    source.wal_segments.sort_unstable();
    Ok((session, source))
}

fn interrupted() -> RewindError {
    RewindError::new(Class::Interrupted, "stopped by a signal; the target is as it was")
}

/// Starts the node if that was asked for. `pg_ctl` is looked for if it was not found before.
async fn start_if_asked(
    config: &Config,
    directory: &Arc<DataDir>,
    pg_ctl: Option<std::path::PathBuf>,
    (steps, stop): (&mut Steps, &Stop),
) -> Result<(), RewindError> {
    if !config.start || config.dry_run {
        return Ok(());
    }
    if stop.signals.stop() {
        let message =
            "the target is rewound; it was not started, because a signal asked for an end";
        return Err(RewindError::new(Class::Rewound, message));
    }
    steps.begin(Step::Start);
    let (config, directory) = (config.clone(), Arc::clone(directory));
    let signals = Arc::clone(&stop.signals);
    blocking(move || {
        let pg_ctl = match pg_ctl {
            Some(pg_ctl) => pg_ctl,
            None => {
                let major = directory.control()?.file.major;
                crate::target::start::find_pg_ctl(&config, &directory, major)?
            }
        };
        crate::target::start::start(&config, &directory, &pg_ctl, &signals)
    })
    .await
    .map_err(RewindError::rewound)
}

/// One run against a target that no other rewind has begun to change.
pub(crate) struct Run {
    pub(crate) config: Config,
    pub(crate) target: Arc<Target>,
    pub(crate) directory: Arc<DataDir>,
    pub(crate) disk: Arc<dyn Disk>,
    /// Where packs and WAL are staged, if not in the state directory.
    staging: Option<Staging>,
    pub(crate) monitor: Arc<dyn Monitor>,
    pub(crate) steps: Steps,
    pub(crate) stop: Stop,
    /// Whether the state directory is this run's: only then it may clear it away. What an earlier run
    /// left stays as it is until its plan was looked at.
    pub(crate) prepared: bool,
    /// Whether an earlier run left a plan.
    found: bool,
    /// Plans made and runs begun before this one, for the same rewind.
    pub(crate) runs: u32,
    /// Files of a plan that did not hold, whose pages are a cache for the next.
    pub(crate) cache: Option<Vec<DataPath>>,
    /// The plan of an earlier run that did not come to its seal.
    pub(crate) stored: Option<SavedPlan>,
    /// The source, asked what it is while the target was looked at, and since when.
    opening: Option<(Instant, Asked<(Session, Description)>)>,
    /// What the node is started with.
    pub(crate) pg_ctl: Option<std::path::PathBuf>,
    /// Whether there is room for undo images.
    pub(crate) undo: bool,
    /// Of the attempt under way.
    pub(crate) gate: Arc<Gate>,
}

/// A source that has described itself.
struct Opened {
    session: Session,
    source: Arc<Description>,
    history: Arc<TimelineHistory>,
}

/// Where *fork* was the cheapest and its WAL cannot be had, the others are tried.
fn or_without_fork(ended: Result<Attempt, RewindError>) -> Result<Attempt, RewindError> {
    match ended {
        Err(error) if error.class() == Class::WalUnavailable => {
            let why = error.chain();
            Ok(Attempt::Again { without_fork: Some(why.clone()), why })
        }
        ended => ended,
    }
}

impl Run {
    async fn run(mut self) -> Result<Outcome, RewindError> {
        self.steps.begin(Step::Describe);
        let cancelled = self.stop.cancelled.clone();
        let mut forbid_fork = None;
        for attempt in 1..=ATTEMPTS_MAX {
            let made = tokio::select! {
                made = self.attempt(attempt, forbid_fork.clone()) => made,
                () = cancelled.cancelled() => Err(interrupted()),
            };
            match made {
                Ok(Attempt::Finished(mut outcome)) => {
                    // What an earlier run had prepared is not needed any more.
                    self.prepared |= self.found;
                    self.abandon();
                    let running = (&mut self.steps, &self.stop);
                    start_if_asked(&self.config, &self.directory, None, running).await?;
                    outcome.times = self.steps.end();
                    return Ok(*outcome);
                }
                Ok(Attempt::Sealed(sealed)) => return self.apply(*sealed).await,
                Ok(Attempt::Again { why, without_fork }) => {
                    self.retire();
                    if attempt < ATTEMPTS_MAX {
                        self.monitor.note(&format!("{why}: planning again"));
                    } else {
                        self.abandon();
                        let message = format!("{why}, {ATTEMPTS_MAX} times: try again later");
                        return Err(RewindError::new(Class::Transient, message));
                    }
                    forbid_fork = without_fork.or(forbid_fork);
                }
                Err(error) if error.needs_new_plan() && attempt < ATTEMPTS_MAX => {
                    self.retire();
                    self.monitor.note(&format!("{}: planning again", error.chain()));
                    // Whatever the source is doing takes a moment.
                    tokio::time::sleep(PAUSE).await;
                }
                Err(error) if error.class() == Class::Transient => {
                    self.keep();
                    return Err(error);
                }
                Err(error) => {
                    self.abandon();
                    return Err(error);
                }
            }
        }
        Err(RewindError::new(Class::Transient, "the source kept changing: try again later"))
    }

    /// Leaves the target as it was, and what was fetched for the next run.
    fn keep(&mut self) {
        let has_plan = matches!(SavedPlan::read(&*self.disk), Ok(Some(_)));
        if !self.prepared || !has_plan {
            return self.abandon();
        }
        std::mem::take(&mut self.gate).close();
        if let Err(error) = pid_file::restore(&*self.disk) {
            self.monitor.warning(&format!("postmaster.pid could not be given back: {error}"));
        }
        self.monitor.note(
            "what was fetched is kept in .pgrejoin: run the same command again to go on with it, \
             or pgrejoin rollback to clear it away",
        );
    }

    /// Gives a plan up and keeps the pages fetched for it, by what file they are of.
    pub(crate) fn retire(&mut self) {
        // One that was not looked at yet may still hold.
        if !self.prepared || self.stored.is_some() {
            return;
        }
        std::mem::take(&mut self.gate).close();
        let stored = SavedPlan::read(&*self.disk).ok().flatten();
        let retired = stored.filter(|_| staged_bytes::retire_packs(&*self.disk).is_ok());
        self.cache =
            retired.map(|stored| stored.plan.files.into_iter().map(|file| file.path).collect());
        if self.cache.is_none() {
            self.abandon();
        }
    }

    /// Leaves the target as it was found.
    pub(crate) fn abandon(&mut self) {
        if !std::mem::take(&mut self.prepared) {
            return;
        }
        std::mem::take(&mut self.gate).close();
        if let Err(error) = clear_away(&*self.disk, &self.directory) {
            self.monitor.warning(&format!(
                "the target is unchanged, but .pgrejoin could not be removed: {error}"
            ));
        }
    }

    /// The session with the source, and what it said of itself if that fits together and fits this node.
    async fn described(&mut self, number: u32) -> Result<Opened, RewindError> {
        let opening = self.opening.take().filter(|(since, _)| since.elapsed() < FRESH);
        let (session, source) = match opening {
            Some((_, opening)) => joined(opening).await?,
            None => open(self.config.clone(), number).await?,
        };
        compat::check(&self.target, &source)?;
        compat::check_settings(&self.target, &source, self.config.start, &*self.monitor)?;
        let history = source.node.history().map_err(|error| {
            RewindError::because(Class::Transient, "the source's history is not usable", error)
        })?;
        check_description(&source, &history)?;
        Ok(Opened { session, source: Arc::new(source), history: Arc::new(history) })
    }

    /// What both nodes' WAL says, unless the target's does not tell what its pages hold.
    async fn analysis(
        &mut self,
        session: &Session,
        source: &Arc<Description>,
        history: &Arc<TimelineHistory>,
    ) -> Result<Analysis, RewindError> {
        if self.target.unstarted {
            return Ok(Analysis::not_rewindable(
                "the target was rewound before and not started since: its WAL does not tell what its pages hold",
            ));
        }
        self.analyse(session, source, history).await
    }

    async fn attempt(
        &mut self,
        number: u32,
        forbid_fork: Option<String>,
    ) -> Result<Attempt, RewindError> {
        let Opened { session, source, history } = self.described(number).await?;
        self.steps.begin(Step::Fork);
        let ahead = self.ask_ahead(&session, (&source, &history));
        if let Some(outcome) = self.already_rewound(&session, &source, &history).await? {
            return Ok(Attempt::Finished(Box::new(outcome)));
        }
        let analysis = self.analysis(&session, &source, &history).await?;
        if let Some(outcome) = self.nothing_to_do(&analysis, &source, &history)? {
            return Ok(Attempt::Finished(Box::new(outcome)));
        }
        self.pg_ctl = self.find_pg_ctl()?;
        let mapping = &self.config.tablespace_mapping;
        let tablespaces = tablespaces_against_fork(&self.target, &source, mapping);
        let forbid_fork = forbid_fork.or(tablespaces);
        let stored = self.go_on(&source, &analysis)?;
        let asked = stored.is_none().then_some((&analysis, ahead.changes));
        let changes = self.changes(&session, (&source, &history), asked);
        let ((announced, wal), changes) = tokio::try_join!(joined(ahead.announced), changes)?;
        let planned = match stored {
            Some(planned) => planned,
            None => {
                self.steps.begin(Step::List);
                let files = joined(ahead.files).await?;
                let (forbid_fork, end) = (forbid_fork.as_deref(), announced.end);
                let ways = Ways { analysis: &analysis, changes: &changes, forbid_fork, end };
                match self.plan_anew(&session, (&source, &history), files, ways).await? {
                    Ok(planned) => planned,
                    Err(attempt) => return Ok(attempt),
                }
            }
        };
        let wal = joined(wal).await?;
        self.prepare(&source, &planned)?;
        let Planned { choice, source_redo, plan, files, hash_bytes, .. } = planned;
        let (kept, strategy) = (self.kept(&plan), choice.strategy);
        let sealing = Sealing {
            config: &self.config,
            target: &self.target,
            disk: &self.disk,
            staging: self.staging.as_ref(),
            monitor: &self.monitor,
            session,
            announced,
            source: &source,
            history: &history,
            analysis: &analysis,
            choice: &choice,
            source_redo,
            attempt: self.runs,
            files: &files,
            stop: &self.stop,
            hash_bytes,
            plan,
            kept,
            ahead: wal,
            cache: self.cache.take(),
            undo: self.undo.then(|| Arc::clone(&self.gate)),
        };
        let ended = Box::pin(sealing.run(&mut self.steps)).await;
        if strategy == Strategy::Fork && self.config.strategy == StrategyArg::Auto {
            return or_without_fork(ended);
        }
        ended
    }

    /// What the node will be started with, found before anything changes.
    pub(crate) fn find_pg_ctl(&self) -> Result<Option<std::path::PathBuf>, RewindError> {
        if !self.config.start {
            return Ok(None);
        }
        let major = self.target.control.file.major;
        crate::target::start::find_pg_ctl(&self.config, &self.directory, major).map(Some)
    }

    /// Makes the state directory and takes the target; the plan is kept there for a run after this.
    fn prepare(&mut self, source: &Description, planned: &Planned<'_>) -> Result<(), RewindError> {
        let Planned { choice, source_redo, plan, files, hash_bytes, again, .. } = planned;
        self.take_target(*again)?;
        self.runs += 1;
        let stored = SavedPlan {
            target_control: self.target.control.bytes.clone(),
            before: plan_reuse::before(plan, &self.target),
            life: plan_reuse::life(&source.node),
            options: plan_reuse::options(&self.config),
            strategy: (choice.strategy.name().to_owned(), choice.why.clone()),
            start: choice.start,
            source_redo: *source_redo,
            plan: plan.clone(),
            listed: files.clone(),
            hash_bytes: *hash_bytes,
            run: self.runs,
            staging: self.staging.clone(),
            sync: self.config.sync,
        };
        stored.write(&*self.disk).map_err(|error| {
            RewindError::because(Class::Preflight, "could not write the plan to staging", error)
        })
    }

    /// Makes the state directory and takes the target, if nobody has started it since it was looked
    /// at: everything the plan says was read before.
    pub(crate) fn take_target(&mut self, again: bool) -> Result<(), RewindError> {
        target::running::refuse_running(&self.directory)?;
        self.prepared = true;
        let (disk, directory) = (&*self.disk, &*self.directory);
        marks::unseal(disk).map_err(state_error)?;
        let staging = self.staging.as_ref();
        let made = match (again, &self.cache) {
            (true, _) => state_directory::prepare_again(disk, directory, (staging, Keep::Plan)),
            (false, Some(_)) => {
                state_directory::prepare_again(disk, directory, (staging, Keep::Cache))
            }
            (false, None) => state_directory::prepare(disk, directory, staging),
        };
        made.map_err(state_error)?;
        pid_file::take(&*self.disk, &self.config.target)?;
        target::running::refuse_running(&self.directory)?;
        if self.directory.control()?.bytes != self.target.control.bytes {
            let message = "PostgreSQL was started on the target while it was looked at: keep it \
                           stopped and run again";
            return Err(RewindError::new(Class::Target, message));
        }
        Ok(())
    }

    async fn analyse(
        &self,
        session: &Session,
        source: &Arc<Description>,
        history: &Arc<TimelineHistory>,
    ) -> Result<Analysis, RewindError> {
        let (target, session) = (Arc::clone(&self.target), session.clone());
        let (source, history) = (Arc::clone(source), Arc::clone(history));
        let config = self.config.clone();
        let runtime = tokio::runtime::Handle::current();
        blocking(move || {
            let own_command = target.settings.get("restore_command").map(str::to_owned);
            Subject {
                target: &target,
                source: &source,
                source_history: &history,
                session,
                runtime,
                wal_archive: config.wal_archive,
                restore_command: config.restore_command.or(own_command),
            }
            .analyse()
        })
        .await
    }

    pub(crate) fn kept(&self, plan: &Plan) -> Vec<String> {
        let slots = &plan.slots;
        if slots.is_empty() {
            return Vec::new();
        }
        vec![format!("replication slots of the target are removed: {}", slots.join(", "))]
    }

    /// Changes the target. From here on nothing needs the source.
    async fn apply(
        mut self,
        sealed: crate::prepare::seal::SealedRun,
    ) -> Result<Outcome, RewindError> {
        self.steps.begin(Step::Apply);
        let crate::prepare::seal::SealedRun { manifest, mut outcome } = sealed;
        let (directory, disk) = (Arc::clone(&self.directory), Arc::clone(&self.disk));
        let (monitor, signals) = (Arc::clone(&self.monitor), Arc::clone(&self.stop.signals));
        let applied = blocking(move || {
            if signals.stop() {
                return Err(interrupted());
            }
            target::running::refuse_running(&directory)?;
            let change = Change {
                manifest: &manifest,
                disk: &*disk,
                directory: &directory,
                signals: &signals,
                monitor: &*monitor,
            };
            change.redo()
        })
        .await;
        if let Err(error) = applied {
            // The marks decide, not the kind of error: whatever went wrong, what was sealed is all
            // there is to finish a target that was changed.
            let changed = marks::is_being_changed(&self.config.target);
            if !changed && !matches!(error.class(), Class::Unfinished | Class::Rewound) {
                self.abandon();
            }
            return Err(error);
        }
        let pg_ctl = self.pg_ctl.take();
        let running = (&mut self.steps, &self.stop);
        start_if_asked(&self.config, &self.directory, pg_ctl, running).await?;
        outcome.times = self.steps.end();
        Ok(outcome)
    }
}
