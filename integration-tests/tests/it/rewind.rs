//! Rewinds from beginning to end, and what is there afterwards.

mod afterwards;
mod basic;
mod changes;
mod divergence;
mod estimates;
mod latest;
mod replayed_blocks;
mod report;
mod tablespaces;
mod without_wal;
