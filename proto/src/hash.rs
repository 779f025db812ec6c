//! The hash by which both ends tell whether a page or a chunk is the same.

use std::fmt;

use serde::{Deserialize, Serialize};

/// First 128 bits of BLAKE3. "The same" is decided by this hash alone and users choose what lies
/// in a page, so it must be one nobody can make collide.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PageHash([u8; 16]);

/// Bytes of a [`PageHash`].
pub const HASH_BYTES: usize = 16;

impl PageHash {
    /// The hash of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        let full = blake3::hash(bytes);
        Self(full.as_bytes().first_chunk().copied().unwrap_or_default())
    }

    /// A hash as it travels.
    pub const fn from_bytes(bytes: [u8; HASH_BYTES]) -> Self {
        Self(bytes)
    }

    /// The bytes that travel.
    pub const fn as_bytes(&self) -> &[u8; HASH_BYTES] {
        &self.0
    }
}

impl fmt::Debug for PageHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The hash of a run of pages: over the hashes of its pages, so that whoever has those need not read
/// the pages again.
pub fn run_hash(pages: &[PageHash]) -> PageHash {
    let bytes: Vec<u8> = pages.iter().flat_map(|hash| *hash.as_bytes()).collect();
    PageHash::of(&bytes)
}
