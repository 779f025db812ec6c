//! Every test that runs whole programs, in one binary: linking one costs far less than linking twenty.

mod again;
mod basic;
mod covered;
mod devices;
mod faults;
mod following;
mod histories;
mod interrupted;
mod kills;
mod latest;
mod live;
mod network;
mod oracle;
mod peers;
mod places;
mod prices;
mod refusals;
mod scenarios;
mod torture;
mod unlogged;
mod windows;
