//! The subcommands of `pgrejoin`.

pub mod attempt;
pub mod follow;
pub mod recover;
pub mod rewind;
pub mod status;
