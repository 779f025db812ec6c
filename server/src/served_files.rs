//! Decides which files the server serves.
//!
//! Everything is refused unless its class is on this list, and a private key is refused whatever it is
//! called.

use std::collections::BTreeSet;
use std::io;

use data_dir::DataDir;
use data_dir::private_keys::{holds_private_key, is_key_name};
use pg_format::conf::{self, ConfLine};
use pg_format::file_class::EMPTIED_DIRECTORIES;
use pg_format::relation::is_of_version;
use pg_format::{DataPath, FileClass};

const CONF_BYTES_MAX: u64 = 16 << 20;
/// Settings that name files with secrets which cannot be recognized by their content.
const SECRET_SETTINGS: [&str; 3] = ["ssl_key_file", "krb_server_keyfile", "ssl_passphrase_command"];

/// The rules for one data directory.
#[derive(Debug)]
pub(crate) struct Served {
    /// Last components of the paths the configuration names as keys.
    key_names: BTreeSet<String>,
    /// Name of this cluster's directory in each tablespace.
    version_directory: String,
}

impl Served {
    /// Reads which files the configuration names as private keys.
    pub(crate) fn new(directory: &DataDir, version_directory: String) -> Self {
        let mut key_names = BTreeSet::new();
        for name in ["postgresql.conf", "postgresql.auto.conf"] {
            let text = directory.read_if_exists(name, CONF_BYTES_MAX).ok().flatten();
            let text = text.unwrap_or_default();
            for line in conf::parse(&String::from_utf8_lossy(&text)) {
                if let ConfLine::Setting(setting, value) = line {
                    key_names.extend(secret_files(&setting, &value));
                }
            }
        }
        Self { key_names, version_directory }
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

    /// Whether a regular file may be listed and read. Files that are not PostgreSQL's own are searched for
    /// private keys.
    pub(crate) fn serves(&self, directory: &DataDir, path: &DataPath) -> io::Result<bool> {
        if !is_of_version(path, &self.version_directory) {
            return Ok(false);
        }
        match FileClass::of(path) {
            FileClass::Relation(_) => Ok(true),
            FileClass::Slru if is_slru_name(path.file_name()) => Ok(true),
            FileClass::State | FileClass::Slru if self.is_key_name(path) => Ok(false),
            FileClass::State | FileClass::Slru => Ok(true),
            FileClass::Configuration | FileClass::Unknown => {
                if self.is_key_name(path) || EMPTIED_DIRECTORIES.contains(&path.as_str()) {
                    return Ok(false);
                }
                Ok(!holds_private_key(directory.open_file(path)?)?)
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
    let named = value.split_whitespace().filter_map(|part| {
        let (key, path) = part.split_once('=')?;
        matches!(key, "sslkey" | "passfile").then(|| path.trim_matches('\'')).and_then(last)
    });
    named.collect()
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
              primary_conninfo = 'host=a passfile=''/x/words'' sslkey=/y/client.der'\n",
        )
        .unwrap();
        fs::create_dir(home.path().join("pg_logical")).unwrap();
        for name in ["own.tab", "words", "client.der", "pg_logical/x.key"] {
            put(name, b"binary").unwrap();
        }
        put("secret.txt", b"der").unwrap();
        put("server.key", b"x").unwrap();
        let mut hidden = vec![b' '; (64 << 10) - 5];
        hidden.extend_from_slice(b"-----BEGIN PRIVATE KEY-----");
        put("notes", &hidden).unwrap();
        put("readme", b"hello").unwrap();
        put("postmaster.pid", b"1").unwrap();
        let directory = DataDir::open(home.path()).unwrap();
        let served = Served::new(&directory, "PG_15_202209061".to_owned());
        let serves = |name: &str| served.serves(&directory, &DataPath::new(name).unwrap()).unwrap();
        assert!(serves("readme") && serves("PG_VERSION") && serves("postgresql.conf"));
        let secrets = ["secret.txt", "server.key", "notes", "own.tab", "words", "client.der"];
        for name in secrets.iter().chain(&["pg_logical/x.key", "postmaster.pid"]) {
            assert!(!serves(name), "{name}");
        }
    }
}
