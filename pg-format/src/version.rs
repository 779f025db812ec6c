//! What differs between PostgreSQL majors, in one table.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::FormatError;

/// A PostgreSQL major version this program reads: 13 to 19.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Major(u8);

impl Major {
    /// The oldest and newest majors read.
    pub const SUPPORTED: std::ops::RangeInclusive<u8> = 13..=19;

    /// Accepts a supported major.
    pub fn new(major: u8) -> Result<Self, FormatError> {
        Self::SUPPORTED.contains(&major).then_some(Self(major)).ok_or_else(|| {
            FormatError::UnknownVersion { what: "PostgreSQL", version: u32::from(major) }
        })
    }

    /// The major whose catalog version is `catalog` (`src/include/catalog/catversion.h` of each
    /// release). 19 is known by its range only: its final number was not published when this was
    /// written.
    pub fn from_catalog_version(catalog: u32) -> Result<Self, FormatError> {
        let major = match catalog {
            202_007_201 => 13,
            202_107_181 => 14,
            202_209_061 => 15,
            202_307_071 => 16,
            202_406_281 => 17,
            202_506_291 => 18,
            202_606_281..=202_699_999 => 19,
            version => {
                return Err(FormatError::UnknownVersion { what: "catalog", version });
            }
        };
        Ok(Self(major))
    }

    /// The number.
    pub const fn number(self) -> u8 {
        self.0
    }

    /// How this major writes WAL.
    pub fn wal_format(self) -> WalFormat {
        WalFormat { major: self }
    }
}

impl fmt::Display for Major {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The rules of one major's WAL (`access/xlog_internal.h`, `access/xlogrecord.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalFormat {
    major: Major,
}

impl WalFormat {
    /// The major these rules belong to.
    pub const fn major(self) -> Major {
        self.major
    }

    /// Whether a page header carries a magic number of this major. 19 changed its number during
    /// development; both are read.
    pub const fn is_page_magic(self, magic: u16) -> bool {
        match self.major.0 {
            13 => magic == 0xD106,
            14 => magic == 0xD10D,
            15 => magic == 0xD110,
            16 => magic == 0xD113,
            17 => magic == 0xD116,
            18 => magic == 0xD118,
            _ => magic == 0xD120 || magic == 0xD121,
        }
    }

    /// The `xlp_info` bits that may be set.
    pub const fn page_info_bits(self) -> u16 {
        if self.major.0 >= 19 { 0x0007 } else { 0x000F }
    }

    /// The `xlp_info` bit that marks an overwritten continuation record.
    pub const fn overwrite_contrecord_bit(self) -> u16 {
        if self.major.0 >= 19 { 0x0004 } else { 0x0008 }
    }

    /// Whether `bimg_info` says a block image is compressed. The bit moved in 15.
    pub const fn image_is_compressed(self, bimg_info: u8) -> bool {
        if self.major.0 >= 15 { bimg_info & 0x1C != 0 } else { bimg_info & 0x02 != 0 }
    }

    /// Whether `bimg_info` says that redo restores the image (as opposed to one that is there only
    /// for consistency checks).
    pub const fn image_is_applied(self, bimg_info: u8) -> bool {
        if self.major.0 >= 15 { bimg_info & 0x02 != 0 } else { bimg_info & 0x04 != 0 }
    }

    /// Whether a resource manager number can occur. Custom ones came with 15.
    pub const fn is_resource_manager(self, rmid: u8) -> bool {
        rmid <= 21 || (rmid == 22 && self.major.0 >= 19) || (rmid >= 128 && self.major.0 >= 15)
    }

    /// Whether `CREATE DATABASE` can log block by block (15 and later), which renumbered the
    /// records of the database resource manager.
    pub const fn has_wal_logged_create_database(self) -> bool {
        self.major.0 >= 15
    }
}
