//! A target that is claimed for a rewind: the state directory exists, and no server can start.
//!
//! The owner of a [`Claim`] decides how it ends. Dropping it leaves the target as it was found.

use std::io;
use std::sync::Arc;

use data_dir::DataDir;
use pg_format::DataPath;

use super::plan_reuse::before;
use crate::config::Config;
use crate::error::{Abort, Class, RewindError};
use crate::monitor::Monitor;
use crate::plan::Planned;
use crate::source::dial::Dial as _;
use crate::staging::disk::Disk;
use crate::staging::saved_plan::{PlanOptions, SavedPlan};
use crate::staging::state_directory::{self, Keep};
use crate::staging::{marks, pid_file, staged_bytes, state_error};
use crate::target::{Target, running};
use crate::task::{Closing, Gate};

/// What a run puts into the target before it changes it: the state directory and, once it is claimed,
/// `postmaster.pid`. Dropping this removes them and leaves the target as it was found.
#[derive(Debug)]
pub struct Prepared {
    directory: Arc<DataDir>,
    disk: Arc<dyn Disk>,
    monitor: Arc<dyn Monitor>,
    /// Whether dropping this removes what was put into the target.
    is_held: bool,
}

impl Prepared {
    fn of(target: &Target, monitor: &Arc<dyn Monitor>) -> Self {
        Self {
            directory: Arc::clone(&target.directory),
            disk: Arc::clone(&target.disk),
            monitor: Arc::clone(monitor),
            is_held: true,
        }
    }

    /// Restores the target, but keeps what was fetched for the next run. Without a saved plan nothing of it
    /// could be used.
    fn keep(mut self) {
        if !matches!(SavedPlan::read(&*self.disk), Ok(Some(_))) {
            return;
        }
        self.is_held = false;
        if let Err(error) = pid_file::restore(&*self.disk) {
            self.monitor
                .warning(&format!("could not restore the target's postmaster.pid: {error}"));
        }
        self.monitor.note(
            "the fetched data is kept in .pgrejoin: run the same command again to resume, or \
             pgrejoin rollback to remove it",
        );
    }

    /// Leaves everything where it is.
    fn leave(mut self) {
        self.is_held = false;
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        if self.is_held {
            clear_away(&*self.disk, &self.directory, &*self.monitor);
        }
    }
}

/// Pages in the state directory that were fetched for a plan that is not valid any more, as a cache for
/// another plan.
#[derive(Debug)]
pub struct PageCache {
    /// The files of the old plan, by their index in it.
    pub files: Vec<DataPath>,
    /// The state directory with the pages. The target may still be claimed.
    pub prepared: Prepared,
}

/// What an earlier run, or an earlier attempt of this one, has left.
#[derive(Debug)]
pub enum Leftover {
    /// Nothing, or nothing that can be used.
    Nothing,
    /// A plan that may still hold, and what was fetched for it.
    Plan(Box<SavedPlan>),
    /// Pages of a plan that does not hold any more.
    Cache(PageCache),
}

/// What a new claim keeps of an earlier run or attempt.
#[derive(Debug)]
pub enum Kept {
    /// Nothing.
    Nothing,
    /// The plan, and what was fetched for it.
    Plan,
    /// Its pages, as a cache.
    Cache(Prepared),
}

/// See the module.
#[derive(Debug)]
pub struct Claim {
    /// The saving of undo images, which runs in threads of its own. It is dropped, and so ended, before
    /// `prepared` is.
    saving: Closing,
    prepared: Prepared,
    /// Number of this run or attempt for this rewind, which is part of the names of its packs.
    run: u32,
}

impl Claim {
    /// Claims the target, if nobody has started it since it was inspected: a plan is made from what was read
    /// then.
    pub fn take(
        target: &Target,
        monitor: &Arc<dyn Monitor>,
        kept: Kept,
        run: u32,
    ) -> Result<Self, RewindError> {
        running::refuse_running(&target.directory)?;
        let (kept, prepared) = match kept {
            Kept::Nothing => (None, Prepared::of(target, monitor)),
            Kept::Plan => (Some(Keep::Plan), Prepared::of(target, monitor)),
            Kept::Cache(prepared) => (Some(Keep::Cache), prepared),
        };
        let claim = Self { saving: Closing::default(), prepared, run };
        let (disk, directory) = (&*target.disk, &*target.directory);
        let staging = target.staging.as_ref();
        marks::unseal(disk).map_err(state_error)?;
        let made = match kept {
            None => state_directory::prepare(disk, directory, staging),
            Some(keep) => state_directory::prepare_again(disk, directory, staging, keep),
        };
        made.map_err(state_error)?;
        pid_file::take(disk, directory.path())?;
        running::refuse_running(directory)?;
        if directory.control()?.bytes != target.control.bytes {
            let message = "PostgreSQL was started on the target while it was inspected: keep it \
                           stopped and run pgrejoin again";
            return Err(RewindError::new(Class::Target, message));
        }
        Ok(claim)
    }

    /// Keeps the plan for a run after this one.
    pub fn save_plan(
        &self,
        config: &Config,
        target: &Target,
        life: proto::model::Life,
        planned: &Planned,
    ) -> Result<(), RewindError> {
        let saved = SavedPlan {
            target_control: target.control.bytes.clone(),
            before: before(&planned.plan, &target.files),
            source: config.source.address(),
            life,
            options: PlanOptions::of(config),
            planned: planned.clone(),
            run: self.run,
            staging: target.staging.clone(),
            sync: config.sync,
        };
        saved.write(&*self.prepared.disk).map_err(|error| {
            RewindError::because(Class::Preflight, "could not save the plan in .pgrejoin", error)
        })
    }

    /// Number of this run or attempt for this rewind.
    pub fn run(&self) -> u32 {
        self.run
    }

    /// The gate that ends the saving of undo images.
    pub fn saving(&self) -> &Arc<Gate> {
        &self.saving.0
    }

    /// Gives the plan up, but keeps the pages that were fetched for it as a cache.
    fn retire(self) -> Leftover {
        let Self { saving, prepared, .. } = self;
        drop(saving);
        match SavedPlan::read(&*prepared.disk) {
            Ok(Some(saved)) => Leftover::cache_of(saved, prepared),
            Ok(None) | Err(_) => Leftover::Nothing,
        }
    }

    /// Restores the target, and keeps what was fetched if a later run may succeed with it.
    pub fn give_up(self, error: &RewindError) {
        let Self { saving, prepared, .. } = self;
        drop(saving);
        if error.a_later_run_may_succeed() {
            prepared.keep();
        }
    }

    /// Ends an attempt that came to no result. Returns what the next attempt can use.
    pub fn settle(self, abort: &Abort) -> Leftover {
        match abort {
            Abort::Replan { .. } => return self.retire(),
            Abort::Failed(error) => self.give_up(error),
        }
        Leftover::Nothing
    }

    /// Leaves everything where it is: from here on the marks say what is to be done.
    pub fn leave(self) {
        self.prepared.leave();
    }
}

/// Removes what was prepared from a target that was not changed.
fn clear_away(disk: &dyn Disk, directory: &DataDir, monitor: &dyn Monitor) {
    if let Err(error) = state_directory::remove(disk, directory) {
        monitor.warning(&format!(
            "the target is unchanged, but .pgrejoin could not be removed: {error}"
        ));
    }
}

impl Leftover {
    /// What an earlier run has left.
    pub fn of_an_earlier_run(disk: &dyn Disk) -> io::Result<Self> {
        let saved = SavedPlan::read(disk)?;
        Ok(saved.map_or(Self::Nothing, |saved| Self::Plan(Box::new(saved))))
    }

    /// Makes a cache of what was fetched for a plan that is not valid any more. A sealed set would not be
    /// complete without its packs, so the seal is removed first.
    ///
    /// # Errors
    /// The seal cannot be removed.
    pub fn retire_plan(
        saved: SavedPlan,
        target: &Target,
        monitor: &Arc<dyn Monitor>,
    ) -> Result<Self, RewindError> {
        marks::unseal(&*target.disk).map_err(state_error)?;
        Ok(Self::cache_of(saved, Prepared::of(target, monitor)))
    }

    /// A cache of what was fetched for a plan; [`Leftover::Nothing`] if there are no packs that can be moved.
    fn cache_of(saved: SavedPlan, prepared: Prepared) -> Self {
        let files = saved.planned.plan.files.into_iter().map(|file| file.path).collect();
        match staged_bytes::retire_packs(&*prepared.disk) {
            Ok(()) => Self::Cache(PageCache { files, prepared }),
            Err(_) => Self::Nothing,
        }
    }

    /// Number of runs and attempts for this rewind before this one.
    pub fn runs(&self) -> u32 {
        match self {
            Self::Nothing | Self::Cache(_) => 0,
            Self::Plan(saved) => saved.run,
        }
    }

    /// Removes what an earlier run left in a target that needs no rewind.
    pub fn discard(self, target: &Target, monitor: &dyn Monitor) {
        match self {
            Self::Nothing | Self::Cache(_) => {}
            Self::Plan(_) => clear_away(&*target.disk, &target.directory, monitor),
        }
    }

    /// Takes the value and leaves [`Leftover::Nothing`] in its place.
    pub fn take(&mut self) -> Self {
        std::mem::replace(self, Self::Nothing)
    }

    /// Ends the attempts with a failure. A cache is kept if another run may succeed with it. The plan of an
    /// earlier run that was not checked yet may still be valid, and stays.
    pub fn give_up(self, error: &RewindError) {
        match self {
            Self::Cache(cache) if error.a_later_run_may_succeed() => cache.prepared.keep(),
            Self::Nothing | Self::Plan(_) | Self::Cache(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Replan;
    use crate::staging::layout;
    use crate::test_values::{EmptyTarget, RecordingMonitor, node, planned};

    fn monitor() -> Arc<dyn Monitor> {
        Arc::new(RecordingMonitor::default())
    }

    fn claim(target: &EmptyTarget, kept: Kept) -> Claim {
        Claim::take(&target.target, &monitor(), kept, 1).expect("taken")
    }

    /// A claim with a plan, for which one pack was fetched.
    fn begun(target: &EmptyTarget) -> Claim {
        let claim = claim(target, Kept::Nothing);
        let saved = SavedPlan {
            target_control: target.target.control.bytes.clone(),
            before: Vec::new(),
            source: "source.example:7432".to_owned(),
            life: node([1; 16]).life(),
            options: PlanOptions {
                strategy: crate::plan::StrategyChoice::Auto,
                config_from_source: false,
                mirror_extra_files: false,
                tablespace_mapping: Vec::new(),
                staging_dir: None,
            },
            planned: planned(),
            run: 1,
            staging: None,
            sync: true,
        };
        saved.write(&*target.target.disk).expect("written");
        target.target.disk.create_file(&layout::pack("1-0000")).expect("a pack");
        claim
    }

    fn pack_is_there(target: &EmptyTarget) -> bool {
        target.names().iter().any(|name| name.ends_with("packs/1-0000"))
    }

    #[test]
    fn a_claim_that_is_dropped_leaves_the_target_as_it_was_found() {
        let target = EmptyTarget::new();
        let before = target.names();
        let claim = begun(&target);
        assert!(target.names().contains(&"postmaster.pid".to_owned()), "no server can start");
        drop(claim);
        assert_eq!(target.names(), before);
    }

    #[test]
    fn a_stale_pid_file_comes_back() {
        let target = EmptyTarget::new();
        let path = target.home.path().join("postmaster.pid");
        let mut file = std::fs::File::create(&path).unwrap();
        std::io::Write::write_all(&mut file, b"999999\n/elsewhere\n").unwrap();
        drop(begun(&target));
        assert_eq!(std::fs::read(&path).unwrap(), b"999999\n/elsewhere\n");
    }

    #[test]
    fn a_failure_that_a_later_run_may_not_meet_keeps_what_was_fetched() {
        let target = EmptyTarget::new();
        let lost = RewindError::transient("the link broke");
        let leftover = begun(&target).settle(&Abort::Failed(lost));
        assert!(matches!(leftover, Leftover::Nothing), "not for this run");
        assert!(pack_is_there(&target));
        assert!(!target.names().contains(&"postmaster.pid".to_owned()), "a server may start");
        let found = Leftover::of_an_earlier_run(&*target.target.disk).unwrap();
        assert!(matches!(&found, Leftover::Plan(saved) if saved.run == 1));
        assert_eq!(found.runs(), 1);
    }

    #[test]
    fn without_a_plan_nothing_is_kept() {
        let target = EmptyTarget::new();
        let before = target.names();
        let lost = RewindError::transient("the link broke");
        let leftover = claim(&target, Kept::Nothing).settle(&Abort::Failed(lost));
        assert!(matches!(leftover, Leftover::Nothing));
        assert_eq!(target.names(), before);
    }

    #[test]
    fn a_failure_that_stays_gives_all_of_it_back() {
        let target = EmptyTarget::new();
        let before = target.names();
        let damaged = RewindError::new(Class::Other, "the source is damaged");
        let leftover = begun(&target).settle(&Abort::Failed(damaged));
        assert!(matches!(leftover, Leftover::Nothing));
        assert_eq!(target.names(), before);
    }

    #[test]
    fn a_plan_that_does_not_hold_leaves_its_pages_as_a_cache() {
        let target = EmptyTarget::new();
        let before = target.names();
        let again = Abort::replan(Replan::SourceChanged, "it was restarted");
        let leftover = begun(&target).settle(&again);
        assert!(!pack_is_there(&target));
        assert!(target.names().iter().any(|name| name.ends_with("cache/1-0000")));
        // The next attempt takes it over; a failure that stays removes it.
        let Leftover::Cache(PageCache { prepared, .. }) = leftover else { panic!("{leftover:?}") };
        let next = claim(&target, Kept::Cache(prepared));
        assert!(target.names().iter().any(|name| name.ends_with("cache/1-0000")));
        drop(next);
        assert_eq!(target.names(), before);
    }

    #[test]
    fn a_cache_is_kept_by_a_failure_that_a_later_run_may_not_meet() {
        let target = EmptyTarget::new();
        let before = target.names();
        let restarted = || Abort::replan(Replan::SourceChanged, "restarted");
        let lost = RewindError::transient("the link broke");
        begun(&target).settle(&restarted()).give_up(&lost);
        assert!(target.names().iter().any(|name| name.ends_with("cache/1-0000")));
        assert!(!target.names().contains(&"postmaster.pid".to_owned()), "a server may start");
        let damaged = RewindError::new(Class::Other, "the source is damaged");
        begun(&target).settle(&restarted()).give_up(&damaged);
        assert_eq!(target.names(), before);
    }

    #[test]
    fn a_target_that_is_in_use_by_the_next_attempt_is_given_back() {
        let target = EmptyTarget::new();
        let before = target.names();
        let leftover = begun(&target).settle(&Abort::replan(Replan::SourceChanged, "restarted"));
        let Leftover::Cache(PageCache { prepared, .. }) = leftover else { panic!("{leftover:?}") };
        let mut working = std::process::Command::new("sleep");
        let mut working = working.arg("60").current_dir(target.home.path()).spawn().unwrap();
        let refused = Claim::take(&target.target, &monitor(), Kept::Cache(prepared), 2);
        working.kill().unwrap();
        working.wait().unwrap();
        assert_eq!(refused.unwrap_err().class(), Class::Target);
        assert_eq!(target.names(), before, "neither our pid file nor the cache is left");
    }

    #[test]
    fn a_plan_that_was_not_looked_at_survives_every_failure() {
        let target = EmptyTarget::new();
        let lost = RewindError::transient("the link broke");
        drop(begun(&target).settle(&Abort::Failed(lost)));
        let before = target.names();
        let leftover = Leftover::of_an_earlier_run(&*target.target.disk).unwrap();
        let refused = RewindError::new(Class::Target, "another cluster");
        leftover.give_up(&refused);
        assert_eq!(target.names(), before);
        // A target that needs no rewind needs no plan.
        let leftover = Leftover::of_an_earlier_run(&*target.target.disk).unwrap();
        leftover.discard(&target.target, &*monitor());
        assert!(!target.names().iter().any(|name| name.starts_with(".pgrejoin")));
    }

    #[test]
    fn a_target_that_was_started_since_is_not_taken() {
        let target = EmptyTarget::new();
        let before = target.names();
        let path = target.home.path().join("global/pg_control");
        let mut bytes = target.target.control.bytes.clone();
        bytes[24..28].copy_from_slice(&5_u32.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..288]).to_le_bytes();
        bytes[288..292].copy_from_slice(&crc);
        let mut file = std::fs::File::create(&path).unwrap();
        std::io::Write::write_all(&mut file, &bytes).unwrap();
        let refused = Claim::take(&target.target, &monitor(), Kept::Nothing, 1).unwrap_err();
        assert_eq!(refused.class(), Class::Target);
        assert_eq!(target.names(), before, "nothing is left of the attempt");
    }

    #[test]
    fn what_is_sealed_is_left_to_whoever_applies_it() {
        let target = EmptyTarget::new();
        let claim = begun(&target);
        let taken = target.names();
        claim.leave();
        assert_eq!(target.names(), taken);
    }
}
