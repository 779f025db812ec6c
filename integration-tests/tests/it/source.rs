//! Sources that go on working, and sources that are not what they say.

mod live;
mod not_believed;
