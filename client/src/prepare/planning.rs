//! Makes a plan: chooses a strategy and decides, file by file.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::prefetch::{EarlyComparison, Listed};
use crate::config::Config;
use crate::divergence::Divergence;
use crate::divergence::source_changes::ChangesOfBoth;
use crate::error::{Abort, NotPossible, Replan, RewindError};
use crate::monitor::Step;
use crate::outcome::{Checkpointed, Outcome, Result as Ended};
use crate::plan::cost::Estimates;
use crate::plan::file_actions::{build, comparisons};
use crate::plan::input::{Differences, Facts};
use crate::plan::summary::{Totals, changes};
use crate::plan::{Planned, SourceFiles, Strategy, StrategyChoice};
use crate::source::{Snapshot, Source, compare};
use crate::source_checks::{check_databases, check_shrink};
use crate::strategy::candidates::{Candidate, Candidates};
use crate::strategy::estimate::{Basis, Measured, estimates, measure};
use crate::strategy::tablespaces;
use crate::target::{self, Target};
use crate::task::{Context, blocking};

/// How often the source is asked while its next checkpoint is waited for.
const CHECKPOINT_POLL: Duration = Duration::from_secs(1);

/// The strategies that are possible, and the one that is chosen.
#[derive(Debug)]
pub struct Choice<'a> {
    /// All of them.
    pub candidates: Candidates<'a>,
    /// What each would transfer.
    pub estimates: Estimates,
    /// The chosen one.
    pub chosen: Candidate<'a>,
}

impl Choice<'_> {
    /// Whether waiting for the source's next checkpoint pays: most of the transfer is WAL that it makes superfluous.
    pub fn waiting_pays(&self, config: &Config) -> bool {
        let may_wait = match config.strategy {
            StrategyChoice::Auto | StrategyChoice::Only(Strategy::Latest) => !config.dry_run,
            StrategyChoice::Only(Strategy::Compare | Strategy::Fork) => false,
        };
        let estimate = self.estimates.of(self.chosen.strategy);
        may_wait && estimate.is_some_and(|estimate| estimate.is_mostly_wal())
    }
}

/// Checks the list of files, finds the strategies that are possible and chooses one.
pub fn choose<'a>(
    config: &Config,
    basis: Basis<'_>,
    divergence: &'a Divergence,
    changes: &'a ChangesOfBoth,
    without_fork: Option<&NotPossible>,
) -> Result<Choice<'a>, Abort> {
    if let Some(oid) = unknown_tablespace(basis.listed, basis.source) {
        let why = format!("tablespace {oid} was created on the source while its files were listed");
        return Err(Abort::replan(Replan::SourceChanged, why));
    }
    check_databases(basis.listed, &basis.target.files)?;
    if !config.accept_shrink {
        check_shrink(&basis.target.files, basis.listed)?;
    }
    let candidates = Candidates::new(basis.source, divergence, changes, without_fork);
    let estimates = estimates(basis, &candidates, &Measured::default())?;
    let chosen = candidates.choose(config.strategy, &estimates)?;
    Ok(Choice { candidates, estimates, chosen })
}

/// Waits for the source's next checkpoint, no longer than `limit`.
///
/// # Errors
/// [`Abort::Replan`] if the source has made a checkpoint: a new plan can begin replay there.
pub async fn wait_for_checkpoint(
    cx: &Context,
    source: &Source,
    limit: Duration,
) -> Result<(), Abort> {
    cx.monitor.note(&format!(
        "waiting up to {} seconds for the source's next checkpoint: most of the transfer would be \
         WAL since the last one",
        limit.as_secs()
    ));
    let (since, before) = (Instant::now(), source.snapshot.checkpoint().redo);
    while since.elapsed() < limit {
        tokio::time::sleep(CHECKPOINT_POLL.min(limit)).await;
        let now = source.session.clone().describe().await?;
        if now.node.control.checkpoint_copy.redo > before {
            return Err(Abort::replan(Replan::NewCheckpoint, "the source made a checkpoint"));
        }
    }
    cx.monitor.note("the source made no checkpoint in this time: continuing without it");
    Ok(())
}

/// A plan, and the pages that were found to differ while it was made.
#[derive(Debug)]
pub struct Made {
    /// The plan.
    pub planned: Planned,
    /// Pages that differ.
    pub differences: Differences,
}

/// Compares what must be compared, and decides file by file.
pub async fn make(
    cx: &Context,
    config: &Config,
    target: &Arc<Target>,
    source: &Source,
    divergence: &Divergence,
    chosen: &Candidate<'_>,
    listed: Listed,
) -> Result<Made, RewindError> {
    let Listed { files, compared } = listed;
    let description = &source.snapshot.description;
    let mapping = &config.tablespace_mapping;
    let places = tablespaces::places(&target.files, description, mapping, chosen.strategy)?;
    let searched = Arc::clone(target);
    let keys = match config.mirror_extra_files {
        true => blocking(move || Ok::<_, RewindError>(target::private_keys(&searched))).await?,
        false => BTreeSet::new(),
    };
    let facts = Facts {
        target: &target.files,
        source: &files,
        wal_summary: chosen.wal_summary,
        version_directory: &source.snapshot.version_directory(),
        choices: config.file_choices(),
        new_tablespaces: &places,
        keys: &keys,
    };
    cx.steps.begin(Step::Compare);
    let EarlyComparison { mut differences, payload_bytes } = compared;
    let mut list = comparisons(&facts)?;
    list.retain(|comparison| !differences.contains_key(&comparison.path));
    let directory = Arc::clone(&target.directory);
    let monitor = Arc::clone(&cx.monitor);
    let others = compare::compare(&source.session, directory, &list, monitor).await?;
    differences.extend(others.differences);
    cx.steps.begin(Step::Plan);
    let plan = build(&facts, &differences)?;
    let planned = Planned {
        strategy: chosen.strategy,
        why: chosen.why.clone(),
        start: chosen.start,
        source_redo: source.snapshot.checkpoint().redo,
        fork: divergence.fork,
        target_end: divergence.target_end,
        plan,
        listed: files,
        hash_bytes: payload_bytes + others.carried.total(),
    };
    Ok(Made { planned, differences })
}

/// Reports a plan instead of fetching anything for it, with an estimate of what it would transfer, measured
/// on a sample.
pub async fn dry_run(
    cx: &Context,
    source: &Source,
    basis: Basis<'_>,
    choice: &Choice<'_>,
    made: Made,
) -> Result<Outcome, RewindError> {
    let Made { planned, differences } = made;
    changes(&planned.plan).iter().for_each(|change| cx.monitor.planned(change));
    let mut outcome = Outcome::new(Ended::WouldRewind, "dry run: nothing was changed");
    outcome.fork = planned.fork.map(|fork| (fork.lsn, fork.timeline));
    outcome.strategy = Some((planned.strategy.name(), planned.why.clone()));
    outcome.totals = Totals::of(&planned.plan);
    outcome.kept = removed_slots(&planned);
    outcome.times = cx.steps.end();
    let known = Measured::by_comparing(differences, planned.hash_bytes);
    let Choice { candidates, chosen, .. } = choice;
    let measured =
        measure(&source.session, basis, candidates, chosen, &planned.plan, known).await?;
    outcome.estimates = Some(estimates(basis, candidates, &measured)?);
    outcome.checkpoint = Some(Checkpointed::of(&source.snapshot.description, basis.end));
    Ok(outcome)
}

/// The message about replication slots that are removed.
pub fn removed_slots(planned: &Planned) -> Vec<String> {
    let slots = &planned.plan.slots;
    if slots.is_empty() {
        return Vec::new();
    }
    vec![format!("replication slots of the target are removed: {}", slots.join(", "))]
}

/// A tablespace the list has and the description has not: created between the two.
fn unknown_tablespace(files: &SourceFiles, source: &Snapshot) -> Option<u32> {
    let tablespaces = &source.description.tablespaces;
    let listed = files.keys().filter_map(|path| path.as_str().strip_prefix("pg_tblspc/"));
    let mut oids = listed.filter_map(|rest| rest.parse().ok());
    oids.find(|oid| !tablespaces.iter().any(|tablespace| tablespace.oid == *oid))
}

#[cfg(test)]
mod tests {
    use data_dir::{Entry, EntryKind};
    use pg_format::{DataPath, Lsn};

    use super::*;
    use crate::error::Class;
    use crate::plan::cost::Estimate;
    use crate::plan::input::Choices;
    use crate::test_values::{EmptyTarget, config, least_files, planned, snapshot};

    /// A choice of *latest*, which transfers so many bytes of pages and of WAL.
    fn choice<'a>(blocks: u64, wal: u64, source: &Snapshot) -> Choice<'a> {
        let candidate = |strategy| Candidate {
            strategy,
            wal_summary: None,
            start: source.checkpoint(),
            why: String::new(),
        };
        let estimate = Estimate { blocks, hashes: 0, wal };
        let impossible = || NotPossible::new("not possible");
        Choice {
            candidates: Candidates {
                fork: Err(impossible()),
                latest: Ok(candidate(Strategy::Latest)),
                compare: candidate(Strategy::Compare),
            },
            estimates: Estimates {
                fork: Err(impossible()),
                latest: Ok(estimate),
                compare: estimate,
            },
            chosen: candidate(Strategy::Latest),
        }
    }

    #[test]
    fn waiting_for_a_checkpoint_pays_where_most_is_wal_and_the_start_may_move() {
        let source = snapshot(0..1, Lsn::new(100));
        let pays = |blocks, wal, strategy, dry_run| {
            let config = Config { strategy, dry_run, ..config() };
            choice(blocks, wal, &source).waiting_pays(&config)
        };
        use StrategyChoice::{Auto, Only};
        assert!(pays(10, 90, Auto, false));
        assert!(pays(10, 90, Only(Strategy::Latest), false));
        assert!(!pays(90, 10, Auto, false), "little of it is WAL");
        assert!(!pays(10, 90, Only(Strategy::Fork), false), "its start stays");
        assert!(!pays(10, 90, Only(Strategy::Compare), false));
        assert!(!pays(10, 90, Auto, true), "a dry run moves nothing");
    }

    /// What a choice is made from: both nodes have the files that every cluster has.
    struct Known {
        home: EmptyTarget,
        source: Snapshot,
        listed: SourceFiles,
        divergence: Divergence,
    }

    impl Known {
        fn new() -> Self {
            let files = least_files().into_iter();
            let listed = files.map(|(name, bytes)| (DataPath::new(name).unwrap(), bytes));
            Self {
                home: EmptyTarget::new(),
                source: snapshot(0..4, Lsn::new(0x300_0028)),
                listed: listed.collect(),
                divergence: Divergence::unknown(NotPossible::new("its WAL is damaged")),
            }
        }

        fn choose(&self, config: &Config) -> Result<Strategy, Abort> {
            let basis = Basis {
                target: &self.home.target,
                source: &self.source,
                listed: &self.listed,
                choices: Choices { config_from_source: false, mirror_extra_files: false },
                fork: Lsn::INVALID,
                end: Lsn::new(0x300_1000),
            };
            let changes = ChangesOfBoth::not_asked_for();
            let choice = choose(config, basis, &self.divergence, &changes, None)?;
            Ok(choice.chosen.strategy)
        }
    }

    fn class(chosen: Result<Strategy, Abort>) -> Option<Class> {
        match chosen {
            Err(Abort::Failed(error)) => Some(error.class()),
            Err(Abort::Replan { .. }) | Ok(_) => None,
        }
    }

    #[test]
    fn a_strategy_is_chosen_among_those_that_are_possible() {
        let known = Known::new();
        assert_eq!(known.choose(&config()).unwrap(), Strategy::Compare);
        let strategy = StrategyChoice::Only(Strategy::Fork);
        let insisted = known.choose(&Config { strategy, ..config() });
        assert_eq!(class(insisted), Some(Class::Rebuild), "it is not possible");
    }

    #[test]
    fn a_list_that_does_not_fit_its_source_is_asked_for_again() {
        let mut known = Known::new();
        known.listed.insert(DataPath::of("pg_tblspc/16400"), None);
        let again = known.choose(&config());
        assert!(matches!(again, Err(Abort::Replan { reason: Replan::SourceChanged, .. })));
    }

    fn entry(path: &str, bytes: u64) -> Entry {
        let (path, kind) = (DataPath::new(path).unwrap(), EntryKind::File { bytes });
        Entry { path, kind, mode: 0o600, inode: 7, modified: (1, 2) }
    }

    fn target(entries: impl IntoIterator<Item = Entry>) -> EmptyTarget {
        EmptyTarget::with_files(
            entries.into_iter().map(|entry| (entry.path.clone(), entry)).collect(),
        )
    }

    #[test]
    fn a_database_of_which_a_part_is_listed_is_asked_for_again() {
        let mut known = Known::new();
        known.home = target([entry("base/5/PG_VERSION", 3), entry("base/5/pg_filenode.map", 512)]);
        assert_eq!(known.choose(&config()).unwrap(), Strategy::Compare);
        known.listed.remove(&DataPath::of("base/5/PG_VERSION"));
        let again = known.choose(&config());
        assert!(matches!(again, Err(Abort::Replan { reason: Replan::SourceChanged, .. })));
    }

    #[test]
    fn a_database_that_would_shrink_to_little_is_asked_about() {
        let mut known = Known::new();
        known.home = target([entry("base/5/16384", 1 << 30)]);
        assert_eq!(class(known.choose(&config())), Some(Class::Preflight));
        let accepted = known.choose(&Config { accept_shrink: true, ..config() });
        assert_eq!(accepted.unwrap(), Strategy::Compare);
    }

    #[test]
    fn a_tablespace_that_was_made_between_two_answers_is_noticed() {
        let source = snapshot(0..1, Lsn::new(100));
        let listed = |name: &str| SourceFiles::from([(DataPath::new(name).unwrap(), None)]);
        assert_eq!(unknown_tablespace(&listed("pg_tblspc/16400"), &source), Some(16400));
        assert_eq!(unknown_tablespace(&listed("base/5"), &source), None);
        let mut source = source;
        let location = Some("/place".to_owned());
        source.description.tablespaces.push(proto::model::Tablespace { oid: 16400, location });
        assert_eq!(unknown_tablespace(&listed("pg_tblspc/16400"), &source), None);
    }

    #[test]
    fn slots_that_go_are_named() {
        assert_eq!(removed_slots(&planned()), Vec::<String>::new());
        let mut planned = planned();
        planned.plan.slots = vec!["one".to_owned(), "two".to_owned()];
        let said = removed_slots(&planned);
        assert_eq!(said, ["replication slots of the target are removed: one, two"]);
    }
}
