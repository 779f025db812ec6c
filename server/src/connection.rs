//! A connection that was accepted: it ends with its client's certificate, or when the server closes it.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use proto::tls::Peer;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Sleep;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::WaitForCancellationFutureOwned;
use tonic::transport::server::Connected;

use crate::audit::AuditSession;
use crate::identities::IdentitySlot;

/// See the module.
pub(crate) struct AcceptedConnection {
    pub(crate) stream: TlsStream<TcpStream>,
    pub(crate) peer: Arc<Peer>,
    pub(crate) ends: Ends,
    pub(crate) _places: Places,
    pub(crate) _session: Arc<AuditSession>,
}

/// What a connection takes of what the server has.
pub(crate) struct Places {
    pub(crate) _of_all: OwnedSemaphorePermit,
    pub(crate) _of_identity: IdentitySlot,
    pub(crate) _of_strangers: Option<OwnedSemaphorePermit>,
}

/// When a connection is closed, whatever its client does.
pub(crate) struct Ends {
    /// When the certificate expires; soon, if the client is not on the allow list.
    pub(crate) deadline: Pin<Box<Sleep>>,
    /// When the server wants to.
    pub(crate) closed: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl Ends {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        if self.deadline.as_mut().poll(cx).is_ready() {
            return Poll::Ready(io::ErrorKind::TimedOut.into());
        }
        self.closed.as_mut().poll(cx).map(|()| io::ErrorKind::ConnectionAborted.into())
    }
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
        if let Poll::Ready(end) = self.ends.poll(cx) {
            return Poll::Ready(Err(end));
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
