//! How long each step of a run took.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::monitor::{Monitor, Step};

/// Times the steps and reports them.
pub(crate) struct Steps {
    monitor: Arc<dyn Monitor>,
    times: Vec<(Step, Duration)>,
    current: Option<(Step, Instant)>,
}

impl Steps {
    pub(crate) fn new(monitor: Arc<dyn Monitor>) -> Self {
        Self { monitor, times: Vec::new(), current: None }
    }

    pub(crate) fn begin(&mut self, step: Step) {
        self.end();
        self.monitor.step(step);
        self.current = Some((step, Instant::now()));
    }

    pub(crate) fn end(&mut self) -> Vec<(Step, Duration)> {
        if let Some((step, since)) = self.current.take() {
            self.times.push((step, since.elapsed()));
        }
        self.times.clone()
    }
}
