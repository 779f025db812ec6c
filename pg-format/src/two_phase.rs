//! State files of prepared transactions, in `pg_twophase` (`twophase.c`).

/// Bytes of the CRC-32C that the file ends in.
const CRC_BYTES: usize = 4;

/// Whether the CRC at the end of the file matches. The file is written in place, so a copy that was read
/// during a write does not match.
pub fn crc_fits(bytes: &[u8]) -> bool {
    let Some(at) = bytes.len().checked_sub(CRC_BYTES) else {
        return false;
    };
    let (body, crc) = bytes.split_at(at);
    crc == crc32c::crc32c(body).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_was_read_while_it_was_written_shows() {
        let mut bytes = b"state of a prepared transaction".to_vec();
        bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
        assert!(crc_fits(&bytes));
        bytes[3] ^= 1;
        assert!(!crc_fits(&bytes));
        assert!(!crc_fits(b""));
        assert!(!crc_fits(b"abc"));
    }
}
