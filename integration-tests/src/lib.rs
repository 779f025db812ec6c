//! The language the whole-program tests are written in: real PostgreSQL servers, real binaries,
//! real TLS, run as an unprivileged user because all of them refuse root.

#![expect(clippy::panic, reason = "a test that cannot go on ends here")]

pub mod binaries;
pub mod client;
pub mod cluster;
pub mod command;
pub mod device;
pub mod faults;
pub mod health;
pub mod hints;
pub mod kills;
pub mod oracle;
pub mod pair;
pub mod readers;
pub mod server;
pub mod snapshot;
pub mod steps;
pub mod torture;
pub mod user;
pub mod wan;
