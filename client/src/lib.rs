//! Rewinds a PostgreSQL node onto the history of another, over the network.
//!
//! [`commands::rewind`] is the list of the steps; ARCHITECTURE.md has the map of the modules. They are in layers: each
//! may use only what stands before it in ARCHITECTURE.md's list.

pub mod apply;
pub mod cli;
pub mod commands;
pub mod config;
pub mod divergence;
pub mod error;
pub mod monitor;
pub mod node_state;
pub mod outcome;
pub mod panics;
pub mod plan;
pub mod prepare;
pub mod source;
pub mod source_checks;
pub mod staging;
pub mod strategy;
pub mod target;
pub mod task;
#[cfg(test)]
mod test_peer;
#[cfg(test)]
mod test_values;

pub use config::Config;
pub use error::{Class, RewindError, TargetState};
pub use outcome::Outcome;
