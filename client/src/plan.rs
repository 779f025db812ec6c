//! Decides what to do. Pure: values in, values out, no I/O; a dry run is "stop after the plan".

pub mod before_images;
pub mod cost;
pub mod file_actions;
pub mod final_files;
pub mod input;
pub mod pg_wal;
pub mod planned;
pub mod replay_hazards;
pub mod replayed_blocks;
pub mod short_segments;
pub mod summary;
pub mod units;

pub use file_actions::{FileAction, Plan, PlannedFile};
pub use final_files::FinalFile;
pub use input::{Differences, ForkPoint, SourceFiles, Strategy, StrategyChoice, TargetFiles};
pub use planned::Planned;
