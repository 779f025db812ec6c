//! Compares page hashes of the two nodes and notes which pages differ.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use data_dir::DataDir;
use data_dir::dir::read_at;
use pg_format::{BLOCK_BYTES, BLOCK_SIZE, DataPath};
use proto::PageHash;
use proto::fetch::{BlockRange, Item, ItemBody, Unit, UnitKind};
use proto::frame::Frame;
use proto::limits::UNIT_HASHES_MAX;

use super::Session;
use super::pool::{self, Carried, Sink};
use crate::error::{Class, RewindError};
use crate::monitor::Monitor;
use crate::plan::Differences;
use crate::plan::decide::Comparison;
use crate::plan::page_map::BlockSet;

/// Pages read at once.
const RUN_PAGES: usize = 64;

/// Compares all of `comparisons`; every file of them has an entry in the result.
pub async fn compare(
    session: &Session,
    directory: Arc<DataDir>,
    comparisons: &[Comparison],
    monitor: Arc<dyn Monitor>,
) -> Result<(Differences, Carried), RewindError> {
    let mut units = Vec::new();
    let mut asked = HashMap::new();
    let mut differences = Differences::new();
    for Comparison { path, blocks } in comparisons {
        differences.insert(path.clone(), BlockSet::default());
        let mut first = 0;
        while first < *blocks {
            let range = BlockRange { first, count: UNIT_HASHES_MAX.min(blocks - first) };
            let id = units.len() as u64;
            asked.insert(id, (path.clone(), range));
            units.push(Unit { id, kind: UnitKind::Hashes { path: path.clone(), range } });
            first += range.count;
        }
    }
    let differences = Arc::new(Mutex::new(differences));
    let asked = Arc::new(Mutex::new(asked));
    let carried = pool::run(
        session,
        units,
        |_| {
            Ok(Box::new(CompareSink {
                directory: Arc::clone(&directory),
                asked: Arc::clone(&asked),
                differences: Arc::clone(&differences),
            }))
        },
        monitor,
    )
    .await?;
    let found = std::mem::take(&mut *differences.lock().unwrap_or_else(PoisonError::into_inner));
    Ok((found, carried))
}

struct CompareSink {
    directory: Arc<DataDir>,
    /// What is still to come of each unit.
    asked: Arc<Mutex<HashMap<u64, (DataPath, BlockRange)>>>,
    differences: Arc<Mutex<Differences>>,
}

impl CompareSink {
    /// Blocks from `first` on whose hash here is another than the source's.
    fn differing(
        &self,
        path: &DataPath,
        first: u32,
        hashes: &[PageHash],
    ) -> std::io::Result<Vec<u32>> {
        let file = self.directory.open_file(path)?;
        let mut buffer = vec![0; RUN_PAGES * BLOCK_SIZE];
        let mut different = Vec::new();
        let mut block = first;
        for run in hashes.chunks(RUN_PAGES) {
            let wanted = buffer.get_mut(..run.len() * BLOCK_SIZE).unwrap_or_default();
            let bytes = read_at(&file, wanted, u64::from(block) * BLOCK_BYTES)?;
            let mut pages = wanted.get(..bytes).unwrap_or_default().chunks_exact(BLOCK_SIZE);
            for hash in run {
                if pages.next().map(PageHash::of) != Some(*hash) {
                    different.push(block);
                }
                block += 1;
            }
        }
        Ok(different)
    }
}

impl Sink for CompareSink {
    fn receive(&mut self, _frame: &Frame, items: &[Item]) -> Result<(), RewindError> {
        for item in items {
            let left = {
                let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
                let Some((path, range)) = asked.get_mut(&item.unit) else {
                    continue;
                };
                let left = (path.clone(), *range);
                if let ItemBody::PageHashes { hashes, .. } = &item.body {
                    let count = u32::try_from(hashes.len()).unwrap_or(range.count);
                    range.first += count.min(range.count);
                    range.count -= count.min(range.count);
                }
                left
            };
            let (path, range) = left;
            let different = match &item.body {
                ItemBody::PageHashes { hashes, .. } => {
                    self.differing(&path, range.first, hashes).map_err(|error| {
                        RewindError::because(Class::Target, format!("could not read {path}"), error)
                    })?
                }
                // Gone, or shorter than it was listed: what did not come is not the same.
                ItemBody::End { .. } => (range.first..range.first + range.count).collect(),
                _ => continue,
            };
            let mut all = self.differences.lock().unwrap_or_else(PoisonError::into_inner);
            let set = all.entry(path).or_default();
            different.into_iter().for_each(|block| set.insert(block));
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<(), RewindError> {
        Ok(())
    }
}
