//! The allow list: which clients may read. A certificate of the authority is not enough: its name must be
//! listed.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::{fmt, io};

use parking_lot::RwLock;
use proto::text::escaped;
use proto::tls::{CertificateName, Peer};
use proto::{Reason, Refusal};

/// Digits of a SHA-256 in hexadecimal.
const FINGERPRINT_DIGITS: usize = 64;

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
    /// A name that cannot match.
    #[error(transparent)]
    Entry(#[from] NotAnEntry),
    /// A line of the file.
    #[error("line {line} of allow list {path} is ignored")]
    Line {
        /// The file.
        path: PathBuf,
        /// Its number, from 1.
        line: usize,
        /// What is wrong with it.
        #[source]
        source: NotAnEntry,
    },
}

/// A text that names no client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotAnEntry {
    /// An unset variable, most likely.
    #[error("an allowed name is empty")]
    Blank,
    /// Names match exactly or not at all.
    #[error("allowed name \"{}\" has a wildcard: names match exactly", escaped(_0))]
    Wildcard(String),
    /// No certificate has such a name.
    #[error("allowed name \"{}\" has control characters", escaped(_0))]
    NotPrintable(String),
    /// Fingerprints are compared as text.
    #[error(
        "\"{}\" is no fingerprint: give sha256: and {FINGERPRINT_DIGITS} lower-case hexadecimal \
         digits without colons",
        escaped(_0)
    )]
    Fingerprint(String),
    /// `ip:` with something else.
    #[error("\"{}\" is no IP address", escaped(_0))]
    Address(String),
    /// It has a colon and is neither an address nor of a known kind.
    #[error(
        "allowed name \"{}\" is of an unknown kind: give dns:NAME, ip:ADDRESS, uri:URI or \
         sha256:FINGERPRINT",
        escaped(_0)
    )]
    Kind(String),
}

/// One allowed client.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum AllowEntry {
    /// Without a kind: a DNS name, or the common name of a certificate without alternative names.
    Name(String),
    /// A DNS name among the alternative names.
    Dns(String),
    /// An IP address among the alternative names.
    Ip(IpAddr),
    /// A URI among the alternative names.
    Uri(String),
    /// SHA-256 of the certificate, in lower-case hexadecimal.
    Fingerprint(String),
}

impl FromStr for AllowEntry {
    type Err = NotAnEntry;

    fn from_str(text: &str) -> Result<Self, NotAnEntry> {
        let (kind, name) = match text.split_once(':') {
            Some((kind @ ("dns" | "ip" | "uri" | "sha256"), name)) => (Some(kind), name),
            _ => (None, text),
        };
        if name.trim().is_empty() {
            return Err(NotAnEntry::Blank);
        }
        if name.contains('*') {
            return Err(NotAnEntry::Wildcard(text.to_owned()));
        }
        if escaped(name) != name {
            return Err(NotAnEntry::NotPrintable(text.to_owned()));
        }
        let address = || name.parse::<IpAddr>();
        Ok(match kind {
            Some("dns") => Self::Dns(name.to_ascii_lowercase()),
            Some("ip") => Self::Ip(address().map_err(|_| NotAnEntry::Address(name.to_owned()))?),
            Some("uri") => Self::Uri(name.to_owned()),
            Some(_) if is_fingerprint(name) => Self::Fingerprint(name.to_owned()),
            Some(_) => return Err(NotAnEntry::Fingerprint(name.to_owned())),
            None => match address() {
                Ok(address) => Self::Ip(address),
                Err(_) if name.contains(':') => return Err(NotAnEntry::Kind(text.to_owned())),
                Err(_) => Self::Name(name.to_owned()),
            },
        })
    }
}

fn is_fingerprint(text: &str) -> bool {
    let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    text.len() == FINGERPRINT_DIGITS && text.bytes().all(is_digit)
}

impl fmt::Display for AllowEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Dns(name) => write!(f, "dns:{name}"),
            Self::Ip(address) => write!(f, "ip:{address}"),
            Self::Uri(uri) => write!(f, "uri:{uri}"),
            Self::Fingerprint(digits) => write!(f, "sha256:{digits}"),
        }
    }
}

impl AllowEntry {
    fn admits(&self, peer: &Peer) -> bool {
        let has = |wanted: &CertificateName| {
            peer.alternative_names.iter().flatten().any(|name| name == wanted)
        };
        match self {
            Self::Name(name) => match &peer.alternative_names {
                Some(_) => has(&CertificateName::Dns(name.to_ascii_lowercase())),
                // As everywhere in TLS, the common name counts for certificates without alternative names alone.
                None => peer.common_name.as_ref() == Some(name),
            },
            Self::Dns(name) => has(&CertificateName::Dns(name.clone())),
            Self::Ip(address) => has(&CertificateName::Ip(*address)),
            Self::Uri(uri) => has(&CertificateName::Uri(uri.clone())),
            Self::Fingerprint(digits) => peer.fingerprint == *digits,
        }
    }
}

/// Names and fingerprints of the clients that may read.
#[derive(Debug)]
pub(crate) struct AllowList {
    fixed: BTreeSet<AllowEntry>,
    file: Option<PathBuf>,
    entries: RwLock<BTreeSet<AllowEntry>>,
}

impl AllowList {
    /// A list of the names given and those in the file. There must be at least one, and each must be valid.
    pub(crate) fn new(names: &[String], file: Option<PathBuf>) -> Result<Self, AllowError> {
        let fixed = names.iter().map(|name| name.parse()).collect::<Result<_, _>>()?;
        let list = Self { fixed, file, entries: RwLock::default() };
        if let Some(fault) = list.reload().into_iter().next() {
            return Err(fault);
        }
        if list.entries.read().is_empty() {
            return Err(AllowError::Empty);
        }
        Ok(list)
    }

    /// Reads the file again and returns what is wrong with it. What is not in it any more is not allowed any
    /// more, whatever else is wrong: a file that cannot be read allows nobody, and a line that names no client
    /// is left out.
    pub(crate) fn reload(&self) -> Vec<AllowError> {
        let (mut entries, mut faults) = (self.fixed.clone(), Vec::new());
        if let Some(path) = &self.file {
            let text = std::fs::read_to_string(path).unwrap_or_else(|source| {
                faults.push(AllowError::Read { path: path.clone(), source });
                String::new()
            });
            for (number, line) in (1..).zip(text.lines().map(str::trim)) {
                if line.is_empty() || line.starts_with('#') {
                    continue;
                }
                match line.parse() {
                    Ok(entry) => drop(entries.insert(entry)),
                    Err(source) => {
                        faults.push(AllowError::Line { path: path.clone(), line: number, source });
                    }
                }
            }
        }
        *self.entries.write() = entries;
        faults
    }

    /// The names in force, for the log.
    pub(crate) fn names(&self) -> Vec<String> {
        self.entries.read().iter().map(ToString::to_string).collect()
    }

    /// The file, for watching.
    pub(crate) fn file(&self) -> Option<&PathBuf> {
        self.file.as_ref()
    }

    /// The entry by which a peer may read.
    ///
    /// # Errors
    /// None of its names is listed.
    pub(crate) fn check(&self, peer: &Peer) -> Result<String, Refusal> {
        let entries = self.entries.read();
        if let Some(entry) = entries.iter().find(|entry| entry.admits(peer)) {
            return Ok(entry.to_string());
        }
        let names = match peer.names() {
            names if names.is_empty() => "has no name that could be allowed".to_owned(),
            names => format!("for {}", names.join(", ")),
        };
        let message = format!(
            "the client certificate {names} (sha256:{}) is not on the server's allow list: add its \
             name with --allow on the source",
            peer.fingerprint
        );
        Err(Refusal::new(Reason::NotAllowed, message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FINGERPRINT: &str = "ab01ab01ab01ab01ab01ab01ab01ab01ab01ab01ab01ab01ab01ab01ab01ab01";

    fn peer(names: Option<Vec<CertificateName>>, common: &str) -> Peer {
        Peer {
            alternative_names: names,
            common_name: Some(common.to_owned()),
            fingerprint: FINGERPRINT.to_owned(),
            expires: i64::MAX,
            chain: Vec::new(),
            address: ([127, 0, 0, 1], 1).into(),
            congestion_control: None,
        }
    }

    fn dns(name: &str) -> CertificateName {
        CertificateName::Dns(name.to_owned())
    }

    fn admits(entry: &str, peer: &Peer) -> bool {
        AllowList::new(&[entry.to_owned()], None).unwrap().check(peer).is_ok()
    }

    #[test]
    fn names_match_exactly() {
        let node2 = peer(Some(vec![dns("node2")]), "x");
        assert!(admits("node2", &node2) && admits("dns:node2", &node2) && admits("Node2", &node2));
        assert!(!admits("node22", &node2) && !admits("node", &node2));
        assert!(admits(&format!("sha256:{FINGERPRINT}"), &node2));
    }

    #[test]
    fn a_name_of_one_kind_does_not_pass_for_another() {
        let address = CertificateName::Ip("10.0.0.1".parse().unwrap());
        let uri = CertificateName::Uri("spiffe://db/node2".to_owned());
        let by_address = peer(Some(vec![address]), "x");
        let by_uri = peer(Some(vec![uri]), "x");
        assert!(admits("10.0.0.1", &by_address) && admits("ip:10.0.0.1", &by_address));
        assert!(!admits("10.0.0.1", &peer(Some(vec![dns("10.0.0.1")]), "10.0.0.1")));
        assert!(!admits("dns:10.0.0.1", &by_address));
        assert!(admits("uri:spiffe://db/node2", &by_uri));
        assert!(!admits("uri:spiffe://db/node2", &peer(Some(vec![dns("spiffe://db/node2")]), "x")));
        let forged = peer(Some(vec![dns(&format!("sha256:{FINGERPRINT}"))]), "x");
        let other = Peer { fingerprint: "0".repeat(64), ..forged };
        assert!(!admits(&format!("sha256:{FINGERPRINT}"), &other));
    }

    #[test]
    fn the_common_name_counts_only_without_alternative_names() {
        assert!(admits("cn", &peer(None, "cn")));
        assert!(!admits("dns:cn", &peer(None, "cn")));
        assert!(!admits("cn", &peer(Some(vec![dns("other")]), "cn")));
        assert!(
            !admits("cn", &peer(Some(vec![CertificateName::Other]), "cn")),
            "an e-mail address"
        );
        assert!(!admits("cn", &peer(Some(Vec::new()), "cn")), "names that cannot be read");
    }

    #[test]
    fn what_can_match_nothing_is_an_error() {
        let short = &FINGERPRINT[1..];
        let upper = FINGERPRINT.to_ascii_uppercase();
        for (text, error) in [
            ("", NotAnEntry::Blank),
            ("dns:", NotAnEntry::Blank),
            ("*.example", NotAnEntry::Wildcard("*.example".to_owned())),
            ("a\u{1b}b", NotAnEntry::NotPrintable("a\u{1b}b".to_owned())),
            (&format!("sha256:{short}"), NotAnEntry::Fingerprint(short.to_owned())),
            (&format!("sha256:{upper}"), NotAnEntry::Fingerprint(upper.clone())),
            ("ip:node2", NotAnEntry::Address("node2".to_owned())),
            ("spiffe://db/node2", NotAnEntry::Kind("spiffe://db/node2".to_owned())),
            ("email:a@b", NotAnEntry::Kind("email:a@b".to_owned())),
        ] {
            assert_eq!(text.parse::<AllowEntry>(), Err(error), "{text:?}");
        }
        assert_eq!("::1".parse(), Ok(AllowEntry::Ip("::1".parse().unwrap())));
    }

    #[test]
    fn nobody_is_no_list() {
        assert!(matches!(AllowList::new(&[], None), Err(AllowError::Empty)));
    }

    #[test]
    fn whoever_is_refused_is_named_with_all_names_and_the_fingerprint() {
        let list = AllowList::new(&["node1".to_owned()], None).unwrap();
        let refused = list.check(&peer(Some(vec![dns("node2"), dns("a\nb")]), "x")).unwrap_err();
        let said = refused.to_string();
        assert!(said.contains(r"for node2, a\nb") && said.contains(FINGERPRINT), "{said}");
    }

    #[test]
    fn a_name_that_was_removed_is_refused_whatever_else_is_wrong_with_the_file() {
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join("allow");
        let write = |text: &str| {
            let mut file = std::fs::File::create(&file).unwrap();
            io::Write::write_all(&mut file, text.as_bytes()).unwrap();
        };
        write("node1\n# a comment\nnode2\n");
        let list = AllowList::new(&[], Some(file.clone())).unwrap();
        let node = |name: &str| peer(Some(vec![dns(name)]), "x");
        assert_eq!(list.check(&node("node2")).unwrap(), "node2");
        write("node1\nno*de\n");
        let faults = list.reload();
        assert!(matches!(faults[..], [AllowError::Line { line: 2, .. }]), "{faults:?}");
        assert!(list.check(&node("node1")).is_ok() && list.check(&node("node2")).is_err());
        std::fs::remove_file(&file).unwrap();
        assert!(matches!(list.reload()[..], [AllowError::Read { .. }]));
        assert!(list.check(&node("node1")).is_err(), "nobody is left");
    }
}
