//! Recognizes private keys, so that no key leaves its node or is removed with other files.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;

use parking_lot::Mutex;
use std::collections::HashMap;

/// Endings of files that hold keys in forms other than text.
const KEY_ENDINGS: [&str; 6] = [".key", ".p12", ".pfx", ".jks", ".pk8", ".keytab"];
/// What every private key in text form has in its first line.
const KEY_MARK: &[u8] = b"PRIVATE KEY";
/// First bytes of files that hold keys: Java's two kinds of key store, and Kerberos' key table.
const KEY_MAGIC: [&[u8]; 3] =
    [&[0xFE, 0xED, 0xFE, 0xED], &[0xCE, 0xCE, 0xCE, 0xCE], &[0x05, 0x02, 0x00, 0x00]];
/// A larger file that is not PostgreSQL's own counts as a key without being read: reading a dump that
/// somebody left in the data directory would take the disk from the database.
const SCANNED_BYTES_MAX: u64 = 64 << 20;
const SCAN_BYTES: usize = 64 << 10;
/// Files whose verdict is remembered.
const VERDICTS_MAX: usize = 100_000;

/// Whether a file's name says that it is a key.
pub fn is_key_name(name: &str) -> bool {
    let lower = name.to_ascii_lowercase();
    KEY_ENDINGS.iter().any(|ending| lower.ends_with(ending))
}

/// Whether a file has a private key in it, and how many bytes were read to know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeySearch {
    /// Whether it has one, or counts as if it had.
    pub holds_key: bool,
    /// Bytes that were read.
    pub read_bytes: u64,
}

/// Searches a file for a private key. Reads the whole file; one that is too large to be read counts as a key.
pub fn search(mut file: &File) -> io::Result<KeySearch> {
    let bytes = file.metadata()?.len();
    if bytes > SCANNED_BYTES_MAX {
        return Ok(KeySearch { holds_key: true, read_bytes: 0 });
    }
    let mut buffer = vec![0; SCAN_BYTES];
    let (mut kept, mut read_bytes) = (0, 0);
    loop {
        let read = file.read(buffer.get_mut(kept..).unwrap_or_default())?;
        if read == 0 {
            return Ok(KeySearch { holds_key: false, read_bytes });
        }
        let filled = kept + read;
        let seen = buffer.get(..filled).unwrap_or_default();
        let begins_as_key = read_bytes == 0 && is_binary_key(seen, bytes);
        read_bytes += read as u64;
        if begins_as_key || seen.windows(KEY_MARK.len()).any(|window| window == KEY_MARK) {
            return Ok(KeySearch { holds_key: true, read_bytes });
        }
        // The mark may lie across two reads.
        kept = filled.min(KEY_MARK.len() - 1);
        buffer.copy_within(filled - kept..filled, 0);
    }
}

/// Whether a file of this length that begins so is a private key in binary form.
fn is_binary_key(head: &[u8], bytes: u64) -> bool {
    KEY_MAGIC.iter().any(|magic| head.starts_with(magic))
        || is_der_key(head, bytes).unwrap_or(false)
}

/// Whether this is one DER value that may be a private key: PKCS #1, PKCS #8 or SEC 1, which begin with a version; a
/// PKCS #12 store; or an encrypted PKCS #8 key, which begins with how it is encrypted. Certificates and revocation
/// lists begin with a sequence of another kind.
fn is_der_key(head: &[u8], bytes: u64) -> Option<bool> {
    let outer = der_value(head)?;
    if outer.tag != SEQUENCE || outer.end != bytes {
        return None;
    }
    let first = der_value(outer.content)?;
    let second = der_value(first.rest).map(|value| value.tag);
    Some(match first.tag {
        INTEGER => {
            let version = first.content.first() == Some(&0) || matches!(first.content, [1 | 3]);
            version && matches!(second, Some(SEQUENCE | INTEGER | OCTET_STRING))
        }
        SEQUENCE => {
            let begins_with_name =
                der_value(first.content).is_some_and(|value| value.tag == OBJECT);
            begins_with_name && second == Some(OCTET_STRING)
        }
        _ => false,
    })
}

const INTEGER: u8 = 0x02;
const OCTET_STRING: u8 = 0x04;
const OBJECT: u8 = 0x06;
const SEQUENCE: u8 = 0x30;

/// The beginning of a DER value.
struct DerValue<'a> {
    tag: u8,
    /// What is at hand of its content.
    content: &'a [u8],
    /// What follows it.
    rest: &'a [u8],
    /// Bytes from the start of its tag to its end.
    end: u64,
}

fn der_value(bytes: &[u8]) -> Option<DerValue<'_>> {
    let [tag, short, ..] = *bytes else {
        return None;
    };
    let digits = if short < 0x80 { 0 } else { usize::from(short & 0x7F) };
    if digits > 4 || short == 0x80 {
        return None;
    }
    let header = 2 + digits;
    let length = match digits {
        0 => u64::from(short),
        _ => bytes.get(2..header)?.iter().fold(0, |length, byte| length << 8 | u64::from(*byte)),
    };
    let content = bytes.get(header..)?;
    let at_hand = usize::try_from(length).unwrap_or(usize::MAX).min(content.len());
    let (content, rest) = content.split_at(at_hand);
    Some(DerValue { tag, content, rest, end: header as u64 + length })
}

/// What was found in files before, so that they are searched again only after they changed.
#[derive(Debug, Default)]
pub struct KeyVerdicts(Mutex<HashMap<FileVersion, bool>>);

/// A file as it was at one time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct FileVersion {
    device: u64,
    inode: u64,
    bytes: u64,
    /// Seconds and nanoseconds.
    modified: [i64; 2],
    changed: [i64; 2],
}

impl KeyVerdicts {
    /// [`search`], unless this version of the file was searched before.
    pub fn search(&self, file: &File) -> io::Result<KeySearch> {
        let found = file.metadata()?;
        let version = FileVersion {
            device: found.dev(),
            inode: found.ino(),
            bytes: found.len(),
            modified: [found.mtime(), found.mtime_nsec()],
            changed: [found.ctime(), found.ctime_nsec()],
        };
        if let Some(holds_key) = self.0.lock().get(&version).copied() {
            return Ok(KeySearch { holds_key, read_bytes: 0 });
        }
        let searched = search(file)?;
        let mut known = self.0.lock();
        if known.len() >= VERDICTS_MAX {
            known.clear();
        }
        known.insert(version, searched.holds_key);
        Ok(searched)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn file(content: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        std::io::Seek::rewind(&mut file).unwrap();
        file
    }

    fn holds_key(content: &[u8]) -> bool {
        search(&file(content)).unwrap().holds_key
    }

    fn der(tag: u8, content: &[u8]) -> Vec<u8> {
        let length = u16::try_from(content.len()).unwrap().to_be_bytes();
        [&[tag, 0x82], &length[..], content].concat()
    }

    /// The identifier of an algorithm.
    fn algorithm() -> Vec<u8> {
        der(SEQUENCE, &der(OBJECT, &[0x2A, 0x86, 0x48]))
    }

    #[test]
    fn keys_in_binary_form_are_known_by_what_they_begin_with() {
        let version = |number: u8| der(INTEGER, &[number]);
        let secret = der(OCTET_STRING, &[7; 300]);
        let pkcs8 = der(SEQUENCE, &[version(0), algorithm(), secret.clone()].concat());
        let pkcs1 = der(SEQUENCE, &[version(0), der(INTEGER, &[9; 256])].concat());
        let sec1 = der(SEQUENCE, &[version(1), secret.clone()].concat());
        let pkcs12 = der(SEQUENCE, &[version(3), algorithm()].concat());
        let encrypted = der(SEQUENCE, &[algorithm(), secret].concat());
        for (name, key) in [
            ("PKCS #8", pkcs8),
            ("PKCS #1", pkcs1),
            ("SEC 1", sec1),
            ("PKCS #12", pkcs12),
            ("encrypted PKCS #8", encrypted),
            ("a key store", vec![0xFE, 0xED, 0xFE, 0xED, 0, 0]),
            ("a key table", vec![5, 2, 0, 0, 0, 9]),
        ] {
            assert!(holds_key(&key), "{name}");
        }
    }

    #[test]
    fn certificates_and_other_files_are_no_keys() {
        // A certificate and a revocation list: the first sequence begins with a version, the second value is an
        // algorithm.
        let signed = der(SEQUENCE, &[der(INTEGER, &[1]), algorithm()].concat());
        let certificate = der(SEQUENCE, &[signed, algorithm()].concat());
        assert!(!holds_key(&certificate));
        assert!(!holds_key(b"host all all all trust\n"));
        assert!(!holds_key(&[0x30, 0x82, 0xFF, 0xFF, 2, 1, 0, 0x30, 0]), "longer than the file");
        assert!(!holds_key(b""));
    }

    #[test]
    fn a_file_is_searched_again_only_after_it_changed() {
        let verdicts = KeyVerdicts::default();
        let mut file = file(&[b'x'; 1000]);
        assert_eq!(verdicts.search(&file).unwrap().read_bytes, 1000);
        assert_eq!(verdicts.search(&file).unwrap().read_bytes, 0);
        file.write_all(b"-----BEGIN PRIVATE KEY-----").unwrap();
        std::io::Seek::rewind(&mut file).unwrap();
        let again = verdicts.search(&file).unwrap();
        assert!(again.holds_key && again.read_bytes > 0);
    }
}
