//! Pages fetched for a plan that does not hold any more, as a cache: those of which the source still has
//! the same hash are taken over into the new plan's packs and not fetched again.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use pg_format::DataPath;
use proto::PageHash;
use proto::fetch::{BlockRange, Item, ItemBody, PageContent, Unit, UnitKind};
use proto::frame::{Frame, FrameEncoder};
use proto::limits::UNIT_HASHES_MAX;

use crate::error::{Class, RewindError};
use crate::plan::units::file_of_unit;
use crate::source::Session;
use crate::source::pool::{self, PoolStart, Sink, Work};
use crate::source::prepare::AsTheyAre;
use crate::staging::disk::{Disk, remove_tree};
use crate::staging::layout;
use crate::staging::pack::{self, PackWriter, STAGING_LEVEL};
use crate::task::Context;

/// A page of the old plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct CachedPage {
    /// Index of its file there.
    file: usize,
    /// Its block.
    block: u32,
}

/// Takes over the cached pages that the source still has unchanged. `files` are those of the old plan,
/// `units` those of the new one. Returns the payload bytes of the hashes that were fetched for it.
pub async fn take_over(
    cx: &Context,
    session: &Session,
    disk: &Arc<dyn Disk>,
    files: Vec<DataPath>,
    units: &[Unit],
    run: u32,
) -> Result<u64, RewindError> {
    let known = index(&**disk).map_err(failed)?;
    let old: HashMap<&DataPath, usize> = files.iter().zip(0..).collect();
    let mut wanted = HashMap::new();
    let mut asked = HashMap::new();
    let mut questions = Vec::new();
    for unit in units {
        let UnitKind::Blocks { path, ranges, .. } = &unit.kind else {
            continue;
        };
        let Some(file) = old.get(path).copied() else {
            continue;
        };
        let blocks = ranges.iter().flat_map(|range| range.first..range.first + range.count);
        let page = |block: &u32| CachedPage { file, block: *block };
        let blocks: Vec<u32> = blocks.filter(|block| known.contains_key(&page(block))).collect();
        wanted.extend(blocks.iter().map(|block| (page(block), unit.id)));
        for range in runs(&blocks) {
            let id = questions.len() as u64;
            asked.insert(id, file);
            questions.push(Unit {
                id,
                kind: UnitKind::Hashes { path: path.clone(), range, own: Vec::new() },
            });
        }
    }
    let same = Arc::new(Mutex::new(HashSet::new()));
    let (known, asked) = (Arc::new(known), Arc::new(asked));
    let prepare = Arc::new(AsTheyAre);
    let carried = pool::run(
        session,
        Work { units: questions, later: None, prepare, start: PoolStart::AsTheyCome },
        |_| {
            let (known, asked, same) = (Arc::clone(&known), Arc::clone(&asked), Arc::clone(&same));
            Ok(Box::new(HashSink { known, asked, same }))
        },
        Arc::clone(&cx.monitor),
    )
    .await?;
    let same = std::mem::take(&mut *same.lock());
    write(disk, run, |page| same.contains(&page).then(|| wanted.get(&page).copied()).flatten())
        .map_err(failed)?;
    Ok(carried.total())
}

fn failed(error: io::Error) -> RewindError {
    RewindError::because(
        Class::Preflight,
        "could not reuse the data that an earlier run fetched",
        error,
    )
}

/// Consecutive blocks, as many as may be asked for at once.
fn runs(blocks: &[u32]) -> Vec<BlockRange> {
    let mut runs: Vec<BlockRange> = Vec::new();
    for block in blocks {
        match runs.last_mut() {
            Some(last) if last.first + last.count == *block && last.count < UNIT_HASHES_MAX => {
                last.count += 1;
            }
            _ => runs.push(BlockRange { first: *block, count: 1 }),
        }
    }
    runs
}

/// Hands out every sound page in the cache.
fn pages(
    disk: &dyn Disk,
    give: &mut dyn FnMut(CachedPage, &Item) -> io::Result<()>,
) -> io::Result<()> {
    let directory = DataPath::new(layout::CACHE).map_err(io::Error::other)?;
    for name in disk.names(&directory)? {
        let file = disk.open(&directory.join(&name).map_err(io::Error::other)?)?;
        let signer = pack::Signer::new(disk, &name);
        let read = pack::recover(file, signer, &mut |items| {
            for item in &items {
                if let ItemBody::Page { block, content: PageContent::Present(_) } = &item.body {
                    give(CachedPage { file: file_of_unit(item.unit), block: *block }, item)?;
                }
            }
            Ok(())
        });
        read.map_err(pack::PackError::into_io)?;
    }
    Ok(())
}

fn index(disk: &dyn Disk) -> io::Result<HashMap<CachedPage, PageHash>> {
    let mut known = HashMap::new();
    pages(disk, &mut |page, item| {
        if let ItemBody::Page { content: PageContent::Present(content), .. } = &item.body {
            known.insert(page, content.hash());
        }
        Ok(())
    })?;
    Ok(known)
}

/// Writes a pack with every page that has a unit in the new plan, and removes the cache.
fn write(
    disk: &Arc<dyn Disk>,
    run: u32,
    unit_of: impl Fn(CachedPage) -> Option<u64>,
) -> io::Result<()> {
    let mut writer = PackWriter::create(Arc::clone(disk), format!("{run}-cache"))?;
    let mut encoder = FrameEncoder::new();
    encoder.pack(Some(STAGING_LEVEL), None);
    pages(&**disk, &mut |page, item| {
        let Some(unit) = unit_of(page) else {
            return Ok(());
        };
        let frame = encoder.push(Item { unit, body: item.body.clone() });
        frame.map_or(Ok(()), |frame| writer.append(&frame))
    })?;
    if let Some(frame) = encoder.flush() {
        writer.append(&frame)?;
    }
    writer.finish()?;
    remove_tree(&**disk, &DataPath::new(layout::CACHE).map_err(io::Error::other)?)
}

/// Notes which pages have the hash the source has now.
struct HashSink {
    known: Arc<HashMap<CachedPage, PageHash>>,
    /// The old file each unit asks about.
    asked: Arc<HashMap<u64, usize>>,
    same: Arc<Mutex<HashSet<CachedPage>>>,
}

impl Sink for HashSink {
    fn receive(&mut self, _frame: &Frame, items: &[Item]) -> Result<Vec<Unit>, RewindError> {
        let mut same = self.same.lock();
        for item in items {
            let (ItemBody::PageHashes { first, hashes }, Some(file)) =
                (&item.body, self.asked.get(&item.unit))
            else {
                continue;
            };
            let pages = (*first..).map(|block| CachedPage { file: *file, block });
            let equal = pages.zip(hashes).filter(|(page, hash)| self.known.get(page) == Some(hash));
            same.extend(equal.map(|(page, _)| page));
        }
        Ok(Vec::new())
    }

    fn finish(&mut self) -> Result<(), RewindError> {
        Ok(())
    }
}
