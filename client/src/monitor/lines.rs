//! Plain lines on standard error, for logs.

use super::{Monitor, Step};

/// See the module.
#[derive(Debug)]
pub struct Lines {
    /// Whether steps are reported, or only notes and warnings.
    pub steps: bool,
}

#[expect(clippy::print_stderr, reason = "this is the room that prints")]
impl Monitor for Lines {
    fn step(&self, step: Step) {
        if self.steps {
            eprintln!("pgrejoin: {step}");
        }
    }

    fn progress(&self, _done: u64, _total: u64) {}

    fn note(&self, message: &str) {
        eprintln!("pgrejoin: {message}");
    }

    fn warning(&self, message: &str) {
        eprintln!("pgrejoin: warning: {message}");
    }
}
