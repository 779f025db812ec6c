//! Fetches everything into staging.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use pg_format::{BLOCK_BYTES, BlockRange, BlockSet, Covered, DataPath};
use proto::fetch::{Item, ItemBody, PageContent, Signatures, Unit, UnitKind, VerifiedChunk};
use proto::frame::{Frame, FrameEncoder};
use tokio::sync::oneshot;

use crate::apply::disk::Disk;
use crate::apply::manifest::PackDigest;
use crate::apply::pack::{PackWriter, STAGING_LEVEL};
use crate::apply::redo::file_of_unit;
use crate::covered::{divide, leave_out};
use crate::error::{Class, RewindError};
use crate::fetch::Session;
use crate::fetch::ask::{AsTheyAre, Prepare};
use crate::fetch::differences::{Open, OwnPages};
use crate::fetch::pool::{self, Carried, Later, Sink, Work};
use crate::fetch::progress::cost;
use crate::fetch::wal_units::{WalUnits, is_wal};
use crate::monitor::Monitor;
use crate::plan::Plan;
use crate::recovered::Recovered;
use crate::source_checks::is_judged;

/// Blocks and bytes in one unit: small enough that every connection gets its share of a small plan.
const UNIT_BLOCKS: u32 = 128;
/// See [`UNIT_BLOCKS`].
pub const UNIT_BYTES: u64 = 1 << 20;

/// Small files are asked for this much, so that one that grew since it was listed comes whole.
const SMALL_FILE_BYTES: u64 = 1 << 20;

/// A file that is judged has no more bytes.
const JUDGED_BYTES_MAX: usize = 4096;

/// What the source had to say about files while they were read.
#[derive(Debug, Default)]
pub struct Notes {
    /// Pages whose checksum did not fit: file and block inside it.
    pub torn: Vec<(usize, u32)>,
    /// Files that were gone.
    pub vanished: BTreeSet<usize>,
    /// Files that were shorter than listed: bytes.
    pub shorter: BTreeMap<usize, u64>,
    /// Pages that arrived, whatever they were.
    pub pages: u64,
    /// Content of files that is judged before the seal.
    pub contents: BTreeMap<usize, Vec<u8>>,
    /// Files of which that is wanted.
    judged: BTreeSet<usize>,
    /// Units of which a page was said to lie behind the end of its file, and where that would be.
    ends: BTreeMap<u64, u64>,
    /// A file that was said to be longer than that in the same answer.
    pub contradicted: Option<usize>,
}

impl Notes {
    /// Nothing was said yet about the files of this plan.
    pub fn of(plan: &Plan) -> Self {
        let files = plan.files.iter().enumerate();
        let judged = files.filter(|(_, file)| is_judged(&file.path)).map(|(index, _)| index);
        Self { judged: judged.collect(), ..Self::default() }
    }

    /// Keeps what a file holds, if that is judged.
    fn keep(&mut self, file: usize, chunk: &VerifiedChunk) {
        let end = chunk.offset().saturating_add(chunk.data().len() as u64);
        let (Ok(start), Ok(end)) = (usize::try_from(chunk.offset()), usize::try_from(end)) else {
            return;
        };
        if !self.judged.contains(&file) || end > JUDGED_BYTES_MAX {
            return;
        }
        let content = self.contents.entry(file).or_default();
        content.resize(content.len().max(end), 0);
        if let Some(place) = content.get_mut(start..end) {
            place.copy_from_slice(chunk.data());
        }
    }

    /// Notes what a reply says.
    pub fn take(&mut self, item: &Item) {
        let file = file_of_unit(item.unit);
        if let ItemBody::Page { .. } = item.body {
            self.pages += 1;
        }
        match &item.body {
            ItemBody::Page { block, content: PageContent::Torn(_) } => {
                self.torn.push((file, *block));
            }
            ItemBody::Page { block, content: PageContent::BeyondEnd } => {
                let end = u64::from(*block) * BLOCK_BYTES;
                let shorter = self.shorter.entry(file).or_insert(end);
                *shorter = end.min(*shorter);
                let first = self.ends.entry(item.unit).or_insert(end);
                *first = end.min(*first);
            }
            ItemBody::Chunk(chunk) => self.keep(file, chunk),
            ItemBody::End { vanished: true, .. } => {
                self.vanished.insert(file);
            }
            ItemBody::End { bytes, .. } => {
                // A last page that is not whole lies behind the end, too.
                let end = self.ends.remove(&item.unit);
                if end.is_some_and(|end| *bytes >= end.saturating_add(BLOCK_BYTES)) {
                    self.contradicted.get_or_insert(file);
                }
            }
            _ => {}
        }
    }
}

/// The result of the data fetch.
#[derive(Debug)]
pub struct Staged {
    /// What was noted.
    pub notes: Notes,
    /// Pages an earlier run had fetched.
    pub recovered_pages: u64,
    /// Pages that replay rebuilds, and that therefore did not travel.
    pub covered_pages: u64,
    /// The packs.
    pub packs: Vec<PackDigest>,
    /// What the connections carried.
    pub carried: Carried,
    /// What of it was WAL: payload bytes.
    pub wal_payload_bytes: u64,
    /// Bytes of signatures of the target's pages that were asked with.
    pub signature_bytes: u64,
}

/// The units of a plan, in the order of its files.
pub fn units(plan: &Plan) -> Vec<Unit> {
    let mut serials: BTreeMap<usize, u64> = BTreeMap::new();
    let mut units = Vec::new();
    let mut add = |file: usize, kind: UnitKind| {
        let serial = serials.entry(file).or_default();
        units.push(Unit { id: (file as u64) << 32 | *serial, kind });
        *serial += 1;
    };
    for wanted in &plan.pages {
        let Some(file) = plan.files.get(wanted.file) else {
            continue;
        };
        // Of the first ones the target has other versions.
        for (part, signed) in [(0..wanted.known, true), (wanted.known..wanted.end, false)] {
            let part = part.start..part.end.min(wanted.end);
            for ranges in batches(&wanted.blocks, part) {
                let signatures = signed.then(|| Signatures { seed: 0, pages: Bytes::new() });
                add(wanted.file, UnitKind::Blocks { path: file.path.clone(), ranges, signatures });
            }
        }
    }
    for wanted in &plan.whole {
        let Some(file) = plan.files.get(wanted.file) else {
            continue;
        };
        let bytes = wanted.bytes.max(SMALL_FILE_BYTES);
        let mut offset = 0;
        while offset < bytes {
            let length = UNIT_BYTES.min(bytes - offset);
            add(wanted.file, UnitKind::File { path: file.path.clone(), offset, length });
            offset += length;
        }
    }
    units.sort_by_key(|unit| unit.id);
    units
}

/// Ranges of the blocks in `part`, as many together as one unit asks for.
fn batches(blocks: &BlockSet, part: Range<u32>) -> Vec<Vec<BlockRange>> {
    let mut batches: Vec<Vec<BlockRange>> = Vec::new();
    let mut room = 0;
    for range in blocks.ranges_in(part, UNIT_BLOCKS) {
        match batches.last_mut() {
            Some(batch) if range.count <= room => {
                room -= range.count;
                batch.push(range);
            }
            _ => {
                room = UNIT_BLOCKS - range.count;
                batches.push(vec![range]);
            }
        }
    }
    batches
}

/// What is fetched for a plan.
#[derive(Debug)]
pub struct Wanted<'a> {
    /// Pages and files.
    pub plan: &'a Plan,
    /// Counts the plans made and the runs begun for this rewind.
    pub attempt: u32,
    /// What an earlier run had fetched of them.
    pub recovered: Recovered,
    /// WAL, which comes first: the source may recycle it.
    pub wal: (Vec<Unit>, Arc<WalUnits>),
    /// What the target has.
    pub own: OwnPages,
    /// Told what replay rebuilds as soon as its WAL is here.
    pub covered: oneshot::Receiver<Covered>,
}

/// Fetches pages and files into packs and WAL to its place in staging.
pub async fn fetch(
    session: &Session,
    disk: &Arc<dyn Disk>,
    wanted: Wanted<'_>,
    monitor: Arc<dyn Monitor>,
) -> Result<Staged, RewindError> {
    let Wanted { plan, attempt, recovered, wal: (mut first, wal), own, covered } = wanted;
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
        Work { units: first, later: Some(later), prepare, start: pool::Start::Together },
        |number| sink(format!("{attempt}-{number:04}")),
        Arc::clone(&monitor),
    )
    .await?;
    // Of a unit of which only the word that it ended was lost with its connection, or that came as
    // differences when it was asked for whole.
    let wrong: Vec<Unit> =
        own.take_wrong().into_iter().filter_map(|wrong| whole_unit(wrong, &paths)).collect();
    if !wrong.is_empty() {
        tracing::debug!(units = wrong.len(), "pages that could not be rebuilt are fetched whole");
        let (prepare, start) = (Arc::new(AsTheyAre), pool::Start::AsTheyCome);
        let again = pool::run(
            session,
            Work { units: wrong, later: None, prepare, start },
            |number| sink(format!("{attempt}-whole-{number:04}")),
            monitor,
        );
        carried.absorb(&again.await?);
    }
    // Nothing that did not come may be sealed.
    if let Some(unit) = own.take_wrong().keys().next() {
        let path = paths.get(file_of_unit(*unit)).map_or("a file", DataPath::as_str);
        let message =
            format!("the source sends pages of {path} as differences that were asked for whole");
        return Err(RewindError::new(Class::Other, message));
    }
    let notes = std::mem::take(&mut *notes.lock().unwrap_or_else(PoisonError::into_inner));
    if let Some(file) = notes.contradicted {
        let path = paths.get(file).map_or("a file", DataPath::as_str);
        let message = format!("the source says of {path} that it ends, and that it is longer");
        return Err(RewindError::new(Class::Changed, message));
    }
    let packs = std::mem::take(&mut *packs.lock().unwrap_or_else(PoisonError::into_inner));
    all.extend(packs.into_values());
    let wal_payload_bytes = wal.payload_bytes();
    let signature_bytes = own.signature_bytes();
    Ok(Staged {
        notes,
        recovered_pages,
        covered_pages: left_out.load(Ordering::Relaxed),
        packs: all,
        carried,
        wal_payload_bytes,
        signature_bytes,
    })
}

/// Whether a question is long and its answer short: it is asked behind those of which it is the other way
/// round, so that the link is busy in both directions.
fn is_signed(unit: &Unit) -> bool {
    matches!(unit.kind, UnitKind::Blocks { signatures: Some(_), .. })
}

/// Units that wait until it is known what replay rebuilds.
fn later(units: Vec<Unit>, covered: oneshot::Receiver<Covered>, left_out: Arc<AtomicU64>) -> Later {
    let cost = units.iter().map(|unit| cost(&unit.kind)).sum();
    let units = async move {
        let covered = covered.await.map_err(|error| {
            RewindError::because(Class::Other, "nobody said what replay rebuilds", error)
        })?;
        let (units, count) = leave_out(units, &covered);
        left_out.store(count, Ordering::Relaxed);
        Ok(units)
    };
    Later { cost, units: Box::pin(units) }
}

/// Asks for pages of a unit whole. It keeps its number, so that a later run finds what came of it.
fn whole_unit((id, blocks): (u64, BTreeSet<u32>), paths: &[DataPath]) -> Option<Unit> {
    let path = paths.get(file_of_unit(id))?.clone();
    let ranges = blocks.into_iter().map(|first| BlockRange { first, count: 1 }).collect();
    Some(Unit { id, kind: UnitKind::Blocks { path, ranges, signatures: None } })
}

fn staging_error(error: io::Error) -> RewindError {
    RewindError::because(Class::Preflight, "could not write fetched data to staging", error)
}

/// What makes whole pages of differences.
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
    wal: Arc<WalUnits>,
    rebuilding: Rebuilding,
}

impl PackSink {
    /// Packs hold whole pages: what is sealed needs neither the source nor the target's old pages.
    fn rebuild(&mut self, items: &[Item]) -> Result<(), RewindError> {
        let Rebuilding { own, paths, open, encoder } = &mut self.rebuilding;
        let unknown =
            || RewindError::new(Class::Other, "a page came of a file that is not planned");
        for item in items {
            let path = paths.get(file_of_unit(item.unit)).ok_or_else(unknown)?;
            let Some(item) = own.rebuild(path, item, open)? else {
                continue;
            };
            self.notes.lock().unwrap_or_else(PoisonError::into_inner).take(&item);
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
            let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
            items.iter().for_each(|item| notes.take(item));
        }
        let Rebuilding { own, paths, .. } = &self.rebuilding;
        let ended = items.iter().filter(|item| matches!(item.body, ItemBody::End { .. }));
        let wrong = ended.filter_map(|item| own.take_wrong_of(item.unit));
        Ok(wrong.filter_map(|wrong| whole_unit(wrong, paths)).collect())
    }

    fn finish(&mut self) -> Result<(), RewindError> {
        let digest = self.writer.finish().map_err(staging_error)?;
        let mut packs = self.packs.lock().unwrap_or_else(PoisonError::into_inner);
        packs.insert(self.name.clone(), digest);
        Ok(())
    }
}
