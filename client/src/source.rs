//! The source: connections, requests, and what survives a broken link.

pub mod compare;
pub mod connect;
pub mod connection_count;
pub mod in_flight;
pub mod page_delta;
pub mod pool;
pub mod requests;
pub mod session;

pub use session::Session;
