//! A progress bar on a terminal.

use indicatif::{ProgressBar, ProgressStyle};

use crate::monitor::lines::Lines;
use crate::monitor::{Monitor, Step};
use crate::plan::summary::PlannedChange;

/// See the module.
#[derive(Debug)]
pub struct Terminal {
    bar: ProgressBar,
}

impl Terminal {
    /// A bar on standard error.
    pub fn new() -> Self {
        let bar = ProgressBar::no_length();
        let template = "{msg:9} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        Self { bar }
    }
}

impl Default for Terminal {
    fn default() -> Self {
        Self::new()
    }
}

impl Monitor for Terminal {
    fn step(&self, step: Step) {
        self.bar.set_message(step.to_string());
        self.bar.tick();
    }

    fn progress(&self, done: u64, total: u64) {
        self.bar.set_length(total);
        self.bar.set_position(done);
    }

    fn planned(&self, change: &PlannedChange<'_>) {
        self.bar.suspend(|| Lines::new(true).planned(change));
    }

    fn note(&self, message: &str) {
        self.bar.suspend(|| Lines::default().note(message));
    }

    fn warning(&self, message: &str) {
        self.bar.suspend(|| Lines::default().warning(message));
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
