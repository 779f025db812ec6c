//! What takes the replies of a pool.

use proto::fetch::{Item, Unit};
use proto::frame::Frame;

use crate::error::RewindError;

/// Takes what arrives on one connection. Runs on a blocking thread.
pub trait Sink: Send {
    /// Takes a frame and its replies, which were checked and all asked for. Returns what must be asked for
    /// because of them; such a unit may have the number of one that has ended.
    fn receive(&mut self, frame: &Frame, items: &[Item]) -> Result<Vec<Unit>, RewindError>;
    /// Nothing more will come.
    fn finish(&mut self) -> Result<(), RewindError>;
}
