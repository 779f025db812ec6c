//! Runs the server: binds, serves, reloads, drains.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use proto::limits::{
    HEADER_BYTES_MAX, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, PENDING_RESETS_MAX,
    STREAMS_PER_CONNECTION_MAX,
};
use proto::rate::RateLimit;
use proto::service::service;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

use crate::accept::{CurrentTls, accept};
use crate::config::Config;
use crate::handler::Calls;
use crate::node::chain;

/// How long streams may go on after the server was told to stop.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
/// How often certificate and allow-list files are looked at for changes.
const WATCH_INTERVAL: Duration = Duration::from_secs(5);
/// Handshaken connections not yet taken over by the HTTP/2 server.
const ACCEPTED_QUEUED: usize = 16;
/// Days before expiry at which a certificate is complained about.
const EXPIRY_WARNING_DAYS: i64 = 30;

/// Why the server ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address cannot be listened on.
    #[error("could not listen on {address}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The HTTP/2 server failed.
    #[error("the server failed")]
    Transport(#[from] tonic::transport::Error),
}

/// Serves until `stop` is cancelled, then drains. `reload` asks for certificates and allow list to
/// be read again. `bound` learns the address, for callers that asked for port 0.
pub async fn serve(
    config: Config,
    stop: CancellationToken,
    reload: mpsc::Receiver<()>,
    bound: impl FnOnce(SocketAddr),
) -> Result<(), ServeError> {
    let address = config.listen;
    let bind = |source| ServeError::Bind { address, source };
    let listener = TcpListener::bind(address).await.map_err(bind)?;
    let local = listener.local_addr().map_err(bind)?;
    tracing::info!(address = %local, pgdata = %config.pgdata.display(), "serving");
    bound(local);
    warn_of_expiry(&config.tls_files.certificate);

    let tls: CurrentTls = Arc::new(RwLock::new(Arc::clone(&config.tls)));
    let (accepted, connections) = mpsc::channel(ACCEPTED_QUEUED);
    tokio::spawn(accept(listener, Arc::clone(&tls), stop.clone(), accepted));
    let watcher = tokio::spawn(watch(Reloaded::new(&config, tls), reload));

    let rate = config.max_rate.map(|rate| Arc::new(RateLimit::new(rate)));
    let calls = Arc::new(Calls::new(config.pgdata, config.allow, rate));
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_service_status("pgrejoin.v1.Rejoin", tonic_health::ServingStatus::Serving).await;
    let serving = Server::builder()
        .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .http2_max_header_list_size(HEADER_BYTES_MAX)
        .http2_max_pending_accept_reset_streams(Some(PENDING_RESETS_MAX))
        .add_service(health_service)
        .add_service(service(calls))
        .serve_with_incoming_shutdown(
            ReceiverStream::new(connections),
            stop.clone().cancelled_owned(),
        );
    let drained = async {
        stop.cancelled().await;
        tokio::time::sleep(DRAIN_TIMEOUT).await;
    };
    tokio::select! {
        result = serving => {
            tracing::info!("drained, stopping");
            result?;
        }
        () = drained => {
            let seconds = DRAIN_TIMEOUT.as_secs();
            tracing::warn!(seconds, "streams were still running: stopping without them");
        }
    }
    watcher.abort();
    Ok(())
}

/// What is read again while the server runs.
struct Reloaded {
    files: proto::tls::TlsFiles,
    tls: CurrentTls,
    allow: Arc<crate::allow::AllowList>,
}

impl Reloaded {
    fn new(config: &Config, tls: CurrentTls) -> Self {
        Self { files: config.tls_files.clone(), tls, allow: Arc::clone(&config.allow) }
    }

    /// Reads everything again; what cannot be read stays as it was.
    fn reload(&self) {
        match proto::tls::server_config(&self.files) {
            Ok(config) => {
                *self.tls.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
                tracing::info!("certificates reloaded");
                warn_of_expiry(&self.files.certificate);
            }
            Err(error) => {
                tracing::error!(error = %chain(&error), "certificates not reloaded, the old ones stay");
            }
        }
        match self.allow.reload() {
            Ok(()) => tracing::info!("allow list reloaded"),
            Err(error) => {
                tracing::error!(error = %chain(&error), "allow list not reloaded, the old one stays");
            }
        }
    }

    fn stamps(&self) -> Vec<Option<SystemTime>> {
        let files = [&self.files.certificate, &self.files.key, &self.files.authority];
        let all: Vec<&PathBuf> = files.into_iter().chain(self.allow.file()).collect();
        all.iter().map(|path| path.metadata().and_then(|m| m.modified()).ok()).collect()
    }
}

/// Reloads when asked and when a file changes.
async fn watch(reloaded: Reloaded, mut asked: mpsc::Receiver<()>) {
    let mut stamps = reloaded.stamps();
    loop {
        let demanded = tokio::select! {
            demand = asked.recv() => demand.is_some(),
            () = tokio::time::sleep(WATCH_INTERVAL) => false,
        };
        let now = reloaded.stamps();
        if demanded || now != stamps {
            stamps = now;
            reloaded.reload();
        }
        if asked.is_closed() && !demanded {
            tokio::time::sleep(WATCH_INTERVAL).await;
        }
    }
}

fn warn_of_expiry(certificate: &Path) {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    if let Ok(days) = proto::tls::days_until_expiry(certificate, now)
        && days < EXPIRY_WARNING_DAYS
    {
        tracing::warn!(days, certificate = %certificate.display(), "certificate expires soon");
    }
}
