//! Log sequence numbers: byte positions in the WAL, and the sizes that divide it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{BLOCK_BYTES, FormatError};

/// A byte position in the WAL. Prints and parses as PostgreSQL does: two hexadecimal halves.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Lsn(u64);

impl Lsn {
    /// Position 0, which PostgreSQL uses for "none" (`InvalidXLogRecPtr`).
    pub const INVALID: Self = Self(0);
    /// The highest position; stands for "no end" in timeline histories.
    pub const MAX: Self = Self(u64::MAX);

    /// A position by its number.
    pub const fn new(position: u64) -> Self {
        Self(position)
    }

    /// The position as a number.
    pub const fn as_u64(self) -> u64 {
        self.0
    }

    /// Whether this is a position, not [`Self::INVALID`].
    pub const fn is_valid(self) -> bool {
        self.0 != 0
    }

    /// The position `bytes` further on; stays at the maximum instead of wrapping.
    #[must_use]
    pub const fn plus(self, bytes: u64) -> Self {
        Self(self.0.saturating_add(bytes))
    }

    /// Bytes from `earlier` to this position; 0 if `earlier` is later.
    pub const fn distance_from(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// First byte of the WAL page that holds this position.
    #[must_use]
    pub const fn page_start(self) -> Self {
        Self(self.0 - self.0 % BLOCK_BYTES)
    }

    /// Offset inside its WAL page.
    pub const fn page_offset(self) -> usize {
        (self.0 % BLOCK_BYTES) as usize
    }

    /// This position rounded up to 8 bytes: where a record after it begins (`MAXALIGN`).
    #[must_use]
    pub const fn aligned(self) -> Self {
        Self(self.0.saturating_add(7) & !7)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

impl fmt::Debug for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Lsn {
    type Err = FormatError;

    fn from_str(text: &str) -> Result<Self, FormatError> {
        let bad = || FormatError::invalid("LSN", format!("\"{text}\" is not of the form X/X"));
        let (high, low) = text.split_once('/').ok_or_else(bad)?;
        let half = |digits: &str| {
            let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_hexdigit());
            plain.then(|| u32::from_str_radix(digits, 16).ok()).flatten().ok_or_else(bad)
        };
        Ok(Self(u64::from(half(high)?) << 32 | u64::from(half(low)?)))
    }
}

/// Size of one WAL segment file: a power of two from 1 MiB to 1 GiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalSegmentSize(u32);

impl WalSegmentSize {
    /// Accepts what `initdb --wal-segsize` accepts.
    pub fn new(bytes: u32) -> Result<Self, FormatError> {
        let allowed = bytes.is_power_of_two() && (1 << 20..=1 << 30).contains(&bytes);
        allowed.then_some(Self(bytes)).ok_or_else(|| {
            FormatError::invalid("WAL segment size", format!("{bytes} bytes is not allowed"))
        })
    }

    /// The size in bytes.
    pub const fn bytes(self) -> u64 {
        self.0 as u64
    }

    /// The size as the on-disk field holds it.
    pub const fn as_u32(self) -> u32 {
        self.0
    }

    /// Number of the segment that holds `lsn`.
    pub const fn segment_of(self, lsn: Lsn) -> u64 {
        lsn.0 / self.bytes()
    }

    /// First position of segment `number`.
    pub const fn start_of(self, number: u64) -> Lsn {
        Lsn(number.saturating_mul(self.bytes()))
    }

    /// Offset of `lsn` inside its segment.
    pub const fn offset_of(self, lsn: Lsn) -> u64 {
        lsn.0 % self.bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_and_parses_like_postgres() {
        let lsn: Lsn = "16/B374D848".parse().unwrap();
        assert_eq!(lsn.as_u64(), 0x16_B374_D848);
        assert_eq!(lsn.to_string(), "16/B374D848");
        assert_eq!("0/03021150".parse::<Lsn>().unwrap().to_string(), "0/3021150");
        for bad in ["", "/", "1", "1/", "g/0", "123456789/0", "+1/0", "0/-1"] {
            assert!(bad.parse::<Lsn>().is_err(), "{bad}");
        }
    }

    #[test]
    fn only_sizes_that_initdb_accepts() {
        for bytes in [1 << 20, 16 << 20, 1 << 30] {
            assert!(WalSegmentSize::new(bytes).is_ok());
        }
        for bytes in [0, 1, 1 << 19, 3 << 20, 1 << 31] {
            assert!(WalSegmentSize::new(bytes).is_err());
        }
    }
}
