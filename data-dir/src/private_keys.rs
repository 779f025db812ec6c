//! Recognizes private keys, so that no key leaves its node or is removed with other files.

use std::fs::File;
use std::io::{self, Read as _};

/// Endings of files that hold keys in forms other than text.
const KEY_ENDINGS: [&str; 6] = [".key", ".p12", ".pfx", ".jks", ".pk8", ".keytab"];
/// What every private key in text form has in its first line.
const KEY_MARK: &[u8] = b"PRIVATE KEY";
/// A larger file that is not PostgreSQL's own counts as a key without being read: reading a dump that
/// somebody left in the data directory would take the disk from the database.
const SCANNED_BYTES_MAX: u64 = 64 << 20;
const SCAN_BYTES: usize = 64 << 10;

/// Whether a file's name says that it is a key.
pub fn is_key_name(name: &str) -> bool {
    let lower = name.to_ascii_lowercase();
    KEY_ENDINGS.iter().any(|ending| lower.ends_with(ending))
}

/// Whether a file has the mark of a private key in it. Reads the whole file; one that is too large to be read
/// counts as a key.
pub fn holds_private_key(mut file: File) -> io::Result<bool> {
    if file.metadata()?.len() > SCANNED_BYTES_MAX {
        return Ok(true);
    }
    let mut buffer = vec![0; SCAN_BYTES];
    let mut kept = 0;
    loop {
        let bytes = file.read(buffer.get_mut(kept..).unwrap_or_default())?;
        if bytes == 0 {
            return Ok(false);
        }
        let filled = kept + bytes;
        let seen = buffer.get(..filled).unwrap_or_default();
        if seen.windows(KEY_MARK.len()).any(|window| window == KEY_MARK) {
            return Ok(true);
        }
        // The mark may lie across two reads.
        kept = filled.min(KEY_MARK.len() - 1);
        buffer.copy_within(filled - kept..filled, 0);
    }
}
