//! The replies of one stream: packed into frames and sent at the allowed rate.

use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::fetch::Item;
use proto::frame::{Codec, Frame, FrameEncoder};
use proto::limits::STREAM_IDLE_TIMEOUT;
use proto::rate::RateLimit;
use proto::{Reason, Refusal};
use tokio::sync::mpsc::Sender;

use crate::audit::AuditSession;
use crate::compression::{Level, Packing, Sent};

/// A frame that is not full is sent after this time, which is far below the client's time-out.
const FRAME_AGE_MAX: Duration = Duration::from_secs(1);

/// `--max-rate`: what may be sent to all clients together, and read for them.
#[derive(Debug)]
pub(crate) struct RateLimits {
    wire: RateLimit,
    disk: RateLimit,
}

impl RateLimits {
    /// The same limit for both.
    pub(crate) fn new(bytes_per_second: u64) -> Self {
        Self { wire: RateLimit::new(bytes_per_second), disk: RateLimit::new(bytes_per_second) }
    }
}

/// See the module. Lives on a blocking thread.
pub(crate) struct ReplyStream {
    encoder: FrameEncoder,
    frames: Sender<Result<Frame, Refusal>>,
    rates: Option<Arc<RateLimits>>,
    session: Arc<AuditSession>,
    level: Level,
    /// When the client took the last frame.
    last_frame: Instant,
    /// Time since then in which nothing more might be read.
    held_back: Duration,
    /// While answers are only measured: their bytes so far, and the encoder that numbers the frames that are
    /// really sent.
    measured: Option<(u64, FrameEncoder)>,
}

impl ReplyStream {
    pub(crate) fn new(
        frames: Sender<Result<Frame, Refusal>>,
        rates: Option<Arc<RateLimits>>,
        session: Arc<AuditSession>,
    ) -> Self {
        let encoder = FrameEncoder::new();
        let (level, last_frame, held_back) = (Level::new(), Instant::now(), Duration::ZERO);
        let measured = None;
        Self { encoder, frames, rates, session, level, last_frame, held_back, measured }
    }

    /// From here on, counts the bytes of replies instead of sending them.
    pub(crate) fn measure(&mut self) {
        let sending = std::mem::replace(&mut self.encoder, FrameEncoder::new());
        self.measured = Some((0, sending));
    }

    /// Ends the measurement; the bytes counted since it began.
    pub(crate) fn measured(&mut self) -> Result<u64, Refusal> {
        self.flush()?;
        let Some((bytes, sending)) = self.measured.take() else {
            return Ok(0);
        };
        self.encoder = sending;
        Ok(bytes)
    }

    /// Whether `--max-rate` is set.
    pub(crate) fn is_limited(&self) -> bool {
        self.rates.is_some()
    }

    /// Counts bytes that were read, and waits as long as `--max-rate` demands.
    pub(crate) fn read(&mut self, kind: &'static str, bytes: u64) {
        let kind = if self.measured.is_some() { "measured" } else { kind };
        self.session.served(kind, bytes);
        if let Some(rates) = &self.rates {
            let since = Instant::now();
            rates.disk.wait(usize::try_from(bytes).unwrap_or(usize::MAX));
            self.held_back += since.elapsed();
        }
    }

    pub(crate) fn send(&mut self, item: Item) -> Result<(), Refusal> {
        match self.encoder.push(item) {
            Some(frame) => self.send_frame(frame),
            // Hashing reads much and sends little: the client must see that it goes on.
            None if self.last_frame.elapsed() > FRAME_AGE_MAX => self.flush(),
            None => Ok(()),
        }
    }

    pub(crate) fn flush(&mut self) -> Result<(), Refusal> {
        match self.encoder.flush() {
            Some(frame) => self.send_frame(frame),
            None => Ok(()),
        }
    }

    fn send_frame(&mut self, frame: Frame) -> Result<(), Refusal> {
        let gone = || Refusal::new(Reason::InvalidRequest, "the client has disconnected");
        // A client that has disconnected must not use up the rate of other clients.
        if self.frames.is_closed() {
            return Err(gone());
        }
        if let Some((measured, _)) = &mut self.measured {
            *measured += frame.payload.len() as u64;
            return Ok(());
        }
        let made = Instant::now();
        let held_back = std::mem::take(&mut self.held_back);
        let busy = made.duration_since(self.last_frame).saturating_sub(held_back);
        let (bytes, shrank) = (frame.payload.len(), frame.codec != Codec::Plain);
        if let Some(rates) = &self.rates {
            rates.wire.wait(bytes);
        }
        self.session.sent(bytes);
        let sending = tokio::time::timeout(STREAM_IDLE_TIMEOUT, self.frames.send(Ok(frame)));
        match tokio::runtime::Handle::current().block_on(sending) {
            Ok(sent) => sent.map_err(|_| gone())?,
            Err(_) => {
                let why = "the client has stopped reading replies";
                return Err(Refusal::new(Reason::InvalidRequest, why));
            }
        }
        self.last_frame = Instant::now();
        let (packed, also) = self.encoder.sizes();
        self.level.note(Sent { busy, waited: made.elapsed() + held_back, packed, also, shrank });
        let Packing { level, also } = self.level.packing();
        self.encoder.pack(level, also);
        Ok(())
    }
}
