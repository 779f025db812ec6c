//! What takes the replies of a pool.

use proto::fetch::{Item, Unit};
use proto::frame::Frame;

use crate::error::RewindError;

/// Takes what arrives on one connection. Runs on a blocking thread.
pub trait Sink: Send {
    /// A frame and the checked replies in it, all of them asked for. Returns what must be asked for
    /// because of them; it may have the number of a unit that has ended.
    fn receive(&mut self, frame: &Frame, items: &[Item]) -> Result<Vec<Unit>, RewindError>;
    /// Nothing more comes.
    fn finish(&mut self) -> Result<(), RewindError>;
}
