//! Picks the strategy and says why.

use std::collections::BTreeMap;

use pg_format::backup_label::ReplayStart;
use pg_format::{Lsn, TimelineHistory};
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
    pub strategy: Strategy<'a>,
    /// Where replay begins.
    pub start: ReplayStart,
    /// Its name.
    pub name: &'static str,
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

/// Picks. `forbid_fork` says why *fork* cannot be, as an earlier attempt or the tablespaces showed.
pub fn choose<'a>(
    wanted: StrategyArg,
    analysis: &'a Analysis,
    source: &Description,
    history: &TimelineHistory,
    forbid_fork: Option<&str>,
) -> Result<Choice<'a>, RewindError> {
    let compare = |why: String| Choice {
        strategy: Strategy::Compare,
        start: source_start(source),
        name: "compare",
        why,
    };
    if wanted == StrategyArg::Compare {
        return Ok(compare("it was asked for".to_owned()));
    }
    // What another way of asking avoids, and what nothing can: WAL that is gone.
    let gone = |why: String| (why, Class::Rebuild);
    let possible = match (&analysis.rewindable, analysis.fork, forbid_fork) {
        (_, _, Some(why)) => Err((why.to_owned(), Class::Preflight)),
        (Err(why), ..) => Err(gone(why.clone())),
        (Ok(_), None, None) => Err(gone("the fork point is not proven".to_owned())),
        (Ok(found), Some(fork), None) => {
            wal_since(source, history, fork.lsn).map(|()| (found, fork.lsn)).map_err(gone)
        }
    };
    match (possible, wanted) {
        (Ok((found, fork)), _) => Ok(Choice {
            strategy: Strategy::Fork(&found.window),
            start: found.start,
            name: "fork",
            why: format!(
                "the target's WAL from {} to {} names every page it changed around the fork at \
                 {fork}",
                found.window.start, found.window.end
            ),
        }),
        (Err((why, class)), StrategyArg::Fork) => Err(RewindError::new(
            class,
            format!("strategy fork is not possible: {why}; use --strategy auto or compare"),
        )),
        (Err((why, _)), StrategyArg::Auto | StrategyArg::Compare) => Ok(compare(why)),
    }
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
    strategy: &Strategy<'_>,
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
        if let (Some(_), Strategy::Fork(_)) = (mapped, strategy) {
            return Err(refuse(format!(
                "tablespace {} was created after the fork and replay will use its own path \
                 {location}: --tablespace-mapping works with --strategy compare only",
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
