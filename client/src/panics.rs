//! A panic is a bug of ours. It ends the run as an error does: one line, a documented exit code, and nothing that waits
//! for a thread that is gone.

use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind, set_hook, take_hook};
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use proto::text::of_peer;

use crate::commands::status::by_marks;
use crate::error::{Class, RewindError};
use crate::task::Stop;

/// Does `work` on a target. Its tasks end early when `stop` is cancelled.
///
/// # Errors
/// Those of `work`. If a thread panics the run is stopped as by a signal, and the panic is the error.
pub fn guarded<T>(
    stop: &Stop,
    target: &Path,
    work: impl FnOnce() -> Result<T, RewindError>,
) -> Result<T, RewindError> {
    let first: Arc<Mutex<Option<String>>> = Arc::default();
    let (seen, stopped, before) = (Arc::clone(&first), stop.clone(), take_hook());
    set_hook(Box::new(move |info| {
        seen.lock().get_or_insert_with(|| describe(info));
        stopped.signals.receive();
        stopped.cancelled.cancel();
    }));
    let done = catch_unwind(AssertUnwindSafe(work));
    set_hook(before);
    let panicked = first.lock().take();
    match (done, panicked) {
        // What was rewound is rewound, whatever ended beside it.
        (Ok(Ok(done)), _) => Ok(done),
        (Ok(Err(error)), None) => Err(error),
        (Ok(Err(error)), Some(text)) => {
            by_marks(target, Err(internal(&text).leaving(error.target())))
        }
        (Err(_), text) => by_marks(target, Err(internal(&text.unwrap_or_default()))),
    }
}

fn internal(text: &str) -> RewindError {
    let message = format!("internal error: {text}: this is a bug, please report it");
    RewindError::new(Class::Other, message)
}

/// What and where, in one line.
fn describe(info: &PanicHookInfo<'_>) -> String {
    let said = info.payload_as_str().unwrap_or("a thread failed");
    let place = info.location().map_or_else(String::new, |place| format!(" at {place}"));
    format!("{}{place}", of_peer(said))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::TargetState;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Runtime::new().unwrap()
    }

    /// The hook is the process's, so this is one test.
    #[test]
    fn a_panic_anywhere_ends_the_run_with_one_line() {
        let home = tempfile::tempdir().unwrap();
        let target = home.path();
        let here = guarded::<()>(&Stop::default(), target, || panic!("one\ntwo")).unwrap_err();
        assert_eq!(here.class(), Class::Other);
        let said = here.to_string();
        assert!(said.contains(r"internal error: one\ntwo at client/src/panics.rs"), "{said}");

        let stop = Stop::default();
        let elsewhere = guarded::<()>(&stop, target, || {
            runtime().block_on(async {
                tokio::spawn(async { panic!("in a task that nobody waits for") });
                stop.unless(std::future::pending()).await
            })
        });
        let elsewhere = elsewhere.unwrap_err();
        assert_eq!(elsewhere.class(), Class::Other, "not as if an operator had stopped it");
        assert!(elsewhere.to_string().contains("nobody waits for"), "{elsewhere}");

        let stop = Stop::default();
        let changed = guarded::<()>(&stop, target, || {
            drop(std::thread::spawn(|| panic!("while the target is changed")).join());
            Err(RewindError::new(Class::Other, "x").leaving(TargetState::PartlyChanged))
        });
        assert_eq!(changed.unwrap_err().class(), Class::Unfinished);

        let fine = guarded(&Stop::default(), target, || {
            Err::<(), _>(RewindError::new(Class::Target, "it is running"))
        });
        assert_eq!(fine.unwrap_err().to_string(), "it is running");
    }
}
