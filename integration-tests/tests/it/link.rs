//! What lies between the two nodes.

mod network;
mod small_buffers;
