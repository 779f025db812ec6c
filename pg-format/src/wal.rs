//! The write-ahead log: segment names, page headers, records, and what a record changes.

pub mod context;
pub mod decoder;
pub mod effect;
pub mod page;
pub mod record;
pub mod segment;

pub use context::WalContext;
pub use decoder::{Decoder, EndOfWal, Progress, Start};
pub use effect::Effect;
pub use record::{BlockReference, Record, RecordBody};
pub use segment::SegmentName;
