//! The first bytes of every file in the state directory: what it is, in which format, and which
//! program wrote it.

/// First bytes of each file.
const MAGIC: &[u8; 8] = b"pgrejoin";
/// Version of the format of everything in the state directory.
pub const FORMAT_VERSION: u32 = 6;
/// Magic, format version, four bytes for later, program version.
pub const HEADER_BYTES: usize = 32;
const PROGRAM_BYTES: usize = 16;

/// Why a file cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// It was not written by pgrejoin, or it is damaged.
    #[error("it is damaged ({0})")]
    Damaged(&'static str),
    /// Another release wrote it.
    #[error(
        "it has format version {format}, but this program supports {FORMAT_VERSION}: finish or \
         roll back the rewind with pgrejoin {program}, which wrote it"
    )]
    Version {
        /// The format.
        format: u32,
        /// The release.
        program: String,
    },
}

/// The header this program writes.
pub fn header() -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    let program = env!("CARGO_PKG_VERSION").bytes().take(PROGRAM_BYTES);
    let version = FORMAT_VERSION.to_le_bytes().into_iter();
    let all = MAGIC.iter().copied().chain(version).chain([0; 4]).chain(program);
    header.iter_mut().zip(all).for_each(|(place, byte)| *place = byte);
    header
}

/// Checks the header of a file and returns what follows.
pub fn check(bytes: &[u8]) -> Result<&[u8], HeaderError> {
    if bytes.get(..8) != Some(MAGIC) {
        return Err(HeaderError::Damaged("wrong magic"));
    }
    let format = bytes.get(8..12).and_then(|word| word.try_into().ok()).map(u32::from_le_bytes);
    let format = format.ok_or(HeaderError::Damaged("too short"))?;
    if format != FORMAT_VERSION {
        let program = bytes.get(16..HEADER_BYTES).unwrap_or_default();
        let program = program.iter().take_while(|byte| byte.is_ascii_graphic());
        let program = program.map(|byte| char::from(*byte)).collect();
        return Err(HeaderError::Version { format, program });
    }
    bytes.get(HEADER_BYTES..).ok_or(HeaderError::Damaged("too short"))
}

/// A whole file: header, CRC-32C of the body, body.
pub fn seal(body: &[u8]) -> Vec<u8> {
    let mut bytes = header().to_vec();
    bytes.extend_from_slice(&crc32c::crc32c(body).to_le_bytes());
    bytes.extend_from_slice(body);
    bytes
}

/// The body of a file that [`seal`] made.
pub fn open(bytes: &[u8]) -> Result<&[u8], HeaderError> {
    let rest = check(bytes)?;
    let (crc, body) = rest.split_at_checked(4).ok_or(HeaderError::Damaged("too short"))?;
    if crc != crc32c::crc32c(body).to_le_bytes() {
        return Err(HeaderError::Damaged("wrong CRC"));
    }
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_format_names_the_release_that_wrote_it() {
        let mut bytes = seal(b"body");
        assert_eq!(open(&bytes), Ok(&b"body"[..]));
        bytes[8] += 1;
        let program = env!("CARGO_PKG_VERSION").to_owned();
        assert_eq!(open(&bytes), Err(HeaderError::Version { format: FORMAT_VERSION + 1, program }));
        bytes[8] -= 1;
        *bytes.last_mut().unwrap() ^= 1;
        assert_eq!(open(&bytes), Err(HeaderError::Damaged("wrong CRC")));
        assert!(open(&bytes[..10]).is_err());
    }
}
