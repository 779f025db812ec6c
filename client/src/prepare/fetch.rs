//! Fetches everything into staging.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use pg_format::{BlockRange, Covered, DataPath};
use proto::fetch::{Item, ItemBody, PageContent, Unit, UnitKind};
use proto::frame::{Frame, FrameEncoder};
use tokio::sync::oneshot;

use crate::error::{Class, Replan, RewindError};
use crate::monitor::Monitor;
use crate::plan::Plan;
use crate::plan::replayed_blocks::{divide, leave_out};
use crate::plan::units::{file_of_unit, units};
use crate::prepare::wal_pieces::{WalPieces, WalReceiver, is_wal};
use crate::source::Session;
use crate::source::in_flight::cost;
use crate::source::page_delta::{Open, OwnPages};
use crate::source::pool::{self, Carried, Later, Sink, Work};
use crate::source::prepare::{AsTheyAre, Prepare};
use crate::staging::disk::Disk;
use crate::staging::manifest::PackDigest;
use crate::staging::notes::Notes;
use crate::staging::pack::{PackWriter, STAGING_LEVEL};
use crate::staging::partial_fetch::Recovered;
use crate::staging::staging_error;

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
    let notes = Arc::new(Mutex::new(notes));
    let packs = Arc::new(Mutex::new(BTreeMap::new()));
    let own = Arc::new(own);
    let paths: Arc<[DataPath]> = plan.files.iter().map(|file| file.path.clone()).collect();
    let sink = |name: String| {
        let writer = PackWriter::create(Arc::clone(disk), name.clone()).map_err(staging_error)?;
        let (notes, packs, wal) = (Arc::clone(&notes), Arc::clone(&packs), Arc::clone(&wal));
        let mut encoder = FrameEncoder::new();
        encoder.pack(Some(STAGING_LEVEL), None);
        let (own, paths) = (Arc::clone(&own), Arc::clone(&paths));
        let rebuilding = Rebuilding { own, paths, open: None, encoder };
        Ok(Box::new(PackSink { writer, name, notes, packs, wal, rebuilding }) as Box<dyn Sink>)
    };
    let prepare = Arc::clone(&own) as Arc<dyn Prepare>;
    let mut carried = pool::run(
        session,
        Work { units: first, later: Some(later), prepare, start: pool::PoolStart::Together },
        |number| sink(format!("{run}-{number:04}")),
        Arc::clone(&monitor),
    )
    .await?;
    // Pages of units whose end was lost with its connection, or that came as differences although they were
    // asked for whole.
    let wrong = own.take_wrong().into_iter();
    let wrong: Vec<Unit> =
        wrong.filter_map(|(id, blocks)| whole_unit(id, blocks, &paths)).collect();
    if !wrong.is_empty() {
        tracing::debug!(units = wrong.len(), "pages that could not be rebuilt are fetched whole");
        let (prepare, start) = (Arc::new(AsTheyAre), pool::PoolStart::AsTheyCome);
        let again = pool::run(
            session,
            Work { units: wrong, later: None, prepare, start },
            |number| sink(format!("{run}-whole-{number:04}")),
            monitor,
        );
        carried.absorb(&again.await?);
    }
    refuse_differences(&own, &paths)?;
    let notes = std::mem::take(&mut *notes.lock());
    if let Some(file) = notes.contradicted {
        let path = paths.get(file).map_or("a file", DataPath::as_str);
        let message = format!("the source reported two different lengths of {path} in one answer");
        return Err(RewindError::replan(Replan::SourceChanged, message));
    }
    let packs = std::mem::take(&mut *packs.lock());
    all.extend(packs.into_values());
    let wal_payload_bytes = wal.payload_bytes();
    let signature_bytes = own.signature_bytes();
    Ok(Fetched {
        notes,
        recovered_pages,
        covered_pages: left_out.load(Ordering::Relaxed),
        packs: all,
        carried,
        wal_payload_bytes,
        signature_bytes,
    })
}

/// Fails if pages are missing because only differences came for them: an incomplete set must not be sealed.
fn refuse_differences(own: &OwnPages, paths: &[DataPath]) -> Result<(), RewindError> {
    let wrong = own.take_wrong();
    let Some(unit) = wrong.keys().next() else {
        return Ok(());
    };
    let path = paths.get(file_of_unit(*unit)).map_or("a file", DataPath::as_str);
    let message =
        format!("the source sent page differences for {path} where whole pages were requested");
    Err(RewindError::new(Class::Other, message))
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

/// A unit that asks for pages of another unit whole. It has the other's number, so that a later run finds
/// what came of both.
fn whole_unit(id: u64, blocks: BTreeSet<u32>, paths: &[DataPath]) -> Option<Unit> {
    let path = paths.get(file_of_unit(id))?.clone();
    let ranges = blocks.into_iter().map(|first| BlockRange { first, count: 1 }).collect();
    Some(Unit { id, kind: UnitKind::Blocks { path, ranges, signatures: None } })
}

/// Rebuilds whole pages from differences.
struct Rebuilding {
    own: Arc<OwnPages>,
    paths: Arc<[DataPath]>,
    open: Open,
    encoder: FrameEncoder,
}

/// Appends frames to a pack and keeps the notes; WAL goes elsewhere.
struct PackSink {
    writer: PackWriter,
    name: String,
    notes: Arc<Mutex<Notes>>,
    packs: Arc<Mutex<BTreeMap<String, PackDigest>>>,
    wal: Arc<WalReceiver>,
    rebuilding: Rebuilding,
}

impl PackSink {
    /// Packs hold whole pages: what is sealed needs neither the source nor the target's old pages.
    fn rebuild(&mut self, items: &[Item]) -> Result<(), RewindError> {
        let Rebuilding { own, paths, open, encoder } = &mut self.rebuilding;
        let unknown = || {
            RewindError::new(
                Class::Other,
                "the source sent a page of a file that is not in the plan",
            )
        };
        for item in items {
            let path = paths.get(file_of_unit(item.unit)).ok_or_else(unknown)?;
            let Some(item) = own.rebuild(path, item, open)? else {
                continue;
            };
            self.notes.lock().take(&item);
            if let Some(frame) = encoder.push(item) {
                self.writer.append(&frame).map_err(staging_error)?;
            }
        }
        encoder.flush().map_or(Ok(()), |frame| self.writer.append(&frame)).map_err(staging_error)
    }
}

fn is_difference(item: &Item) -> bool {
    matches!(item.body, ItemBody::Page { content: PageContent::Difference(_), .. })
}

impl Sink for PackSink {
    fn receive(&mut self, frame: &Frame, items: &[Item]) -> Result<Vec<Unit>, RewindError> {
        if items.iter().any(is_wal) {
            self.wal.receive(frame, items)?;
            return Ok(Vec::new());
        }
        if items.iter().any(is_difference) {
            self.rebuild(items)?;
        } else {
            self.writer.append(frame).map_err(staging_error)?;
            let mut notes = self.notes.lock();
            items.iter().for_each(|item| notes.take(item));
        }
        let Rebuilding { own, paths, .. } = &self.rebuilding;
        let ended = items.iter().filter(|item| matches!(item.body, ItemBody::End { .. }));
        let wrong = ended.filter_map(|item| own.take_wrong_of(item.unit));
        Ok(wrong.filter_map(|(id, blocks)| whole_unit(id, blocks, paths)).collect())
    }

    fn finish(&mut self) -> Result<(), RewindError> {
        let digest = self.writer.finish().map_err(staging_error)?;
        let mut packs = self.packs.lock();
        packs.insert(self.name.clone(), digest);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
