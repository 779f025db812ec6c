//! Looks for the fork point and for what the target changed around it.

use std::sync::Arc;

use super::search::Search;
use super::{Divergence, target_changes};
use crate::config::Config;
use crate::error::{NotPossible, RewindError};
use crate::source::Source;
use crate::target::Target;
use crate::task::blocking;

/// Finds the fork point and what the target changed: reads the target's WAL and compares it with the
/// source's.
///
/// # Errors
/// The nodes have no history in common, or the source cannot be asked. WAL that cannot be read is no error:
/// the nodes can still be compared.
pub async fn find(
    config: &Config,
    target: &Arc<Target>,
    source: &Source,
) -> Result<Divergence, RewindError> {
    if target.unstarted {
        return Ok(Divergence::unknown(NotPossible::new(
            "the target was rewound before and not started since: its WAL does not describe what \
             its pages contain",
        )));
    }
    let own_command = target.settings.get("restore_command").map(str::to_owned);
    let restore_command = config.restore_command.clone().or(own_command);
    let wal_archive = config.wal_archive.clone();
    let (target, source) = (Arc::clone(target), source.clone());
    let runtime = tokio::runtime::Handle::current();
    blocking(move || {
        let search =
            Search { target: &target, source: &source, runtime, wal_archive, restore_command };
        target_changes::find(&search)
    })
    .await
}
