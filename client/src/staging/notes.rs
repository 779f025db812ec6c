//! What the source reported about planned files while they were read.

use std::collections::{BTreeMap, BTreeSet};

use pg_format::BLOCK_BYTES;
use proto::fetch::{Item, ItemBody, PageContent, VerifiedChunk};

use crate::plan::Plan;
use crate::plan::units::file_of_unit;
use crate::source_checks::is_judged;

/// Longest content that is kept; the files whose content is checked are shorter.
const JUDGED_BYTES_MAX: usize = 4096;

/// What the source reported about files while they were read.
#[derive(Debug, Default)]
pub struct Notes {
    /// Pages whose checksum did not fit: file and block inside it.
    pub torn: Vec<(usize, u32)>,
    /// Files that were gone.
    pub vanished: BTreeSet<usize>,
    /// Files that were shorter than listed, with their length in bytes.
    pub shorter: BTreeMap<usize, u64>,
    /// Pages that arrived, whatever they were.
    pub pages: u64,
    /// Content of files that is checked before the seal.
    pub contents: BTreeMap<usize, Vec<u8>>,
    /// Files whose content is kept.
    judged: BTreeSet<usize>,
    /// For each unit, the offset of the first page that was reported to lie behind the end of its file.
    ends: BTreeMap<u64, u64>,
    /// A file that the same answer reported to be longer than that.
    pub contradicted: Option<usize>,
}

impl Notes {
    /// Nothing is noted yet about the files of this plan.
    pub fn of(plan: &Plan) -> Self {
        let files = plan.files.iter().enumerate();
        let judged = files.filter(|(_, file)| is_judged(&file.path)).map(|(index, _)| index);
        Self { judged: judged.collect(), ..Self::default() }
    }

    /// Keeps the content of a file, if it is checked before the seal.
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

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use pg_format::{BLOCK_SIZE, DataPath};
    use proto::fetch::VerifiedPage;

    use super::*;
    use crate::plan::file_actions::{FileAction, PlannedFile};

    /// A reply of the first unit of a file.
    fn reply(file: u64, body: ItemBody) -> Item {
        Item { unit: file << 32, body }
    }

    fn page(block: u32, content: PageContent) -> ItemBody {
        ItemBody::Page { block, content }
    }

    fn torn() -> PageContent {
        PageContent::Torn(VerifiedPage::read(Bytes::from(vec![0; BLOCK_SIZE])).unwrap())
    }

    fn noted(items: impl IntoIterator<Item = Item>) -> Notes {
        let path = |name: &str| DataPath::new(name).unwrap();
        let action = FileAction::Replace { bytes: None };
        let files = ["base/5/16384", "PG_VERSION"];
        let files = files.map(|name| PlannedFile { path: path(name), action: action.clone() });
        let plan = Plan { files: files.to_vec(), ..Plan::default() };
        let mut notes = Notes::of(&plan);
        items.into_iter().for_each(|item| notes.take(&item));
        notes
    }

    #[test]
    fn torn_pages_and_files_that_are_gone_are_noted_by_their_file() {
        let end = |vanished| ItemBody::End { vanished, bytes: 0 };
        let notes = noted([
            reply(0, page(3, torn())),
            reply(0, page(7, torn())),
            reply(1, end(true)),
            reply(0, end(false)),
        ]);
        assert_eq!(notes.torn, [(0, 3), (0, 7)]);
        assert_eq!(notes.vanished, BTreeSet::from([1]));
        assert_eq!(notes.pages, 2);
        assert_eq!(notes.contradicted, None);
    }

    #[test]
    fn a_file_ends_at_the_first_page_that_lies_behind_its_end() {
        let beyond = |block| reply(0, page(block, PageContent::BeyondEnd));
        let notes = noted([beyond(9), beyond(4), beyond(6)]);
        assert_eq!(notes.shorter, BTreeMap::from([(0, 4 * BLOCK_BYTES)]));
    }

    #[test]
    fn a_file_cannot_end_and_be_longer() {
        let beyond = reply(0, page(4, PageContent::BeyondEnd));
        let ends = |bytes| reply(0, ItemBody::End { vanished: false, bytes });
        assert_eq!(noted([beyond.clone(), ends(4 * BLOCK_BYTES)]).contradicted, None);
        // Its last page is not whole.
        assert_eq!(noted([beyond.clone(), ends(4 * BLOCK_BYTES + 100)]).contradicted, None);
        assert_eq!(noted([beyond, ends(5 * BLOCK_BYTES)]).contradicted, Some(0));
    }

    #[test]
    fn what_is_judged_is_kept_and_no_more_of_it_than_makes_sense() {
        let chunk = |offset, bytes: &[u8]| {
            let data = Bytes::copy_from_slice(bytes);
            ItemBody::Chunk(VerifiedChunk::read(offset, data))
        };
        let notes = noted([reply(1, chunk(0, b"15")), reply(1, chunk(2, b"\n"))]);
        assert_eq!(notes.contents, BTreeMap::from([(1, b"15\n".to_vec())]));
        let other = noted([reply(0, chunk(0, b"rows"))]);
        assert!(other.contents.is_empty(), "of a relation nothing is kept");
        let far = noted([reply(1, chunk(u64::MAX - 1, b"15"))]);
        assert!(far.contents.is_empty());
    }
}
