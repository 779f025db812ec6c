//! Rewinds a PostgreSQL node onto the history of another, over the network.
//!
//! [`rewind::rewind`] is the pipeline and reads like its list of steps; the other modules are the
//! rooms it walks through. ARCHITECTURE.md has the map.

pub mod analysis;
pub mod apply;
pub mod choose;
pub mod cli;
pub mod compat;
pub mod config;
pub mod error;
pub mod fetch;
pub mod future_wal;
mod hint_logging;
pub mod inspect;
pub mod monitor;
pub mod outcome;
pub mod plan;
pub mod recovered;
pub mod recovery;
pub mod rewind;
pub mod stage;
pub mod start;
pub mod unfinished;

mod agenda;
mod ahead;
mod changes;
mod continued;
mod covered;
mod no_rewind;
mod own_wal;
mod priced;
mod proof;
mod seal;
mod sealed;
mod source_checks;
mod steps;
#[cfg(test)]
mod test_values;
mod timeline_ends;
mod unstarted;
mod way_back;

pub use config::Config;
pub use error::{Class, RewindError};
pub use outcome::Outcome;
