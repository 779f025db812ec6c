//! Every test that runs whole programs, in one binary: linking one costs far less than linking twenty.

mod crash;
mod link;
mod oracle;
mod refusals;
mod rewind;
mod source;
