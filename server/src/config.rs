//! A configuration that is valid by construction.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use proto::tls::{TlsError, TlsFiles};

use crate::allow::{AllowError, AllowList};

/// Why the server does not start.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Nobody would be allowed in.
    #[error(transparent)]
    Allow(#[from] AllowError),
    /// The TLS identity cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// What to serve, to whom, how fast.
#[derive(Debug)]
pub struct Config {
    pub(crate) pgdata: PathBuf,
    pub(crate) listen: SocketAddr,
    pub(crate) tls_files: TlsFiles,
    pub(crate) tls: Arc<rustls::ServerConfig>,
    pub(crate) allow: Arc<AllowList>,
    pub(crate) max_rate: Option<u64>,
}

impl Config {
    pub(crate) fn new(
        pgdata: PathBuf,
        listen: SocketAddr,
        tls_files: TlsFiles,
        allow: AllowList,
        max_rate: Option<u64>,
    ) -> Result<Self, ConfigError> {
        let tls = Arc::new(proto::tls::server_config(&tls_files)?);
        Ok(Self { pgdata, listen, tls_files, tls, allow: Arc::new(allow), max_rate })
    }
}
