//! Serves a PostgreSQL data directory, read-only, over gRPC and mutual TLS.
//!
//! One process beside the node, run as the user that owns the data directory. It never writes,
//! needs no connection to PostgreSQL, and keeps no state between calls: what the node is, is read
//! from its files at every call, so it survives PostgreSQL being stopped, restarted, promoted or
//! not there yet.

pub mod cli;
pub mod config;

mod accept;
mod admission;
mod allow;
mod audit;
mod compression;
mod connection;
mod fetch;
mod guarded;
mod half_open;
mod handler;
mod identities;
mod list;
mod node;
mod node_watch;
mod page_delta;
mod page_reader;
mod refusal_log;
mod reload;
mod reply_stream;
mod request_budget;
mod serve;
mod served_files;
mod unit;
mod wal_end;

pub use allow::AllowError;
pub use config::{Config, Queues};
pub use serve::{ServeError, serve};
