//! Going on with a rewind that was being prepared: what must be the same for its plan to hold.

use proto::model::{Node, Role};

use crate::config::Config;
use crate::plan::{FileAction, Plan, PlannedFile};
use crate::staging::disk::FileStat;
use crate::staging::saved_plan::SavedPlan;
use crate::target::Target;
use crate::target::places::check_place;

/// Which life of which source: nothing that was read before may be believed in another.
pub(crate) fn life(node: &Node) -> String {
    let control = &node.control;
    // A stopped node may have been started and stopped in between.
    let stopped = (node.role == Role::Stopped).then(|| crc32c::crc32c(&node.control_bytes));
    format!(
        "{} {:?} {} {:?} {:?} {:?} {stopped:?}",
        control.system_identifier,
        node.role,
        node.timeline,
        control.state,
        node.postmaster,
        node.directory
    )
}

/// The operator's choices that decide what a plan holds.
pub(crate) fn options(config: &Config) -> String {
    format!(
        "{:?} {} {} {:?} {:?}",
        config.strategy,
        config.config_from_source,
        config.mirror_extra_files,
        config.tablespace_mapping,
        config.staging_dir
    )
}

/// The planned files as they are on the target.
pub(crate) fn before(plan: &Plan, target: &Target) -> Vec<Option<FileStat>> {
    plan.files.iter().map(|file| FileStat::of(target.files.get(&file.path)?)).collect()
}

fn place_is_taken(file: &PlannedFile) -> bool {
    match &file.action {
        FileAction::MakeDirectory { link: Some(place) } => check_place(place).is_err(),
        _ => false,
    }
}

/// Why a plan cannot be gone on with; `None` if it can.
pub(crate) fn obstacle(
    stored: &SavedPlan,
    target: &Target,
    node: &Node,
    config: &Config,
) -> Option<&'static str> {
    if stored.target_control != target.control.bytes {
        Some("PostgreSQL was started here since")
    } else if stored.before != before(&stored.plan, target) {
        Some("files of the target changed since")
    } else if stored.life != life(node) {
        Some("the source was restarted, promoted or stopped since, or it is another one")
    } else if stored.options != options(config) {
        Some("it was begun with other options")
    } else if stored.plan.files.iter().any(place_is_taken) {
        Some("a place for a new tablespace is not empty any more")
    } else if config.config_from_source || config.mirror_extra_files {
        // Nothing replays what happened to them since they were fetched.
        Some("configuration and extra files of the source may have changed since")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_values::node;

    /// In containers both postmasters may have number 1 and the same start second.
    #[test]
    fn two_nodes_behind_one_address_are_two_lives() {
        let (one, other) = (node([1; 16]), node([2; 16]));
        assert!(one.same_life(&node([1; 16])) && !one.same_life(&other));
        assert_eq!(life(&one), life(&node([1; 16])));
        assert_ne!(life(&one), life(&other));
        let restarted = Node { postmaster: Some((1, 1_700_000_001)), ..one.clone() };
        assert!(!one.same_life(&restarted));
        assert_ne!(life(&one), life(&restarted));
    }
}
