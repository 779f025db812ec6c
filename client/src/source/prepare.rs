//! Completes units with what this node knows, just before they are asked for.

use proto::fetch::Unit;

use crate::error::RewindError;

/// Makes known what a completed unit says, at the moment it is asked for.
pub type Announce = Box<dyn FnOnce() + Send>;

/// Completes units before they are sent, on a blocking thread.
pub trait Prepare: Send + Sync {
    /// A unit that may be one that was sent before and did not come to its end. Nothing may be changed
    /// for others but by what comes back: the connection may be gone by the time this ends, and the
    /// unit asked for on another.
    fn prepare(&self, unit: &mut Unit) -> Result<Announce, RewindError>;

    /// Cost of the units that are completed before the first of them is sent.
    fn cost_at_once(&self) -> u64;
}

/// Nothing to complete.
#[derive(Debug)]
pub struct AsTheyAre;

impl Prepare for AsTheyAre {
    fn prepare(&self, _unit: &mut Unit) -> Result<Announce, RewindError> {
        Ok(Box::new(|| {}))
    }

    fn cost_at_once(&self) -> u64 {
        u64::MAX
    }
}
