//! Accepts connections: limits, the TLS handshake, and the identity of the client.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use parking_lot::{Mutex, RwLock};
use proto::limits::{
    CONNECTIONS_MAX, CONNECTIONS_PER_IDENTITY_MAX, HANDSHAKE_TIMEOUT, HANDSHAKES_MAX,
    STRANGER_LIFE, STRANGERS_MAX,
};
use proto::tls::Peer;
use rustls::ServerConfig;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Sleep;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

use crate::allow::AllowList;
use crate::audit::{AuditSession, AuditSessions};

/// Pause after accepting a connection failed, mostly because file descriptors ran out: an immediate retry
/// would only burn processor time.
const ACCEPT_PAUSE: std::time::Duration = std::time::Duration::from_millis(100);

/// How long a refused connection is drained before it is closed.
const LINGER: std::time::Duration = std::time::Duration::from_secs(1);
/// At most this many bytes are drained, see [`LINGER`].
const LINGER_BYTES: u64 = 64 << 10;

/// The TLS configuration in force; replaced as a whole on reload.
pub(crate) type CurrentTls = Arc<RwLock<Arc<ServerConfig>>>;

/// A connection whose client has a certificate of the authority.
pub(crate) struct AcceptedConnection {
    stream: TlsStream<TcpStream>,
    peer: Arc<Peer>,
    /// When the connection is closed in any case; only for clients that are not on the allow list.
    deadline: Option<Pin<Box<Sleep>>>,
    _slot: OwnedSemaphorePermit,
    _identity: IdentitySlot,
    _session: Arc<AuditSession>,
    _stranger: Option<OwnedSemaphorePermit>,
}

impl Connected for AcceptedConnection {
    type ConnectInfo = Arc<Peer>;

    fn connect_info(&self) -> Arc<Peer> {
        Arc::clone(&self.peer)
    }
}

impl AsyncRead for AcceptedConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Some(deadline) = &mut self.deadline
            && deadline.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for AcceptedConnection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Connections each identity has open, by certificate fingerprint.
type Identities = Arc<Mutex<HashMap<String, usize>>>;

/// Counts a connection of an identity as long as it lives.
struct IdentitySlot {
    identities: Identities,
    fingerprint: String,
}

impl IdentitySlot {
    fn take(identities: &Identities, fingerprint: &str) -> Option<Self> {
        let mut open = identities.lock();
        let count = open.entry(fingerprint.to_owned()).or_default();
        if *count >= CONNECTIONS_PER_IDENTITY_MAX {
            return None;
        }
        *count += 1;
        Some(Self { identities: Arc::clone(identities), fingerprint: fingerprint.to_owned() })
    }
}

impl Drop for IdentitySlot {
    fn drop(&mut self) {
        let mut open = self.identities.lock();
        if let Some(count) = open.get_mut(&self.fingerprint) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.fingerprint);
            }
        }
    }
}

/// Decides which connections are accepted, and how many.
#[derive(Clone)]
pub(crate) struct Admission {
    tls: CurrentTls,
    allow: Arc<AllowList>,
    sessions: Arc<AuditSessions>,
    identities: Identities,
    strangers: Arc<Semaphore>,
}

impl Admission {
    pub(crate) fn new(
        tls: CurrentTls,
        allow: Arc<AllowList>,
        sessions: Arc<AuditSessions>,
    ) -> Self {
        let strangers = Arc::new(Semaphore::new(STRANGERS_MAX));
        Self { tls, allow, sessions, identities: Identities::default(), strangers }
    }

    /// Accepts a connection of a client whose certificate is valid.
    ///
    /// # Errors
    /// Why it is not accepted, for the log.
    fn admit(
        &self,
        stream: TlsStream<TcpStream>,
        peer: Peer,
        slot: OwnedSemaphorePermit,
    ) -> Result<AcceptedConnection, &'static str> {
        let allowed = self.allow.check(&peer).is_ok();
        let stranger = match allowed {
            true => None,
            // The connection is accepted only so that the refusal and its advice can be sent.
            false => Some(
                Arc::clone(&self.strangers)
                    .try_acquire_owned()
                    .map_err(|_| "too many clients that are not allowed")?,
            ),
        };
        let identity = IdentitySlot::take(&self.identities, &peer.fingerprint)
            .ok_or("too many connections of one client")?;
        let peer = Arc::new(peer);
        Ok(AcceptedConnection {
            stream,
            deadline: (!allowed).then(|| Box::pin(tokio::time::sleep(STRANGER_LIFE))),
            _slot: slot,
            _identity: identity,
            _session: self.sessions.open(&peer),
            _stranger: stranger,
            peer,
        })
    }
}

/// Accepts connections until `stop` is cancelled, and passes on those whose handshake succeeded.
pub(crate) async fn accept(
    listener: TcpListener,
    admission: Admission,
    stop: CancellationToken,
    accepted: mpsc::Sender<io::Result<AcceptedConnection>>,
) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    loop {
        let arrived = tokio::select! {
            () = stop.cancelled() => return,
            arrived = listener.accept() => arrived,
        };
        let (stream, address) = match arrived {
            Ok(arrived) => arrived,
            Err(error) => {
                tracing::warn!(%error, "could not accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let slot = Arc::clone(&slots).try_acquire_owned();
        let handshake = Arc::clone(&handshakes).try_acquire_owned();
        let (Ok(slot), Ok(handshake)) = (slot, handshake) else {
            tracing::warn!(%address, "too many connections: refused one");
            continue;
        };
        let config = Arc::clone(&admission.tls.read());
        let (accepted, admission) = (accepted.clone(), admission.clone());
        tokio::spawn(async move {
            let greeted =
                tokio::time::timeout(HANDSHAKE_TIMEOUT, greet(stream, address, config)).await;
            drop(handshake);
            match greeted {
                Ok(Ok((stream, peer))) => {
                    let name = peer.name().to_owned();
                    match admission.admit(stream, peer, slot) {
                        // Fails only when the server is shutting down.
                        Ok(connection) => drop(accepted.send(Ok(connection)).await),
                        Err(why) => tracing::warn!(%address, peer = name, why, "refused"),
                    }
                }
                Ok(Err(error)) => tracing::warn!(%address, %error, "TLS handshake failed"),
                Err(_) => tracing::warn!(%address, "TLS handshake took too long"),
            }
        });
    }
}

async fn greet(
    stream: TcpStream,
    address: SocketAddr,
    config: Arc<ServerConfig>,
) -> io::Result<(TlsStream<TcpStream>, Peer)> {
    stream.set_nodelay(true)?;
    let congestion_control = choose_congestion_control(&stream);
    let stream = match TlsAcceptor::from(config).accept(stream).into_fallible().await {
        Ok(stream) => stream,
        Err((error, stream)) => {
            linger(stream).await;
            return Err(error);
        }
    };
    let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let peer = certificate.and_then(|certificate| Peer::from_certificate(certificate, address));
    let mut peer = peer.ok_or_else(|| io::Error::other("client certificate cannot be read"))?;
    peer.congestion_control = congestion_control;
    Ok((stream, peer))
}

/// Closes a connection so that the alert just sent, which says why, is not lost: closing with bytes
/// unread would reset it. The client has sent its first request already.
async fn linger(mut stream: TcpStream) {
    let drained = async {
        stream.shutdown().await.ok();
        let mut unread = (&mut stream).take(LINGER_BYTES);
        tokio::io::copy(&mut unread, &mut tokio::io::sink()).await.ok();
    };
    drop(tokio::time::timeout(LINGER, drained).await);
}

/// Asks the kernel for BBR, which keeps a long link with packet loss full where other algorithms slow down.
/// Returns the congestion control that the connection has.
fn choose_congestion_control(stream: &TcpStream) -> Option<String> {
    let socket = SockRef::from(stream);
    // Not every kernel has it or permits it to us; the default works, only slower.
    drop(socket.set_tcp_congestion(b"bbr"));
    let name = socket.tcp_congestion().ok()?;
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    Some(String::from_utf8_lossy(name).into_owned())
}
