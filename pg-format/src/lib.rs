//! PostgreSQL's on-disk formats, versions 13 to 19: bytes in, meaning out.
//!
//! Nothing here opens a file, waits, or decides policy. Every parser takes bytes that may be
//! hostile or damaged and answers with a value or a [`FormatError`]; none panics. Layouts are those
//! of little-endian machines with 8-byte alignment, the only ones the project supports.

pub mod backup_label;
pub mod conf;
pub mod conninfo;
pub mod control_file;
pub mod covered;
pub mod error;
pub mod file_class;
pub mod lsn;
pub mod page;
pub mod page_map;
pub mod path;
pub mod postmaster_opts;
pub mod postmaster_pid;
pub mod relation;
pub mod relation_map;
pub mod timeline;
pub mod tuple_state;
pub mod two_phase;
pub mod version;
pub mod wal;

mod bytes;

pub use control_file::{ClusterState, ControlFile};
pub use covered::Covered;
pub use error::FormatError;
pub use file_class::FileClass;
pub use lsn::{Lsn, WalSegmentSize};
pub use page_map::{BlockRange, BlockSet, PageMap};
pub use path::DataPath;
pub use relation::{Fork, RelationPath, RelationSegment};
pub use timeline::{TimelineHistory, TimelineId};
pub use version::{Major, WalFormat};

/// Size of a data page and of a WAL page. PostgreSQL can be built with others; such clusters are
/// refused when `pg_control` is read.
pub const BLOCK_SIZE: usize = 8192;

/// [`BLOCK_SIZE`] for arithmetic on file positions.
pub const BLOCK_BYTES: u64 = 8192;

/// Blocks in one segment file of a relation (1 GiB), as all packaged PostgreSQL builds have it;
/// other values are refused when `pg_control` is read.
pub const RELATION_SEGMENT_BLOCKS: u32 = 131_072;
