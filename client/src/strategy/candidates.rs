//! Picks the strategy and says why.

use std::collections::BTreeMap;

use data_dir::window::Window;
use pg_format::backup_label::ReplayStart;
use pg_format::{Lsn, TimelineHistory};
use proto::model::Description;

use crate::cli::StrategyArg;
use crate::divergence::common_wal::{Analysis, source_segment, source_start};
use crate::error::{Class, RewindError};
use crate::plan::Strategy;
use crate::plan::cost::Prices;
use crate::target::Target;
use crate::target::places::check_place;

/// The choice.
#[derive(Debug, Clone)]
pub struct Choice<'a> {
    /// The strategy.
    pub strategy: Strategy,
    /// What may differ in main forks; `None` if every page is compared.
    pub window: Option<&'a Window>,
    /// Where replay begins.
    pub start: ReplayStart,
    /// Why.
    pub why: String,
}

/// Why replay from the fork could not make the source's new tablespaces: it would use their literal
/// paths.
pub fn tablespaces_against_fork(
    target: &Target,
    source: &Description,
    mapping: &[(String, String)],
) -> Option<String> {
    source.tablespaces.iter().find_map(|tablespace| {
        let location = tablespace.location.as_ref()?;
        let path = pg_format::DataPath::new(format!("pg_tblspc/{}", tablespace.oid)).ok()?;
        if target.files.contains_key(&path) {
            return None;
        }
        let mapped = mapping.iter().any(|(old, _)| old == location);
        let why = check_place(location).err().or_else(|| mapped.then(|| "is mapped".to_owned()))?;
        Some(format!(
            "the source made tablespace {} in {location}, which {why} here",
            tablespace.oid
        ))
    })
}

/// What is known about each way.
#[derive(Debug, Clone, Copy)]
pub struct Ways<'a> {
    /// The fork and the target's window.
    pub analysis: &'a Analysis,
    /// What either side changed since the fork, or why that is not known.
    pub changes: &'a Result<Window, String>,
    /// Why *fork* cannot be, as an earlier attempt or the tablespaces showed.
    pub forbid_fork: Option<&'a str>,
    /// Where the source's WAL ends by now.
    pub end: Lsn,
}

/// A way that cannot be gone, and how it ends who insists on it.
pub type Obstacle = (String, Class);

/// The ways there are.
#[derive(Debug)]
pub struct Candidates<'a> {
    /// Replay from the last common checkpoint.
    pub fork: Result<Choice<'a>, Obstacle>,
    /// Replay from the source's newest checkpoint.
    pub latest: Result<Choice<'a>, Obstacle>,
    /// Always possible.
    pub compare: Choice<'a>,
}

impl<'a> Candidates<'a> {
    /// Which ways can be gone.
    pub fn new(ways: Ways<'a>, source: &Description, history: &TimelineHistory) -> Self {
        let compare = Choice {
            strategy: Strategy::Compare,
            window: None,
            start: source_start(source),
            why: "it was asked for".to_owned(),
        };
        Self { fork: fork(ways, source, history), latest: latest(ways, source), compare }
    }

    /// Takes the one that was asked for, or the cheapest.
    pub fn choose(&self, wanted: StrategyArg, prices: &Prices) -> Result<Choice<'a>, RewindError> {
        let insisted = |(why, class): Obstacle, name: &str| {
            let message =
                format!("strategy {name} is not possible: {why}; use another one, or auto");
            RewindError::new(class, message)
        };
        let (fork, latest) = (self.fork.clone(), self.latest.clone());
        let compare = self.compare.clone();
        match wanted {
            StrategyArg::Compare => return Ok(compare),
            StrategyArg::Fork => return fork.map_err(|obstacle| insisted(obstacle, "fork")),
            StrategyArg::Latest => return latest.map_err(|obstacle| insisted(obstacle, "latest")),
            StrategyArg::Auto => {}
        }
        let cheapest = prices.cheapest();
        let why_not = fork.as_ref().err().map(|(why, _)| why.clone());
        Ok(match (cheapest, fork, latest) {
            (Strategy::Fork, Ok(choice), _) | (Strategy::Latest, _, Ok(choice)) => {
                let why = match why_not {
                    Some(why) => format!("{}; not from the fork: {why}", choice.why),
                    None => choice.why,
                };
                Choice { why, ..choice }
            }
            _ => Choice { why: why_not.unwrap_or_default(), ..compare },
        })
    }
}

fn fork<'a>(
    ways: Ways<'a>,
    source: &Description,
    history: &TimelineHistory,
) -> Result<Choice<'a>, Obstacle> {
    // What another way of asking avoids, and what nothing can: WAL that is gone.
    let gone = |why: String| (why, Class::Rebuild);
    if let Some(why) = ways.forbid_fork {
        return Err((why.to_owned(), Class::Preflight));
    }
    let found = ways.analysis.rewindable.as_ref().map_err(|why| gone(why.to_string()))?;
    let fork = ways.analysis.fork.ok_or_else(|| gone("the fork point is not proven".to_owned()))?;
    wal_since(source, history, fork.lsn).map_err(gone)?;
    let Window { start, end, .. } = &found.window;
    Ok(Choice {
        strategy: Strategy::Fork,
        window: Some(&found.window),
        start: found.start,
        why: format!(
            "the target's WAL from {start} to {end} names every page it changed around the fork at {}",
            fork.lsn
        ),
    })
}

fn latest<'a>(ways: Ways<'a>, source: &Description) -> Result<Choice<'a>, Obstacle> {
    let window = ways.changes.as_ref().map_err(|why| (why.clone(), Class::Rebuild))?;
    let start = source_start(source);
    let why = format!(
        "both nodes' WAL names every page changed around the fork, and the source's checkpoint at {} \
         is on its disk",
        start.redo
    );
    Ok(Choice { strategy: Strategy::Latest, window: Some(window), start, why })
}

/// Whether the source still has its WAL from the fork on.
fn wal_since(source: &Description, history: &TimelineHistory, fork: Lsn) -> Result<(), String> {
    let size = source.node.control.wal_segment_size;
    let first = size.segment_of(fork);
    let last = size.segment_of(source_start(source).redo).max(first);
    for number in first..=last {
        if source_segment(source, history, number).is_none() {
            return Err(format!(
                "the source no longer has the WAL at {}, which replay from the fork needs",
                size.start_of(number)
            ));
        }
    }
    Ok(())
}

/// Where each linked tablespace goes that the target does not have.
pub fn new_tablespaces(
    target: &Target,
    source: &Description,
    mapping: &[(String, String)],
    strategy: Strategy,
) -> Result<BTreeMap<u32, String>, RewindError> {
    let refuse = |message: String| RewindError::new(Class::Preflight, message);
    let mut places = BTreeMap::new();
    for tablespace in &source.tablespaces {
        let Some(location) = &tablespace.location else {
            continue;
        };
        let path = pg_format::DataPath::new(format!("pg_tblspc/{}", tablespace.oid))
            .map_err(|error| refuse(error.to_string()))?;
        if target.files.contains_key(&path) {
            continue;
        }
        let mapped = mapping.iter().find(|(old, _)| old == location).map(|(_, new)| new);
        if mapped.is_some() && strategy == Strategy::Fork {
            return Err(refuse(format!(
                "tablespace {} was created after the fork and replay will use its own path \
                 {location}: --tablespace-mapping works with --strategy latest or compare",
                tablespace.oid
            )));
        }
        let place = mapped.unwrap_or(location);
        check_place(place).map_err(|why| {
            refuse(format!(
                "tablespace {} of the source lies in {location} and the target has no place for \
                 it: {place} {why}; make it an empty directory of ours, or give \
                 --tablespace-mapping {location}=DIR",
                tablespace.oid
            ))
        })?;
        places.insert(tablespace.oid, place.clone());
    }
    Ok(places)
}
