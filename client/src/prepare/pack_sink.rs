//! Takes the replies of a fetch: whole pages and files go into packs, one for each connection, and WAL goes to its place.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use parking_lot::Mutex;
use pg_format::{BlockRange, DataPath};
use proto::fetch::{Item, ItemBody, PageContent, Unit, UnitKind};
use proto::frame::{Frame, FrameEncoder};

use crate::error::{Class, Replan, RewindError};
use crate::plan::units::file_of_unit;
use crate::prepare::wal_pieces::{WalReceiver, is_wal};
use crate::source::page_delta::{Open, OwnPages};
use crate::source::pool::Sink;
use crate::source::prepare::Prepare;
use crate::staging::disk::Disk;
use crate::staging::manifest::PackDigest;
use crate::staging::notes::Notes;
use crate::staging::pack::{PackWriter, STAGING_LEVEL};
use crate::staging::staging_error;

/// What all connections of a fetch put into packs.
#[derive(Debug, Clone)]
pub(super) struct PackSinks {
    disk: Arc<dyn Disk>,
    notes: Arc<Mutex<Notes>>,
    packs: Arc<Mutex<BTreeMap<String, PackDigest>>>,
    wal: Arc<WalReceiver>,
    own: Arc<OwnPages>,
    /// The files of the plan.
    paths: Arc<[DataPath]>,
}

/// The result.
pub(super) struct Packed {
    /// What was noted.
    pub(super) notes: Notes,
    /// The packs.
    pub(super) packs: Vec<PackDigest>,
    /// Bytes of signatures of the target's pages that were sent.
    pub(super) signature_bytes: u64,
}

impl PackSinks {
    pub(super) fn new(
        disk: &Arc<dyn Disk>,
        notes: Notes,
        own: Arc<OwnPages>,
        paths: Arc<[DataPath]>,
        wal: Arc<WalReceiver>,
    ) -> Self {
        let (notes, packs) = (Arc::new(Mutex::new(notes)), Arc::default());
        Self { disk: Arc::clone(disk), notes, packs, wal, own, paths }
    }

    /// The target's own pages, which complete the requests.
    pub(super) fn own(&self) -> Arc<dyn Prepare> {
        Arc::clone(&self.own) as Arc<dyn Prepare>
    }

    /// The sink of one connection, with a pack of this name.
    pub(super) fn open(&self, name: String) -> Result<Box<dyn Sink>, RewindError> {
        let writer =
            PackWriter::create(Arc::clone(&self.disk), name.clone()).map_err(staging_error)?;
        let mut encoder = FrameEncoder::new();
        encoder.pack(Some(STAGING_LEVEL), None);
        Ok(Box::new(PackSink { shared: self.clone(), writer, name, open: None, encoder }))
    }

    /// Units that ask for the pages that could not be rebuilt from differences so far.
    pub(super) fn whole_units(&self) -> Vec<Unit> {
        let wrong = self.own.take_wrong().into_iter();
        wrong.filter_map(|(id, blocks)| self.whole_unit(id, blocks)).collect()
    }

    /// A unit that asks for pages of another unit whole. It has the other's number, so that a later run finds
    /// what came of both.
    fn whole_unit(&self, id: u64, blocks: BTreeSet<u32>) -> Option<Unit> {
        let path = self.paths.get(file_of_unit(id))?.clone();
        let ranges = blocks.into_iter().map(|first| BlockRange { first, count: 1 }).collect();
        Some(Unit { id, kind: UnitKind::Blocks { path, ranges, signatures: None } })
    }

    /// What was packed, once all connections have finished.
    ///
    /// # Errors
    /// Pages are missing because only differences came for them, or the source contradicted itself: an incomplete
    /// set must not be sealed.
    pub(super) fn packed(&self) -> Result<Packed, RewindError> {
        let path = |file: usize| self.paths.get(file).map_or("a file", DataPath::as_str);
        if let Some(unit) = self.own.take_wrong().keys().next() {
            let path = path(file_of_unit(*unit));
            let message = format!(
                "the source sent page differences for {path} where whole pages were requested"
            );
            return Err(RewindError::new(Class::Other, message));
        }
        let notes = std::mem::take(&mut *self.notes.lock());
        if let Some(file) = notes.contradicted {
            let path = path(file);
            let message =
                format!("the source reported two different lengths of {path} in one answer");
            return Err(RewindError::replan(Replan::SourceChanged, message));
        }
        let packs = std::mem::take(&mut *self.packs.lock()).into_values().collect();
        Ok(Packed { notes, packs, signature_bytes: self.own.signature_bytes() })
    }
}

/// Appends frames to a pack and keeps the notes; WAL goes elsewhere.
struct PackSink {
    shared: PackSinks,
    writer: PackWriter,
    name: String,
    /// The file whose pages were rebuilt last.
    open: Open,
    encoder: FrameEncoder,
}

impl PackSink {
    /// Packs hold whole pages: what is sealed needs neither the source nor the target's old pages.
    fn rebuild(&mut self, items: &[Item]) -> Result<(), RewindError> {
        let Self { shared, writer, open, encoder, .. } = self;
        let unknown = || {
            let message = "the source sent a page of a file that is not in the plan";
            RewindError::new(Class::Other, message)
        };
        for item in items {
            let path = shared.paths.get(file_of_unit(item.unit)).ok_or_else(unknown)?;
            let Some(item) = shared.own.rebuild(path, item, open)? else {
                continue;
            };
            shared.notes.lock().take(&item);
            if let Some(frame) = encoder.push(item) {
                writer.append(&frame).map_err(staging_error)?;
            }
        }
        encoder.flush().map_or(Ok(()), |frame| writer.append(&frame)).map_err(staging_error)
    }
}

fn is_difference(item: &Item) -> bool {
    matches!(item.body, ItemBody::Page { content: PageContent::Difference(_), .. })
}

impl Sink for PackSink {
    fn receive(&mut self, frame: &Frame, items: &[Item]) -> Result<Vec<Unit>, RewindError> {
        if items.iter().any(is_wal) {
            self.shared.wal.receive(frame, items)?;
            return Ok(Vec::new());
        }
        if items.iter().any(is_difference) {
            self.rebuild(items)?;
        } else {
            self.writer.append(frame).map_err(staging_error)?;
            let mut notes = self.shared.notes.lock();
            items.iter().for_each(|item| notes.take(item));
        }
        let ended = items.iter().filter(|item| matches!(item.body, ItemBody::End { .. }));
        let wrong = ended.filter_map(|item| self.shared.own.take_wrong_of(item.unit));
        Ok(wrong.filter_map(|(id, blocks)| self.shared.whole_unit(id, blocks)).collect())
    }

    fn finish(&mut self) -> Result<(), RewindError> {
        let digest = self.writer.finish().map_err(staging_error)?;
        self.shared.packs.lock().insert(self.name.clone(), digest);
        Ok(())
    }
}
