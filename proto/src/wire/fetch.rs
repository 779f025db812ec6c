//! Generated messages to domain types and back: the data path.

use bytes::Bytes;
use pg_format::{BLOCK_SIZE, DataPath, Lsn, TimelineId};

use super::changes;
use crate::delta::SIGNATURE_BYTES;
use crate::fetch::{
    BlockRange, Item, ItemBody, PageContent, PageDifference, ProofStart, Signatures, Unit,
    UnitKind, VerifiedChunk, VerifiedPage,
};
use crate::frame::{Codec, Frame, FrameError};
use crate::hash::HASH_BYTES;
use crate::limits::UNITS_PER_MESSAGE_MAX;
use crate::limits::{
    BATCH_BYTES_MAX, FRAME_MESSAGE_BYTES_MAX, RUN_PAGES, UNIT_BLOCKS_MAX, UNIT_BYTES_MAX,
    UNIT_HASHES_MAX,
};
use crate::refusal::{Reason, Refusal};
use crate::{PageHash, wire};

fn bad_request(why: impl Into<String>) -> Refusal {
    Refusal::new(Reason::InvalidRequest, why)
}

fn path(text: String) -> Result<DataPath, Refusal> {
    DataPath::new(text).map_err(|error| bad_request(error.to_string()))
}

fn range(first: u32, count: u32, count_max: u32) -> Result<BlockRange, Refusal> {
    if count == 0 || count > count_max || first.checked_add(count).is_none() {
        return Err(bad_request(format!("a range of {count} blocks from {first} is not allowed")));
    }
    Ok(BlockRange { first, count })
}

fn length(offset: u64, length: u64) -> Result<(), Refusal> {
    if length == 0 || length > UNIT_BYTES_MAX || offset.checked_add(length).is_none() {
        return Err(bad_request(format!("{length} bytes from {offset} are not allowed")));
    }
    Ok(())
}

/// The signatures of a unit, one for each page; `None` if it has none.
fn signatures(pages: Bytes, seed: u64, blocks: u64) -> Result<Option<Signatures>, Refusal> {
    if pages.is_empty() {
        return Ok(None);
    }
    if pages.len() as u64 != blocks.saturating_mul(SIGNATURE_BYTES as u64) {
        return Err(bad_request("a unit must have one signature for each page"));
    }
    Ok(Some(Signatures { seed, pages }))
}

impl TryFrom<wire::Unit> for Unit {
    type Error = Refusal;

    fn try_from(unit: wire::Unit) -> Result<Self, Refusal> {
        use wire::unit::Kind;
        let kind = match unit.kind.ok_or_else(|| bad_request("a unit has no kind"))? {
            Kind::Blocks(blocks) => {
                let ranges: Result<Vec<_>, _> = blocks
                    .ranges
                    .iter()
                    .map(|r| range(r.first, r.count, UNIT_BLOCKS_MAX))
                    .collect();
                let ranges = ranges?;
                let total: u64 = ranges.iter().map(|r| u64::from(r.count)).sum();
                if total > u64::from(UNIT_BLOCKS_MAX) {
                    return Err(bad_request(format!("a unit has too many blocks: {total}")));
                }
                let signatures = signatures(blocks.signatures, blocks.seed, total)?;
                UnitKind::Blocks { path: path(blocks.path)?, ranges, signatures }
            }
            Kind::Hashes(hashes) => {
                let range = range(hashes.first, hashes.count, UNIT_HASHES_MAX)?;
                let (own, rest) = hashes.own.as_chunks::<HASH_BYTES>();
                let runs = range.count.div_ceil(RUN_PAGES) as usize;
                if !rest.is_empty() || !own.is_empty() && own.len() != runs {
                    return Err(bad_request("a unit must have one hash for each run of pages"));
                }
                let own = own.iter().map(|bytes| PageHash::from_bytes(*bytes)).collect();
                UnitKind::Hashes { range, path: path(hashes.path)?, own }
            }
            Kind::File(file) => {
                length(file.offset, file.length)?;
                UnitKind::File { path: path(file.path)?, offset: file.offset, length: file.length }
            }
            Kind::Wal(wal) => {
                length(wal.offset, wal.length)?;
                let timeline = TimelineId::new(wal.timeline)
                    .map_err(|error| bad_request(error.to_string()))?;
                UnitKind::Wal {
                    timeline,
                    number: wal.number,
                    offset: wal.offset,
                    length: wal.length,
                }
            }
            Kind::Proof(proof) => {
                let from = Lsn::new(proof.from);
                let from = if proof.from_record {
                    ProofStart::Record(from)
                } else {
                    ProofStart::Segment(from)
                };
                UnitKind::Proof { from, to: Lsn::new(proof.to), each_record: proof.each_record }
            }
            Kind::Changes(changes) => {
                let (from, to) = (Lsn::new(changes.from), Lsn::new(changes.to));
                if from >= to {
                    return Err(bad_request(format!("changes from {from} to {to}: invalid range")));
                }
                UnitKind::Changes { from, to, rebuilt: changes.rebuilt }
            }
            Kind::Measure(measure) => {
                let nested = |unit: &wire::Unit| matches!(unit.kind, Some(Kind::Measure(_)));
                if measure.units.len() > UNITS_PER_MESSAGE_MAX || measure.units.iter().any(nested) {
                    return Err(bad_request("a measurement is nested or has too many units"));
                }
                let units: Result<Vec<Self>, _> =
                    measure.units.into_iter().map(Self::try_from).collect();
                UnitKind::Measure(units?)
            }
        };
        Ok(Self { id: unit.id, kind })
    }
}

impl From<Unit> for wire::Unit {
    fn from(unit: Unit) -> Self {
        use wire::unit::Kind;
        let kind = match unit.kind {
            UnitKind::Blocks { path, ranges, signatures } => Kind::Blocks(wire::BlocksUnit {
                path: path.into(),
                seed: signatures.as_ref().map_or(0, |signatures| signatures.seed),
                signatures: signatures.map(|signatures| signatures.pages).unwrap_or_default(),
                ranges: ranges
                    .iter()
                    .map(|r| wire::BlockRange { first: r.first, count: r.count })
                    .collect(),
            }),
            UnitKind::Hashes { path, range, own } => Kind::Hashes(wire::HashesUnit {
                path: path.into(),
                first: range.first,
                count: range.count,
                own: all_bytes(&own),
            }),
            UnitKind::File { path, offset, length } => {
                Kind::File(wire::FileUnit { path: path.into(), offset, length })
            }
            UnitKind::Wal { timeline, number, offset, length } => {
                Kind::Wal(wire::WalUnit { timeline: timeline.get(), number, offset, length })
            }
            UnitKind::Proof { from, to, each_record } => {
                let (from, from_record) = match from {
                    ProofStart::Record(lsn) => (lsn, true),
                    ProofStart::Segment(lsn) => (lsn, false),
                };
                let (from, to) = (from.as_u64(), to.as_u64());
                Kind::Proof(wire::ProofUnit { from, to, from_record, each_record })
            }
            UnitKind::Changes { from, to, rebuilt } => {
                let (from, to) = (from.as_u64(), to.as_u64());
                Kind::Changes(wire::ChangesUnit { from, to, rebuilt })
            }
            UnitKind::Measure(units) => {
                let units = units.into_iter().map(Into::into).collect();
                Kind::Measure(wire::MeasureUnit { units })
            }
        };
        Self { id: unit.id, kind: Some(kind) }
    }
}

fn all_bytes(hashes: &[PageHash]) -> Bytes {
    hashes.iter().flat_map(|hash| *hash.as_bytes()).collect()
}

fn hash_bytes(hash: PageHash) -> Bytes {
    Bytes::copy_from_slice(hash.as_bytes())
}

fn hash(bytes: &[u8], field: &'static str) -> Result<PageHash, FrameError> {
    let bytes: [u8; HASH_BYTES] = bytes.try_into().map_err(|_| FrameError::Field { field })?;
    Ok(PageHash::from_bytes(bytes))
}

impl From<Item> for wire::Item {
    fn from(item: Item) -> Self {
        use wire::item::Body;
        let body = match item.body {
            ItemBody::Page { block, content } => Body::Page(page_item(block, content)),
            ItemBody::PageHashes { first, hashes } => {
                Body::PageHashes(wire::PageHashesItem { first, hashes: all_bytes(&hashes) })
            }
            ItemBody::Same { first, count } => Body::Same(wire::SameItem { first, count }),
            ItemBody::Chunk(chunk) => Body::Chunk(wire::ChunkItem {
                offset: chunk.offset(),
                hash: hash_bytes(chunk.hash()),
                data: chunk.data().clone(),
            }),
            ItemBody::SegmentDigest { number, records, digest } => Body::Proof(wire::ProofItem {
                position: number,
                records,
                digest: hash_bytes(digest),
            }),
            ItemBody::RecordCrc { lsn, crc } => Body::Proof(wire::ProofItem {
                position: lsn.as_u64(),
                records: 1,
                digest: Bytes::copy_from_slice(&crc.to_le_bytes()),
            }),
            ItemBody::Change(change) => changes::body(change),
            ItemBody::Waiting => Body::Waiting(wire::WaitingItem {}),
            ItemBody::End { vanished, bytes } => Body::End(wire::UnitEnd { vanished, bytes }),
        };
        Self { unit: item.unit, body: Some(body) }
    }
}

impl TryFrom<wire::Item> for Item {
    type Error = FrameError;

    fn try_from(item: wire::Item) -> Result<Self, FrameError> {
        use wire::item::Body;
        let unit = item.unit;
        let body = match item.body.ok_or(FrameError::Field { field: "body" })? {
            Body::Page(page) => {
                ItemBody::Page { block: page.block, content: page_content(unit, &page)? }
            }
            Body::PageHashes(hashes) => {
                let (hashes_of_16, rest) = hashes.hashes.as_chunks::<HASH_BYTES>();
                if !rest.is_empty() || hashes_of_16.len() > UNIT_HASHES_MAX as usize {
                    return Err(FrameError::Field { field: "hashes" });
                }
                let list = hashes_of_16.iter().map(|bytes| PageHash::from_bytes(*bytes));
                ItemBody::PageHashes { first: hashes.first, hashes: list.collect() }
            }
            Body::Same(same) => ItemBody::Same { first: same.first, count: same.count },
            Body::Chunk(chunk) => {
                let expected = hash(&chunk.hash, "hash")?;
                ItemBody::Chunk(
                    VerifiedChunk::check(chunk.offset, expected, chunk.data)
                        .ok_or(FrameError::Hash { unit })?,
                )
            }
            Body::Proof(proof) => match <[u8; 4]>::try_from(&proof.digest[..]) {
                Ok(crc) => ItemBody::RecordCrc {
                    lsn: Lsn::new(proof.position),
                    crc: u32::from_le_bytes(crc),
                },
                Err(_) => ItemBody::SegmentDigest {
                    number: proof.position,
                    records: proof.records,
                    digest: hash(&proof.digest, "digest")?,
                },
            },
            Body::ChangedBlocks(blocks) => ItemBody::Change(changes::blocks(&blocks)?),
            Body::ChangedRelation(relation) => ItemBody::Change(changes::relation(&relation)),
            Body::ChangedDirectory(item) => ItemBody::Change(changes::directory(item)),
            Body::ChangesCovered(covered) => ItemBody::Change(changes::covered(&covered)),
            Body::Waiting(wire::WaitingItem {}) => ItemBody::Waiting,
            Body::End(end) => ItemBody::End { vanished: end.vanished, bytes: end.bytes },
        };
        Ok(Self { unit, body })
    }
}

fn page_item(block: u32, content: PageContent) -> wire::PageItem {
    let whole = |page: &VerifiedPage, torn| {
        let (hash, data) = (hash_bytes(page.hash()), page.data().clone());
        wire::PageItem { block, hash, data, torn, delta: Bytes::new() }
    };
    match content {
        PageContent::Present(page) => whole(&page, false),
        PageContent::Torn(page) => whole(&page, true),
        PageContent::Difference(PageDifference { hash, delta }) => {
            wire::PageItem { block, hash: hash_bytes(hash), delta, ..Default::default() }
        }
        PageContent::BeyondEnd => wire::PageItem { block, ..Default::default() },
    }
}

fn page_content(unit: u64, page: &wire::PageItem) -> Result<PageContent, FrameError> {
    if !page.delta.is_empty() {
        if !page.data.is_empty() || page.torn {
            return Err(FrameError::Field { field: "delta" });
        }
        let (hash, delta) = (hash(&page.hash, "hash")?, page.delta.clone());
        return Ok(PageContent::Difference(PageDifference { hash, delta }));
    }
    if page.data.is_empty() {
        return Ok(PageContent::BeyondEnd);
    }
    if page.data.len() != BLOCK_SIZE {
        return Err(FrameError::Field { field: "data" });
    }
    let verified = VerifiedPage::check(hash(&page.hash, "hash")?, page.data.clone())
        .ok_or(FrameError::Hash { unit })?;
    Ok(if page.torn { PageContent::Torn(verified) } else { PageContent::Present(verified) })
}

impl From<Frame> for wire::FetchFrame {
    fn from(frame: Frame) -> Self {
        let codec = match frame.codec {
            Codec::Plain => wire::Codec::Plain,
            Codec::Zstd => wire::Codec::Zstd,
        };
        Self {
            sequence: frame.sequence,
            codec: codec.into(),
            batch_bytes: frame.batch_bytes,
            payload: frame.payload,
            payload_crc32c: frame.payload_crc,
        }
    }
}

impl TryFrom<wire::FetchFrame> for Frame {
    type Error = FrameError;

    fn try_from(frame: wire::FetchFrame) -> Result<Self, FrameError> {
        let codec = match frame.codec() {
            wire::Codec::Plain => Codec::Plain,
            wire::Codec::Zstd => Codec::Zstd,
            wire::Codec::Unspecified => return Err(FrameError::Field { field: "codec" }),
        };
        // Checked before the frame is queued: the receive budget counts frames, not bytes.
        if frame.batch_bytes as usize > BATCH_BYTES_MAX
            || frame.payload.len() > FRAME_MESSAGE_BYTES_MAX
        {
            return Err(FrameError::TooLong(frame.batch_bytes));
        }
        Ok(Self {
            sequence: frame.sequence,
            codec,
            batch_bytes: frame.batch_bytes,
            payload: frame.payload,
            payload_crc: frame.payload_crc32c,
        })
    }
}
