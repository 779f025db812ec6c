//! One JSON object a line on standard output, for programs.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde_json::json;

use super::{Monitor, Step};
use crate::plan::report::Change;

/// Progress lines come no closer together.
const INTERVAL: Duration = Duration::from_secs(1);

/// See the module.
#[derive(Debug, Default)]
pub struct Json {
    last: Mutex<Option<Instant>>,
}

#[expect(clippy::print_stdout, reason = "this is the room that prints")]
impl Monitor for Json {
    fn step(&self, step: Step) {
        println!("{}", json!({"event": "step", "step": step.to_string()}));
    }

    fn progress(&self, done: u64, total: u64) {
        if let Ok(mut last) = self.last.lock() {
            if last.is_some_and(|last| last.elapsed() < INTERVAL) && done < total {
                return;
            }
            *last = Some(Instant::now());
        }
        println!("{}", json!({"event": "progress", "done_bytes": done, "total_bytes": total}));
    }

    fn planned(&self, change: &Change<'_>) {
        let blocks: Vec<_> = change.blocks.iter().map(|r| [r.first, r.count]).collect();
        let line = json!({
            "event": "planned",
            "path": change.path.as_str(),
            "action": change.action,
            "blocks": blocks,
            "bytes": change.bytes,
        });
        println!("{line}");
    }

    fn note(&self, message: &str) {
        println!("{}", json!({"event": "note", "message": message}));
    }

    fn warning(&self, message: &str) {
        println!("{}", json!({"event": "warning", "message": message}));
    }
}
