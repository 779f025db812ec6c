//! The compression level of a stream, decided by what the stream waits for.
//!
//! A stream that waits for the link has time to spare: a better level is tried on the same frames, and kept
//! if they become smaller. A stream that never waits is limited by the processor: it takes a faster level,
//! which leaves time to other streams. Frames that do not shrink are sent uncompressed.

use std::time::Duration;

use proto::limits::ZSTD_LEVEL;

/// Levels of zstd, from fast to good. Better ones do not pay on database pages.
const LEVELS: [i32; 4] = [-5, ZSTD_LEVEL, 3, 6];
/// Index of the level with which a stream begins.
const FIRST: usize = 1;
/// Frames over which it is judged what a stream waits for: 8 MiB.
const FRAMES_JUDGED: u32 = 16;
/// A stream that waits for less than this share of its time is limited by the processor, if this is found
/// [`JUDGED_IN_A_ROW`] times in a row.
const WAITS_LITTLE: f64 = 0.05;
/// See [`WAITS_LITTLE`]. Once is not enough: the first megabytes fill the buffers of any link.
const JUDGED_IN_A_ROW: u32 = 3;
/// A stream that waits for more than this share of its time is limited by the link.
const WAITS_LONG: f64 = 0.5;
/// Frames on which a better level is tried.
const FRAMES_TRIED: u32 = 4;
/// A better level must make frames smaller by so much.
const GAIN_MIN: f64 = 0.03;
/// Judgements for which a level that gained nothing is not tried again.
const REST: u32 = 16;
/// After this many frames in a row that did not shrink, [`PLAIN_SENT`] frames are sent without trying to
/// compress them.
const PLAIN_SEEN: u32 = 4;
/// See [`PLAIN_SEEN`].
const PLAIN_SENT: u32 = 32;

/// How the next frame is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Packing {
    /// Level of zstd; `None` is not at all.
    pub(crate) level: Option<i32>,
    /// Another level to be tried on the same frame.
    pub(crate) also: Option<i32>,
}

/// What became of a frame.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sent {
    /// Time it took to make.
    pub(crate) busy: Duration,
    /// Time until the client took it, and time spent waiting for `--max-rate`.
    pub(crate) waited: Duration,
    /// Bytes at the level in use, and at the other if that was tried.
    pub(crate) packed: usize,
    /// See `packed`.
    pub(crate) also: Option<usize>,
    /// Whether it shrank.
    pub(crate) shrank: bool,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Level {
    index: usize,
    frames: u32,
    busy: Duration,
    waited: Duration,
    /// The next better level, while it is tried.
    trying: Option<Trial>,
    rest: u32,
    /// Judgements in a row that found it waiting little.
    unhindered: u32,
    did_not_shrink: u32,
    send_plain: u32,
}

/// What became of frames that were packed at two levels.
#[derive(Debug, Clone, Copy)]
struct Trial {
    /// Frames that are still to be tried.
    frames: u32,
    /// Bytes of the frames tried so far, at the level in use.
    in_use: usize,
    /// Bytes of these frames at the next better level.
    better: usize,
}

impl Level {
    pub(crate) fn new() -> Self {
        Self {
            index: FIRST,
            frames: 0,
            busy: Duration::ZERO,
            waited: Duration::ZERO,
            trying: None,
            rest: 0,
            unhindered: 0,
            did_not_shrink: 0,
            send_plain: 0,
        }
    }

    /// How to pack the next frame.
    pub(crate) fn packing(&self) -> Packing {
        let level = LEVELS.get(self.index).copied().filter(|_| self.send_plain == 0);
        let also = self.trying.and_then(|_| LEVELS.get(self.index + 1).copied());
        let also = also.filter(|_| level.is_some());
        Packing { level, also }
    }

    /// Takes the result of a frame into account.
    pub(crate) fn note(&mut self, sent: Sent) {
        if self.send_plain > 0 {
            self.send_plain -= 1;
            return;
        }
        self.did_not_shrink = if sent.shrank { 0 } else { self.did_not_shrink + 1 };
        if self.did_not_shrink >= PLAIN_SEEN {
            (self.did_not_shrink, self.send_plain) = (0, PLAIN_SENT);
        }
        if let Some(trying) = self.trying
            && let Some(also) = sent.also
        {
            self.tried(trying, sent.packed, also);
        }
        self.busy += sent.busy;
        self.waited += sent.waited;
        self.frames += 1;
        if self.frames >= FRAMES_JUDGED {
            self.judge();
        }
    }

    /// Notes the bytes of a frame at the level in use and at the one that is tried.
    fn tried(&mut self, trial: Trial, in_use: usize, better: usize) {
        let frames = trial.frames - 1;
        let (in_use, better) = (trial.in_use + in_use, trial.better + better);
        self.trying = (frames > 0).then_some(Trial { frames, in_use, better });
        if frames > 0 {
            return;
        }
        match (better as f64) < in_use as f64 * (1.0 - GAIN_MIN) {
            true => self.index += 1,
            false => self.rest = REST,
        }
    }

    fn judge(&mut self) {
        let (busy, waited) = (std::mem::take(&mut self.busy), std::mem::take(&mut self.waited));
        self.frames = 0;
        self.rest = self.rest.saturating_sub(1);
        let share = waited.as_secs_f64() / (busy + waited).as_secs_f64().max(f64::EPSILON);
        self.unhindered = if share < WAITS_LITTLE { self.unhindered + 1 } else { 0 };
        if self.unhindered >= JUDGED_IN_A_ROW {
            self.unhindered = 0;
            self.index = self.index.saturating_sub(1);
            self.trying = None;
        } else if share > WAITS_LITTLE && self.index < FIRST {
            // The link is busy after all.
            self.index = FIRST;
        } else if share > WAITS_LONG && self.index + 1 < LEVELS.len() && self.rest == 0 {
            self.trying.get_or_insert(Trial { frames: FRAMES_TRIED, in_use: 0, better: 0 });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(level: &mut Level, count: u32, waited: u64, size: impl Fn(i32) -> usize) {
        for _ in 0..count {
            let packing = level.packing();
            level.note(Sent {
                busy: Duration::from_millis(10),
                waited: Duration::from_millis(waited),
                packed: packing.level.map_or(1000, &size),
                also: packing.also.map(&size),
                shrank: packing.level.is_some_and(|level| size(level) < 1000),
            });
        }
    }

    #[test]
    fn a_stream_that_waits_compresses_better_where_that_helps() {
        let mut level = Level::new();
        frames(&mut level, 200, 90, |level| usize::try_from(500 - level * 30).unwrap());
        assert_eq!(level.packing().level, Some(6));
        // Rows that become no smaller.
        let mut level = Level::new();
        frames(&mut level, 200, 90, |_| 500);
        assert_eq!(level.packing().level, Some(ZSTD_LEVEL));
    }

    #[test]
    fn a_stream_that_never_waits_leaves_the_processor_to_others() {
        let mut level = Level::new();
        frames(&mut level, FRAMES_JUDGED, 0, |_| 500);
        assert_eq!(level.packing().level, Some(ZSTD_LEVEL));
        frames(&mut level, 2 * FRAMES_JUDGED, 0, |_| 500);
        assert_eq!(level.packing().level, Some(-5));
        // It begins to wait for the link.
        frames(&mut level, FRAMES_JUDGED, 90, |_| 500);
        assert_eq!(level.packing().level, Some(ZSTD_LEVEL));
    }

    #[test]
    fn what_does_not_shrink_is_not_tried_for_a_while() {
        let mut level = Level::new();
        frames(&mut level, PLAIN_SEEN, 10, |_| 1000);
        assert_eq!(level.packing(), Packing { level: None, also: None });
        frames(&mut level, PLAIN_SENT, 10, |_| 1000);
        assert_eq!(level.packing().level, Some(ZSTD_LEVEL));
    }
}
