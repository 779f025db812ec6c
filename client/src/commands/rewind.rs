//! `pgrejoin rewind`: from a locked target to a rewound one, step by step.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use data_dir::DataDir;

use super::attempt::{Attempted, Attempts, Opening, Ready, attempt};
use super::recover;
use super::status::by_marks;
use crate::apply::change::TargetChange;
use crate::config::Config;
use crate::error::{Abort, Replan, RewindError, TargetState};
use crate::monitor::{Monitor, Step};
use crate::outcome::Outcome;
use crate::prepare::claim::Claim;
use crate::staging::disk::RealDisk;
use crate::staging::external::Staging;
use crate::staging::manifest::Manifest;
use crate::staging::{marks, state_directory, state_error};
use crate::target::{self, Target, recovery_conf, running, start};
use crate::task::{Context, Stop, blocking};

/// Number of plans that one run makes at most, if the source changes while it is read.
const ATTEMPTS_MAX: u32 = 3;
/// Pause before another plan: whatever the source is doing takes a moment.
const PAUSE: Duration = Duration::from_millis(500);

/// Rewinds the target.
///
/// # Errors
/// The error says in which state the target is, see [`RewindError::target`].
pub async fn rewind(
    config: Config,
    monitor: Arc<dyn Monitor>,
    stop: Stop,
) -> Result<Outcome, RewindError> {
    let cx = Context::new(monitor, stop);
    let done = Box::pin(rewind_and_start(&cx, &config)).await;
    let outcome = by_marks(&config.target, done)?;
    Ok(Outcome { times: cx.steps.end(), ..outcome })
}

async fn rewind_and_start(cx: &Context, config: &Config) -> Result<Outcome, RewindError> {
    config.warnings.iter().for_each(|warning| cx.monitor.warning(warning));
    cx.steps.begin(Step::Inspect);
    recovery_conf::check(config)?;
    let path = config.target.clone();
    let locked = Arc::new(blocking(move || target::lock(&path)).await?);
    if let Some(outcome) = recover::finish_earlier(cx, config, &locked).await? {
        start_if_asked(cx, config, &locked, None).await?;
        return Ok(outcome);
    }
    let opening = Opening::begin(config);
    let target = Arc::new(cx.stop.unless(inspected(cx, config, &locked)).await?);
    cx.steps.begin(Step::Describe);
    let (outcome, pg_ctl) = match attempts(cx, config, &target, opening).await? {
        Attempted::Report(outcome) => (*outcome, None),
        Attempted::Sealed(ready) => {
            let Ready { claim, rewind, pg_ctl } = *ready;
            apply(cx, &target, claim, rewind.manifest).await?;
            (rewind.outcome, pg_ctl)
        }
    };
    start_if_asked(cx, config, &locked, pg_ctl).await?;
    Ok(outcome)
}

/// Inspects the locked target, and refuses it if it cannot be rewound.
async fn inspected(
    cx: &Context,
    config: &Config,
    locked: &Arc<DataDir>,
) -> Result<Target, RewindError> {
    let (directory, config) = (Arc::clone(locked), config.clone());
    let monitor = Arc::clone(&cx.monitor);
    blocking(move || {
        let staging = staging_of(&directory, &config)?;
        let target = target::inspect(&directory, staging, &config)?;
        target::check_unreadable(&config, &target, &*monitor)?;
        recovery_conf::check_target(&config, &target, &*monitor)?;
        Ok(target)
    })
    .await
}

/// Where packs and WAL are staged, if not in the state directory: in the directory that an earlier run
/// created below the same `--staging-dir`, or in a new one.
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

/// Makes attempts until one comes to a result. If a plan is not valid any more, another one is made, a
/// limited number of times.
async fn attempts(
    cx: &Context,
    config: &Config,
    target: &Arc<Target>,
    opening: Opening,
) -> Result<Attempted, RewindError> {
    let mut attempts = Attempts::new(config, target, opening)?;
    let mut number = 1;
    loop {
        let (reason, why) = match attempt(cx, config, target, &mut attempts).await {
            Ok(attempted) => return Ok(attempted),
            Err(Abort::Failed(error)) => {
                attempts.give_up(&error);
                return Err(error);
            }
            Err(Abort::Replan { reason, why }) => (reason, why),
        };
        if number == ATTEMPTS_MAX {
            // The attempts own what they fetched, and it goes with them: it has not helped so often.
            let message = format!("{why}; gave up after {ATTEMPTS_MAX} attempts: try again later");
            return Err(RewindError::transient(message));
        }
        number += 1;
        cx.monitor.note(&format!("{why}: planning again"));
        attempts.learn(reason, why);
        if matches!(reason, Replan::SourceChanged | Replan::WalUnavailable) {
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// Changes the target. From here on nothing needs the source.
async fn apply(
    cx: &Context,
    target: &Arc<Target>,
    claim: Claim,
    manifest: Manifest,
) -> Result<(), RewindError> {
    cx.steps.begin(Step::Apply);
    let (cx, changed) = (cx.clone(), Arc::clone(target));
    let applied = blocking(move || {
        cx.stop.signals.check()?;
        running::refuse_running(&changed.directory)?;
        let change = TargetChange {
            manifest: &manifest,
            disk: &*changed.disk,
            directory: &changed.directory,
            signals: &cx.stop.signals,
            monitor: &*cx.monitor,
        };
        change.redo()
    })
    .await;
    // The marks decide, not the kind of error: once the target is being changed, only the sealed set can
    // finish it.
    match &applied {
        Err(error)
            if error.target() == TargetState::Unchanged
                && !marks::is_being_changed(target.directory.path()) =>
        {
            claim.give_up(error);
        }
        _ => claim.leave(),
    }
    applied
}

/// Starts the node if that was asked for. Looks for `pg_ctl` if it was not found before.
async fn start_if_asked(
    cx: &Context,
    config: &Config,
    directory: &Arc<DataDir>,
    pg_ctl: Option<PathBuf>,
) -> Result<(), RewindError> {
    if !config.start || config.dry_run {
        return Ok(());
    }
    if cx.stop.signals.stop() {
        let message = "the target is rewound, but PostgreSQL was not started because the run was \
                       stopped by a signal";
        return Err(RewindError::interrupted(message).leaving(TargetState::Rewound));
    }
    cx.steps.begin(Step::Start);
    let (config, directory) = (config.clone(), Arc::clone(directory));
    let signals = Arc::clone(&cx.stop.signals);
    let started = blocking(move || {
        let pg_ctl = match pg_ctl {
            Some(pg_ctl) => pg_ctl,
            None => {
                let major = directory.control()?.file.major;
                start::find_pg_ctl(&config, &directory, major)?
            }
        };
        start::start(&config, &directory, &pg_ctl, &signals)
    });
    started.await.map_err(|error| error.leaving(TargetState::Rewound))
}
