//! TLS for both ends: version 1.3 alone, certificates required on both sides.

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use sha2::{Digest as _, Sha256};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

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

/// The server's configuration: a client without a certificate of the authority is refused.
pub fn server_config(files: &TlsFiles) -> Result<ServerConfig, TlsError> {
    let provider = Arc::new(default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(
        Arc::new(roots(&files.authority)?),
        Arc::clone(&provider),
    )
    .build()
    .map_err(|error| TlsError::Authority {
        path: files.authority.clone(),
        source: Box::new(error),
    })?;
    let refused = |source| TlsError::Certificate { path: files.certificate.clone(), source };
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(refused)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(certificates(&files.certificate)?, private_key(&files.key)?)
        .map_err(refused)?;
    config.alpn_protocols = vec![ALPN_HTTP2.to_vec()];
    // A resumed session would skip the check of the certificate.
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// The client's configuration: the server must have a certificate of the authority.
pub fn client_config(files: &TlsFiles) -> Result<ClientConfig, TlsError> {
    let refused = |source| TlsError::Certificate { path: files.certificate.clone(), source };
    let mut config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[&TLS13])
        .map_err(refused)?
        .with_root_certificates(roots(&files.authority)?)
        .with_client_auth_cert(certificates(&files.certificate)?, private_key(&files.key)?)
        .map_err(refused)?;
    config.alpn_protocols = vec![ALPN_HTTP2.to_vec()];
    Ok(config)
}

/// Days before its end at which a certificate is warned about.
const EXPIRY_WARNING_DAYS: i64 = 30;

/// A warning if the first certificate in a file has expired or will expire soon. `None` also for a file that
/// cannot be read: loading it reports the error.
pub fn expiry_warning(path: &Path) -> Option<String> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).ok()?;
    let now = i64::try_from(now.as_secs()).ok()?;
    let certificates = certificates(path).ok()?;
    let (_, parsed) = X509Certificate::from_der(certificates.first()?).ok()?;
    let end = parsed.validity().not_after;
    let days = (end.timestamp() - now).div_euclid(86_400);
    let name = path.display();
    match days {
        ..0 => Some(format!("certificate {name} expired on {end}: issue a new one")),
        0..EXPIRY_WARNING_DAYS => {
            Some(format!("certificate {name} expires in {days} days, on {end}: issue a new one"))
        }
        _ => None,
    }
}

/// Who is at the other end of a connection, by the certificate rustls verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Subject alternative names: DNS names, addresses and URIs.
    pub alternative_names: Vec<String>,
    /// The subject's common name.
    pub common_name: Option<String>,
    /// SHA-256 of the certificate, in lower-case hexadecimal.
    pub fingerprint: String,
    /// Where the connection comes from.
    pub address: SocketAddr,
    /// Congestion control of the connection, if the kernel told.
    pub congestion_control: Option<String>,
}

impl Peer {
    /// Reads the names out of a certificate.
    pub fn from_certificate(certificate: &CertificateDer<'_>, address: SocketAddr) -> Option<Self> {
        let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
        let mut alternative_names = Vec::new();
        if let Ok(Some(extension)) = parsed.subject_alternative_name() {
            for name in &extension.value.general_names {
                match name {
                    GeneralName::DNSName(name) | GeneralName::URI(name) => {
                        alternative_names.push((*name).to_owned());
                    }
                    GeneralName::IPAddress(bytes) => alternative_names.extend(ip(bytes)),
                    _ => {}
                }
            }
        }
        let common_name =
            parsed.subject().iter_common_name().next().and_then(|name| name.as_str().ok());
        let digest = Sha256::digest(certificate);
        Some(Self {
            alternative_names,
            common_name: common_name.map(str::to_owned),
            fingerprint: digest.iter().map(|byte| format!("{byte:02x}")).collect(),
            address,
            congestion_control: None,
        })
    }

    /// The name to show in logs.
    pub fn name(&self) -> &str {
        self.common_name
            .as_deref()
            .or_else(|| self.alternative_names.first().map(String::as_str))
            .unwrap_or(&self.fingerprint)
    }
}

fn ip(bytes: &[u8]) -> Option<String> {
    if let Ok(four) = <[u8; 4]>::try_from(bytes) {
        return Some(std::net::Ipv4Addr::from(four).to_string());
    }
    <[u8; 16]>::try_from(bytes).ok().map(|b| std::net::Ipv6Addr::from(b).to_string())
}
