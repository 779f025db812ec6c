//! Sources that go on working, and sources that are not what they say.

mod hostile_client;
mod live;
mod not_believed;
