//! A configuration that is valid by construction.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use ipnet::IpNet;
use proto::tls::{ServerTls, TlsError, TlsFiles};

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
    pub(crate) tls: ServerTls,
    pub(crate) allow: Arc<AllowList>,
    pub(crate) allow_from: Vec<IpNet>,
    pub(crate) max_rate: Option<u64>,
    pub(crate) queues: Queues,
}

/// Bounds of the queues of each stream.
#[derive(Debug, Clone, Copy)]
pub struct Queues {
    /// Frames made but not sent: enough to overlap reading with the network, and with
    /// `CONNECTIONS_MAX` streams still little memory.
    pub frames: usize,
    /// Messages with units received but not worked on. A message has at most
    /// `REQUEST_MESSAGE_BYTES_MAX`.
    pub units: usize,
}

impl Default for Queues {
    fn default() -> Self {
        Self { frames: 4, units: 2 }
    }
}

impl Config {
    pub(crate) fn new(
        pgdata: PathBuf,
        listen: SocketAddr,
        tls_files: TlsFiles,
        allow: AllowList,
        allow_from: Vec<IpNet>,
        max_rate: Option<u64>,
    ) -> Result<Self, ConfigError> {
        let (tls, allow) = (proto::tls::server_config(&tls_files)?, Arc::new(allow));
        let queues = Queues::default();
        Ok(Self { pgdata, listen, tls_files, tls, allow, allow_from, max_rate, queues })
    }

    /// The same configuration with other bounds of the queues.
    #[must_use]
    pub fn with_queues(self, queues: Queues) -> Self {
        Self { queues, ..self }
    }
}
