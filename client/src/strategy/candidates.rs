//! Which strategies are possible, and which one is chosen.

use data_dir::wal::summary::WalSummary;
use pg_format::Lsn;
use pg_format::backup_label::ReplayStart;

use crate::divergence::source_changes::ChangesOfBoth;
use crate::divergence::{Divergence, TargetChanges};
use crate::error::{NotPossible, RewindError};
use crate::plan::cost::Estimates;
use crate::plan::{Strategy, StrategyChoice};
use crate::source::Snapshot;

/// A strategy that is possible.
#[derive(Debug, Clone)]
pub struct Candidate<'a> {
    /// The strategy.
    pub strategy: Strategy,
    /// What may differ in main forks; `None` if every page is compared.
    pub wal_summary: Option<&'a WalSummary>,
    /// Where replay begins.
    pub start: ReplayStart,
    /// Why it is possible or, once it is chosen, why it was.
    pub why: String,
}

/// Every strategy, or why it is not possible.
#[derive(Debug)]
pub struct Candidates<'a> {
    /// Replay from the last common checkpoint.
    pub fork: Result<Candidate<'a>, NotPossible>,
    /// Replay from the source's newest checkpoint.
    pub latest: Result<Candidate<'a>, NotPossible>,
    /// Always possible.
    pub compare: Candidate<'a>,
}

impl<'a> Candidates<'a> {
    /// Finds which strategies are possible. `without_fork` is a reason other than missing WAL why *fork* is
    /// not.
    pub fn new(
        source: &Snapshot,
        divergence: &'a Divergence,
        changes: &'a ChangesOfBoth,
        without_fork: Option<&NotPossible>,
    ) -> Self {
        let compare = Candidate {
            strategy: Strategy::Compare,
            wal_summary: None,
            start: source.checkpoint(),
            why: "requested with --strategy".to_owned(),
        };
        let fork = match without_fork {
            Some(why) => Err(why.clone()),
            None => fork(source, divergence),
        };
        Self { fork, latest: latest(source, changes), compare }
    }

    /// Chooses the strategy that was asked for, or the cheapest one.
    ///
    /// # Errors
    /// The strategy that was asked for is not possible.
    pub fn choose(
        &self,
        wanted: StrategyChoice,
        estimates: &Estimates,
    ) -> Result<Candidate<'a>, RewindError> {
        let insisted = |candidate: &Result<Candidate<'a>, NotPossible>, strategy: Strategy| {
            candidate.clone().map_err(|why| why.insisted_on(strategy.name()))
        };
        match wanted {
            StrategyChoice::Only(Strategy::Compare) => Ok(self.compare.clone()),
            StrategyChoice::Only(Strategy::Fork) => insisted(&self.fork, Strategy::Fork),
            StrategyChoice::Only(Strategy::Latest) => insisted(&self.latest, Strategy::Latest),
            StrategyChoice::Auto => Ok(self.cheapest(estimates)),
        }
    }

    fn cheapest(&self, estimates: &Estimates) -> Candidate<'a> {
        let not_from_the_fork = self.fork.as_ref().err().map(NotPossible::to_string);
        let ((Strategy::Fork, Ok(chosen), _) | (Strategy::Latest, _, Ok(chosen))) =
            (estimates.cheapest(), &self.fork, &self.latest)
        else {
            let why = not_from_the_fork.unwrap_or_default();
            return Candidate { why, ..self.compare.clone() };
        };
        let why = match not_from_the_fork {
            Some(why) => format!("{}; strategy fork is not possible: {why}", chosen.why),
            None => chosen.why.clone(),
        };
        Candidate { why, ..chosen.clone() }
    }
}

fn fork<'a>(source: &Snapshot, divergence: &'a Divergence) -> Result<Candidate<'a>, NotPossible> {
    let TargetChanges { wal_summary, start } =
        divergence.target_changes.as_ref().map_err(Clone::clone)?;
    let fork = divergence.fork.ok_or_else(|| NotPossible::new("the fork point is not proven"))?.lsn;
    has_wal_since(source, fork)?;
    let (from, to) = (wal_summary.start, wal_summary.end);
    let why = format!(
        "the target's WAL from {from} to {to} names every page that it changed around the fork \
         point {fork}"
    );
    Ok(Candidate { strategy: Strategy::Fork, wal_summary: Some(wal_summary), start: *start, why })
}

fn latest<'a>(source: &Snapshot, changes: &'a ChangesOfBoth) -> Result<Candidate<'a>, NotPossible> {
    let wal_summary = changes.wal_summary.as_ref().map_err(Clone::clone)?;
    let start = source.checkpoint();
    let why = format!(
        "the WAL of both nodes names every page changed around the fork point, and replay can \
         start from the source's checkpoint at {}",
        start.redo
    );
    Ok(Candidate { strategy: Strategy::Latest, wal_summary: Some(wal_summary), start, why })
}

/// Whether the source still has its WAL from the fork on.
fn has_wal_since(source: &Snapshot, fork: Lsn) -> Result<(), NotPossible> {
    let redo = source.checkpoint().redo.max(fork);
    source.first_missing_wal(fork, redo).map_or(Ok(()), |at| {
        Err(NotPossible::new(format!(
            "the source no longer has the WAL at {at}, which replay from the fork needs"
        )))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Class;
    use crate::plan::ForkPoint;
    use crate::plan::cost::Estimate;
    use crate::test_values::snapshot;
    use pg_format::TimelineId;

    const MB_16: u64 = 16 << 20;
    const FORK: Lsn = Lsn::new(4 * MB_16 + 8192);

    fn start(redo: u64) -> ReplayStart {
        let timeline = TimelineId::new(1).unwrap();
        ReplayStart { redo: Lsn::new(redo), checkpoint: Lsn::new(redo + 100), timeline }
    }

    /// Nodes that parted at [`FORK`], and whose WAL says what both changed.
    fn divergence() -> Divergence {
        let changes =
            TargetChanges { wal_summary: WalSummary::default(), start: start(4 * MB_16 + 40) };
        Divergence {
            fork: Some(ForkPoint { lsn: FORK, timeline: TimelineId::new(1).unwrap() }),
            target_end: Some(FORK.plus(1000)),
            target_changes: Ok(changes),
            restored: Vec::new(),
        }
    }

    /// A source whose newest checkpoint is in segment 6.
    fn source() -> Snapshot {
        snapshot(3..8, Lsn::new(6 * MB_16 + 40))
    }

    fn both() -> ChangesOfBoth {
        ChangesOfBoth { wal_summary: Ok(WalSummary::default()) }
    }

    fn estimate(bytes: u64) -> Estimate {
        Estimate { blocks: bytes, hashes: 0, wal: 0 }
    }

    /// Estimates of these sizes; what is not possible has none.
    fn estimates(fork: Option<u64>, latest: Option<u64>) -> Estimates {
        let of = |bytes: Option<u64>| {
            bytes.map(estimate).ok_or_else(|| NotPossible::new("not possible"))
        };
        Estimates { fork: of(fork), latest: of(latest), compare: estimate(1 << 40) }
    }

    #[test]
    fn auto_takes_the_cheapest_and_says_why() {
        let (source, divergence, both) = (source(), divergence(), both());
        let candidates = Candidates::new(&source, &divergence, &both, None);
        let choose = |estimates| candidates.choose(StrategyChoice::Auto, &estimates).unwrap();
        let fork = choose(estimates(Some(10), Some(20)));
        assert_eq!(fork.strategy, Strategy::Fork);
        assert_eq!(fork.start.redo, Lsn::new(4 * MB_16 + 40));
        assert!(fork.why.contains("names every page"), "{}", fork.why);
        let latest = choose(estimates(Some(20), Some(10)));
        assert_eq!(latest.strategy, Strategy::Latest);
        assert_eq!(latest.start, source.checkpoint());
        assert!(!latest.why.contains("fork is not possible"), "it was possible: {}", latest.why);
    }

    #[test]
    fn auto_says_why_it_is_not_from_the_fork() {
        let (source, divergence, both) = (source(), divergence(), both());
        let why = NotPossible::as_asked("a tablespace is mapped");
        let candidates = Candidates::new(&source, &divergence, &both, Some(&why));
        let chosen = candidates.choose(StrategyChoice::Auto, &estimates(None, Some(9))).unwrap();
        assert_eq!(chosen.strategy, Strategy::Latest);
        assert!(chosen.why.ends_with("strategy fork is not possible: a tablespace is mapped"));
    }

    #[test]
    fn auto_compares_where_nothing_else_is_possible() {
        let source = source();
        let divergence = Divergence::unknown(NotPossible::new("its WAL is damaged"));
        let both = ChangesOfBoth::not_asked_for();
        let candidates = Candidates::new(&source, &divergence, &both, None);
        let chosen = candidates.choose(StrategyChoice::Auto, &estimates(None, None)).unwrap();
        assert_eq!(chosen.strategy, Strategy::Compare);
        assert_eq!(chosen.why, "its WAL is damaged");
        assert!(chosen.wal_summary.is_none(), "every page is compared");
        assert_eq!(chosen.start, source.checkpoint());
    }

    #[test]
    fn fork_needs_a_proven_fork_point_and_the_sources_wal_since() {
        let both = both();
        let unproven = Divergence { fork: None, ..divergence() };
        let whole = divergence();
        let why = Candidates::new(&source(), &unproven, &both, None).fork.unwrap_err().to_string();
        assert_eq!(why, "the fork point is not proven");
        assert!(Candidates::new(&source(), &whole, &both, None).fork.is_ok());
        // Of the segments from the fork's to that of the checkpoint none may be missing.
        for missing in 4..=6 {
            let mut source = source();
            source.description.wal_segments.retain(|name| name.number != missing);
            let why = Candidates::new(&source, &whole, &both, None).fork.unwrap_err().to_string();
            assert!(why.contains(&Lsn::new(missing * MB_16).to_string()), "{why}");
        }
        let mut source = source();
        source.description.wal_segments.retain(|name| name.number != 3);
        assert!(Candidates::new(&source, &whole, &both, None).fork.is_ok(), "older than the fork");
    }

    #[test]
    fn a_source_whose_checkpoint_is_older_than_the_fork_needs_the_forks_segment_alone() {
        let (divergence, both) = (divergence(), both());
        let source = snapshot(4..5, Lsn::new(3 * MB_16));
        assert!(Candidates::new(&source, &divergence, &both, None).fork.is_ok());
        let source = snapshot(3..4, Lsn::new(3 * MB_16));
        assert!(Candidates::new(&source, &divergence, &both, None).fork.is_err());
    }

    #[test]
    fn insisting_on_what_is_not_possible_is_an_error() {
        let source = source();
        let divergence = Divergence::unknown(NotPossible::new("its WAL is damaged"));
        let both = ChangesOfBoth::not_asked_for();
        let why = NotPossible::as_asked("a tablespace is mapped");
        let gone = Candidates::new(&source, &divergence, &both, None);
        let mapped = Candidates::new(&source, &divergence, &both, Some(&why));
        let insist = |candidates: &Candidates<'_>, strategy| {
            let insisted = StrategyChoice::Only(strategy);
            let chosen = candidates.choose(insisted, &estimates(None, None))?;
            Ok::<_, RewindError>((chosen.strategy, chosen.why))
        };
        let error = insist(&gone, Strategy::Fork).unwrap_err();
        assert_eq!(error.class(), Class::Rebuild, "WAL does not come back");
        assert!(error.to_string().starts_with("strategy fork is not possible: its WAL is damaged"));
        let error = insist(&mapped, Strategy::Fork).unwrap_err();
        assert_eq!(error.class(), Class::Preflight, "other options avoid it");
        let error = insist(&gone, Strategy::Latest).unwrap_err();
        assert!(error.to_string().starts_with("strategy latest is not possible"), "{error}");
        let compare = insist(&gone, Strategy::Compare).unwrap();
        assert_eq!(compare, (Strategy::Compare, "requested with --strategy".to_owned()));
    }
}
