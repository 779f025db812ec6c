//! What is read again while the server runs: certificates, revocation lists and the allow list.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use proto::limits::CONNECTION_IDLE_TIMEOUT;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::accept::CurrentTls;
use crate::allow::AllowList;
use crate::audit::AuditSessions;
use crate::node::chain;

/// How often certificate and allow-list files are looked at for changes.
const WATCH_INTERVAL: Duration = Duration::from_secs(5);
/// How often a warning is logged about certificates that will soon expire.
const EXPIRY_INTERVAL: Duration = Duration::from_secs(86_400);

/// What is read again while the server runs.
pub(crate) struct Reloaded {
    pub(crate) files: proto::tls::TlsFiles,
    pub(crate) tls: CurrentTls,
    pub(crate) allow: Arc<AllowList>,
    pub(crate) sessions: Arc<AuditSessions>,
}

impl Reloaded {
    /// Reads everything again, and closes connections that would not be accepted any more. Certificates that
    /// cannot be read stay as they were; nobody stays allowed who is not on the list any more.
    fn reload(&self) {
        match proto::tls::server_config(&self.files) {
            Ok(config) => {
                *self.tls.write() = Arc::new(config);
                tracing::info!("certificates reloaded");
            }
            Err(error) => {
                tracing::error!(error = %chain(&error), "could not reload the certificates, the \
                                                         old ones stay in use");
            }
        }
        for fault in self.allow.reload() {
            tracing::error!(error = %chain(&fault), "the allow list has a fault");
        }
        self.warn_of_expiry();
        self.say_what_is_in_force();
        self.close_what_is_not_valid();
    }

    pub(crate) fn say_what_is_in_force(&self) {
        tracing::info!(
            certificate = %self.files.certificate.display(),
            authority = %self.files.authority.display(),
            revocation_lists = self.files.revocation.lists.len(),
            allowed = %self.allow.names().join(", "),
            "in force"
        );
    }

    /// Closes connections whose certificate is not valid any more, and those of clients that are not allowed any
    /// more.
    fn close_what_is_not_valid(&self) {
        let tls = Arc::clone(&self.tls.read());
        for session in self.sessions.all() {
            let peer = session.peer();
            let why = if let Err(error) = tls.verify_again(peer) {
                Some(format!("its certificate is not valid any more: {error}"))
            } else if let Err(refusal) = self.allow.check(peer) {
                Some(refusal.to_string())
            } else {
                None
            };
            if let Some(why) = why {
                tracing::warn!(target: "audit", address = %peer.address, why, "closing a connection");
                session.close().cancel();
            }
        }
    }

    /// Closes connections that have had no call for long.
    fn close_what_is_idle(&self) {
        for session in self.sessions.all() {
            if session.idle_for().is_some_and(|time| time >= CONNECTION_IDLE_TIMEOUT) {
                session.close().cancel();
            }
        }
    }

    /// Warns in time that a certificate, the server's own or the authority's, will expire, or that a revocation
    /// list must be updated.
    pub(crate) fn warn_of_expiry(&self) {
        for warning in proto::tls::expiry_warnings(&self.files) {
            tracing::warn!("{warning}");
        }
    }

    fn stamps(&self) -> Vec<Option<SystemTime>> {
        let all = self.files.all().chain(self.allow.file());
        all.map(|path| path.metadata().and_then(|m| m.modified()).ok()).collect()
    }
}

/// Reloads when asked, and when a file has changed and is the same at two checks in a row: a file that is
/// still being written must not remove anybody's right to read.
pub(crate) async fn watch(reloaded: Reloaded, mut asked: mpsc::Receiver<()>) {
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
        reloaded.close_what_is_idle();
        if warned.elapsed() > EXPIRY_INTERVAL {
            warned = Instant::now();
            reloaded.warn_of_expiry();
        }
    }
}
