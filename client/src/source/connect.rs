//! Opens one connection: reaches the source, then HTTP/2; remembers why it broke.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use proto::client::Client;
use proto::limits::{KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT};
use proto::model::Description;
use proto::refusal::CallError;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::Endpoint;

use crate::error::{Class, RewindError};
use crate::outcome::utc_now;
use crate::source::dial::{ByteStream, Dial, Dialled};

/// What HTTP/2 calls the source. The connection is made already and its certificate checked against
/// the real name, which need not even have the form of a URI (IPv6).
const AUTHORITY: &str = "http://source";

/// Why a connection broke.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Broke {
    /// The peer refused it with a TLS alert.
    Refused(String),
    /// Anything else.
    Lost(String),
}

impl Broke {
    fn of(error: &io::Error) -> Self {
        let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        match tls {
            Some(rustls::Error::AlertReceived(_)) => Self::Refused(error.to_string()),
            Some(_) | None => Self::Lost(error.to_string()),
        }
    }
}

/// A connection and why it broke, once it has.
#[derive(Debug, Clone)]
pub struct Connection {
    /// The calls.
    pub client: Client,
    /// How long the link took to answer when the connection was made.
    pub round_trip: Duration,
    broke: Arc<Mutex<Option<Broke>>>,
}

impl Connection {
    /// The first call; tells a refused certificate apart from a dead link.
    ///
    /// With TLS 1.3 a server refuses a client's certificate only after the client believes the
    /// handshake done, so the refusal arrives as an error of this call.
    pub async fn describe(&mut self, limit: Duration) -> Result<Description, RewindError> {
        let error = match self.client.describe(limit).await {
            Ok(description) => return Ok(description),
            Err(error) => error,
        };
        let broke = self.broke.lock().clone();
        match (&error, broke) {
            (CallError::Broken(_), Some(Broke::Refused(why))) => {
                let message = format!(
                    "the source did not accept this node's certificate: {why} (this node's \
                     clock says {})",
                    utc_now()
                );
                Err(RewindError::new(Class::Authentication, message))
            }
            (CallError::Broken(_), Some(Broke::Lost(why))) => {
                let message = format!("the source closed the connection: {why}");
                Err(RewindError::transient_because(message, error))
            }
            (_, _) => Err(error.into()),
        }
    }
}

/// Opens a connection with a receive window of `window` bytes.
pub async fn connect(
    source: &dyn Dial,
    window: u32,
    patience: Duration,
) -> Result<Connection, RewindError> {
    secure(source.reach().await?, &source.address(), window, patience).await
}

/// The steps after the source was reached: the handshake and HTTP/2.
pub async fn secure(
    reached: Dialled,
    address: &str,
    window: u32,
    patience: Duration,
) -> Result<Connection, RewindError> {
    let Dialled { round_trip, handshake } = reached;
    let stream = handshake.await?;
    let broke = Arc::new(Mutex::new(None));
    let mut stream = Some(Watched { stream, broke: Arc::clone(&broke) });
    let channel = Endpoint::from_static(AUTHORITY)
        .initial_stream_window_size(window)
        .initial_connection_window_size(window)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .connect_with_connector(tower::service_fn(move |_| {
            // There is one stream only. If it is lost, the caller opens another connection and decides what
            // is asked again.
            let stream = stream.take().map(TokioIo::new);
            std::future::ready(stream.ok_or_else(|| io::Error::other("connection was lost")))
        }))
        .await
        .map_err(|error| {
            let message = format!("could not open an HTTP/2 connection to the source at {address}");
            RewindError::transient_because(message, error)
        })?;
    Ok(Connection { client: Client::new(channel, patience), round_trip, broke })
}

/// A stream that remembers why it broke: HTTP/2 reports only that it did.
struct Watched {
    stream: Box<dyn ByteStream>,
    broke: Arc<Mutex<Option<Broke>>>,
}

impl Watched {
    fn note(&self, error: &io::Error) {
        let mut broke = self.broke.lock();
        broke.get_or_insert_with(|| Broke::of(error));
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_read(cx, buffer);
        if let Poll::Ready(Err(error)) = &polled {
            self.note(error);
        }
        polled
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(cx, bytes);
        if let Poll::Ready(Err(_)) = &polled {
            // The peer has closed the connection. A TLS alert that says why may still wait to be read.
            let mut last_word = [0; 256];
            drop(self.as_mut().poll_read(cx, &mut ReadBuf::new(&mut last_word)));
        }
        polled
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use rustls::AlertDescription;

    use super::*;

    #[test]
    fn an_alert_is_told_from_a_broken_link() {
        let alert = rustls::Error::AlertReceived(AlertDescription::UnknownCA);
        let refused = io::Error::new(io::ErrorKind::InvalidData, alert);
        assert!(matches!(Broke::of(&refused), Broke::Refused(_)));
        let lost = io::Error::new(io::ErrorKind::ConnectionReset, "alert: the cable was pulled");
        assert!(matches!(Broke::of(&lost), Broke::Lost(_)));
    }
}
