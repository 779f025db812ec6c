//! How long each step of a run took.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};

use crate::monitor::{Monitor, Step};

/// Times the steps and reports each as it begins.
#[derive(Debug, Clone)]
pub struct Steps {
    monitor: Arc<dyn Monitor>,
    timing: Arc<Mutex<Timing>>,
}

#[derive(Debug, Default)]
struct Timing {
    times: Vec<(Step, Duration)>,
    current: Option<(Step, Instant)>,
}

impl Timing {
    fn end(&mut self) {
        if let Some((step, since)) = self.current.take() {
            self.times.push((step, since.elapsed()));
        }
    }
}

impl Steps {
    /// Steps of which none has begun.
    pub fn new(monitor: Arc<dyn Monitor>) -> Self {
        Self { monitor, timing: Arc::default() }
    }

    fn timing(&self) -> MutexGuard<'_, Timing> {
        self.timing.lock()
    }

    /// Ends the step under way and begins another.
    pub fn begin(&self, step: Step) {
        let mut timing = self.timing();
        timing.end();
        timing.current = Some((step, Instant::now()));
        self.monitor.step(step);
    }

    /// Ends the current step, and returns how long each step took.
    pub fn end(&self) -> Vec<(Step, Duration)> {
        let mut timing = self.timing();
        timing.end();
        timing.times.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_values::RecordingMonitor;

    #[test]
    fn each_step_ends_where_the_next_begins() {
        let recorded = Arc::new(RecordingMonitor::default());
        let steps = Steps::new(Arc::clone(&recorded) as _);
        steps.begin(Step::Inspect);
        steps.clone().begin(Step::Fetch);
        let times: Vec<Step> = steps.end().into_iter().map(|(step, _)| step).collect();
        assert_eq!(times, [Step::Inspect, Step::Fetch]);
        assert_eq!(recorded.all(), ["inspect", "fetch"]);
        assert_eq!(steps.end().len(), 2, "nothing is under way");
    }
}
