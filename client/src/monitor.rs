//! Where the pipeline reports what it does. Nothing else but `main.rs` prints.

pub mod json;
pub mod lines;
pub mod steps;
pub mod terminal;

use std::fmt;
use std::io::Write as _;

use proto::text::escaped;

use crate::plan::summary::PlannedChange;

/// The steps of a rewind, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Lock and look at the target.
    Inspect,
    /// Ask the source what it is.
    Describe,
    /// Find where the histories part.
    Fork,
    /// List the source's files.
    List,
    /// Compare page hashes.
    Compare,
    /// Decide what to do.
    Plan,
    /// Fetch WAL and data into staging.
    Fetch,
    /// Make the staged set complete and durable.
    Seal,
    /// Change the target.
    Apply,
    /// Write the recovery settings and the new `pg_control`.
    Commit,
    /// Roll a target that was being changed back to its state before the rewind.
    Rollback,
    /// Start PostgreSQL and wait.
    Start,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Inspect => "inspect",
            Self::Describe => "describe",
            Self::Fork => "fork",
            Self::List => "list",
            Self::Compare => "compare",
            Self::Plan => "plan",
            Self::Fetch => "fetch",
            Self::Seal => "seal",
            Self::Apply => "apply",
            Self::Commit => "commit",
            Self::Rollback => "rollback",
            Self::Start => "start",
        })
    }
}

/// Prints a line on standard output. The rewind goes on even if nobody reads it any more.
pub fn print_out(line: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).ok();
}

/// Prints a line on standard error, likewise. Characters that a terminal would obey are escaped: a name of a file may
/// have them.
pub fn print_err(line: &str) {
    writeln!(std::io::stderr().lock(), "{}", escaped(line)).ok();
}

/// Prints several lines on standard output, each escaped as [`print_err`] does.
pub fn print_lines(text: &str) {
    text.lines().for_each(|line| print_out(&escaped(line)));
}

/// Receives what a rewind reports. Called from several threads.
pub trait Monitor: fmt::Debug + Send + Sync {
    /// A step begins.
    fn step(&self, step: Step);
    /// So much of the current step is done, in bytes.
    fn progress(&self, done: u64, total: u64);
    /// What a dry run would do to one path.
    fn planned(&self, change: &PlannedChange<'_>);
    /// Something the operator should know.
    fn note(&self, message: &str);
    /// Something the operator should worry about.
    fn warning(&self, message: &str);
}
