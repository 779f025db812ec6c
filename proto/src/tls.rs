//! TLS for both ends: version 1.3 alone, certificates required on both sides.

use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;
use std::{fmt, io};

use rustls::client::WebPkiServerVerifier;
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use sha2::{Digest as _, Sha256};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};
use x509_parser::revocation_list::CertificateRevocationList;
use x509_parser::time::ASN1Time;

use crate::text::of_peer;

/// gRPC runs over HTTP/2 and nothing else is offered.
const ALPN_HTTP2: &[u8] = b"h2";

/// Files that make up one end's identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// Our certificate, followed by intermediates.
    pub certificate: PathBuf,
    /// Our private key.
    pub key: PathBuf,
    /// The authority that must have signed the other end's certificate.
    pub authority: PathBuf,
    /// Which certificates of the authority count no more.
    pub revocation: Revocation,
}

impl TlsFiles {
    /// Every file.
    pub fn all(&self) -> impl Iterator<Item = &PathBuf> {
        [&self.certificate, &self.key, &self.authority].into_iter().chain(&self.revocation.lists)
    }
}

/// How revoked certificates are found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Revocation {
    /// Certificate revocation lists, one for each authority in a chain; without any nothing is checked.
    pub lists: Vec<PathBuf>,
    /// What happens where an authority has no list, or only one that is past its next update.
    pub expired: ExpiredList,
}

/// What happens to certificates of an authority whose revocation list is missing or past its next update.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ExpiredList {
    /// They are refused: a certificate that was revoked since would not be known.
    #[default]
    Refuse,
    /// They are accepted, with a warning.
    Warn,
}

/// Why an identity could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The operating system reported an error.
    #[error("could not read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file has no PEM block of the kind needed.
    #[error("{path} holds no {expected} in PEM form")]
    Pem {
        /// The file.
        path: PathBuf,
        /// What was looked for.
        expected: &'static str,
    },
    /// Others could read the private key.
    #[error(
        "private key {path} has mode {mode:04o} and owner {owner}: it must belong to the user \
         running this program with mode 0600 or less, or to root with 0640 or less"
    )]
    KeyNotPrivate {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
        /// Its owner's user id.
        owner: u32,
    },
    /// rustls does not take the certificate, key or authority.
    #[error("certificate {path} cannot be used")]
    Certificate {
        /// The certificate's file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls::Error,
    },
    /// The authority cannot verify anything.
    #[error("authority {path} cannot be used")]
    Authority {
        /// The authority's file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// The revocation lists in a file, PEM or DER.
fn revocation_lists(path: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
    let read =
        std::fs::read(path).map_err(|source| TlsError::Read { path: path.to_owned(), source })?;
    let pem = CertificateRevocationListDer::pem_slice_iter(&read).filter_map(Result::ok);
    let lists: Vec<_> = pem.collect();
    if !lists.is_empty() {
        return Ok(lists);
    }
    if CertificateRevocationList::from_der(&read).is_err() {
        let expected = "certificate revocation list";
        return Err(TlsError::Pem { path: path.to_owned(), expected });
    }
    Ok(vec![read.into()])
}

impl Revocation {
    /// All lists. A file that is missing is an error, unless the operator accepts that.
    fn load(&self) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
        let mut lists = Vec::new();
        for path in &self.lists {
            match revocation_lists(path) {
                Err(TlsError::Read { source, .. })
                    if source.kind() == io::ErrorKind::NotFound
                        && self.expired == ExpiredList::Warn => {}
                found => lists.extend(found?),
            }
        }
        Ok(lists)
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read =
        std::fs::read(path).map_err(|source| TlsError::Read { path: path.to_owned(), source })?;
    let found: Vec<_> = CertificateDer::pem_slice_iter(&read).filter_map(Result::ok).collect();
    if found.is_empty() {
        return Err(TlsError::Pem { path: path.to_owned(), expected: "certificate" });
    }
    Ok(found)
}

/// Reads a private key after checking that nobody else can, by PostgreSQL's own rule
/// (`check_ssl_key_file_permissions`).
fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let read_error = |source| TlsError::Read { path: path.to_owned(), source };
    let mut file = File::open(path).map_err(read_error)?;
    let metadata = file.metadata().map_err(read_error)?;
    let (mode, owner) = (metadata.mode() & 0o7777, metadata.uid());
    let us = rustix::process::geteuid().as_raw();
    let forbidden = if owner == us && owner != 0 { 0o077 } else { 0o027 };
    if (owner != us && owner != 0) || mode & forbidden != 0 {
        return Err(TlsError::KeyNotPrivate { path: path.to_owned(), mode, owner });
    }
    let mut pem = Vec::new();
    io::Read::read_to_end(&mut file, &mut pem).map_err(read_error)?;
    PrivateKeyDer::from_pem_slice(&pem)
        .map_err(|_| TlsError::Pem { path: path.to_owned(), expected: "private key" })
}

fn roots(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut store = RootCertStore::empty();
    for certificate in certificates(path)? {
        store.add(certificate).map_err(|error| TlsError::Authority {
            path: path.to_owned(),
            source: Box::new(error),
        })?;
    }
    Ok(store)
}

/// What a server accepts connections with.
#[derive(Debug, Clone)]
pub struct ServerTls {
    /// For new connections.
    pub config: Arc<ServerConfig>,
    verifier: Arc<dyn ClientCertVerifier>,
}

impl ServerTls {
    /// Whether a client that was accepted earlier would be accepted now.
    ///
    /// # Errors
    /// Why it would not.
    pub fn verify_again(&self, peer: &Peer) -> Result<(), rustls::Error> {
        let (own, rest) = peer.chain.split_first().ok_or(rustls::Error::NoCertificatesPresented)?;
        self.verifier.verify_client_cert(own, rest, UnixTime::now()).map(drop)
    }
}

/// The server's configuration: a client without a certificate of the authority is refused.
pub fn server_config(files: &TlsFiles) -> Result<ServerTls, TlsError> {
    let provider = Arc::new(default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(
        Arc::new(roots(&files.authority)?),
        Arc::clone(&provider),
    )
    .with_crls(files.revocation.load()?);
    let verifier = match files.revocation.expired {
        ExpiredList::Refuse => verifier.enforce_revocation_expiration(),
        ExpiredList::Warn => verifier.allow_unknown_revocation_status(),
    };
    let verifier = verifier.build().map_err(|error| TlsError::Authority {
        path: files.authority.clone(),
        source: Box::new(error),
    })?;
    let refused = |source| TlsError::Certificate { path: files.certificate.clone(), source };
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(refused)?
        .with_client_cert_verifier(Arc::clone(&verifier))
        .with_single_cert(certificates(&files.certificate)?, private_key(&files.key)?)
        .map_err(refused)?;
    config.alpn_protocols = vec![ALPN_HTTP2.to_vec()];
    // A resumed session would skip the check of the certificate.
    config.send_tls13_tickets = 0;
    Ok(ServerTls { config: Arc::new(config), verifier })
}

/// The client's configuration: the server must have a certificate of the authority.
pub fn client_config(files: &TlsFiles) -> Result<ClientConfig, TlsError> {
    let refused = |source| TlsError::Certificate { path: files.certificate.clone(), source };
    let provider = Arc::new(default_provider());
    let verifier = WebPkiServerVerifier::builder_with_provider(
        Arc::new(roots(&files.authority)?),
        Arc::clone(&provider),
    )
    .with_crls(files.revocation.load()?);
    let verifier = match files.revocation.expired {
        ExpiredList::Refuse => verifier.enforce_revocation_expiration(),
        ExpiredList::Warn => verifier.allow_unknown_revocation_status(),
    };
    let verifier = verifier.build().map_err(|error| TlsError::Authority {
        path: files.authority.clone(),
        source: Box::new(error),
    })?;
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(refused)?
        .with_webpki_verifier(verifier)
        .with_client_auth_cert(certificates(&files.certificate)?, private_key(&files.key)?)
        .map_err(refused)?;
    config.alpn_protocols = vec![ALPN_HTTP2.to_vec()];
    Ok(config)
}

/// Days before its end at which a certificate is warned about.
const EXPIRY_WARNING_DAYS: i64 = 30;
/// Days before its next update at which a revocation list is warned about.
const UPDATE_WARNING_DAYS: i64 = 7;

/// Days from now to a time, rounded down.
fn days_to(end: ASN1Time) -> Option<i64> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).ok()?;
    let now = i64::try_from(now.as_secs()).ok()?;
    Some((end.timestamp() - now).div_euclid(86_400))
}

/// Warnings about certificates and revocation lists that are out of date or soon will be.
pub fn expiry_warnings(files: &TlsFiles) -> Vec<String> {
    let own = [&files.certificate, &files.authority].into_iter();
    let certificates = own.filter_map(|path| certificate_warning(path));
    certificates.chain(files.revocation.lists.iter().flat_map(|path| list_warnings(path))).collect()
}

/// A warning about the first certificate in a file.
fn certificate_warning(path: &Path) -> Option<String> {
    let certificates = certificates(path).ok()?;
    let (_, parsed) = X509Certificate::from_der(certificates.first()?).ok()?;
    let end = parsed.validity().not_after;
    let (days, name) = (days_to(end)?, path.display());
    match days {
        ..0 => Some(format!("certificate {name} expired on {end}: issue a new one")),
        0..EXPIRY_WARNING_DAYS => {
            Some(format!("certificate {name} expires in {days} days, on {end}: issue a new one"))
        }
        _ => None,
    }
}

/// A warning about each revocation list in a file.
fn list_warnings(path: &Path) -> Vec<String> {
    let lists = match revocation_lists(path) {
        Ok(lists) => lists,
        Err(error) => return vec![format!("{error}: revoked certificates are not known")],
    };
    let warning = |list: &CertificateRevocationListDer<'_>| {
        let (_, parsed) = CertificateRevocationList::from_der(list.as_ref()).ok()?;
        let update = parsed.next_update()?;
        let (days, name) = (days_to(update)?, path.display());
        match days {
            ..0 => Some(format!(
                "revocation list {name} should have been updated on {update}: get the new one; \
                 certificates of its authority are refused unless --crl-expired warn is given"
            )),
            0..UPDATE_WARNING_DAYS => Some(format!(
                "revocation list {name} must be updated within {days} days, by {update}"
            )),
            _ => None,
        }
    };
    lists.iter().filter_map(warning).collect()
}

/// A subject alternative name of a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CertificateName {
    /// A DNS name, in lower case.
    Dns(String),
    /// An IP address.
    Ip(IpAddr),
    /// A URI.
    Uri(String),
    /// A name of another kind, which nothing is compared with.
    Other,
}

impl fmt::Display for CertificateName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dns(name) | Self::Uri(name) => f.write_str(&of_peer(name)),
            Self::Ip(address) => address.fmt(f),
            Self::Other => f.write_str("a name of another kind"),
        }
    }
}

/// Who is at the other end of a connection, by the certificate rustls verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Subject alternative names; `None` if the certificate does not have that extension.
    pub alternative_names: Option<Vec<CertificateName>>,
    /// The subject's common name.
    pub common_name: Option<String>,
    /// SHA-256 of the certificate, in lower-case hexadecimal.
    pub fingerprint: String,
    /// When the certificate expires, in seconds since 1970.
    pub expires: i64,
    /// The certificate and the intermediates that came with it.
    pub chain: Vec<CertificateDer<'static>>,
    /// Where the connection comes from.
    pub address: SocketAddr,
    /// Congestion control of the connection, if the kernel told.
    pub congestion_control: Option<String>,
}

impl Peer {
    /// Reads the names out of the first certificate of a chain.
    pub fn from_chain(chain: &[CertificateDer<'_>], address: SocketAddr) -> Option<Self> {
        let certificate = chain.first()?;
        let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
        // A certificate whose names cannot be read has names: its common name does not count.
        let alternative_names = match parsed.subject_alternative_name() {
            Ok(None) => None,
            Ok(Some(names)) => Some(names.value.general_names.iter().map(name_of).collect()),
            Err(_) => Some(Vec::new()),
        };
        let common_name =
            parsed.subject().iter_common_name().next().and_then(|name| name.as_str().ok());
        let digest = Sha256::digest(certificate);
        Some(Self {
            alternative_names,
            common_name: common_name.map(str::to_owned),
            fingerprint: digest.iter().map(|byte| format!("{byte:02x}")).collect(),
            expires: parsed.validity().not_after.timestamp(),
            chain: chain.iter().map(|certificate| certificate.clone().into_owned()).collect(),
            address,
            congestion_control: None,
        })
    }

    /// The names by which a client can be allowed: alternative names, or the common name of a certificate that
    /// has none.
    pub fn names(&self) -> Vec<String> {
        match &self.alternative_names {
            Some(names) => names.iter().map(ToString::to_string).collect(),
            None => self.common_name.iter().map(|name| of_peer(name)).collect(),
        }
    }
}

fn name_of(name: &GeneralName<'_>) -> CertificateName {
    match name {
        GeneralName::DNSName(name) => CertificateName::Dns(name.to_ascii_lowercase()),
        GeneralName::URI(name) => CertificateName::Uri((*name).to_owned()),
        GeneralName::IPAddress(bytes) => {
            ip(bytes).map_or(CertificateName::Other, CertificateName::Ip)
        }
        _ => CertificateName::Other,
    }
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(four) = <[u8; 4]>::try_from(bytes) {
        return Some(IpAddr::from(four));
    }
    <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from)
}
