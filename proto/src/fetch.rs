//! The content of the data stream, as domain types.

use bytes::Bytes;
pub use pg_format::BlockRange;
use pg_format::{BLOCK_SIZE, BlockSet, DataPath, Lsn, RelationPath, RelationSegment, TimelineId};

use crate::PageHash;
use crate::delta::AnyOffset;

/// One piece of work for the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    /// Chosen by the client; replies carry it.
    pub id: u64,
    /// What is requested.
    pub kind: UnitKind,
}

impl Unit {
    /// The only unit of a request.
    pub fn single(kind: UnitKind) -> Self {
        Self { id: 0, kind }
    }
}

/// Kinds of work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UnitKind {
    /// Pages of a file that consists of pages.
    Blocks {
        /// The file.
        path: DataPath,
        /// The pages, in order.
        ranges: Vec<BlockRange>,
        /// Signatures of the client's versions of these pages, which may then be sent as differences; `None`
        /// to get whole pages.
        signatures: Option<Signatures>,
    },
    /// Hashes of pages.
    Hashes {
        /// The file.
        path: DataPath,
        /// The pages.
        range: BlockRange,
        /// Hashes of runs of the client's own pages, see [`crate::hash::run_hash`]; empty if every
        /// hash is wanted.
        own: Vec<PageHash>,
    },
    /// Bytes of a file.
    File {
        /// The file.
        path: DataPath,
        /// First byte.
        offset: u64,
        /// Bytes wanted; fewer come if the file ends before.
        length: u64,
    },
    /// Bytes of a WAL segment file.
    Wal {
        /// Timeline in its name.
        timeline: TimelineId,
        /// Its number.
        number: u64,
        /// First byte.
        offset: u64,
        /// Bytes wanted.
        length: u64,
    },
    /// Digests of WAL records that begin in `[from, to)`.
    Proof {
        /// First position.
        from: ProofStart,
        /// End.
        to: Lsn,
        /// List every record instead of one digest a segment.
        each_record: bool,
    },
    /// What the WAL records that begin in `[from, to)` change.
    Changes {
        /// First position.
        from: Lsn,
        /// End.
        to: Lsn,
        /// Ask only for the blocks that replay of these records rebuilds whatever their old content is.
        rebuilt: bool,
    },
    /// How many bytes the answers to these units would take. The answers are not sent. None of the units is
    /// of this kind.
    Measure(Vec<Unit>),
}

/// Signatures of the client's own pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signatures {
    /// Seed of the hashes in the signatures.
    pub seed: u64,
    /// [`crate::delta::SIGNATURE_BYTES`] for each page of the unit, in their order. Empty until the unit is asked for.
    pub pages: Bytes,
}

/// Where a proof begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProofStart {
    /// A record begins exactly here.
    Record(Lsn),
    /// The first record that begins in the segment that starts here.
    Segment(Lsn),
}

/// A page whose hash was checked. Only these can be written.
#[derive(Debug, Clone)]
pub struct VerifiedPage {
    hash: PageHash,
    data: Bytes,
}

impl VerifiedPage {
    /// Checks a page that was received; `None` if it is not what the hash says.
    pub fn check(hash: PageHash, data: Bytes) -> Option<Self> {
        let sound = data.len() == BLOCK_SIZE && PageHash::of(&data) == hash;
        sound.then_some(Self { hash, data })
    }

    /// A page that was read on this node and is to be sent with its hash; `None` if the length is not that of
    /// a page.
    pub fn read(data: Bytes) -> Option<Self> {
        let hash = PageHash::of(&data);
        (data.len() == BLOCK_SIZE).then_some(Self { hash, data })
    }

    /// The hash, which fits.
    pub fn hash(&self) -> PageHash {
        self.hash
    }

    /// The page's bytes.
    pub fn data(&self) -> &Bytes {
        &self.data
    }
}

/// Bytes of a file whose hash was checked. Only these can be written.
#[derive(Debug, Clone)]
pub struct VerifiedChunk {
    offset: u64,
    hash: PageHash,
    data: Bytes,
}

impl VerifiedChunk {
    /// Checks bytes that were received; `None` if they are not what the hash says.
    pub fn check(offset: u64, hash: PageHash, data: Bytes) -> Option<Self> {
        (PageHash::of(&data) == hash).then_some(Self { offset, hash, data })
    }

    /// Bytes that were read on this node and are to be sent with their hash.
    pub fn read(offset: u64, data: Bytes) -> Self {
        Self { offset, hash: PageHash::of(&data), data }
    }

    /// The hash, which fits.
    pub fn hash(&self) -> PageHash {
        self.hash
    }

    /// Where they belong.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The bytes.
    pub fn data(&self) -> &Bytes {
        &self.data
    }
}

/// One reply to a unit.
#[derive(Debug, Clone)]
pub struct Item {
    /// The unit.
    pub unit: u64,
    /// The reply.
    pub body: ItemBody,
}

/// The content of a page when it was read.
#[derive(Debug, Clone)]
pub enum PageContent {
    /// The page, whose checksum is correct or which has none.
    Present(VerifiedPage),
    /// The page, whose checksum was wrong at every attempt to read it: only replay can repair it.
    Torn(VerifiedPage),
    /// The page as a difference to the client's own version. It cannot be written before it is rebuilt and
    /// checked.
    Difference(PageDifference),
    /// The file ends before it.
    BeyondEnd,
}

/// A page as a difference to the client's own.
#[derive(Debug, Clone)]
pub struct PageDifference {
    /// The hash of the page.
    pub hash: PageHash,
    /// See [`crate::delta`].
    pub delta: Bytes,
}

impl PageDifference {
    /// Rebuilds the page; `None` if the result is not what the hash says.
    pub fn rebuild(&self, codec: &AnyOffset, own: &[u8]) -> Option<VerifiedPage> {
        let page = codec.apply(own, &self.delta).ok()?;
        VerifiedPage::check(self.hash, page.into())
    }
}

/// The range that an answer about changes covers, and what in it limits the use of the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reached {
    /// Start of the range: every record that begins at or after this position and before `to` is covered.
    pub from: Lsn,
    /// End of the range, at which another record begins.
    pub to: Lsn,
    /// Position at which `wal_level` was minimal: changes without records are possible.
    pub minimal_at: Option<Lsn>,
    /// A record whose effect on files is not known.
    pub unknown_at: Option<Lsn>,
    /// A record of an extension's own resource manager.
    pub extension_at: Option<Lsn>,
}

/// What WAL records change, piece by piece.
#[derive(Debug, Clone)]
pub enum Change {
    /// Blocks of a main fork's segment file that WAL records name.
    Blocks {
        /// The file.
        segment: RelationSegment,
        /// The blocks.
        blocks: BlockSet,
    },
    /// A relation that WAL records create or cut.
    Relation {
        /// The relation.
        relation: RelationPath,
        /// Whether it was created.
        created: bool,
        /// The smallest length to which it was truncated, in blocks.
        cut_to: Option<u32>,
    },
    /// A database directory that WAL records make, move or drop.
    Directory {
        /// The tablespace.
        tablespace: u32,
        /// The database.
        database: u32,
    },
    /// What an answer about changes covers.
    Reached(Reached),
}

/// Kinds of reply.
#[derive(Debug, Clone)]
pub enum ItemBody {
    /// One page of a blocks unit.
    Page {
        /// Its block number in the file.
        block: u32,
        /// Its content.
        content: PageContent,
    },
    /// Hashes of consecutive pages. Fewer than were asked for if the file ends.
    PageHashes {
        /// First page.
        first: u32,
        /// Their hashes.
        hashes: Vec<PageHash>,
    },
    /// Consecutive pages that are equal to the client's own, by the hash of their run.
    Same {
        /// First page.
        first: u32,
        /// How many.
        count: u32,
    },
    /// Bytes of a file or of WAL.
    Chunk(VerifiedChunk),
    /// Digest of one segment's records.
    SegmentDigest {
        /// The segment.
        number: u64,
        /// How many records begin in it.
        records: u64,
        /// Digest of their positions and CRCs.
        digest: PageHash,
    },
    /// One record.
    RecordCrc {
        /// Where it begins.
        lsn: Lsn,
        /// Its CRC.
        crc: u32,
    },
    /// Something that WAL records change.
    Change(Change),
    /// The answer goes on later: `--max-rate` makes the server wait. A sign of life, in a frame of its own.
    Waiting,
    /// Nothing more comes for this unit.
    End {
        /// Whether the file did not exist.
        vanished: bool,
        /// Its length when it was read; for a proof, where the source's records end.
        bytes: u64,
    },
}
