//! Completes units with what this node knows, just before they are asked for.

use proto::fetch::Unit;

use crate::error::RewindError;

/// Makes the content of a completed unit known to other threads, at the moment the unit is sent.
pub type Announce = Box<dyn FnOnce() + Send>;

/// Completes units before they are sent, on a blocking thread.
pub trait Prepare: Send + Sync {
    /// Completes a unit, which may have been sent before without being answered in full. Shared values may be
    /// changed only by the returned function: the connection may be lost before this returns, and the unit is
    /// then asked for on another one.
    fn prepare(&self, unit: &mut Unit) -> Result<Announce, RewindError>;

    /// Cost of the units that are completed before the first of them is sent.
    fn cost_at_once(&self) -> u64;
}

/// Sends units as they are.
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
