//! `pg_filenode.map`: the file numbers of the mapped relations, the catalogs that `pg_class` cannot give a
//! file number (`RelMapFile` in `relmapper.c`).

use crate::bytes::Fields;
use crate::{FormatError, Major};

const WHAT: &str = "pg_filenode.map";
/// `RELMAPPER_FILEMAGIC`.
const MAGIC: i32 = 0x59_2717;
/// Bytes before the first mapping, and of each.
const HEADER_BYTES: usize = 8;
const MAPPING_BYTES: usize = 8;

/// Number of mappings that a file has space for (`MAX_MAPPINGS`). Up to 15 the file is padded to 512 bytes.
fn mappings_max(major: Major) -> usize {
    if major.number() >= 16 { 64 } else { 62 }
}

/// Length of the file in bytes, whatever the number of its mappings.
pub fn file_bytes(major: Major) -> usize {
    let body = HEADER_BYTES + mappings_max(major) * MAPPING_BYTES;
    // The CRC, and before 16 four bytes of padding.
    if major.number() >= 16 { body + 4 } else { body + 8 }
}

/// A relation and the number of its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// OID of the relation.
    pub relation: u32,
    /// Number of its file.
    pub file: u32,
}

/// Reads and checks the file: all mapped relations.
///
/// # Errors
/// The length, the magic number, the count or the CRC is not right.
pub fn parse(bytes: &[u8], major: Major) -> Result<Vec<Mapping>, FormatError> {
    let expected = file_bytes(major);
    if bytes.len() != expected {
        return Err(FormatError::TooShort { what: WHAT, expected, actual: bytes.len() });
    }
    let fields = Fields::new(WHAT, bytes);
    if fields.i32(0)? != MAGIC {
        return Err(FormatError::invalid(WHAT, "wrong magic number".to_owned()));
    }
    let crc_at = HEADER_BYTES + mappings_max(major) * MAPPING_BYTES;
    let computed = crc32c::crc32c(bytes.get(..crc_at).unwrap_or_default());
    let stored = fields.u32(crc_at)?;
    if stored != computed {
        return Err(FormatError::Crc { what: WHAT, stored, computed });
    }
    let count = usize::try_from(fields.i32(4)?).unwrap_or(usize::MAX);
    if count > mappings_max(major) {
        return Err(FormatError::invalid(WHAT, format!("{count} mappings")));
    }
    let mapping = |index| {
        let at = HEADER_BYTES + index * MAPPING_BYTES;
        Ok(Mapping { relation: fields.u32(at)?, file: fields.u32(at + 4)? })
    };
    (0..count).map(mapping).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A map of these relations and files.
    fn map(major: Major, mappings: &[(u32, u32)]) -> Vec<u8> {
        let mut bytes = MAGIC.to_le_bytes().to_vec();
        bytes.extend(i32::try_from(mappings.len()).unwrap().to_le_bytes());
        for (relation, file) in mappings {
            bytes.extend(relation.to_le_bytes());
            bytes.extend(file.to_le_bytes());
        }
        bytes.resize(HEADER_BYTES + mappings_max(major) * MAPPING_BYTES, 0);
        bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
        bytes.resize(file_bytes(major), 0);
        bytes
    }

    #[test]
    fn names_the_mapped_files_or_is_refused() {
        for (major, bytes) in [(15, 512), (16, 524)] {
            let major = Major::new(major).unwrap();
            let sound = map(major, &[(1259, 16500), (1249, 1249)]);
            assert_eq!(sound.len(), bytes);
            let files: Vec<u32> =
                parse(&sound, major).unwrap().iter().map(|mapping| mapping.file).collect();
            assert_eq!(files, [16500, 1249]);
            let mut other = sound.clone();
            other[20] ^= 1;
            assert!(matches!(parse(&other, major), Err(FormatError::Crc { .. })));
            assert!(parse(&sound[..bytes - 1], major).is_err());
            assert!(parse(&vec![0xA5; bytes], major).is_err());
        }
    }
}
