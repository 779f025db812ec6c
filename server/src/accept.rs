//! Accepts connections and proves who is at the other end.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use parking_lot::RwLock;
use proto::limits::{FIRST_BYTES_TIMEOUT, HANDSHAKE_TIMEOUT};
use proto::tls::{Peer, ServerTls};
use socket2::SockRef;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;

use crate::admission::Admission;
use crate::connection::AcceptedConnection;
use crate::half_open::HalfOpen;
use crate::refusal_log::{self, RefusalLog};

/// Pause after accepting a connection failed, mostly because file descriptors ran out: an immediate retry
/// would only burn processor time.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long a refused connection is drained before it is closed.
const LINGER: Duration = Duration::from_secs(1);
/// At most this many bytes are drained, see [`LINGER`].
const LINGER_BYTES: u64 = 64 << 10;

/// The TLS configuration in force; replaced as a whole on reload.
pub(crate) type CurrentTls = Arc<RwLock<Arc<ServerTls>>>;

/// What connections are accepted with.
#[derive(Clone)]
pub(crate) struct Acceptor {
    pub(crate) tls: CurrentTls,
    pub(crate) admission: Admission,
    /// Networks that connections may come from; without any, from everywhere.
    pub(crate) allow_from: Arc<[IpNet]>,
    pub(crate) log: Arc<RefusalLog>,
}

/// Why nobody is known at the other end.
#[derive(Debug, thiserror::Error)]
enum NoPeer {
    #[error("it sent nothing for {} seconds", FIRST_BYTES_TIMEOUT.as_secs())]
    Silent,
    #[error("it took longer than {} seconds", HANDSHAKE_TIMEOUT.as_secs())]
    Slow,
    #[error("it gave way to other connections that are not finished")]
    GaveWay,
    #[error("its certificate cannot be read")]
    Certificate,
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl Acceptor {
    /// Accepts connections until `stop` is cancelled, and passes on those whose handshake succeeded.
    pub(crate) async fn run(
        self,
        listener: TcpListener,
        stop: CancellationToken,
        accepted: mpsc::Sender<io::Result<AcceptedConnection>>,
    ) {
        let half_open = HalfOpen::default();
        let mut periods = tokio::time::interval(refusal_log::PERIOD);
        loop {
            let arrived = tokio::select! {
                () = stop.cancelled() => return,
                now = periods.tick() => {
                    self.log.end_period(now.into_std());
                    continue;
                }
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
            let ip = address.ip().to_canonical();
            if !self.may_come_from(ip) {
                self.log.note("refused a connection", address, &"--allow-from does not name it");
                continue;
            }
            let slot = half_open.enter(ip);
            let (acceptor, accepted) = (self.clone(), accepted.clone());
            tokio::spawn(async move {
                let greeted = tokio::select! {
                    greeted = acceptor.greet(stream, address) => greeted,
                    () = slot.give_way.cancelled() => Err(NoPeer::GaveWay),
                };
                drop(slot);
                match greeted {
                    Ok(greeted) => acceptor.pass_on(greeted, accepted).await,
                    Err(why) => acceptor.log.note("TLS handshake failed", address, &why),
                }
            });
        }
    }

    fn may_come_from(&self, address: IpAddr) -> bool {
        self.allow_from.is_empty() || self.allow_from.iter().any(|net| net.contains(&address))
    }

    /// Waits for the first bytes, then for the rest of the handshake.
    async fn greet(&self, stream: TcpStream, address: SocketAddr) -> Result<Greeted, NoPeer> {
        let first = tokio::time::timeout(FIRST_BYTES_TIMEOUT, stream.readable()).await;
        first.map_err(|_| NoPeer::Silent)??;
        let tls = Arc::clone(&self.tls.read());
        let greeted = tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake(stream, address, &tls));
        greeted.await.map_err(|_| NoPeer::Slow)?
    }

    async fn pass_on(
        &self,
        greeted: Greeted,
        accepted: mpsc::Sender<io::Result<AcceptedConnection>>,
    ) {
        let Greeted { stream, peer } = greeted;
        let address = peer.address;
        let names = peer.names().join(", ");
        match self.admission.admit(stream, peer).await {
            // Fails only when the server is shutting down.
            Ok(connection) => drop(accepted.send(Ok(connection)).await),
            Err(why) => {
                self.log.note("refused a connection", address, &format!("{why} ({names})"));
            }
        }
    }
}

/// A connection with a valid certificate.
struct Greeted {
    stream: TlsStream<TcpStream>,
    peer: Peer,
}

async fn handshake(
    stream: TcpStream,
    address: SocketAddr,
    tls: &ServerTls,
) -> Result<Greeted, NoPeer> {
    stream.set_nodelay(true)?;
    let congestion_control = choose_congestion_control(&stream);
    let acceptor = TlsAcceptor::from(Arc::clone(&tls.config));
    let stream = match acceptor.accept(stream).into_fallible().await {
        Ok(stream) => stream,
        Err((error, stream)) => {
            linger(stream).await;
            return Err(error.into());
        }
    };
    let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let mut peer = Peer::from_chain(chain, address).ok_or(NoPeer::Certificate)?;
    peer.congestion_control = congestion_control;
    Ok(Greeted { stream, peer })
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
