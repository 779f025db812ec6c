//! Decides what to do. Pure: values in, values out, no I/O; a dry run is "stop after the plan".

pub mod cut;
pub mod decide;
pub mod input;
pub mod price;
pub mod replay;
pub mod report;
pub mod undo;
pub mod wal;

pub use decide::{FileAction, Plan, PlannedFile};
pub use input::{Differences, SourceFiles, Strategy, TargetFiles};
