//! The command line.

use std::net::{SocketAddr, ToSocketAddrs as _};
use std::path::PathBuf;

use clap::Parser;
use ipnet::IpNet;
use proto::rate::parse_rate;
use proto::tls::{ExpiredList, Revocation, TlsFiles};

use crate::allow::AllowList;
use crate::config::{Config, ConfigError};

/// Serves a PostgreSQL data directory, read-only, to pgrejoin clients.
///
/// Whoever may read a data directory can read every row and every password hash in it: allow only
/// nodes that may have all data of the cluster.
#[derive(Debug, Parser)]
#[command(name = "pgrejoin-server", version)]
pub struct Cli {
    /// Data directory to serve
    #[arg(short = 'D', long, value_name = "DIR", env = "PGREJOIN_SERVER_PGDATA")]
    pub pgdata: PathBuf,

    /// Where to listen: an address or name with a port, or a port alone for all addresses
    #[arg(long, value_name = "[ADDR:]PORT", default_value = "0.0.0.0:7432", value_parser = listen_address)]
    pub listen: SocketAddr,

    /// This server's certificate, PEM
    #[arg(long, value_name = "FILE")]
    pub cert: PathBuf,

    /// This server's private key, PEM; nobody else may be able to read it
    #[arg(long, value_name = "FILE")]
    pub key: PathBuf,

    /// Certificate authority that signed the clients' certificates, PEM
    #[arg(long, value_name = "FILE")]
    pub client_ca: PathBuf,

    /// Certificate revocation list of an authority of the clients, PEM or DER; can be repeated. With one, an
    /// authority whose list is missing or past its next update is not trusted
    #[arg(long, value_name = "FILE")]
    pub client_crl: Vec<PathBuf>,

    /// What happens to certificates of an authority whose revocation list is missing or past its next update
    #[arg(long, value_enum, default_value = "refuse")]
    pub crl_expired: ClientCrlArg,

    /// Client that may read, by its certificate: a DNS name or IP address among the subject alternative names
    /// (NAME, dns:NAME, ip:ADDRESS), uri:URI, or sha256:FINGERPRINT of the certificate. NAME is also the common
    /// name of a certificate without alternative names. Can be repeated
    #[arg(long, value_name = "NAME")]
    pub allow: Vec<String>,

    /// File with more allowed names, one per line; it is read again when it changes
    #[arg(long, value_name = "FILE")]
    pub allow_file: Option<PathBuf>,

    /// Network that clients may connect from, as 10.0.0.0/8; can be repeated. Default: everywhere
    #[arg(long, value_name = "CIDR")]
    pub allow_from: Vec<IpNet>,

    /// Limit on the bytes per second sent to all clients together, and on those read for them from disk;
    /// k, M and G multiply by 1024
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub max_rate: Option<u64>,
}

impl Cli {
    /// Checks everything that can be checked before a port is bound.
    pub fn into_config(self) -> Result<Config, ConfigError> {
        let allow = AllowList::new(&self.allow, self.allow_file)?;
        let expired = self.crl_expired.into();
        let tls = TlsFiles {
            certificate: self.cert,
            key: self.key,
            authority: self.client_ca,
            revocation: Revocation { lists: self.client_crl, expired },
        };
        Config::new(self.pgdata, self.listen, tls, allow, self.allow_from, self.max_rate)
    }
}

/// An address or name with a port, or a port alone.
fn listen_address(text: &str) -> Result<SocketAddr, String> {
    if let Ok(port) = text.strip_prefix(':').unwrap_or(text).parse::<u16>() {
        return Ok(SocketAddr::from(([0, 0, 0, 0], port)));
    }
    let mut found = text.to_socket_addrs().map_err(|error| {
        format!("{error}: give an address or name with a port, as 10.0.0.2:7432, or a port")
    })?;
    found.next().ok_or_else(|| "the name has no address".to_owned())
}

/// See [`ExpiredList`].
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum ClientCrlArg {
    /// Refuse them
    Refuse,
    /// Accept them with a warning
    Warn,
}

impl From<ClientCrlArg> for ExpiredList {
    fn from(argument: ClientCrlArg) -> Self {
        match argument {
            ClientCrlArg::Refuse => Self::Refuse,
            ClientCrlArg::Warn => Self::Warn,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn listening_takes_addresses_names_and_ports() {
        let every = SocketAddr::from(([0, 0, 0, 0], 7432));
        assert_eq!(listen_address("7432"), Ok(every));
        assert_eq!(listen_address(":7432"), Ok(every));
        assert_eq!(listen_address("10.0.0.2:7432"), Ok(SocketAddr::from(([10, 0, 0, 2], 7432))));
        assert_eq!(listen_address("[::1]:1"), Ok("[::1]:1".parse().unwrap()));
        assert!(listen_address("localhost:7432").is_ok_and(|address| address.ip().is_loopback()));
        for bad in ["", "localhost", "10.0.0.2", "70000"] {
            assert!(listen_address(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }
}
