//! Runs the server: binds, serves, reloads, drains.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;
use proto::limits::{
    HEADER_BYTES_MAX, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, LOCAL_RESETS_MAX, PENDING_RESETS_MAX,
    REQUEST_WINDOW_BYTES, STREAMS_PER_CONNECTION_MAX,
};
use proto::service::service;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic_health::ServingStatus;

use crate::accept::Acceptor;
use crate::admission::Admission;
use crate::audit::AuditSessions;
use crate::config::Config;
use crate::connection::AcceptedConnection;
use crate::guarded::Guarded;
use crate::handler::Calls;
use crate::node_watch;
use crate::refusal_log::RefusalLog;
use crate::reload::{Reloaded, watch};
use crate::reply_stream::RateLimits;

/// How long streams may go on after the server was told to stop.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
/// Handshaken connections not yet taken over by the HTTP/2 server.
const ACCEPTED_QUEUED: usize = 16;
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
    let sessions = Arc::new(AuditSessions::default());
    let reloaded = Reloaded {
        files: config.tls_files.clone(),
        tls: Arc::new(RwLock::new(Arc::new(config.tls.clone()))),
        allow: Arc::clone(&config.allow),
        sessions: Arc::clone(&sessions),
    };
    reloaded.warn_of_expiry();
    reloaded.say_what_is_in_force();

    let (accepted, connections) = mpsc::channel(ACCEPTED_QUEUED);
    let log = Arc::new(RefusalLog::default());
    let acceptor = Acceptor {
        tls: Arc::clone(&reloaded.tls),
        admission: Admission::new(Arc::clone(&config.allow), Arc::clone(&sessions)),
        allow_from: config.allow_from.into(),
        log: Arc::clone(&log),
    };
    tokio::spawn(acceptor.run(listener, stop.clone(), accepted));
    let watcher = tokio::spawn(watch(reloaded, reload));
    let looker = tokio::spawn(node_watch::watch(config.pgdata.clone()));

    let rates = config.max_rate.map(|rate| Arc::new(RateLimits::new(rate)));
    let calls = Calls::new(config.pgdata, config.allow, config.queues, rates, sessions, log);
    let calls = Arc::new(calls);
    let serving = answer(Arc::clone(&calls), ReceiverStream::new(connections), stop.clone());
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
    looker.abort();
    Ok(())
}

/// Answers the calls of connections until `stop` is cancelled and all of them have ended.
async fn answer(
    calls: Arc<Calls>,
    connections: ReceiverStream<io::Result<AcceptedConnection>>,
    stop: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_service_status(SERVICE, ServingStatus::Serving).await;
    let draining = stop.clone();
    tokio::spawn(async move {
        draining.cancelled().await;
        health.set_service_status(SERVICE, ServingStatus::NotServing).await;
    });
    let (allow, budget) = (Arc::clone(&calls.allow), calls.budget.clone());
    let health_service = Guarded::new(health_service, Arc::clone(&allow), budget.clone());
    Server::builder()
        .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .http2_max_header_list_size(HEADER_BYTES_MAX)
        .http2_max_pending_accept_reset_streams(Some(PENDING_RESETS_MAX))
        .http2_max_local_error_reset_streams(Some(LOCAL_RESETS_MAX))
        .initial_connection_window_size(REQUEST_WINDOW_BYTES)
        .initial_stream_window_size(REQUEST_WINDOW_BYTES)
        .add_service(health_service)
        .add_service(Guarded::new(service(calls), allow, budget))
        .serve_with_incoming_shutdown(connections, stop.cancelled_owned())
        .await
}
