//! Which strategies are possible, what each would transfer, and which one is chosen.

pub mod candidates;
pub mod estimate;
pub mod tablespaces;
pub mod wal_start;
