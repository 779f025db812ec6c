//! The language the whole-program tests are written in: real PostgreSQL servers, real binaries,
//! real TLS, run as an unprivileged user because all of them refuse root.

pub mod binaries;
pub mod cluster;
pub mod client;
pub mod oracle;
pub mod server;
pub mod snapshot;
pub mod user;
