//! Decides which files the server serves.
//!
//! Everything is refused unless its class is on this list, and a private key is refused whatever it is
//! called.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

use data_dir::DataDir;
use data_dir::private_keys::{KeyVerdicts, is_key_name};
use data_dir::settings;
use pg_format::conninfo::parameters;
use pg_format::file_class::EMPTIED_DIRECTORIES;
use pg_format::relation::is_of_version;
use pg_format::{BLOCK_BYTES, DataPath, FileClass, Major};
use proto::{Reason, Refusal};

/// Settings that name files with secrets which cannot be recognized by their content.
const SECRET_SETTINGS: [&str; 3] = ["ssl_key_file", "krb_server_keyfile", "ssl_passphrase_command"];

/// The rules for one data directory.
#[derive(Debug)]
pub(crate) struct Served {
    /// Last components of the paths the configuration names as keys.
    key_names: BTreeSet<String>,
    /// Name of this cluster's directory in each tablespace.
    version_directory: String,
    verdicts: Arc<KeyVerdicts>,
}

impl Served {
    /// Reads which files the configuration names as private keys.
    ///
    /// # Errors
    /// The configuration cannot be read, so it is not known which files are keys.
    pub(crate) fn new(
        directory: &DataDir,
        major: Major,
        version_directory: String,
        verdicts: Arc<KeyVerdicts>,
    ) -> Result<Self, Refusal> {
        let settings = settings::read(directory, major, None)
            .map_err(|error| Refusal::new(Reason::NotServed, error.to_string()))?;
        let named = settings.all().iter();
        let key_names = named.flat_map(|one| secret_files(&one.name, &one.value)).collect();
        Ok(Self { key_names, version_directory, verdicts })
    }

    /// Whether a directory is listed.
    pub(crate) fn lists_directory(path: &DataPath) -> bool {
        match FileClass::of(path) {
            FileClass::Own | FileClass::Log | FileClass::Discarded => false,
            FileClass::Wal => path.as_str() == "pg_wal",
            FileClass::Unknown => !matches!(path.as_str(), "log" | "pg_log"),
            FileClass::Control
            | FileClass::Relation(_)
            | FileClass::Slru
            | FileClass::State
            | FileClass::Signal
            | FileClass::Runtime
            | FileClass::Configuration => true,
        }
    }

    /// Whether a regular file may be listed and read. Files that PostgreSQL does not write page by page are searched
    /// for private keys; `read` learns how many bytes that took.
    pub(crate) fn serves(
        &self,
        directory: &DataDir,
        path: &DataPath,
        read: &mut dyn FnMut(u64),
    ) -> io::Result<bool> {
        if !is_of_version(path, &self.version_directory) {
            return Ok(false);
        }
        match FileClass::of(path) {
            FileClass::Relation(_) => Ok(true),
            // PostgreSQL writes these in pages alone.
            FileClass::Slru if is_slru_name(path.file_name()) => {
                Ok(directory.open_file(path)?.metadata()?.len().is_multiple_of(BLOCK_BYTES))
            }
            FileClass::State | FileClass::Slru | FileClass::Configuration | FileClass::Unknown => {
                if self.is_key_name(path) || EMPTIED_DIRECTORIES.contains(&path.as_str()) {
                    return Ok(false);
                }
                let search = self.verdicts.search(&directory.open_file(path)?)?;
                read(search.read_bytes);
                Ok(!search.holds_key)
            }
            FileClass::Control
            | FileClass::Wal
            | FileClass::Discarded
            | FileClass::Signal
            | FileClass::Runtime
            | FileClass::Log
            | FileClass::Own => Ok(false),
        }
    }

    fn is_key_name(&self, path: &DataPath) -> bool {
        let name = path.file_name();
        self.key_names.contains(name) || is_key_name(name)
    }
}

/// Whether a name is that of an SLRU segment: 4 to 15 hexadecimal digits (`SlruFileName`).
fn is_slru_name(name: &str) -> bool {
    (4..=15).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Names of the files a setting says hold secrets.
fn secret_files(setting: &str, value: &str) -> Vec<String> {
    let last = |path: &str| path.rsplit(['/', ':']).next().map(str::to_owned);
    if SECRET_SETTINGS.contains(&setting) {
        return value.split_whitespace().filter_map(last).collect();
    }
    if setting != "primary_conninfo" {
        return Vec::new();
    }
    let named = parameters(value).into_iter();
    let secret = named.filter(|parameter| matches!(&*parameter.name, "sslkey" | "passfile"));
    secret.filter_map(|parameter| last(&parameter.value)).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn keys_are_never_served_whatever_their_name() {
        let home = tempfile::tempdir().unwrap();
        let put = |name: &str, content: &[u8]| {
            io::Write::write_all(&mut fs::File::create(home.path().join(name)).unwrap(), content)
        };
        put("PG_VERSION", b"15\n").unwrap();
        put(
            "postgresql.conf",
            b"ssl_key_file = 'secret.txt'\nkrb_server_keyfile = 'FILE:/etc/pg/own.tab'\n\
              primary_conninfo = 'host=a passfile = ''/x/words'' sslkey=/y/client.der'\n\
              include 'more.conf'\n",
        )
        .unwrap();
        put("more.conf", b"primary_conninfo = 'postgresql://a/?sslkey=%2Fz%2Furi.der'\n").unwrap();
        for directory in ["pg_logical", "pg_xact", "pg_wal", "pg_tblspc"] {
            fs::create_dir(home.path().join(directory)).unwrap();
        }
        for name in ["own.tab", "words", "client.der", "uri.der", "pg_logical/x.key"] {
            put(name, b"binary").unwrap();
        }
        let pem = b"-----BEGIN PRIVATE KEY-----\nabc\n";
        for name in ["pg_logical/state", "pg_xact/0000"] {
            put(name, pem).unwrap();
        }
        put("pg_xact/0001", &[0; 8192]).unwrap();
        // PKCS #8 in DER, whatever it is called.
        put("picture.png", &[0x30, 0x0A, 2, 1, 0, 0x30, 2, 6, 0, 4, 1, 9]).unwrap();
        put("secret.txt", b"der").unwrap();
        put("server.key", b"x").unwrap();
        let mut hidden = vec![b' '; (64 << 10) - 5];
        hidden.extend_from_slice(b"-----BEGIN PRIVATE KEY-----");
        put("notes", &hidden).unwrap();
        put("readme", b"hello").unwrap();
        put("postmaster.pid", b"1").unwrap();
        let directory = DataDir::open(home.path()).unwrap();
        let served = {
            let major = Major::new(15).unwrap();
            Served::new(&directory, major, "PG_15_202209061".to_owned(), Arc::default()).unwrap()
        };
        let read = std::cell::Cell::new(0);
        let serves = |name: &str| {
            let path = DataPath::new(name).unwrap();
            served.serves(&directory, &path, &mut |bytes| read.set(read.get() + bytes)).unwrap()
        };
        assert!(serves("readme") && serves("PG_VERSION") && serves("postgresql.conf"));
        assert!(read.get() > 0, "what is read for a search is known");
        let before = read.get();
        assert!(serves("readme") && read.get() == before, "it is searched once");
        assert!(serves("pg_xact/0001"));
        let secrets = ["secret.txt", "server.key", "notes", "own.tab", "words", "client.der"];
        let hidden = ["pg_logical/x.key", "postmaster.pid", "uri.der", "picture.png"];
        let in_state = ["pg_logical/state", "pg_xact/0000"];
        for name in secrets.iter().chain(&hidden).chain(&in_state) {
            assert!(!serves(name), "{name}");
        }
    }
}
