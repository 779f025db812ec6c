//! Fetches everything into staging.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pg_format::{Covered, DataPath};
use proto::fetch::{Unit, UnitKind};
use tokio::sync::oneshot;

use super::pack_sink::{PackSinks, Packed};
use crate::error::{Class, RewindError};
use crate::monitor::Monitor;
use crate::plan::Plan;
use crate::plan::replayed_blocks::{divide, leave_out};
use crate::plan::units::units;
use crate::prepare::wal_pieces::WalPieces;
use crate::source::Session;
use crate::source::in_flight::cost;
use crate::source::page_delta::OwnPages;
use crate::source::pool::{self, Carried, Later, Work};
use crate::source::prepare::AsTheyAre;
use crate::staging::disk::Disk;
use crate::staging::manifest::PackDigest;
use crate::staging::notes::Notes;
use crate::staging::partial_fetch::Recovered;

/// The result of the data fetch.
#[derive(Debug)]
pub struct Fetched {
    /// What the source reported about the files.
    pub notes: Notes,
    /// Pages an earlier run had fetched.
    pub recovered_pages: u64,
    /// Pages that replay rebuilds, and that therefore did not travel.
    pub covered_pages: u64,
    /// The packs.
    pub packs: Vec<PackDigest>,
    /// What the connections carried.
    pub carried: Carried,
    /// Payload bytes of WAL among them.
    pub wal_payload_bytes: u64,
    /// Bytes of signatures of the target's pages that were sent with requests.
    pub signature_bytes: u64,
}

/// What is fetched for a plan.
#[derive(Debug)]
pub struct FetchWanted<'a> {
    /// Pages and files.
    pub plan: &'a Plan,
    /// Counts the runs and attempts for this rewind.
    pub run: u32,
    /// What an earlier run had fetched of them.
    pub recovered: Recovered,
    /// WAL, which comes first: the source may recycle it.
    pub wal: WalPieces,
    /// The target's own pages, to which the source sends differences.
    pub own: OwnPages,
    /// Receives what replay rebuilds, as soon as the announced WAL was fetched and read.
    pub covered: oneshot::Receiver<Covered>,
}

/// Fetches pages and files into packs and WAL to its place in staging.
pub async fn fetch(
    session: &Session,
    disk: &Arc<dyn Disk>,
    wanted: FetchWanted<'_>,
    monitor: Arc<dyn Monitor>,
) -> Result<Fetched, RewindError> {
    let FetchWanted { plan, run, recovered, wal, own, covered } = wanted;
    let WalPieces { units: mut first, receiver: wal } = wal;
    let left = units(plan).into_iter().filter_map(|unit| recovered.left(unit));
    let (mut coverable, others) = divide(left);
    coverable.sort_by_key(is_signed);
    first.extend(others);
    let left_out = Arc::new(AtomicU64::new(0));
    let later = later(coverable, covered, Arc::clone(&left_out));
    let Recovered { packs: mut all, notes, .. } = recovered;
    let recovered_pages = notes.pages;
    let paths: Arc<[DataPath]> = plan.files.iter().map(|file| file.path.clone()).collect();
    let sinks = PackSinks::new(disk, notes, Arc::new(own), paths, Arc::clone(&wal));
    let prepare = sinks.own();
    let mut carried = pool::run(
        session,
        Work { units: first, later: Some(later), prepare, start: pool::PoolStart::Together },
        |number| sinks.open(format!("{run}-{number:04}")),
        Arc::clone(&monitor),
    )
    .await?;
    // Pages of units whose end was lost with its connection, or that came as differences although they were
    // asked for whole.
    let wrong = sinks.whole_units();
    if !wrong.is_empty() {
        tracing::debug!(units = wrong.len(), "pages that could not be rebuilt are fetched whole");
        let (prepare, start) = (Arc::new(AsTheyAre), pool::PoolStart::AsTheyCome);
        let again = pool::run(
            session,
            Work { units: wrong, later: None, prepare, start },
            |number| sinks.open(format!("{run}-whole-{number:04}")),
            monitor,
        );
        carried.absorb(&again.await?);
    }
    let Packed { notes, packs, signature_bytes } = sinks.packed()?;
    all.extend(packs);
    Ok(Fetched {
        notes,
        recovered_pages,
        covered_pages: left_out.load(Ordering::Relaxed),
        packs: all,
        carried,
        wal_payload_bytes: wal.payload_bytes(),
        signature_bytes,
    })
}

/// Whether a request is long and its answer short. Such requests are sent after those that are short and have
/// long answers, so that the link is busy in both directions.
fn is_signed(unit: &Unit) -> bool {
    matches!(unit.kind, UnitKind::Blocks { signatures: Some(_), .. })
}

/// Units that wait until it is known what replay rebuilds.
fn later(units: Vec<Unit>, covered: oneshot::Receiver<Covered>, left_out: Arc<AtomicU64>) -> Later {
    let cost = units.iter().map(|unit| cost(&unit.kind)).sum();
    let units = async move {
        let covered = covered.await.map_err(|error| {
            RewindError::because(Class::Other, "it is not known what replay rebuilds", error)
        })?;
        let (units, count) = leave_out(units, &covered);
        left_out.store(count, Ordering::Relaxed);
        Ok(units)
    };
    Later { cost, units: Box::pin(units) }
}

#[cfg(test)]
mod tests;
