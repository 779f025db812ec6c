//! Runs, disks and nodes that end in the middle.

mod devices;
mod faults;
mod interrupted;
mod kills;
mod torture;
