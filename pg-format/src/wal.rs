//! The write-ahead log: segment names, page headers, records, and what a record changes.

pub mod decoder;
pub mod effect;
pub mod page;
pub mod record;
pub mod segment;

pub use decoder::{Decoder, EndOfWal, Progress, Start, WalContext};
pub use effect::Effect;
pub use record::{BlockReference, Record, RecordBody};
pub use segment::SegmentName;
