//! The replies of one stream: packed into frames and sent at the allowed rate.

use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::fetch::{Item, ItemBody};
use proto::frame::{Codec, Frame, FrameEncoder};
use proto::limits::{STREAM_IDLE_TIMEOUT, WAITING_INTERVAL};
use proto::rate::SharedRate;
use proto::{Reason, Refusal};
use tokio::sync::mpsc::Sender;

use crate::audit::AuditSession;
use crate::compression::{Level, Packing, Sent};

/// A frame that is not full is sent after this time, which is far below the client's time-out.
const FRAME_AGE_MAX: Duration = Duration::from_secs(1);

/// Bytes for which the rate is asked at once: small enough that all clients get their turn.
const CHARGE_BYTES: u64 = 256 << 10;

/// `--max-rate`: what may be sent to all clients together, and read for them.
#[derive(Debug)]
pub(crate) struct RateLimits {
    pub(crate) wire: SharedRate,
    pub(crate) disk: SharedRate,
}

impl RateLimits {
    /// The same limit for both.
    pub(crate) fn new(bytes_per_second: u64) -> Self {
        Self { wire: SharedRate::new(bytes_per_second), disk: SharedRate::new(bytes_per_second) }
    }
}

/// The rates, and whose part of them is used: the fingerprint of the client's certificate.
#[derive(Debug, Clone)]
struct ClientRates {
    limits: Arc<RateLimits>,
    client: String,
}

/// See the module. Lives on a blocking thread.
pub(crate) struct ReplyStream {
    encoder: FrameEncoder,
    frames: Sender<Result<Frame, Refusal>>,
    rates: Option<ClientRates>,
    session: Arc<AuditSession>,
    /// The unit that is being answered.
    unit: u64,
    level: Level,
    /// When the client took the last frame.
    last_frame: Instant,
    /// Time since then in which nothing more might be read.
    held_back: Duration,
    /// Frames that were sent.
    sequence: u64,
    /// While answers are only measured: their bytes so far.
    measured: Option<u64>,
}

impl ReplyStream {
    pub(crate) fn new(
        frames: Sender<Result<Frame, Refusal>>,
        rates: Option<Arc<RateLimits>>,
        session: Arc<AuditSession>,
        client: &str,
    ) -> Self {
        Self {
            encoder: FrameEncoder::new(),
            frames,
            rates: rates.map(|limits| ClientRates { limits, client: client.to_owned() }),
            session,
            unit: 0,
            level: Level::new(),
            last_frame: Instant::now(),
            held_back: Duration::ZERO,
            sequence: 0,
            measured: None,
        }
    }

    /// From here on this unit is answered. The units of a measurement are parts of one that the client knows.
    pub(crate) fn begin(&mut self, unit: u64) {
        if self.measured.is_none() {
            self.unit = unit;
        }
    }

    /// From here on, counts the bytes of replies instead of sending them.
    pub(crate) fn measure(&mut self) {
        self.measured = Some(0);
    }

    /// Ends the measurement; the bytes counted since it began.
    pub(crate) fn measured(&mut self) -> Result<u64, Refusal> {
        self.flush()?;
        Ok(self.measured.take().unwrap_or(0))
    }

    /// Whether `--max-rate` is set.
    pub(crate) fn is_limited(&self) -> bool {
        self.rates.is_some()
    }

    /// Counts bytes that were read, and waits as long as `--max-rate` demands.
    pub(crate) fn read(&mut self, kind: &'static str, bytes: u64) {
        let kind = if self.measured.is_some() { "measured" } else { kind };
        self.session.served(kind, bytes);
        let Some(ClientRates { limits, client }) = self.rates.clone() else { return };
        let since = Instant::now();
        let mut left = bytes;
        while left > 0 {
            let charge = left.min(CHARGE_BYTES);
            left -= charge;
            self.pause(limits.disk.reserve(&client, charge));
        }
        self.held_back += since.elapsed();
    }

    /// Waits, and tells the client from time to time that it is not forgotten.
    fn pause(&mut self, mut time: Duration) {
        while !time.is_zero() && !self.frames.is_closed() {
            let part = time.min(WAITING_INTERVAL);
            std::thread::sleep(part);
            time -= part;
            if self.last_frame.elapsed() >= WAITING_INTERVAL {
                self.sign_of_life();
            }
        }
    }

    /// Says that the answer goes on later, unless the client has not even taken what was sent before.
    fn sign_of_life(&mut self) {
        let sequence = self.sequence;
        let Ok(place) = self.frames.try_reserve() else { return };
        let mut encoder = FrameEncoder::new();
        drop(encoder.push(Item { unit: self.unit, body: ItemBody::Waiting }));
        if let Some(frame) = encoder.flush() {
            place.send(Ok(Frame { sequence, ..frame }));
            self.sequence += 1;
            self.last_frame = Instant::now();
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
        if let Some(measured) = &mut self.measured {
            *measured += frame.payload.len() as u64;
            return Ok(());
        }
        let made = Instant::now();
        let held_back = std::mem::take(&mut self.held_back);
        let busy = made.duration_since(self.last_frame).saturating_sub(held_back);
        let (bytes, shrank) = (frame.payload.len(), frame.codec != Codec::Plain);
        if let Some(ClientRates { limits, client }) = self.rates.clone() {
            self.pause(limits.wire.reserve(&client, bytes as u64));
        }
        self.session.sent(bytes);
        let frame = Frame { sequence: self.sequence, ..frame };
        self.sequence += 1;
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
