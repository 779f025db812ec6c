//! The command line.

use std::path::PathBuf;

use clap::Parser;
use proto::rate::parse_rate;
use proto::tls::TlsFiles;

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

    /// Address and port to listen on
    #[arg(long, value_name = "ADDR:PORT", default_value = "0.0.0.0:7432")]
    pub listen: std::net::SocketAddr,

    /// This server's certificate, PEM
    #[arg(long, value_name = "FILE")]
    pub cert: PathBuf,

    /// This server's private key, PEM; nobody else may be able to read it
    #[arg(long, value_name = "FILE")]
    pub key: PathBuf,

    /// Certificate authority that signed the clients' certificates, PEM
    #[arg(long, value_name = "FILE")]
    pub client_ca: PathBuf,

    /// Client that may read: a subject alternative name of its certificate (the common name if it has none)
    /// or sha256:FINGERPRINT; can be repeated
    #[arg(long, value_name = "NAME")]
    pub allow: Vec<String>,

    /// File with more allowed names, one per line; it is read again when it changes
    #[arg(long, value_name = "FILE")]
    pub allow_file: Option<PathBuf>,

    /// Limit on the bytes per second sent to all clients together, and on those read for them from disk;
    /// k, M and G multiply by 1024
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub max_rate: Option<u64>,
}

impl Cli {
    /// Checks everything that can be checked before a port is bound.
    pub fn into_config(self) -> Result<Config, ConfigError> {
        let allow = AllowList::new(self.allow, self.allow_file)?;
        let tls = TlsFiles { certificate: self.cert, key: self.key, authority: self.client_ca };
        Config::new(self.pgdata, self.listen, tls, allow, self.max_rate)
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }
}
