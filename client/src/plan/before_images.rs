//! Which bytes of the target's files a plan overwrites or cuts. Pure.

use std::ops::Range;

use pg_format::{BLOCK_BYTES, DataPath};

use crate::plan::FinalFile;
use crate::plan::file_actions::{FileAction, Plan};
use crate::plan::input::{TargetFiles, file_bytes};

/// What is saved of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Index of the file in the plan.
    pub file: usize,
    /// Where it is.
    pub path: DataPath,
    /// Bytes that will be overwritten or cut, in order.
    pub ranges: Vec<Range<u64>>,
}

/// What must be saved of the files a plan changes in place.
pub fn images(plan: &Plan, target: &TargetFiles) -> Vec<Image> {
    let mut blocks: Vec<Vec<Range<u64>>> = vec![Vec::new(); plan.files.len()];
    for wanted in &plan.pages {
        if let Some(blocks) = blocks.get_mut(wanted.file) {
            blocks.extend(wanted.blocks.ranges(wanted.end, u32::MAX).iter().map(|range| {
                let start = u64::from(range.first) * BLOCK_BYTES;
                start..start + u64::from(range.count) * BLOCK_BYTES
            }));
        }
    }
    let mut images = Vec::new();
    for (index, (file, mut ranges)) in plan.files.iter().zip(blocks).enumerate() {
        let FileAction::Patch { bytes: end } = file.action else {
            continue;
        };
        let Some(length) = target.get(&file.path).and_then(file_bytes) else {
            continue;
        };
        ranges.push(end..length);
        for range in &mut ranges {
            range.end = range.end.min(length);
        }
        ranges.retain(|range| range.start < range.end);
        if !ranges.is_empty() {
            images.push(Image { file: index, path: file.path.clone(), ranges });
        }
    }
    images
}

/// Images that [`images`] does not have: the ends of files that became shorter than planned while they were
/// fetched, and of files that must be emptied besides. The first `planned` of `files` are those of the plan.
pub fn cut_images(files: &[FinalFile<'_>], planned: usize) -> Vec<Image> {
    let mut images = Vec::new();
    for (index, file) in files.iter().enumerate() {
        let (FileAction::Patch { bytes }, Some(before)) = (&file.planned.action, file.bytes_before)
        else {
            continue;
        };
        let end = file.bytes(*bytes);
        let saved = index < planned && end == *bytes;
        if !saved && end < before {
            let ranges = std::iter::once(end..before).collect();
            images.push(Image { file: index, path: file.planned.path.clone(), ranges });
        }
    }
    images
}

/// Number of bytes that the images have.
pub fn bytes_of(images: &[Image]) -> u64 {
    images.iter().flat_map(|image| &image.ranges).map(|range| range.end - range.start).sum()
}

#[cfg(test)]
mod tests {
    use data_dir::{Entry, EntryKind};

    use pg_format::BlockSet;

    use super::*;
    use crate::plan::PlannedFile;
    use crate::plan::file_actions::PagesWanted;

    fn image(ours: u64, theirs: u64, blocks: &[u32]) -> Vec<(u64, u64)> {
        let path = DataPath::new("base/5/10").unwrap();
        let kind = EntryKind::File { bytes: ours };
        let entry = Entry { path: path.clone(), kind, mode: 0o600, inode: 1, modified: (0, 0) };
        let mut wanted = BlockSet::default();
        blocks.iter().for_each(|block| wanted.insert(*block));
        let end = u32::try_from(theirs / BLOCK_BYTES).unwrap();
        let plan = Plan {
            files: vec![PlannedFile {
                path: path.clone(),
                action: FileAction::Patch { bytes: theirs },
            }],
            pages: vec![PagesWanted { file: 0, blocks: wanted, end, known: 0 }],
            ..Plan::default()
        };
        let images = images(&plan, &TargetFiles::from([(path, entry)]));
        let ranges = images.into_iter().flat_map(|image| image.ranges);
        ranges.map(|range| (range.start, range.end)).collect()
    }

    #[test]
    fn what_is_overwritten_and_what_is_cut_is_saved() {
        let page = BLOCK_BYTES;
        assert_eq!(image(4 * page, 4 * page, &[1, 2]), [(page, 3 * page)]);
        assert_eq!(image(4 * page, 2 * page, &[0]), [(0, page), (2 * page, 4 * page)]);
        // What is not there yet needs no image, and a last page may be cut short.
        assert_eq!(image(page + 100, 3 * page, &[1, 2]), [(page, page + 100)]);
        assert_eq!(image(page, 3 * page, &[1, 2]), []);
    }

    fn file(action: FileAction) -> PlannedFile {
        PlannedFile { path: DataPath::new("base/5/10").unwrap(), action }
    }

    /// What is saved besides of one file that was `before` bytes long, of which `planned` are to be left and
    /// `shorter` came.
    fn cut(before: u64, planned: u64, shorter: Option<u64>, known: usize) -> Vec<(u64, u64)> {
        let planned_file = file(FileAction::Patch { bytes: planned });
        let came = FinalFile {
            planned: &planned_file,
            bytes_before: Some(before),
            shorter,
            is_gone: false,
        };
        let images = cut_images(&[came], known).into_iter();
        images.flat_map(|image| image.ranges).map(|range| (range.start, range.end)).collect()
    }

    #[test]
    fn a_file_that_came_shorter_is_saved_from_there_on() {
        let page = BLOCK_BYTES;
        assert_eq!(cut(4 * page, 4 * page, Some(page), 1), [(page, 4 * page)]);
        // As it was planned: saved already.
        assert_eq!(cut(4 * page, 2 * page, None, 1), []);
        assert_eq!(cut(4 * page, 2 * page, Some(3 * page), 1), []);
        // One that is emptied besides what was planned.
        assert_eq!(cut(4 * page, 0, None, 0), [(0, 4 * page)]);
        assert_eq!(cut(page, 4 * page, Some(2 * page), 1), [], "it grows all the same");
    }

    #[test]
    fn what_is_replaced_or_new_needs_no_image() {
        let replaced = file(FileAction::Replace { bytes: Some(0) });
        let new = file(FileAction::Patch { bytes: 0 });
        let of = |planned, bytes_before| FinalFile {
            planned,
            bytes_before,
            shorter: None,
            is_gone: false,
        };
        assert_eq!(cut_images(&[of(&replaced, Some(8192)), of(&new, None)], 0), []);
    }
}
