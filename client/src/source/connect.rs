//! Opens one connection: TCP, TLS, HTTP/2, each with its own clear error.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use proto::client::Client;
use proto::limits::{HANDSHAKE_TIMEOUT, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT};
use proto::model::Description;
use proto::status::CallError;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::Endpoint;

use crate::config::SourceAddress;
use crate::error::{Class, RewindError};

/// What HTTP/2 calls the source. The connection is made already and its certificate checked against
/// the real name, which need not even have the form of a URI (IPv6).
const AUTHORITY: &str = "http://source";

/// A connection and why it broke, once it has.
#[derive(Debug, Clone)]
pub struct Connection {
    /// The calls.
    pub client: Client,
    /// How long the link took to answer when the connection was made.
    pub round_trip: Duration,
    broke: Arc<Mutex<Option<String>>>,
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
        let broke = self.broke.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match (&error, broke) {
            (CallError::Broken(_), Some(why)) if why.contains("alert") => Err(RewindError::new(
                Class::Authentication,
                format!(
                    "the source did not accept this node's certificate: {why} (this node's \
                         clock says {})",
                    clock()
                ),
            )),
            (CallError::Broken(_), Some(why)) => {
                let message = format!("the source closed the connection: {why}");
                Err(RewindError::because(Class::Transient, message, error))
            }
            (_, _) => Err(error.into()),
        }
    }
}

/// A source that answered, and how long that took.
#[derive(Debug)]
pub struct Reached {
    tcp: TcpStream,
    /// How long the link took to answer.
    pub round_trip: Duration,
}

fn address_of(source: &SourceAddress) -> String {
    match source.host.contains(':') {
        true => format!("[{}]:{}", source.host, source.port),
        false => format!("{}:{}", source.host, source.port),
    }
}

fn transient(
    what: String,
    error: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> RewindError {
    RewindError::because(Class::Transient, what, error)
}

/// Opens a connection that may have so many bytes on their way.
pub async fn connect(
    source: &SourceAddress,
    window: u32,
    patience: Duration,
) -> Result<Connection, RewindError> {
    reach(source).await?.secure(source, window, patience).await
}

/// The first step: TCP.
pub async fn reach(source: &SourceAddress) -> Result<Reached, RewindError> {
    let unreachable = format!("could not connect to the source at {}", address_of(source));
    let target = (source.host.as_str(), source.port);
    let since = Instant::now();
    let tcp = tokio::time::timeout(HANDSHAKE_TIMEOUT, TcpStream::connect(target)).await;
    let round_trip = since.elapsed();
    let tcp = tcp
        .map_err(|_| RewindError::new(Class::Transient, format!("{unreachable}: no answer")))?
        .map_err(|error| transient(unreachable, error))?;
    // Small requests must not wait for the acknowledgement of earlier ones.
    tcp.set_nodelay(true).map_err(|error| transient("TCP socket".to_owned(), error))?;
    drop(SockRef::from(&tcp).set_tcp_congestion(b"bbr"));
    Ok(Reached { tcp, round_trip })
}

impl Reached {
    /// The others: TLS and HTTP/2.
    pub async fn secure(
        self,
        source: &SourceAddress,
        window: u32,
        patience: Duration,
    ) -> Result<Connection, RewindError> {
        let Self { tcp, round_trip } = self;
        let address = address_of(source);
        let connector = TlsConnector::from(Arc::clone(&source.tls));
        let handshake = connector.connect(source.server_name.clone(), tcp);
        let tls = match tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await {
            Ok(Ok(tls)) => tls,
            Ok(Err(error)) => return Err(handshake_error(&address, error)),
            Err(_) => {
                let message = format!("the source at {address} does not answer the TLS handshake");
                return Err(RewindError::new(Class::Transient, message));
            }
        };
        let broke = Arc::new(Mutex::new(None));
        let mut stream = Some(Watched { tls, broke: Arc::clone(&broke) });
        let channel = Endpoint::from_static(AUTHORITY)
            .initial_stream_window_size(window)
            .initial_connection_window_size(window)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .connect_with_connector(tower::service_fn(move |_| {
                // One stream, one connection: whoever lost it opens another and decides what is asked
                // again.
                let stream = stream.take().map(TokioIo::new);
                std::future::ready(stream.ok_or_else(|| io::Error::other("connection was lost")))
            }))
            .await
            .map_err(|error| transient(format!("no HTTP/2 with the source at {address}"), error))?;
        Ok(Connection { client: Client::new(channel, patience), round_trip, broke })
    }
}

/// What a failed handshake means to the operator.
fn handshake_error(address: &str, error: io::Error) -> RewindError {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    let (class, advice) = match tls {
        Some(rustls::Error::InvalidCertificate(_)) => (
            Class::Authentication,
            format!("its certificate is not acceptable (this node's clock says {})", clock()),
        ),
        Some(rustls::Error::InvalidMessage(_)) => {
            (Class::Authentication, "it does not speak TLS".to_owned())
        }
        Some(_) => (Class::Authentication, "TLS handshake failed".to_owned()),
        None => (Class::Transient, "the connection broke in the TLS handshake".to_owned()),
    };
    RewindError::because(class, format!("source at {address}: {advice}"), error)
}

/// The wall clock, for comparing with a certificate's dates.
fn clock() -> String {
    crate::outcome::utc_now()
}

/// A TLS stream that remembers why it broke: HTTP/2 reports only that it did.
struct Watched {
    tls: TlsStream<TcpStream>,
    broke: Arc<Mutex<Option<String>>>,
}

impl Watched {
    fn note(&self, error: &io::Error) {
        let mut broke = self.broke.lock().unwrap_or_else(PoisonError::into_inner);
        broke.get_or_insert_with(|| error.to_string());
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.tls).poll_read(cx, buffer);
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
        let polled = Pin::new(&mut self.tls).poll_write(cx, bytes);
        if let Poll::Ready(Err(_)) = &polled {
            // The peer has closed. Its last word, a TLS alert, waits to be read and says why.
            let mut last_word = [0; 256];
            drop(self.as_mut().poll_read(cx, &mut ReadBuf::new(&mut last_word)));
        }
        polled
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_shutdown(cx)
    }
}
