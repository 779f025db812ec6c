//! How far each unit has been answered, so that nothing that has arrived is fetched again after a connection
//! is lost.
//!
//! Replies are checked here: one that does not fit its request is an error.

use std::collections::BTreeMap;

use pg_format::{BLOCK_BYTES, Lsn};
use proto::PageHash;
use proto::fetch::{BlockRange, Item, ItemBody, ProofStart, Unit, UnitKind};
use proto::limits::RUN_PAGES;

/// Smallest WAL segment `initdb` makes: how many digests a proof can have at most.
const SEGMENT_BYTES_MIN: u64 = 1 << 20;
/// Smallest record: how many records a proof can have at most.
const RECORD_BYTES_MIN: u64 = 24;

/// Cost of a page that comes as a difference: few bytes are transferred, but both nodes read a page.
const DIFFERENCE_BYTES: u64 = 1 << 10;

/// A reply that does not belong to what was asked.
#[derive(Debug, thiserror::Error)]
#[error("unexpected reply to request {unit}: {why}")]
pub struct Unexpected {
    unit: u64,
    why: &'static str,
}

impl Unexpected {
    /// A reply of this unit that does not belong there.
    pub fn of(unit: u64, why: &'static str) -> Self {
        Self { unit, why }
    }
}

/// Units that were asked for and are not finished, in the order they were asked.
#[derive(Debug, Default)]
pub struct Outstanding {
    units: BTreeMap<u64, (u64, Unit)>,
    next: u64,
}

/// Bytes a unit is expected to bring, before compression.
pub fn cost(kind: &UnitKind) -> u64 {
    match kind {
        UnitKind::Blocks { ranges, signatures, .. } => {
            let page = if signatures.is_some() { DIFFERENCE_BYTES } else { BLOCK_BYTES };
            ranges.iter().map(|range| u64::from(range.count) * page).sum()
        }
        // Little travels, but the source has to read all of it.
        UnitKind::Hashes { range, .. } => u64::from(range.count) * 256,
        UnitKind::File { length, .. } | UnitKind::Wal { length, .. } => *length,
        UnitKind::Proof { .. } | UnitKind::Changes { .. } | UnitKind::Measure(_) => BLOCK_BYTES,
    }
}

impl Outstanding {
    /// Notes a unit that is being asked for.
    pub fn insert(&mut self, unit: Unit) {
        self.units.insert(unit.id, (self.next, unit));
        self.next += 1;
    }

    /// Replaces units by what they have become since they were inserted.
    pub fn update(&mut self, units: &[Unit]) {
        for unit in units {
            if let Some((_, known)) = self.units.get_mut(&unit.id) {
                known.clone_from(unit);
            }
        }
    }

    /// Bytes still expected.
    pub fn cost(&self) -> u64 {
        self.units.values().map(|(_, unit)| cost(&unit.kind)).sum()
    }

    /// Whether nothing is expected.
    pub fn is_empty(&self) -> bool {
        self.units.is_empty()
    }

    /// What is left to ask for, in order: only what has not arrived.
    pub fn take(&mut self) -> Vec<Unit> {
        let mut left: Vec<_> = std::mem::take(&mut self.units).into_values().collect();
        left.sort_by_key(|(order, _)| *order);
        left.into_iter().map(|(_, unit)| unit).collect()
    }

    /// Checks a reply against its request, and takes what it answers off the request.
    pub fn receive(&mut self, item: &Item) -> Result<(), Unexpected> {
        let fault = |why| Unexpected { unit: item.unit, why };
        let (_, unit) = self.units.get_mut(&item.unit).ok_or_else(|| fault("no such request"))?;
        match (&mut unit.kind, &item.body) {
            (_, ItemBody::Waiting) => {}
            (kind, ItemBody::End { vanished, .. }) => {
                let missing = match kind {
                    UnitKind::Blocks { ranges, .. } => !ranges.is_empty(),
                    // Fewer come where the file has become shorter.
                    UnitKind::Hashes { .. }
                    | UnitKind::File { .. }
                    | UnitKind::Wal { .. }
                    | UnitKind::Proof { .. }
                    | UnitKind::Changes { .. }
                    | UnitKind::Measure(_) => false,
                };
                if missing && !vanished {
                    return Err(fault("it ends before all pages have come"));
                }
                self.units.remove(&item.unit);
            }
            (UnitKind::Blocks { ranges, .. }, ItemBody::Page { block, .. }) => {
                match ranges.first_mut() {
                    Some(range) if range.first == *block => take_first(ranges),
                    _ => return Err(fault("it is not the page that is next")),
                }
            }
            (UnitKind::Hashes { range, own, .. }, ItemBody::PageHashes { first, hashes }) => {
                let count = u32::try_from(hashes.len()).unwrap_or(u32::MAX);
                if *first != range.first || count == 0 || count > range.count {
                    return Err(fault("it has hashes of other pages"));
                }
                advance(range, own, count);
            }
            (UnitKind::Hashes { range, own, .. }, ItemBody::Same { first, count }) => {
                // Only a whole run whose hash was sent to the source can be reported as the same.
                let run = RUN_PAGES.min(range.count);
                if *first != range.first || *count != run || own.is_empty() {
                    return Err(fault("it reports other pages as the same"));
                }
                advance(range, own, run);
            }
            (
                UnitKind::File { offset, length, .. } | UnitKind::Wal { offset, length, .. },
                ItemBody::Chunk(chunk),
            ) => {
                let bytes = chunk.data().len() as u64;
                if bytes == 0 {
                    return Err(fault("it is empty"));
                }
                if chunk.offset() != *offset || bytes > *length {
                    return Err(fault("its bytes are not those that are next"));
                }
                *offset += bytes;
                *length -= bytes;
            }
            (UnitKind::Proof { from, to, each_record: true }, ItemBody::RecordCrc { lsn, .. }) => {
                if *lsn < position(*from) || lsn >= to {
                    return Err(fault("its WAL record is outside the requested range"));
                }
                *from = ProofStart::Record(lsn.plus(RECORD_BYTES_MIN));
            }
            (UnitKind::Proof { from, to, each_record: false }, ItemBody::SegmentDigest { .. }) => {
                let next = position(*from);
                if next >= *to {
                    return Err(fault("it has more digests than there are segments"));
                }
                *from = ProofStart::Segment(next.plus(SEGMENT_BYTES_MIN));
            }
            // Changes may come in any order. They are used only if the last one says which range they cover.
            (UnitKind::Changes { .. }, ItemBody::Change(_)) => {}
            _ => return Err(fault("it is of another kind")),
        }
        Ok(())
    }
}

fn position(start: ProofStart) -> Lsn {
    match start {
        ProofStart::Record(lsn) | ProofStart::Segment(lsn) => lsn,
    }
}

/// Takes pages off the front of a unit of hashes, and the client's hashes of their runs.
fn advance(range: &mut BlockRange, own: &mut Vec<PageHash>, count: u32) {
    range.first += count;
    range.count -= count;
    let runs = (count.div_ceil(RUN_PAGES) as usize).min(own.len());
    own.drain(..runs);
}

fn take_first(ranges: &mut Vec<BlockRange>) {
    if let Some(range) = ranges.first_mut() {
        range.first += 1;
        range.count -= 1;
        if range.count == 0 {
            ranges.remove(0);
        }
    }
}

/// Whether nothing of a unit is left to ask for after its connection is lost.
pub fn is_finished(unit: &Unit) -> bool {
    match &unit.kind {
        UnitKind::Blocks { ranges, .. } => ranges.is_empty(),
        UnitKind::File { length, .. } | UnitKind::Wal { length, .. } => *length == 0,
        UnitKind::Hashes { range, .. } => range.count == 0,
        UnitKind::Proof { .. } | UnitKind::Changes { .. } | UnitKind::Measure(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use pg_format::DataPath;
    use proto::fetch::PageContent;

    use super::*;

    fn page(unit: u64, block: u32) -> Item {
        Item { unit, body: ItemBody::Page { block, content: PageContent::BeyondEnd } }
    }

    #[test]
    fn only_what_is_missing_is_asked_again() {
        let mut outstanding = Outstanding::default();
        let ranges = vec![BlockRange { first: 5, count: 2 }, BlockRange { first: 9, count: 2 }];
        let path = DataPath::new("base/5/1").unwrap();
        outstanding
            .insert(Unit { id: 7, kind: UnitKind::Blocks { path, ranges, signatures: None } });
        for block in [5, 6, 9] {
            outstanding.receive(&page(7, block)).unwrap();
        }
        assert!(outstanding.receive(&page(7, 9)).is_err());
        assert!(outstanding.receive(&page(8, 10)).is_err());
        let left = outstanding.take();
        let UnitKind::Blocks { ranges, .. } = &left[0].kind else { panic!() };
        assert_eq!(ranges[..], [BlockRange { first: 10, count: 1 }]);
    }

    fn asked(kind: UnitKind) -> Outstanding {
        let mut outstanding = Outstanding::default();
        outstanding.insert(Unit { id: 7, kind });
        outstanding
    }

    fn path() -> DataPath {
        DataPath::new("base/5/1").unwrap()
    }

    fn reply(body: ItemBody) -> Item {
        Item { unit: 7, body }
    }

    fn end(vanished: bool) -> Item {
        reply(ItemBody::End { vanished, bytes: 0 })
    }

    #[test]
    fn a_unit_of_pages_ends_when_all_of_them_came_or_the_file_is_gone() {
        let ranges = vec![BlockRange { first: 5, count: 1 }];
        let blocks = || UnitKind::Blocks { path: path(), ranges: ranges.clone(), signatures: None };
        assert!(asked(blocks()).receive(&end(false)).is_err(), "a page is missing");
        let mut whole = asked(blocks());
        whole.receive(&page(7, 5)).unwrap();
        whole.receive(&end(false)).unwrap();
        assert!(whole.is_empty());
        let mut gone = asked(blocks());
        gone.receive(&end(true)).unwrap();
        assert!(gone.is_empty());
    }

    fn chunk(offset: u64, bytes: usize) -> Item {
        let data = bytes::Bytes::from(vec![1; bytes]);
        reply(ItemBody::Chunk(proto::fetch::VerifiedChunk::read(offset, data)))
    }

    #[test]
    fn bytes_come_in_order_and_no_more_than_were_asked_for() {
        let file = || asked(UnitKind::File { path: path(), offset: 100, length: 10 });
        assert!(file().receive(&chunk(101, 1)).is_err());
        assert!(file().receive(&chunk(100, 11)).is_err());
        assert!(file().receive(&chunk(100, 0)).is_err(), "nothing keeps a run alive");
        let mut whole = file();
        whole.receive(&chunk(100, 4)).unwrap();
        whole.receive(&chunk(104, 6)).unwrap();
        assert!(whole.receive(&chunk(110, 1)).is_err());
        whole.receive(&end(false)).unwrap();
        assert!(whole.is_empty());
    }

    #[test]
    fn what_is_left_of_a_file_begins_where_the_last_bytes_ended() {
        let mut cut = asked(UnitKind::File { path: path(), offset: 100, length: 10 });
        cut.receive(&chunk(100, 4)).unwrap();
        let left = cut.take();
        let kind = UnitKind::File { path: path(), offset: 104, length: 6 };
        assert_eq!(left, [Unit { id: 7, kind }]);
        assert!(!is_finished(&left[0]));
    }

    fn hashes(runs: usize, pages: u32) -> Outstanding {
        let own = vec![PageHash::of(b"run"); runs];
        asked(UnitKind::Hashes { path: path(), range: BlockRange { first: 0, count: pages }, own })
    }

    #[test]
    fn only_whole_runs_are_the_same() {
        let same = |first, count| reply(ItemBody::Same { first, count });
        let mut two = hashes(2, 2 * RUN_PAGES);
        two.receive(&same(0, RUN_PAGES)).unwrap();
        assert!(two.receive(&same(0, RUN_PAGES)).is_err(), "said already");
        two.receive(&same(RUN_PAGES, RUN_PAGES)).unwrap();
        assert!(hashes(2, 2 * RUN_PAGES).receive(&same(0, 5)).is_err(), "a part of a run");
        assert!(hashes(0, RUN_PAGES).receive(&same(0, RUN_PAGES)).is_err(), "no hash was sent");
    }

    #[test]
    fn hashes_are_of_the_pages_that_were_asked_about() {
        let of = |first, count: usize| {
            reply(ItemBody::PageHashes { first, hashes: vec![PageHash::of(b"page"); count] })
        };
        assert!(hashes(1, 10).receive(&of(0, 11)).is_err());
        assert!(hashes(1, 10).receive(&of(1, 1)).is_err());
        assert!(hashes(1, 10).receive(&of(0, 0)).is_err());
        let mut part = hashes(1, 10);
        part.receive(&of(0, 4)).unwrap();
        part.receive(&of(4, 6)).unwrap();
    }

    #[test]
    fn a_proof_has_no_more_than_its_range_can_hold() {
        let range = |each_record| UnitKind::Proof {
            from: ProofStart::Segment(Lsn::new(0)),
            to: Lsn::new(2 * SEGMENT_BYTES_MIN),
            each_record,
        };
        let digest = || {
            let digest = PageHash::of(b"records");
            reply(ItemBody::SegmentDigest { number: 0, records: 1, digest })
        };
        let mut digests = asked(range(false));
        digests.receive(&digest()).unwrap();
        digests.receive(&digest()).unwrap();
        assert!(digests.receive(&digest()).is_err());
        let record = |lsn| reply(ItemBody::RecordCrc { lsn: Lsn::new(lsn), crc: 1 });
        let mut records = asked(range(true));
        records.receive(&record(40)).unwrap();
        assert!(records.receive(&record(50)).is_err(), "inside the last one");
        assert!(records.receive(&record(2 * SEGMENT_BYTES_MIN)).is_err(), "behind the range");
    }

    #[test]
    fn a_reply_of_another_kind_is_refused() {
        let wal = || {
            let timeline = pg_format::TimelineId::new(1).unwrap();
            asked(UnitKind::Wal { timeline, number: 1, offset: 0, length: 10 })
        };
        assert!(wal().receive(&page(7, 0)).is_err());
        let change = proto::fetch::Change::Directory { tablespace: 1663, database: 5 };
        assert!(wal().receive(&reply(ItemBody::Change(change))).is_err());
    }

    #[test]
    fn costs_follow_what_travels() {
        let ranges = vec![BlockRange { first: 0, count: 2 }];
        let seed = proto::fetch::Signatures { seed: 0, pages: bytes::Bytes::new() };
        let blocks =
            |signatures| UnitKind::Blocks { path: path(), ranges: ranges.clone(), signatures };
        assert_eq!(cost(&blocks(None)), 2 * BLOCK_BYTES);
        assert!(cost(&blocks(Some(seed))) < cost(&blocks(None)));
        let mut outstanding = asked(blocks(None));
        assert_eq!(outstanding.cost(), 2 * BLOCK_BYTES);
        outstanding.receive(&page(7, 0)).unwrap();
        assert_eq!(outstanding.cost(), BLOCK_BYTES);
    }
}
