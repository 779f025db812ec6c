//! Data pages: header, checksum, and whether a page can be what PostgreSQL wrote.

use crate::{BLOCK_SIZE, Lsn};

/// Number of parallel sums in PostgreSQL's page checksum (`storage/checksum_impl.h`).
const SUMS: usize = 32;
const FNV_PRIME: u32 = 16_777_619;
const BASE_OFFSETS: [u32; SUMS] = [
    0x5B1F_36E9,
    0xB852_5960,
    0x02AB_50AA,
    0x1DE6_6D2A,
    0x79FF_467A,
    0x9BB9_F8A3,
    0x217E_7CD2,
    0x83E1_3D2C,
    0xF8D4_474F,
    0xE39E_B970,
    0x42C6_AE16,
    0x9932_16FA,
    0x7B09_3B5D,
    0x98DA_FF3C,
    0xF718_902A,
    0x0B1C_9CDB,
    0xE58F_764B,
    0x1876_36BC,
    0x5D7B_3BB1,
    0xE73D_E7DE,
    0x92BE_C979,
    0xCCA6_C0B2,
    0x304A_0979,
    0x85AA_43D4,
    0x7831_25BB,
    0x6CA8_EAA2,
    0xE407_EAC6,
    0x4B5C_FC3E,
    0x9FBF_8C76,
    0x15CA_20BE,
    0xF2CA_9FD3,
    0x959B_D756,
];

/// One page of a relation, as read.
#[derive(Debug, Clone, Copy)]
pub struct Page<'a>(&'a [u8; BLOCK_SIZE]);

impl<'a> Page<'a> {
    /// A page from exactly [`BLOCK_SIZE`] bytes.
    pub fn new(bytes: &'a [u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// The page's LSN (`pd_lsn`): the end of the last WAL record that changed the page. It is stored as two
    /// 32-bit halves, the high one first.
    pub fn lsn(self) -> Lsn {
        let half = |at: usize| {
            let bytes = self.0.get(at..at + 4).and_then(|b| b.try_into().ok());
            u64::from(bytes.map_or(0, u32::from_le_bytes))
        };
        Lsn::new(half(0) << 32 | half(4))
    }

    /// Whether it was allocated and never initialised (`PageIsNew`).
    pub fn is_new(self) -> bool {
        self.0[14] == 0 && self.0[15] == 0
    }

    /// Whether every byte of the page is zero.
    pub fn is_zero(self) -> bool {
        self.0.iter().all(|byte| *byte == 0)
    }

    /// The checksum in its header.
    pub fn stored_checksum(self) -> u16 {
        u16::from_le_bytes([self.0[8], self.0[9]])
    }

    /// Whether the page's checksum matches its content as block `block` of the relation, counted over all
    /// segments (`pg_checksum_page`). A new page has no checksum and must be zero throughout.
    pub fn checksum_fits(self, block: u32) -> bool {
        if self.is_new() {
            return self.is_zero();
        }
        self.stored_checksum() == checksum(self.0, block)
    }
}

/// PostgreSQL's page checksum: 32 interleaved FNV-1a sums with the checksum field taken as zero.
fn checksum(page: &[u8; BLOCK_SIZE], block: u32) -> u16 {
    let mut sums = BASE_OFFSETS;
    let mix = |sum: u32, value: u32| {
        let mixed = sum ^ value;
        mixed.wrapping_mul(FNV_PRIME) ^ (mixed >> 17)
    };
    for (row_number, row) in page.chunks_exact(4 * SUMS).enumerate() {
        for (index, (sum, word)) in sums.iter_mut().zip(row.chunks_exact(4)).enumerate() {
            let mut value = word.try_into().map_or(0, u32::from_le_bytes);
            if row_number == 0 && index == 2 {
                value &= 0xFFFF_0000;
            }
            *sum = mix(*sum, value);
        }
    }
    // Two rounds of zeros mix the last values in.
    for sum in &mut sums {
        *sum = mix(mix(*sum, 0), 0);
    }
    let folded = sums.iter().fold(0, |all, sum| all ^ sum) ^ block;
    u16::try_from(folded % 65_535 + 1).unwrap_or(u16::MAX)
}

/// Bytes at the start of a page that tell the first page of an `SP-GiST` index from others.
pub const SPGIST_METAPAGE_BYTES: usize = 28;

/// Whether a page that begins like this is the first one of an `SP-GiST` index: `SPGIST_MAGIC_NUMBER` stands behind the
/// page's header (`spgist_private.h`, `SpGistMetaPageData`).
pub fn is_spgist_metapage(start: &[u8]) -> bool {
    start.get(24..SPGIST_METAPAGE_BYTES) == Some(&0xBA0B_ABEE_u32.to_le_bytes()[..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_pages_must_be_zero() {
        let mut bytes = [0_u8; BLOCK_SIZE];
        assert!(Page::new(&bytes).unwrap().checksum_fits(7));
        bytes[100] = 1;
        assert!(Page::new(&bytes).unwrap().is_new());
        assert!(!Page::new(&bytes).unwrap().checksum_fits(7));
    }

    #[test]
    fn the_lsn_is_stored_high_half_first() {
        let mut bytes = [0_u8; BLOCK_SIZE];
        bytes[0] = 1;
        bytes[4] = 2;
        assert_eq!(Page::new(&bytes).unwrap().lsn(), Lsn::new(0x1_0000_0002));
    }
}
