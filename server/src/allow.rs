//! The allow list: which clients may read. A certificate of the authority is not enough: its name must be
//! listed.

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;

use parking_lot::RwLock;
use proto::tls::Peer;
use proto::{Reason, Refusal};

const FINGERPRINT_PREFIX: &str = "sha256:";

/// Why there is no usable list.
#[derive(Debug, thiserror::Error)]
pub enum AllowError {
    /// The file cannot be read.
    #[error("could not read allow list {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No name at all.
    #[error("no client is allowed: give --allow NAME or --allow-file FILE with at least one name")]
    Empty,
    /// An unset variable, most likely.
    #[error("an allowed name is empty")]
    Blank,
    /// Names match exactly or not at all.
    #[error("allowed name \"{0}\" contains a wildcard: names match exactly")]
    Wildcard(String),
}

/// Names and fingerprints of the clients that may read.
#[derive(Debug)]
pub(crate) struct AllowList {
    fixed: BTreeSet<String>,
    file: Option<PathBuf>,
    names: RwLock<BTreeSet<String>>,
}

impl AllowList {
    /// A list of the names given and those in the file. There must be at least one.
    pub(crate) fn new(names: Vec<String>, file: Option<PathBuf>) -> Result<Self, AllowError> {
        let fixed = names.into_iter().map(|name| checked(&name)).collect::<Result<_, _>>()?;
        let list = Self { fixed, file, names: RwLock::default() };
        list.reload()?;
        if list.names.read().is_empty() {
            return Err(AllowError::Empty);
        }
        Ok(list)
    }

    /// Reads the file again. An empty or missing file allows nobody; what was allowed stays allowed
    /// only if the file is there and cannot be read or understood.
    pub(crate) fn reload(&self) -> Result<(), AllowError> {
        let mut names = self.fixed.clone();
        if let Some(path) = &self.file {
            let text = match std::fs::read_to_string(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
                text => text.map_err(|source| AllowError::Read { path: path.clone(), source })?,
            };
            for line in text.lines().map(str::trim) {
                if !line.is_empty() && !line.starts_with('#') {
                    names.insert(checked(line)?);
                }
            }
        }
        *self.names.write() = names;
        Ok(())
    }

    /// The file, for watching.
    pub(crate) fn file(&self) -> Option<&PathBuf> {
        self.file.as_ref()
    }

    /// Refuses a peer none of whose names is listed. The common name counts only for certificates
    /// without alternative names, as everywhere in TLS.
    pub(crate) fn check(&self, peer: &Peer) -> Result<(), Refusal> {
        let names = self.names.read();
        let common = peer.common_name.iter().filter(|_| peer.alternative_names.is_empty());
        let fingerprint = format!("{FINGERPRINT_PREFIX}{}", peer.fingerprint);
        // A name must not pass for a fingerprint.
        let mut known = peer
            .alternative_names
            .iter()
            .chain(common)
            .filter(|name| !name.starts_with(FINGERPRINT_PREFIX))
            .chain([&fingerprint]);
        if known.any(|name| names.contains(name)) {
            return Ok(());
        }
        let message = format!(
            "client certificate \"{}\" (sha256:{}) is not on the server's allow list: add its name \
             with --allow on the source",
            peer.name(),
            peer.fingerprint
        );
        Err(Refusal::new(Reason::NotAllowed, message))
    }
}

fn checked(name: &str) -> Result<String, AllowError> {
    if name.trim().is_empty() {
        return Err(AllowError::Blank);
    }
    if name.contains('*') {
        return Err(AllowError::Wildcard(name.to_owned()));
    }
    if let Some(digits) = name.strip_prefix(FINGERPRINT_PREFIX) {
        let digits = digits.replace(':', "").to_ascii_lowercase();
        return Ok(format!("{FINGERPRINT_PREFIX}{digits}"));
    }
    Ok(name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(names: &[&str], common: &str) -> Peer {
        Peer {
            alternative_names: names.iter().map(|name| (*name).to_owned()).collect(),
            common_name: Some(common.to_owned()),
            fingerprint: "ab01".to_owned(),
            address: ([127, 0, 0, 1], 1).into(),
            congestion_control: None,
        }
    }

    fn list(name: &str) -> AllowList {
        AllowList::new(vec![name.to_owned()], None).unwrap()
    }

    #[test]
    fn names_match_exactly() {
        assert!(list("node2").check(&peer(&["node2"], "x")).is_ok());
        assert!(list("node2").check(&peer(&["node22"], "x")).is_err());
        assert!(list("sha256:AB:01").check(&peer(&[], "x")).is_ok());
    }

    #[test]
    fn the_common_name_counts_only_without_alternative_names() {
        assert!(list("cn").check(&peer(&[], "cn")).is_ok());
        assert!(list("cn").check(&peer(&["other"], "cn")).is_err());
    }

    #[test]
    fn nobody_or_everybody_is_no_list() {
        assert!(matches!(AllowList::new(vec![], None), Err(AllowError::Empty)));
        let wild = AllowList::new(vec!["*.example".to_owned()], None);
        assert!(matches!(wild, Err(AllowError::Wildcard(_))));
    }
}
