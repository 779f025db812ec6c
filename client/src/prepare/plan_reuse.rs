//! Whether the plan of an earlier run still holds. Pure but for the places of new tablespaces.

use proto::model::Node;

use crate::config::Config;
use crate::divergence::Divergence;
use crate::plan::{FileAction, Plan, Planned, PlannedFile, Strategy, TargetFiles};
use crate::staging::disk::FileStat;
use crate::staging::saved_plan::{PlanOptions, SavedPlan};
use crate::target::Target;
use crate::target::places::check_place;

/// Why a saved plan does not hold any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotReusable {
    /// It was made for another `pg_control`.
    #[error("PostgreSQL was started on the target since")]
    TargetStarted,
    /// Files that it changes are not what they were.
    #[error("files of the target changed since")]
    TargetChanged,
    /// It was made for another life of the source.
    #[error("the source was restarted, promoted or stopped since, or it is another node")]
    OtherSource,
    /// It was made with other options.
    #[error("it was made with other options")]
    OtherOptions,
    /// The directory for a new tablespace is not empty or not usable any more.
    #[error("the directory for a new tablespace is no longer empty or usable")]
    PlaceTaken,
    /// Nothing replays what happened to configuration and extra files since they were fetched.
    #[error("configuration and extra files of the source may have changed since")]
    UnloggedFiles,
    /// It is not known any more which pages the target changed.
    #[error("the target's WAL no longer shows which pages it changed")]
    WalChanged,
}

/// The planned files as they are on the target.
pub fn before(plan: &Plan, target: &TargetFiles) -> Vec<Option<FileStat>> {
    plan.files.iter().map(|file| FileStat::of(target.get(&file.path)?)).collect()
}

fn place_is_taken(file: &PlannedFile) -> bool {
    match &file.action {
        FileAction::MakeDirectory { link: Some(place) } => check_place(place).is_err(),
        _ => false,
    }
}

/// The saved plan, if it holds.
///
/// # Errors
/// Why it does not.
pub fn reusable(
    saved: &SavedPlan,
    config: &Config,
    target: &Target,
    source: &Node,
    divergence: &Divergence,
) -> Result<Planned, NotReusable> {
    if saved.target_control != target.control.bytes {
        return Err(NotReusable::TargetStarted);
    }
    let planned = &saved.planned;
    if saved.before != before(&planned.plan, &target.files) {
        return Err(NotReusable::TargetChanged);
    }
    holds_for(saved, &PlanOptions::of(config), source)?;
    if planned.strategy != Strategy::Compare && divergence.target_changes.is_err() {
        return Err(NotReusable::WalChanged);
    }
    let Divergence { fork, target_end, .. } = *divergence;
    Ok(Planned { fork, target_end, ..planned.clone() })
}

/// Whether a saved plan holds for these options and this source.
fn holds_for(saved: &SavedPlan, options: &PlanOptions, source: &Node) -> Result<(), NotReusable> {
    if saved.life != source.life() {
        return Err(NotReusable::OtherSource);
    }
    if saved.options != *options {
        return Err(NotReusable::OtherOptions);
    }
    if saved.planned.plan.files.iter().any(place_is_taken) {
        return Err(NotReusable::PlaceTaken);
    }
    if options.config_from_source || options.mirror_extra_files {
        return Err(NotReusable::UnloggedFiles);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use data_dir::{Entry, EntryKind};
    use pg_format::{DataPath, Lsn};

    use super::*;
    use crate::config::TablespaceMapping;
    use crate::error::NotPossible;
    use crate::plan::StrategyChoice;
    use crate::test_values::{EmptyTarget, config, control_bytes, node, planned};

    fn options() -> PlanOptions {
        PlanOptions {
            strategy: StrategyChoice::Auto,
            config_from_source: false,
            mirror_extra_files: false,
            tablespace_mapping: Vec::new(),
            staging_dir: None,
        }
    }

    fn saved() -> SavedPlan {
        SavedPlan {
            target_control: b"control".to_vec(),
            before: Vec::new(),
            source: "source.example:7432".to_owned(),
            life: node([1; 16]).life(),
            options: options(),
            planned: planned(),
            run: 1,
            staging: None,
            sync: true,
        }
    }

    /// In containers both postmasters may have number 1 and the same start second.
    #[test]
    fn two_nodes_behind_one_address_are_two_lives() {
        let (one, other) = (node([1; 16]), node([2; 16]));
        assert!(one.same_life(&node([1; 16])) && !one.same_life(&other));
        assert_eq!(one.life(), node([1; 16]).life());
        assert_ne!(one.life(), other.life());
        let restarted = Node { postmaster: Some((1, 1_700_000_001)), ..one.clone() };
        assert!(!one.same_life(&restarted));
        assert_ne!(one.life(), restarted.life());
    }

    #[test]
    fn a_plan_holds_for_the_same_life_of_the_source_alone() {
        assert_eq!(holds_for(&saved(), &options(), &node([1; 16])), Ok(()));
        let other = holds_for(&saved(), &options(), &node([2; 16]));
        assert_eq!(other, Err(NotReusable::OtherSource));
    }

    #[test]
    fn a_plan_holds_for_the_options_it_was_made_with() {
        let mapping = TablespaceMapping { from: "/a".to_owned(), to: "/b".to_owned() };
        for others in [
            PlanOptions { strategy: StrategyChoice::Only(Strategy::Compare), ..options() },
            PlanOptions { config_from_source: true, ..options() },
            PlanOptions { mirror_extra_files: true, ..options() },
            PlanOptions { tablespace_mapping: vec![mapping], ..options() },
            PlanOptions { staging_dir: Some(PathBuf::from("/staging")), ..options() },
        ] {
            let held = holds_for(&saved(), &others, &node([1; 16]));
            assert_eq!(held, Err(NotReusable::OtherOptions), "{others:?}");
        }
    }

    #[test]
    fn files_that_no_wal_protects_are_fetched_anew() {
        for options in [
            PlanOptions { config_from_source: true, ..options() },
            PlanOptions { mirror_extra_files: true, ..options() },
        ] {
            let saved = SavedPlan { options: options.clone(), ..saved() };
            let held = holds_for(&saved, &options, &node([1; 16]));
            assert_eq!(held, Err(NotReusable::UnloggedFiles));
        }
    }

    #[test]
    fn a_place_that_is_taken_by_now_is_not_used() {
        let home = tempfile::tempdir().unwrap();
        let place = home.path().display().to_string();
        let action = FileAction::MakeDirectory { link: Some(place) };
        let mut saved = saved();
        let path = DataPath::new("pg_tblspc/16400").unwrap();
        saved.planned.plan.files.push(PlannedFile { path, action });
        assert_eq!(holds_for(&saved, &options(), &node([1; 16])), Ok(()));
        std::fs::File::create(home.path().join("taken")).unwrap();
        let held = holds_for(&saved, &options(), &node([1; 16]));
        assert_eq!(held, Err(NotReusable::PlaceTaken));
    }

    /// What a saved plan is judged by, as it was when the plan was made.
    struct Now {
        home: EmptyTarget,
        divergence: Divergence,
        saved: SavedPlan,
    }

    impl Now {
        fn new() -> Self {
            let saved = SavedPlan { target_control: control_bytes(), ..saved() };
            let divergence = Divergence::unknown(NotPossible::new("its WAL is damaged"));
            Self { home: EmptyTarget::new(), divergence, saved }
        }

        fn reused(&self) -> Result<Planned, NotReusable> {
            let (target, source) = (&self.home.target, node([1; 16]));
            reusable(&self.saved, &config(), target, &source, &self.divergence)
        }

        fn why_not(&self) -> Option<NotReusable> {
            self.reused().err()
        }
    }

    #[test]
    fn a_plan_is_used_again_with_what_is_known_of_the_divergence_now() {
        let mut now = Now::new();
        now.divergence.target_end = Some(Lsn::new(77));
        let planned = now.reused().unwrap();
        assert_eq!(planned.target_end, Some(Lsn::new(77)));
        assert_eq!(planned.start, now.saved.planned.start);
    }

    #[test]
    fn a_plan_for_a_target_that_changed_since_is_not_used_again() {
        let mut now = Now::new();
        now.saved.target_control = b"another".to_vec();
        assert_eq!(now.why_not(), Some(NotReusable::TargetStarted));
        let mut now = Now::new();
        let path = DataPath::new("base/5/16384").unwrap();
        let action = FileAction::Patch { bytes: 8192 };
        now.saved.planned.plan.files.push(PlannedFile { path, action });
        now.saved.before.push(Some(stat(8192)));
        assert_eq!(now.why_not(), Some(NotReusable::TargetChanged), "the file is gone");
    }

    #[test]
    fn a_plan_from_wal_that_is_not_readable_any_more_is_not_used_again() {
        for strategy in [Strategy::Fork, Strategy::Latest] {
            let mut now = Now::new();
            now.saved.planned.strategy = strategy;
            assert_eq!(now.why_not(), Some(NotReusable::WalChanged), "{strategy:?}");
        }
        assert!(Now::new().reused().is_ok(), "compare does not read it");
    }

    fn stat(bytes: u64) -> FileStat {
        FileStat { bytes, mode: 0o600, inode: 7, modified: (1, 2) }
    }

    #[test]
    fn what_a_file_was_is_kept_with_its_inode_and_times() {
        let path = DataPath::new("base/5/16384").unwrap();
        let entry = |inode, bytes| Entry {
            path: path.clone(),
            kind: EntryKind::File { bytes },
            mode: 0o600,
            inode,
            modified: (1, 2),
        };
        let plan = Plan {
            files: vec![PlannedFile {
                path: path.clone(),
                action: FileAction::Patch { bytes: 8192 },
            }],
            ..Plan::default()
        };
        let of = |entry: Entry| before(&plan, &TargetFiles::from([(path.clone(), entry)]));
        assert_eq!(of(entry(7, 8192)), of(entry(7, 8192)));
        assert_ne!(of(entry(7, 8192)), of(entry(8, 8192)), "another file of the same name");
        assert_ne!(of(entry(7, 8192)), of(entry(7, 16384)));
        assert_eq!(before(&plan, &TargetFiles::new()), [None]);
    }
}
