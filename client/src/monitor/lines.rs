//! Plain lines on standard error, for logs.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::monitor::{Monitor, Step, print_err};
use crate::plan::summary::PlannedChange;

/// Shortest time between two progress lines: a log is read by people.
const INTERVAL: Duration = Duration::from_secs(5);

/// See the module.
#[derive(Debug, Default)]
pub struct Lines {
    progress: bool,
    last: Mutex<Option<Instant>>,
}

impl Lines {
    /// Lines for notes and warnings and, where `progress` is wanted, for steps too.
    pub fn new(progress: bool) -> Self {
        Self { progress, last: Mutex::default() }
    }

    /// Whether a progress line is due.
    fn is_due(&self) -> bool {
        let mut last = self.last.lock();
        let due = last.is_none_or(|last| last.elapsed() >= INTERVAL);
        if due {
            *last = Some(Instant::now());
        }
        due
    }
}

impl Monitor for Lines {
    fn step(&self, step: Step) {
        if self.progress {
            print_err(&format!("pgrejoin: {step}"));
        }
    }

    fn progress(&self, done: u64, total: u64) {
        if self.progress && (done == total || self.is_due()) {
            let percent = done.saturating_mul(100).checked_div(total).unwrap_or(100);
            print_err(&format!("pgrejoin: {done} of {total} bytes ({percent}%)"));
        }
    }

    fn planned(&self, change: &PlannedChange<'_>) {
        if self.progress {
            let (action, path, bytes) = (change.action, change.path, change.bytes);
            print_err(&format!("pgrejoin: would {action} {path}, {bytes} bytes to fetch"));
        }
    }

    fn note(&self, message: &str) {
        print_err(&format!("pgrejoin: {message}"));
    }

    fn warning(&self, message: &str) {
        print_err(&format!("pgrejoin: warning: {message}"));
    }
}
