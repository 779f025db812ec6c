//! One JSON object a line on standard output, for programs.

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde_json::json;

use crate::monitor::{Monitor, Step, print_out};
use crate::plan::summary::PlannedChange;

/// Shortest time between two progress lines.
const INTERVAL: Duration = Duration::from_secs(1);

/// See the module.
#[derive(Debug, Default)]
pub struct Json {
    last: Mutex<Option<Instant>>,
}

impl Monitor for Json {
    fn step(&self, step: Step) {
        print_out(&json!({"event": "step", "step": step.to_string()}).to_string());
    }

    fn progress(&self, done: u64, total: u64) {
        let mut last = self.last.lock();
        if last.is_some_and(|last| last.elapsed() < INTERVAL) && done < total {
            return;
        }
        *last = Some(Instant::now());
        drop(last);
        print_out(
            &json!({"event": "progress", "done_bytes": done, "total_bytes": total}).to_string(),
        );
    }

    fn planned(&self, change: &PlannedChange<'_>) {
        let blocks: Vec<_> = change.blocks.iter().map(|r| [r.first, r.count]).collect();
        let line = json!({
            "event": "planned",
            "path": change.path.as_str(),
            "action": change.action,
            "blocks": blocks,
            "bytes": change.bytes,
        });
        print_out(&line.to_string());
    }

    fn note(&self, message: &str) {
        print_out(&json!({"event": "note", "message": message}).to_string());
    }

    fn warning(&self, message: &str) {
        print_out(&json!({"event": "warning", "message": message}).to_string());
    }
}
