//! Compares page hashes of the two nodes and notes which pages differ.
//!
//! Each request has a hash of every run of the target's pages. For a run that is equal almost nothing is
//! transferred, and for a run that differs the hashes of its single pages come at once. Both nodes read at
//! the same time.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use data_dir::DataDir;
use data_dir::dir::{is_hole, read_at};
use parking_lot::Mutex;
use pg_format::{BLOCK_BYTES, BLOCK_SIZE, BlockSet, DataPath};
use proto::PageHash;
use proto::fetch::{BlockRange, Item, ItemBody, Unit, UnitKind};
use proto::frame::Frame;
use proto::hash::run_hash;
use proto::limits::{RUN_PAGES, UNIT_HASHES_MAX};

use crate::error::{Class, RewindError};
use crate::monitor::Monitor;
use crate::plan::Differences;
use crate::plan::file_actions::Comparison;
use crate::source::Session;
use crate::source::pool::{self, Carried, PoolStart, Sink, Work};
use crate::source::prepare::{Announce, Prepare};

/// What a comparison found.
#[derive(Debug)]
pub struct Compared {
    /// Pages that differ; every file that was compared has an entry.
    pub differences: Differences,
    /// What it took.
    pub carried: Carried,
}

/// Compares all of `comparisons`; every file of them has an entry in the result.
pub async fn compare(
    session: &Session,
    directory: Arc<DataDir>,
    comparisons: &[Comparison],
    monitor: Arc<dyn Monitor>,
) -> Result<Compared, RewindError> {
    let mut units = Vec::new();
    let mut differences = Differences::new();
    for Comparison { path, blocks } in comparisons {
        differences.insert(path.clone(), BlockSet::default());
        let mut first = 0;
        while first < *blocks {
            let range = BlockRange { first, count: UNIT_HASHES_MAX.min(blocks - first) };
            let kind = UnitKind::Hashes { path: path.clone(), range, own: Vec::new() };
            units.push(Unit { id: units.len() as u64, kind });
            first += range.count;
        }
    }
    let own = Arc::new(OwnHashes { directory, asked: Arc::default() });
    let differences = Arc::new(Mutex::new(differences));
    let prepare = Arc::clone(&own) as Arc<dyn Prepare>;
    let carried = pool::run(
        session,
        Work { units, later: None, prepare, start: PoolStart::AsTheyCome },
        |_| {
            let (own, differences) = (Arc::clone(&own), Arc::clone(&differences));
            Ok(Box::new(CompareSink { own, differences }))
        },
        monitor,
    )
    .await?;
    let differences = std::mem::take(&mut *differences.lock());
    Ok(Compared { differences, carried })
}

/// A request, and the part of it that is not answered yet.
struct AskedHashes {
    path: DataPath,
    range: BlockRange,
    /// Hashes of this node's pages of that range; fewer where its file ends.
    own: Vec<PageHash>,
}

impl AskedHashes {
    /// Takes the next pages off: their numbers and this node's hashes of them.
    fn take(&mut self, count: u32) -> impl Iterator<Item = (u32, Option<PageHash>)> + use<> {
        let count = count.min(self.range.count);
        let own: Vec<PageHash> = self.own.drain(..(count as usize).min(self.own.len())).collect();
        let first = self.range.first;
        self.range.first += count;
        self.range.count -= count;
        let own = own.into_iter().map(Some).chain(std::iter::repeat(None));
        (first..first + count).zip(own)
    }
}

/// Cost of one full question: the next is hashed while the source works on it.
const COST_AT_ONCE: u64 = 2 << 20;

/// Questions by the number of their unit.
type AllAsked = Arc<Mutex<HashMap<u64, AskedHashes>>>;

/// Hashes this node's pages for the questions, and keeps the hashes until they are answered.
struct OwnHashes {
    directory: Arc<DataDir>,
    asked: AllAsked,
}

impl OwnHashes {
    fn hashes(&self, path: &DataPath, range: BlockRange) -> io::Result<Vec<PageHash>> {
        let file = self.directory.open_file(path)?;
        let mut buffer = vec![0; RUN_PAGES as usize * BLOCK_SIZE];
        let mut hashes = Vec::with_capacity(range.count as usize);
        let end = range.first + range.count;
        let mut first = range.first;
        while first < end {
            let count = RUN_PAGES.min(end - first);
            let (offset, bytes) = (u64::from(first) * BLOCK_BYTES, count as usize * BLOCK_SIZE);
            first += count;
            if is_hole(&file, offset, bytes as u64) {
                let zeros = PageHash::of(&[0; BLOCK_SIZE]);
                hashes.extend(std::iter::repeat_n(zeros, count as usize));
                continue;
            }
            let wanted = buffer.get_mut(..bytes).unwrap_or_default();
            let read = read_at(&file, wanted, offset)?;
            let pages = wanted.get(..read).unwrap_or_default().chunks_exact(BLOCK_SIZE);
            hashes.extend(pages.map(PageHash::of));
            if read < bytes {
                break;
            }
        }
        Ok(hashes)
    }
}

impl Prepare for OwnHashes {
    fn prepare(&self, unit: &mut Unit) -> Result<Announce, RewindError> {
        let UnitKind::Hashes { path, range, own } = &mut unit.kind else {
            return Ok(Box::new(|| {}));
        };
        let hashes = self.hashes(path, *range).map_err(|error| {
            RewindError::because(Class::Target, format!("could not read {path}"), error)
        })?;
        *own = hashes.chunks(RUN_PAGES as usize).map(run_hash).collect();
        // Pages that no longer exist get a hash that no run of the source has.
        own.resize(range.count.div_ceil(RUN_PAGES) as usize, run_hash(&[]));
        let asked = AskedHashes { path: path.clone(), range: *range, own: hashes };
        let (all, id) = (Arc::clone(&self.asked), unit.id);
        Ok(Box::new(move || {
            all.lock().insert(id, asked);
        }))
    }

    fn cost_at_once(&self) -> u64 {
        COST_AT_ONCE
    }
}

struct CompareSink {
    own: Arc<OwnHashes>,
    differences: Arc<Mutex<Differences>>,
}

impl CompareSink {
    /// Pages that a reply shows to differ, and their file.
    fn differing(&self, item: &Item) -> Option<(DataPath, Vec<u32>)> {
        let mut all = self.own.asked.lock();
        let asked = all.get_mut(&item.unit)?;
        let different = match &item.body {
            // These are not the pages that come next: nothing is known of them.
            ItemBody::PageHashes { first, hashes } if *first != asked.range.first => {
                let count = u32::try_from(hashes.len()).unwrap_or(u32::MAX);
                (*first..first.saturating_add(count)).collect()
            }
            ItemBody::PageHashes { hashes, .. } => {
                let pages = asked.take(u32::try_from(hashes.len()).unwrap_or(u32::MAX)).zip(hashes);
                pages
                    .filter(|((_, own), theirs)| *own != Some(**theirs))
                    .map(|((block, _), _)| block)
                    .collect()
            }
            ItemBody::Same { count, .. } => {
                drop(asked.take(*count));
                Vec::new()
            }
            // Gone, or shorter than it was listed: what did not come is not the same.
            ItemBody::End { .. } => {
                let asked = all.remove(&item.unit)?;
                let range = asked.range;
                return Some((asked.path, (range.first..range.first + range.count).collect()));
            }
            _ => Vec::new(),
        };
        Some((asked.path.clone(), different))
    }
}

impl Sink for CompareSink {
    fn receive(&mut self, _frame: &Frame, items: &[Item]) -> Result<Vec<Unit>, RewindError> {
        for item in items {
            let Some((path, different)) = self.differing(item) else {
                continue;
            };
            let mut all = self.differences.lock();
            let set = all.entry(path).or_default();
            different.into_iter().for_each(|block| set.insert(block));
        }
        Ok(Vec::new())
    }

    fn finish(&mut self) -> Result<(), RewindError> {
        Ok(())
    }
}
