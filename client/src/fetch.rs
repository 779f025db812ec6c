//! Gets things from the source: connections, the units of work, and what survives a cut link.

pub mod adapt;
pub mod ask;
pub mod cache;
pub mod compare;
pub mod connect;
pub mod differences;
pub mod pool;
pub mod progress;
pub mod session;
pub mod wal;
pub mod wal_units;

pub use session::Session;
