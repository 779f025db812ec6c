//! What the source had to say about planned files while they were read.

use std::collections::{BTreeMap, BTreeSet};

use pg_format::BLOCK_BYTES;
use proto::fetch::{Item, ItemBody, PageContent, VerifiedChunk};

use crate::plan::Plan;
use crate::plan::units::file_of_unit;
use crate::source_checks::is_judged;

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
