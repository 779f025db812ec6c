//! Little-endian fields at fixed offsets, without panics.

use crate::FormatError;

/// A structure's bytes, named for error messages.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fields<'a> {
    what: &'static str,
    bytes: &'a [u8],
}

impl<'a> Fields<'a> {
    pub(crate) fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { what, bytes }
    }

    pub(crate) fn array<const N: usize>(&self, at: usize) -> Result<[u8; N], FormatError> {
        self.bytes.get(at..).and_then(|rest| rest.first_chunk::<N>()).copied().ok_or(
            FormatError::TooShort {
                what: self.what,
                expected: at.saturating_add(N),
                actual: self.bytes.len(),
            },
        )
    }

    pub(crate) fn u8(&self, at: usize) -> Result<u8, FormatError> {
        self.array::<1>(at).map(|[byte]| byte)
    }

    pub(crate) fn bool(&self, at: usize) -> Result<bool, FormatError> {
        self.u8(at).map(|byte| byte != 0)
    }

    pub(crate) fn u16(&self, at: usize) -> Result<u16, FormatError> {
        self.array(at).map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&self, at: usize) -> Result<u32, FormatError> {
        self.array(at).map(u32::from_le_bytes)
    }

    pub(crate) fn i32(&self, at: usize) -> Result<i32, FormatError> {
        self.array(at).map(i32::from_le_bytes)
    }

    pub(crate) fn u64(&self, at: usize) -> Result<u64, FormatError> {
        self.array(at).map(u64::from_le_bytes)
    }

    pub(crate) fn i64(&self, at: usize) -> Result<i64, FormatError> {
        self.array(at).map(i64::from_le_bytes)
    }
}
