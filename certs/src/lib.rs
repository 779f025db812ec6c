//! A small certificate authority: makes the few certificates a cluster needs.
//!
//! An existing PKI serves as well; this is for those who have none. Nothing is ever overwritten.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    RevokedCertParams, SanType, SerialNumber,
};
use time::{Duration, OffsetDateTime};
use x509_parser::pem::Pem;
use x509_parser::prelude::{FromDer as _, X509Certificate};
use x509_parser::revocation_list::CertificateRevocationList;

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
    /// A file is not what it should be.
    #[error("{path} is no {what} in PEM form")]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What was looked for.
        what: &'static str,
    },
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

/// Adds certificates to the authority's revocation list `ca.crl`, which both programs read. The list is valid for `days`;
/// made again without certificates it is only prolonged.
pub fn revoke(ca: &Path, certificates: &[PathBuf], days: u32) -> Result<PathBuf, CertsError> {
    let path = ca.join("ca.crl");
    let authority_key = KeyPair::from_pem(&read(&ca.join("ca.key"))?)?;
    let issuer = Issuer::from_ca_cert_pem(&read(&ca.join("ca.crt"))?, authority_key)?;
    let now = OffsetDateTime::now_utc();
    let before = if path.exists() { Some(read(&path)?) } else { None };
    let mut revoked = before.as_deref().map(|text| revoked_by(&path, text)).transpose()?;
    let revoked = revoked.get_or_insert_default();
    for certificate in certificates {
        let serial = serial_of(certificate)?;
        revoked.retain(|known| known.serial_number != serial);
        let (reason_code, invalidity_date) = (None, None);
        let revocation_time = now;
        revoked.push(RevokedCertParams {
            serial_number: serial,
            revocation_time,
            reason_code,
            invalidity_date,
        });
    }
    let list = CertificateRevocationListParams {
        this_update: now - BACKDATE,
        next_update: now + Duration::days(i64::from(days)),
        crl_number: SerialNumber::from(u64::try_from(now.unix_timestamp()).unwrap_or(0)),
        issuing_distribution_point: None,
        revoked_certs: std::mem::take(revoked),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    replace(&path, &list.signed_by(&issuer)?.pem()?)?;
    Ok(path)
}

/// What an earlier list revokes.
fn revoked_by(path: &Path, text: &str) -> Result<Vec<RevokedCertParams>, CertsError> {
    let unusable = || CertsError::Unusable { path: path.to_owned(), what: "revocation list" };
    let pem = pem_block(text).ok_or_else(unusable)?;
    let (_, list) = CertificateRevocationList::from_der(&pem.contents).map_err(|_| unusable())?;
    let entries = list.iter_revoked_certificates();
    let known = entries.map(|entry| RevokedCertParams {
        serial_number: SerialNumber::from_slice(entry.raw_serial()),
        revocation_time: entry.revocation_date.to_datetime(),
        reason_code: None,
        invalidity_date: None,
    });
    Ok(known.collect())
}

fn serial_of(path: &Path) -> Result<SerialNumber, CertsError> {
    let unusable = || CertsError::Unusable { path: path.to_owned(), what: "certificate" };
    let pem = pem_block(&read(path)?).ok_or_else(unusable)?;
    let (_, certificate) = X509Certificate::from_der(&pem.contents).map_err(|_| unusable())?;
    Ok(SerialNumber::from_slice(certificate.raw_serial()))
}

fn pem_block(text: &str) -> Option<Pem> {
    Pem::iter_from_buffer(text.as_bytes()).next()?.ok()
}

/// Writes a file that takes the place of an older one at once: a server may be reading it.
fn replace(path: &Path, text: &str) -> Result<(), CertsError> {
    let file = |action| {
        let path = path.to_owned();
        move |source| CertsError::File { action, path, source }
    };
    let new = path.with_extension("new");
    drop(std::fs::remove_file(&new));
    let mut options = OpenOptions::new();
    let mut opened =
        options.write(true).create_new(true).mode(0o644).open(&new).map_err(file("create"))?;
    opened.write_all(text.as_bytes()).map_err(file("write"))?;
    opened.sync_all().map_err(file("sync"))?;
    rustix::fs::rename(&new, path).map_err(|error| file("replace")(error.into()))
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
    fn what_was_revoked_stays_revoked() {
        let home = tempfile::tempdir().unwrap();
        init(home.path()).unwrap();
        for name in ["node1", "node2"] {
            issue(home.path(), name, &[], 10, home.path()).unwrap();
        }
        let certificate = |name: &str| home.path().join(format!("{name}.crt"));
        let serials = |path: &Path| {
            let found = revoked_by(path, &read(path).unwrap()).unwrap();
            found.into_iter().map(|one| one.serial_number).collect::<Vec<_>>()
        };
        let list = revoke(home.path(), &[certificate("node1")], 30).unwrap();
        revoke(home.path(), &[certificate("node2"), certificate("node1")], 30).unwrap();
        let wanted = [certificate("node2"), certificate("node1")];
        let wanted: Vec<_> = wanted.iter().map(|path| serial_of(path).unwrap()).collect();
        assert_eq!(serials(&list), wanted);
        revoke(home.path(), &[], 30).unwrap();
        assert_eq!(serials(&list), wanted, "only prolonged");
        let error = revoke(home.path(), &[home.path().join("ca.key")], 30);
        assert!(matches!(error, Err(CertsError::Unusable { .. })), "{error:?}");
    }

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
