//! Reaches the source: a byte stream that is proven to lead to it, each step with its own clear error.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::limits::HANDSHAKE_TIMEOUT;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::config::SourceAddress;
use crate::error::{Class, RewindError};
use crate::outcome::utc_now;

/// How long an address may take before the next one is tried as well.
const NEXT_ADDRESS: Duration = Duration::from_millis(250);

/// A two-way stream of bytes, whatever carries it.
pub trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> ByteStream for S {}

/// The second step of a dial: proves who is at the other end.
pub type Handshake = Pin<Box<dyn Future<Output = Result<Box<dyn ByteStream>, RewindError>> + Send>>;

/// Something that answered at the source's address.
pub struct Dialled {
    /// How long the link took to answer.
    pub round_trip: Duration,
    /// Proves that it is the source.
    pub handshake: Handshake,
}

impl std::fmt::Debug for Dialled {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dialled").field("round_trip", &self.round_trip).finish_non_exhaustive()
    }
}

/// A way to reach the source.
#[tonic::async_trait]
pub trait Dial: std::fmt::Debug + Send + Sync {
    /// The first step: connects to the source's address, once.
    ///
    /// # Errors
    /// Nothing answers in time (`Class::Transient`).
    async fn reach(&self) -> Result<Dialled, RewindError>;

    /// What messages call the source's address.
    fn address(&self) -> String;
}

#[tonic::async_trait]
impl Dial for SourceAddress {
    async fn reach(&self) -> Result<Dialled, RewindError> {
        let address = self.address();
        let unreachable = |why: &str| {
            format!(
                "could not connect to the source at {address}{why}: check that pgrejoin-server runs there"
            )
        };
        let connecting = tokio::time::timeout(HANDSHAKE_TIMEOUT, async {
            let found = tokio::net::lookup_host((self.host.as_str(), self.port)).await?;
            connect_to_any(by_turns(found.collect())).await
        });
        let transient = |what: &str, error| RewindError::transient_because(what, error);
        let ReachedAddress { tcp, round_trip } = connecting
            .await
            .map_err(|_| RewindError::transient(unreachable(", it does not answer")))?
            .map_err(|error| transient(&unreachable(""), error))?;
        // Small requests must not wait for the acknowledgement of earlier ones.
        tcp.set_nodelay(true).map_err(|error| {
            transient("could not set TCP_NODELAY on the connection to the source", error)
        })?;
        drop(SockRef::from(&tcp).set_tcp_congestion(b"bbr"));
        let connector = TlsConnector::from(Arc::clone(&self.tls));
        let handshake = secure(connector.connect(self.server_name.clone(), tcp), address);
        Ok(Dialled { round_trip, handshake: Box::pin(handshake) })
    }

    fn address(&self) -> String {
        match self.host.contains(':') {
            true => format!("[{}]:{}", self.host, self.port),
            false => format!("{}:{}", self.host, self.port),
        }
    }
}

/// A connection, and how long its address took to answer.
struct ReachedAddress {
    tcp: TcpStream,
    round_trip: Duration,
}

/// Addresses of both families in turns, in the order in which they were found otherwise.
fn by_turns(addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let first = addresses.first().is_some_and(SocketAddr::is_ipv6);
    let (one, other): (Vec<_>, Vec<_>) =
        addresses.into_iter().partition(|address| address.is_ipv6() == first);
    let (mut one, mut other) = (one.into_iter(), other.into_iter());
    let mut turns = Vec::new();
    loop {
        let pair = [one.next(), other.next()];
        if pair.iter().all(Option::is_none) {
            return turns;
        }
        turns.extend(pair.into_iter().flatten());
    }
}

/// Connects to whichever address answers first. One that does not answer must not hold up the others, so the next one
/// is tried after a moment (RFC 8305).
async fn connect_to_any(addresses: Vec<SocketAddr>) -> io::Result<ReachedAddress> {
    let mut waiting = addresses.into_iter();
    let mut attempts = tokio::task::JoinSet::new();
    let mut last = io::Error::other("the host has no address");
    loop {
        if let Some(address) = waiting.next() {
            attempts.spawn(async move {
                let since = Instant::now();
                let tcp = TcpStream::connect(address).await;
                tcp.map(|tcp| ReachedAddress { tcp, round_trip: since.elapsed() })
                    .map_err(|error| io::Error::new(error.kind(), format!("{address}: {error}")))
            });
        } else if attempts.is_empty() {
            return Err(last);
        }
        tokio::select! {
            Some(attempt) = attempts.join_next() => match attempt {
                Ok(Ok(answered)) => return Ok(answered),
                Ok(Err(error)) => last = error,
                Err(error) => last = io::Error::other(error),
            },
            () = tokio::time::sleep(NEXT_ADDRESS), if waiting.len() > 0 => {}
        }
    }
}

/// Waits for a TLS handshake.
async fn secure<S: ByteStream + 'static>(
    handshake: impl Future<Output = io::Result<S>>,
    address: String,
) -> Result<Box<dyn ByteStream>, RewindError> {
    match tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await {
        Ok(Ok(tls)) => Ok(Box::new(tls)),
        Ok(Err(error)) => Err(handshake_error(&address, error)),
        Err(_) => {
            let message = format!("the source at {address} does not answer the TLS handshake");
            Err(RewindError::transient(message))
        }
    }
}

/// What a failed handshake means to the operator.
fn handshake_error(address: &str, error: io::Error) -> RewindError {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    let message = match tls {
        Some(rustls::Error::InvalidCertificate(_)) => format!(
            "source at {address}: its certificate is not acceptable (this node's clock says {})",
            utc_now()
        ),
        Some(rustls::Error::InvalidMessage(_)) => {
            format!("the source at {address} does not speak TLS: is it a pgrejoin-server?")
        }
        Some(_) => format!("the TLS handshake with the source at {address} failed"),
        None => {
            let message = format!("the connection to {address} broke in the TLS handshake");
            return RewindError::transient_because(message, error);
        }
    };
    RewindError::because(Class::Authentication, message, error)
}

#[cfg(test)]
mod tests {
    use rustls::{CertificateError, InvalidMessage};

    use super::*;

    #[test]
    fn families_take_turns() {
        let address = |text: &str| text.parse::<SocketAddr>().unwrap();
        let found = ["[::1]:1", "[::2]:1", "10.0.0.1:1"].map(address).to_vec();
        let turns = ["[::1]:1", "10.0.0.1:1", "[::2]:1"].map(address);
        assert_eq!(by_turns(found), turns);
        assert_eq!(by_turns(Vec::new()), []);
    }

    #[tokio::test]
    async fn a_dead_address_does_not_hide_a_good_one() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let good = listener.local_addr().unwrap();
        // Nothing answers at an address of the documentation (RFC 5737), and a closed port refuses.
        let silent = "192.0.2.1:9".parse().unwrap();
        let closed = "127.0.0.1:1".parse().unwrap();
        for dead in [silent, closed] {
            let answered = connect_to_any(vec![dead, good]).await.unwrap();
            assert_eq!(answered.tcp.peer_addr().unwrap(), good);
            assert!(answered.round_trip < NEXT_ADDRESS, "only the address that answered counts");
        }
        let refused = connect_to_any(vec![closed]).await.err().unwrap();
        assert!(refused.to_string().contains("127.0.0.1:1"), "{refused}");
    }

    fn class_of(error: rustls::Error) -> Class {
        let error = io::Error::new(io::ErrorKind::InvalidData, error);
        handshake_error("source.example:7432", error).class()
    }

    #[test]
    fn whom_the_source_is_not_is_a_question_of_authentication() {
        let expired = rustls::Error::InvalidCertificate(CertificateError::Expired);
        assert_eq!(class_of(expired), Class::Authentication);
        let plain = rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType);
        assert_eq!(class_of(plain), Class::Authentication);
        assert_eq!(class_of(rustls::Error::HandshakeNotComplete), Class::Authentication);
    }

    #[test]
    fn a_link_that_broke_may_be_there_again_later() {
        let broken = io::Error::from(io::ErrorKind::ConnectionReset);
        assert_eq!(handshake_error("source.example:7432", broken).class(), Class::Transient);
    }

    #[test]
    fn an_ipv6_address_stands_in_brackets() {
        let mut source = crate::test_values::config().source;
        assert_eq!(source.address(), "source.example:7432");
        source.host = "::1".to_owned();
        assert_eq!(source.address(), "[::1]:7432");
    }
}
