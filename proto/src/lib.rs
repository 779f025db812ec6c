//! What both ends of pgrejoin must agree on: messages, limits, TLS and the meaning of errors.
//!
//! The generated messages stay in this crate. Everything else speaks the domain types of
//! [`model`] and [`fetch`], which are checked when they are received: a value of such a type is
//! known to be sound, whatever peer sent it.

pub mod client;
pub mod delta;
pub mod fetch;
pub mod frame;
pub mod hash;
pub mod limits;
pub mod model;
pub mod rate;
pub mod refusal;
pub mod service;
pub mod text;
pub mod tls;

mod wire;

pub use hash::PageHash;
pub use refusal::{Reason, Refusal};

/// Version of the protocol; both ends must have the same.
pub const PROTOCOL_VERSION: u32 = 5;
