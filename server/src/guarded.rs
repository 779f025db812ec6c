//! Looks at a request before a byte of it is kept: whether its client is on the allow list, how long its messages
//! are, how long they take, and how much memory they need.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes};
use proto::limits::{EMPTY_REQUEST_BYTES_MAX, REQUEST_MESSAGE_BYTES_MAX, REQUEST_TIMEOUT};
use proto::tls::Peer;
use proto::{Reason, Refusal};
use tokio::time::{Instant, Sleep};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service, http};
use tonic::server::NamedService;

use crate::allow::AllowList;
use crate::request_budget::{HeldBytes, RequestBudget};

/// The call whose client sends messages as long as it likes.
const STREAMING_CALL: &str = "/Fetch";
/// Bytes before each message of gRPC: whether it is compressed, and its length.
const PREFIX_BYTES: usize = 5;

/// See the module.
#[derive(Debug, Clone)]
pub(crate) struct Guarded<S> {
    service: S,
    allow: Arc<AllowList>,
    budget: RequestBudget,
}

impl<S> Guarded<S> {
    pub(crate) fn new(service: S, allow: Arc<AllowList>, budget: RequestBudget) -> Self {
        Self { service, allow, budget }
    }

    /// The request with its bounds.
    fn bounded(&self, request: http::Request<Body>) -> Result<http::Request<Body>, Refusal> {
        let no_peer = || Refusal::new(Reason::NotAllowed, "the client sent no certificate");
        let peer = request.extensions().get::<Arc<Peer>>().ok_or_else(no_peer)?;
        self.allow.check(peer)?;
        let held = self.budget.of(&peer.fingerprint);
        let bounds = match request.uri().path().ends_with(STREAMING_CALL) {
            true => Bounds { message_bytes: REQUEST_MESSAGE_BYTES_MAX, is_stream: true },
            false => Bounds { message_bytes: EMPTY_REQUEST_BYTES_MAX, is_stream: false },
        };
        Ok(request.map(|body| Body::new(BoundedBody::new(body, bounds, held))))
    }
}

impl<S: NamedService> NamedService for Guarded<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<http::Request<Body>> for Guarded<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>>,
    S::Error: Send + 'static,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = BoxFuture<S::Response, S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.service.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        match self.bounded(request) {
            Ok(request) => Box::pin(self.service.call(request)),
            Err(refusal) => {
                let refused = Status::from(refusal).into_http();
                Box::pin(std::future::ready(Ok(refused)))
            }
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Bounds {
    /// Bytes of a message.
    message_bytes: usize,
    /// Whether many messages may come, with any time between them.
    is_stream: bool,
}

/// A request body whose messages are bounded in length, time and memory.
struct BoundedBody {
    body: Body,
    bounds: Bounds,
    held: HeldBytes,
    message: Message,
    deadline: Pin<Box<Sleep>>,
}

/// Where in a message the body is.
#[derive(Debug, Default)]
struct Message {
    prefix: Vec<u8>,
    /// Bytes of its content that have not come.
    left: usize,
}

impl Message {
    /// Whether a message has begun and is not whole.
    fn is_open(&self) -> bool {
        self.left > 0 || !self.prefix.is_empty()
    }

    /// Takes bytes that have come. Whether another message ended in them.
    fn advance(&mut self, mut bytes: Bytes, most: usize) -> Result<bool, Refusal> {
        let mut ended = false;
        while bytes.has_remaining() {
            if self.left > 0 {
                let taken = self.left.min(bytes.remaining());
                bytes.advance(taken);
                self.left -= taken;
                ended |= self.left == 0;
                continue;
            }
            let missing = (PREFIX_BYTES - self.prefix.len()).min(bytes.remaining());
            self.prefix.extend_from_slice(&bytes.split_to(missing));
            if let [_, a, b, c, d] = *self.prefix {
                let length = [a, b, c, d];
                self.left = u32::from_be_bytes(length) as usize;
                self.prefix.clear();
                ended |= self.left == 0;
                if self.left > most {
                    let why = format!("a request of {} bytes is longer than {most}", self.left);
                    return Err(Refusal::new(Reason::InvalidRequest, why));
                }
            }
        }
        Ok(ended)
    }
}

impl BoundedBody {
    fn new(body: Body, bounds: Bounds, held: HeldBytes) -> Self {
        let deadline = Box::pin(tokio::time::sleep(REQUEST_TIMEOUT));
        Self { body, bounds, held, message: Message::default(), deadline }
    }

    fn take(&mut self, data: &Bytes) -> Result<(), Refusal> {
        let was_open = self.message.is_open();
        self.held.add(data.len())?;
        let ended = self.message.advance(data.clone(), self.bounds.message_bytes)?;
        if ended {
            // Whoever decodes it counts it from here on; what has come of the next one is at most a window.
            self.held.release();
        }
        if !was_open || ended {
            self.deadline.as_mut().reset(Instant::now() + REQUEST_TIMEOUT);
        }
        Ok(())
    }
}

impl tonic::codegen::Body for BoundedBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, Status>>> {
        let waits = !self.bounds.is_stream || self.message.is_open();
        if waits && self.deadline.as_mut().poll(cx).is_ready() {
            let why =
                format!("a request was not whole after {} seconds", REQUEST_TIMEOUT.as_secs());
            let refusal = Refusal::new(Reason::InvalidRequest, why);
            return Poll::Ready(Some(Err(refusal.into())));
        }
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        Poll::Ready(match frame {
            Some(Ok(frame)) => {
                let taken = frame.data_ref().map_or(Ok(()), |data| self.take(data));
                Some(taken.map(|()| frame).map_err(Status::from))
            }
            other => other,
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(length: u32, sent: usize) -> Bytes {
        let mut bytes = vec![0];
        bytes.extend(length.to_be_bytes());
        bytes.extend(vec![7; sent]);
        bytes.into()
    }

    #[test]
    fn messages_are_followed_however_they_are_cut() {
        let whole: Vec<u8> = [message(3, 3), message(0, 0), message(9, 9)].concat();
        for size in 1..=whole.len() {
            let mut state = Message::default();
            let ended = whole
                .chunks(size)
                .filter(|chunk| state.advance(Bytes::copy_from_slice(chunk), 9).unwrap())
                .count();
            assert!(!state.is_open() && ended > 0, "in pieces of {size}");
        }
        let mut open = Message::default();
        assert!(!open.advance(message(4, 3), 9).unwrap() && open.is_open());
    }

    #[test]
    fn a_message_that_is_too_long_is_refused_before_it_comes() {
        let refused = Message::default().advance(message(10, 0), 9).unwrap_err();
        assert_eq!(refused.reason, Reason::InvalidRequest);
    }

    #[tokio::test]
    async fn what_a_client_begins_is_held_until_it_is_whole() {
        let budget = RequestBudget::default();
        let bounds = Bounds { message_bytes: REQUEST_MESSAGE_BYTES_MAX, is_stream: true };
        let mut body = BoundedBody::new(Body::empty(), bounds, budget.of("one"));
        body.take(&message(1000, 600)).unwrap();
        assert!(format!("{budget:?}").contains("605"), "{budget:?}");
        body.take(&Bytes::from(vec![7; 400])).unwrap();
        assert!(format!("{budget:?}").contains("all: 0"), "{budget:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_never_becomes_whole_is_refused() {
        let pending = http_body_util::StreamBody::new(tokio_stream::pending::<
            Result<http_body::Frame<Bytes>, Status>,
        >());
        let bounds = Bounds { message_bytes: EMPTY_REQUEST_BYTES_MAX, is_stream: false };
        let held = RequestBudget::default().of("one");
        let mut body = BoundedBody::new(Body::new(pending), bounds, held);
        let frame =
            std::future::poll_fn(|cx| tonic::codegen::Body::poll_frame(Pin::new(&mut body), cx));
        assert!(matches!(frame.await, Some(Err(_))));
    }
}
