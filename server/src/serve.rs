//! Runs the server: binds, serves, reloads, drains.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::RwLock;
use proto::limits::{
    HEADER_BYTES_MAX, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, LOCAL_RESETS_MAX, PENDING_RESETS_MAX,
    STREAMS_PER_CONNECTION_MAX,
};
use proto::service::service;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic_health::ServingStatus;

use crate::accept::{Admission, CurrentTls, accept};
use crate::audit::AuditSessions;
use crate::config::Config;
use crate::handler::Calls;
use crate::node::chain;
use crate::reply_stream::RateLimits;

/// How long streams may go on after the server was told to stop.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
/// How often certificate and allow-list files are looked at for changes.
const WATCH_INTERVAL: Duration = Duration::from_secs(5);
/// Handshaken connections not yet taken over by the HTTP/2 server.
const ACCEPTED_QUEUED: usize = 16;
/// How often a warning is logged about certificates that will soon expire.
const EXPIRY_INTERVAL: Duration = Duration::from_secs(86_400);
/// Name of this service for gRPC health checks.
const SERVICE: &str = "pgrejoin.v1.Rejoin";

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
    #[error("the HTTP/2 server failed")]
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
    let reloaded = Reloaded::new(&config, Arc::new(RwLock::new(Arc::clone(&config.tls))));
    reloaded.warn_of_expiry();

    let tls = Arc::clone(&reloaded.tls);
    let (accepted, connections) = mpsc::channel(ACCEPTED_QUEUED);
    let sessions = Arc::new(AuditSessions::default());
    let admission = Admission::new(tls, Arc::clone(&config.allow), Arc::clone(&sessions));
    tokio::spawn(accept(listener, admission, stop.clone(), accepted));
    let watcher = tokio::spawn(watch(reloaded, reload));

    let rates = config.max_rate.map(|rate| Arc::new(RateLimits::new(rate)));
    let calls = Arc::new(Calls::new(config.pgdata, config.allow, config.queues, rates, sessions));
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_service_status(SERVICE, ServingStatus::Serving).await;
    let draining = stop.clone();
    tokio::spawn(async move {
        draining.cancelled().await;
        health.set_service_status(SERVICE, ServingStatus::NotServing).await;
    });
    let serving = Server::builder()
        .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .http2_max_header_list_size(HEADER_BYTES_MAX)
        .http2_max_pending_accept_reset_streams(Some(PENDING_RESETS_MAX))
        .http2_max_local_error_reset_streams(Some(LOCAL_RESETS_MAX))
        .add_service(health_service)
        .add_service(service(Arc::clone(&calls)))
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
            calls.wind_down().await;
            tracing::info!("drained, stopping");
            result?;
        }
        () = drained => {
            let seconds = DRAIN_TIMEOUT.as_secs();
            tracing::warn!(seconds, "transfers are still running: stopping without them");
            calls.wind_down().await;
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
                *self.tls.write() = Arc::new(config);
                tracing::info!("certificates reloaded");
                self.warn_of_expiry();
            }
            Err(error) => {
                tracing::error!(error = %chain(&error), "could not reload the certificates, the \
                                                         old ones stay in use");
            }
        }
        match self.allow.reload() {
            Ok(()) => tracing::info!("allow list reloaded"),
            Err(error) => {
                tracing::error!(error = %chain(&error), "could not reload the allow list, the old \
                                                         one stays in use");
            }
        }
    }

    /// Warns in time that a certificate, the server's own or the authority's, will expire.
    fn warn_of_expiry(&self) {
        for file in [&self.files.certificate, &self.files.authority] {
            if let Some(warning) = proto::tls::expiry_warning(file) {
                tracing::warn!("{warning}");
            }
        }
    }

    fn stamps(&self) -> Vec<Option<SystemTime>> {
        let files = [&self.files.certificate, &self.files.key, &self.files.authority];
        let all: Vec<&PathBuf> = files.into_iter().chain(self.allow.file()).collect();
        all.iter().map(|path| path.metadata().and_then(|m| m.modified()).ok()).collect()
    }
}

/// Reloads when asked, and when a file has changed and is the same at two checks in a row: a file that is
/// still being written must not remove anybody's right to read.
async fn watch(reloaded: Reloaded, mut asked: mpsc::Receiver<()>) {
    let mut in_force = reloaded.stamps();
    let mut seen = in_force.clone();
    let mut warned = Instant::now();
    loop {
        let demanded = tokio::select! {
            Some(()) = asked.recv() => true,
            () = tokio::time::sleep(WATCH_INTERVAL) => false,
        };
        let now = reloaded.stamps();
        let settled = now != in_force && now == seen;
        seen.clone_from(&now);
        if demanded || settled {
            in_force = now;
            reloaded.reload();
        }
        if warned.elapsed() > EXPIRY_INTERVAL {
            warned = Instant::now();
            reloaded.warn_of_expiry();
        }
    }
}
