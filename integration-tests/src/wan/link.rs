//! One direction of an emulated long link: what leaves one TUN device arrives at the other later.
//!
//! A queue of a bounded number of bytes drains at the link's rate; what does not fit is dropped, as a
//! router does it. Each packet may be lost at random before it is queued, and arrives half a round
//! trip after it has left the queue. The kernel hands over and takes long TCP segments; they are cut
//! to packets of the device's MTU first, so that each is queued and lost on its own.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tun_rs::{GROTable, IDEAL_BATCH_SIZE, SyncDevice, VIRTIO_NET_HDR_LEN};

/// A queue shorter than this would drop one long segment of the kernel's.
const QUEUE_BYTES_MIN: u64 = 128 << 10;

/// What a link is like.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shape {
    /// Round trip.
    pub rtt: Duration,
    /// Bits a second, each way.
    pub rate: u64,
    /// Share of packets lost at random, each way.
    pub loss: f64,
    /// The kernel's congestion control on both ends, whatever programs ask for.
    pub congestion_control: &'static str,
}

impl Shape {
    /// Bytes that wait at most: one bandwidth-delay product.
    pub fn queue_bytes(&self) -> u64 {
        let microseconds = u64::try_from(self.rtt.as_micros()).unwrap_or(u64::MAX);
        (self.rate / 8 * microseconds / 1_000_000).max(QUEUE_BYTES_MIN)
    }

    /// How long the link takes to send so many bytes.
    pub fn time_of(&self, bytes: f64) -> Duration {
        Duration::from_secs_f64(bytes * 8.0 / self.rate as f64)
    }
}

/// How often a link with nothing to do looks whether it is to end.
const IDLE: Duration = Duration::from_millis(50);
/// Packets delivered at once.
const BURST: usize = 64;
/// Longest packet: MTU and room for a header.
const PACKET_BYTES_MAX: usize = 2048;

/// What a direction has carried.
#[derive(Debug, Default)]
pub struct Counters {
    /// Bytes of packets that entered the link, TCP/IP headers included.
    pub bytes: AtomicU64,
    /// Bytes of packets lost at random, or that the queue had no room for.
    pub lost_bytes: AtomicU64,
}

/// A packet on its way, behind room for the device's header.
struct Packet {
    arrives: Instant,
    content: Vec<u8>,
}

/// See the module.
pub(super) struct Direction {
    from: Arc<SyncDevice>,
    to: Arc<SyncDevice>,
    shape: Shape,
    /// Whether the shape counts no longer.
    lifted: Arc<AtomicBool>,
    counters: Arc<Counters>,
    /// When everything queued will have left.
    free_at: Instant,
    on_the_way: VecDeque<Packet>,
    random: u64,
}

impl Direction {
    pub(super) fn new(
        (from, to): (Arc<SyncDevice>, Arc<SyncDevice>),
        (shape, lifted): (Shape, Arc<AtomicBool>),
        counters: Arc<Counters>,
        seed: u64,
    ) -> Self {
        let (free_at, on_the_way) = (Instant::now(), VecDeque::new());
        Self { from, to, shape, lifted, counters, free_at, on_the_way, random: seed | 1 }
    }

    /// Carries packets until told to stop.
    pub(super) fn carry(mut self, stop: &AtomicBool) -> io::Result<()> {
        let mut whole = vec![0; VIRTIO_NET_HDR_LEN + 65_535];
        let mut parts = vec![vec![0; PACKET_BYTES_MAX]; IDEAL_BATCH_SIZE];
        let mut sizes = vec![0; IDEAL_BATCH_SIZE];
        let mut table = GROTable::new();
        while !stop.load(Ordering::Relaxed) {
            if self.wait()? {
                match self.from.recv_multiple(&mut whole, &mut parts, &mut sizes, 0) {
                    Ok(count) => {
                        let packets = parts.iter().zip(&sizes).take(count);
                        packets.for_each(|(part, size)| self.take(&part[..*size]));
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error),
                }
            }
            self.deliver(&mut table);
        }
        Ok(())
    }

    /// Waits for a packet or until one is due; whether there is one to take.
    fn wait(&self) -> io::Result<bool> {
        let due = self.on_the_way.front().map(|packet| packet.arrives);
        let wait = due.map_or(IDLE, |due| due.saturating_duration_since(Instant::now()).min(IDLE));
        let timeout = Timespec { tv_sec: 0, tv_nsec: i64::from(wait.subsec_nanos()) };
        let mut readable = [PollFd::new(&*self.from, PollFlags::IN)];
        match poll(&mut readable, Some(&timeout)) {
            Ok(ready) => Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// A packet enters the link.
    fn take(&mut self, packet: &[u8]) {
        let bytes = packet.len() as u64;
        self.counters.bytes.fetch_add(bytes, Ordering::Relaxed);
        let lifted = self.lifted.load(Ordering::Relaxed);
        if self.chance() < self.shape.loss && !lifted {
            self.counters.lost_bytes.fetch_add(bytes, Ordering::Relaxed);
            return;
        }
        let now = Instant::now();
        let waits = self.free_at.saturating_duration_since(now);
        if waits > self.shape.time_of(self.shape.queue_bytes() as f64) && !lifted {
            self.counters.lost_bytes.fetch_add(bytes, Ordering::Relaxed);
            return;
        }
        let delay = if lifted { Duration::ZERO } else { self.shape.rtt / 2 };
        self.free_at = match lifted {
            true => now,
            false => now + waits + self.shape.time_of(bytes as f64),
        };
        let mut content = Vec::with_capacity(VIRTIO_NET_HDR_LEN + packet.len());
        content.resize(VIRTIO_NET_HDR_LEN, 0);
        content.extend_from_slice(packet);
        self.on_the_way.push_back(Packet { arrives: self.free_at + delay, content });
    }

    /// Hands over what is due.
    fn deliver(&mut self, table: &mut GROTable) {
        let now = Instant::now();
        let due = self.on_the_way.iter().take(BURST).take_while(|packet| packet.arrives <= now);
        let count = due.count();
        if count == 0 {
            return;
        }
        let mut burst: Vec<_> = self.on_the_way.drain(..count).map(|p| p.content).collect();
        // A device that takes nothing any more loses packets, as a network card would.
        drop(self.to.send_multiple(table, &mut burst, VIRTIO_NET_HDR_LEN));
    }

    /// A number from 0 up to 1 (xorshift64*).
    fn chance(&mut self) -> f64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        let bits = self.random.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11;
        bits as f64 / (1_u64 << 53) as f64
    }
}
