//! Picks the strategy and says why.

use std::collections::BTreeMap;

use data_dir::window::Window;
use pg_format::backup_label::ReplayStart;
use pg_format::{BLOCK_BYTES, Lsn, TimelineHistory};
use proto::model::Description;

use crate::analysis::{Analysis, source_segment, source_start};
use crate::apply::preflight::check_place;
use crate::cli::StrategyArg;
use crate::error::{Class, RewindError};
use crate::inspect::Target;
use crate::plan::Strategy;

/// The choice.
#[derive(Debug)]
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
type Obstacle = (String, Class);

/// Picks.
pub fn choose<'a>(
    wanted: StrategyArg,
    ways: Ways<'a>,
    source: &Description,
    history: &TimelineHistory,
) -> Result<Choice<'a>, RewindError> {
    let compare = |why: String| Choice {
        strategy: Strategy::Compare,
        window: None,
        start: source_start(source),
        why,
    };
    let insisted = |(why, class): Obstacle, name: &str| {
        let message = format!("strategy {name} is not possible: {why}; use another one, or auto");
        RewindError::new(class, message)
    };
    let (fork, latest) = (fork(ways, source, history), latest(ways, source));
    match wanted {
        StrategyArg::Compare => Ok(compare("it was asked for".to_owned())),
        StrategyArg::Fork => fork.map_err(|obstacle| insisted(obstacle, "fork")),
        StrategyArg::Latest => latest.map_err(|obstacle| insisted(obstacle, "latest")),
        StrategyArg::Auto => Ok(match (fork, latest) {
            (Ok(fork), Ok(latest)) => cheaper(fork, latest, ways),
            (Ok(fork), Err(_)) => fork,
            (Err((why, _)), Ok(latest)) => {
                Choice { why: format!("{}; not from the fork: {why}", latest.why), ..latest }
            }
            (Err((why, _)), Err(_)) => compare(why),
        }),
    }
}

/// The one that carries less: blocks, and the WAL to be replayed.
fn cheaper<'a>(fork: Choice<'a>, latest: Choice<'a>, ways: Ways<'_>) -> Choice<'a> {
    let forked_at = ways.analysis.fork.map_or(Lsn::INVALID, |fork| fork.lsn);
    let bytes = |choice: &Choice<'_>| {
        let pages = choice.window.map_or(0, |window| window.pages.len());
        let wal = ways.end.distance_from(choice.start.redo.max(forked_at));
        pages.saturating_mul(BLOCK_BYTES).saturating_add(wal)
    };
    let (of_fork, of_latest) = (bytes(&fork), bytes(&latest));
    let (cheaper, bytes, name, other) = match of_fork <= of_latest {
        true => (fork, of_fork, "latest", of_latest),
        false => (latest, of_latest, "fork", of_fork),
    };
    let why = format!(
        "{}; at most {bytes} bytes of blocks and WAL before compression, {other} with {name}",
        cheaper.why
    );
    Choice { why, ..cheaper }
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
    let found = ways.analysis.rewindable.as_ref().map_err(|why| gone(why.clone()))?;
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
