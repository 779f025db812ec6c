//! A small certificate authority: makes the few certificates a cluster needs.
//!
//! An existing PKI serves as well; this is for those who have none. Nothing is ever overwritten.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use time::{Duration, OffsetDateTime};

/// Certificates are valid from a day back: the clocks of two nodes never agree.
const BACKDATE: Duration = Duration::days(1);
const AUTHORITY_LIFE: Duration = Duration::days(CERTIFICATE_DAYS_MAX);
/// Days a certificate lives unless told otherwise: two years.
pub const CERTIFICATE_DAYS: u32 = 730;

/// And at most: an authority lives ten years.
pub const CERTIFICATE_DAYS_MAX: i64 = 3650;

/// Why a certificate could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CertsError {
    /// The system refused.
    #[error("could not {action} {path}")]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is there already.
    #[error("{path} exists already and is not overwritten: remove it first if you mean it")]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The name cannot stand in a certificate or a file name.
    #[error("name \"{0}\" is not usable: letters, digits, dots, dashes and underscores are")]
    Name(String),
    /// rcgen refused.
    #[error("could not make the certificate")]
    Certificate(#[from] rcgen::Error),
}

/// Makes `ca.crt` and `ca.key` in `out`.
pub fn init(out: &Path) -> Result<(), CertsError> {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "pgrejoin authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    set_life(&mut params, AUTHORITY_LIFE);
    let key = KeyPair::generate()?;
    let certificate = params.self_signed(&key)?;
    write_pair(out, "ca", &certificate.pem(), &key.serialize_pem())
}

/// Makes `NAME.crt` and `NAME.key` in `out`, signed by the authority in `ca`. The name and every
/// entry of `san` become alternative names; the certificate serves both roles.
pub fn issue(
    ca: &Path,
    name: &str,
    san: &[String],
    days: u32,
    out: &Path,
) -> Result<(), CertsError> {
    let usable = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    if name.is_empty() || name.starts_with('.') || !name.chars().all(usable) {
        return Err(CertsError::Name(name.to_owned()));
    }
    let authority_key = KeyPair::from_pem(&read(&ca.join("ca.key"))?)?;
    let issuer = Issuer::from_ca_cert_pem(&read(&ca.join("ca.crt"))?, authority_key)?;
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    for entry in std::iter::once(name).chain(san.iter().map(String::as_str)) {
        params.subject_alt_names.push(match entry.parse::<IpAddr>() {
            Ok(address) => SanType::IpAddress(address),
            Err(_) => SanType::DnsName(entry.try_into()?),
        });
    }
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    set_life(&mut params, Duration::days(i64::from(days)));
    let key = KeyPair::generate()?;
    let certificate = params.signed_by(&key, &issuer)?;
    write_pair(out, name, &certificate.pem(), &key.serialize_pem())
}

fn set_life(params: &mut CertificateParams, life: Duration) {
    let now = OffsetDateTime::now_utc();
    params.not_before = now - BACKDATE;
    params.not_after = now + life;
}

fn read(path: &Path) -> Result<String, CertsError> {
    std::fs::read_to_string(path).map_err(|source| CertsError::File {
        action: "read",
        path: path.to_owned(),
        source,
    })
}

fn write_pair(out: &Path, name: &str, certificate: &str, key: &str) -> Result<(), CertsError> {
    let file = |action, path: &Path| {
        let path = path.to_owned();
        move |source| CertsError::File { action, path, source }
    };
    std::fs::create_dir_all(out).map_err(file("create", out))?;
    let (certificate_path, key_path) =
        (out.join(format!("{name}.crt")), out.join(format!("{name}.key")));
    for path in [&certificate_path, &key_path] {
        if path.exists() {
            return Err(CertsError::Exists { path: path.clone() });
        }
    }
    for (path, mode, text) in [(&key_path, 0o600, key), (&certificate_path, 0o644, certificate)] {
        let mut options = OpenOptions::new();
        let opened: io::Result<File> = options.write(true).create_new(true).mode(mode).open(path);
        let mut opened = opened.map_err(file("create", path))?;
        opened.write_all(text.as_bytes()).map_err(file("write", path))?;
        opened.sync_all().map_err(file("sync", path))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn makes_private_keys_and_overwrites_nothing() {
        let home = tempfile::tempdir().unwrap();
        init(home.path()).unwrap();
        issue(home.path(), "node1", &["127.0.0.1".to_owned()], 10, home.path()).unwrap();
        for key in ["ca.key", "node1.key"] {
            let mode = home.path().join(key).metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        }
        assert!(matches!(init(home.path()), Err(CertsError::Exists { .. })));
        let again = issue(home.path(), "node1", &[], 10, home.path());
        assert!(matches!(again, Err(CertsError::Exists { .. })));
        for bad in ["", "../x", ".hidden", "a b"] {
            let result = issue(home.path(), bad, &[], 10, home.path());
            assert!(matches!(result, Err(CertsError::Name(_))), "{bad}");
        }
    }
}
