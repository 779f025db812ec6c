//! Checks that the two nodes belong to one cluster and that the target can follow the source (R9, R12, R17).

use pg_format::TimelineId;
use pg_format::control_file::WalLevel;
use proto::model::{Description, Role};

use crate::error::{Class, RewindError};
use crate::monitor::Monitor;
use crate::target::Target;
use crate::target::wal_archive::newest_history;

/// Refuses nodes that are not of one cluster or were built differently.
pub fn check(target: &Target, source: &Description) -> Result<(), RewindError> {
    let (ours, theirs) = (&target.control.file, &source.node.control);
    let refuse = |message: String| Err(RewindError::new(Class::Target, message));
    let here = target.directory.identity().map_err(|error| {
        RewindError::because(Class::Target, "could not inspect the target's data directory", error)
    })?;
    if here == source.node.directory {
        return refuse(
            "the source is this data directory itself: --source leads back to this node (a virtual address that \
             still points here?); give the address of the node to follow"
                .to_owned(),
        );
    }
    if ours.system_identifier != theirs.system_identifier {
        return refuse(format!(
            "target and source belong to different clusters (system identifiers {} and {})",
            ours.system_identifier, theirs.system_identifier
        ));
    }
    if ours.control_version != theirs.control_version
        || ours.catalog_version != theirs.catalog_version
    {
        return refuse(format!(
            "target and source have different PostgreSQL versions (target: {}, catalog {}; source: \
             {}, catalog {})",
            ours.major, ours.catalog_version, theirs.major, theirs.catalog_version
        ));
    }
    if ours.wal_segment_size != theirs.wal_segment_size {
        return refuse(format!(
            "target and source have different WAL segment sizes (target: {} bytes, source: {} \
             bytes)",
            ours.wal_segment_size.bytes(),
            theirs.wal_segment_size.bytes()
        ));
    }
    // From 19 on there are states between on and off. Pages that were written in one state are not valid in
    // another.
    if ours.data_checksum_version != theirs.data_checksum_version {
        return refuse(format!(
            "target and source have different data checksum settings (target: {}, source: {})",
            ours.checksum_state(),
            theirs.checksum_state()
        ));
    }
    check_source(source)
}

fn check_source(source: &Description) -> Result<(), RewindError> {
    let control = &source.node.control;
    let refuse = |message: &str| Err(RewindError::new(Class::Preflight, message));
    // A stopped source's pages are not being written: none of them is torn.
    if source.node.role != Role::Stopped && !control.checkpoint_copy.full_page_writes {
        return refuse(
            "full_page_writes is off on the source: pages read while they are being written could \
             not be repaired; switch it on, run CHECKPOINT there and try again",
        );
    }
    if control.wal_level == WalLevel::Minimal {
        return refuse(
            "wal_level is minimal on the source: a standby cannot follow it; raise it and restart \
             the source",
        );
    }
    Ok(())
}

/// Settings with which PostgreSQL would refuse to start the rewound node. `max_*` values are read
/// from the target's configuration where it sets them, else from its `pg_control`.
pub fn check_settings(
    target: &Target,
    source: &Description,
    start: bool,
    monitor: &dyn Monitor,
) -> Result<(), RewindError> {
    let ours = target.control.file.required_settings.named();
    let theirs = source.node.control.required_settings.named();
    for ((name, recorded), (_, needed)) in ours.into_iter().zip(theirs) {
        let configured = target.settings.get(name).and_then(|value| value.parse().ok());
        let value = configured.unwrap_or(recorded);
        if value < needed {
            let message = format!(
                "{name} is {value} on the target and {needed} on the source: PostgreSQL will not \
                 start as a standby until it is raised to {needed}"
            );
            if start {
                return Err(RewindError::new(Class::Preflight, message));
            }
            monitor.warning(&message);
        }
    }
    let timeline = source.node.timeline;
    let wanted = target.settings.get("recovery_target_timeline");
    if let Some(number) = wanted.and_then(|value| value.parse::<u32>().ok())
        && number != timeline.get()
    {
        let message = format!(
            "the target's configuration has recovery_target_timeline = '{number}', but the source is on timeline \
             {timeline}: remove it, or set it to {timeline}"
        );
        return Err(RewindError::new(Class::Target, message));
    }
    if let Some(slot) = target.settings.get("primary_slot_name") {
        monitor.warning(&format!(
            "the target's primary_slot_name is \"{slot}\": streaming will not start unless the \
             source has that slot"
        ));
    }
    Ok(())
}

/// What is wrong where the archive that the target's `restore_command` reads has the history of a newer timeline than
/// the source's: recovery follows the newest timeline that it finds (`timeline.c` `findNewestTimeLine`), and that one
/// is not the source's. `None` if nothing is.
pub fn dead_branch(target: &Target, timeline: TimelineId) -> Option<String> {
    let follows_newest =
        matches!(target.settings.get("recovery_target_timeline"), None | Some("latest"));
    let command = target.settings.get("restore_command").filter(|_| follows_newest)?;
    let newest = newest_history(command, timeline, target.directory.path())?;
    let file = newest.history_file_name();
    Some(format!(
        "the target's archive has {file}, but the source is on timeline {timeline}: PostgreSQL would follow timeline \
         {newest} and not become consistent. If that branch is dead, remove {file} from the archive; or set \
         recovery_target_timeline = '{timeline}' on the target"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_values::{EmptyTarget, RecordingMonitor, described};
    use pg_format::Lsn;

    /// A source of the same cluster, changed in one way.
    fn judged(change: impl FnOnce(&mut Description)) -> Result<(), RewindError> {
        let target = EmptyTarget::new();
        let mut source = described(0..1, Lsn::new(100), 0);
        source.node.control.checkpoint_copy.full_page_writes = true;
        change(&mut source);
        check(&target.target, &source)
    }

    #[test]
    fn two_nodes_of_one_cluster_fit() {
        assert!(judged(|_| {}).is_ok());
    }

    #[test]
    fn nodes_that_are_not_of_one_cluster_are_refused() {
        let refused = |change: fn(&mut Description)| {
            let error = judged(change).unwrap_err();
            assert_eq!(error.class(), Class::Target, "{error}");
            error.to_string()
        };
        assert!(
            refused(|source| source.node.control.system_identifier += 1)
                .contains("different clusters")
        );
        assert!(
            refused(|source| source.node.control.catalog_version += 1)
                .contains("different PostgreSQL versions")
        );
        assert!(
            refused(|source| source.node.control.control_version += 1)
                .contains("different PostgreSQL versions")
        );
        assert!(
            refused(|source| {
                let other = pg_format::WalSegmentSize::new(1 << 20).expect("a size");
                source.node.control.wal_segment_size = other;
            })
            .contains("different WAL segment sizes")
        );
        assert!(
            refused(|source| source.node.control.data_checksum_version = 1)
                .contains("target: off, source: on")
        );
    }

    #[test]
    fn the_target_itself_is_no_source() {
        let target = EmptyTarget::new();
        let mut source = described(0..1, Lsn::new(100), 0);
        source.node.directory = target.target.directory.identity().unwrap();
        let error = check(&target.target, &source).unwrap_err();
        assert!(error.to_string().contains("this data directory itself"), "{error}");
    }

    #[test]
    fn a_source_whose_pages_could_be_torn_is_refused_unless_it_is_stopped() {
        let off = |source: &mut Description| {
            source.node.control.checkpoint_copy.full_page_writes = false;
        };
        let error = judged(off).unwrap_err();
        assert_eq!(error.class(), Class::Preflight);
        let stopped = judged(|source| {
            off(source);
            source.node.role = Role::Stopped;
        });
        assert!(stopped.is_ok());
    }

    #[test]
    fn a_source_that_no_standby_can_follow_is_refused() {
        let error = judged(|source| source.node.control.wal_level = WalLevel::Minimal).unwrap_err();
        assert!(error.to_string().contains("wal_level is minimal"), "{error}");
    }

    #[test]
    fn settings_lower_than_the_sources_are_warned_about_or_refuse_a_start() {
        let target = EmptyTarget::new();
        let mut source = described(0..1, Lsn::new(100), 0);
        let recorded = RecordingMonitor::default();
        check_settings(&target.target, &source, true, &recorded).unwrap();
        assert_eq!(recorded.all(), Vec::<String>::new());
        source.node.control.required_settings.max_connections += 50;
        check_settings(&target.target, &source, false, &recorded).unwrap();
        assert!(
            recorded.all()[0].starts_with("warning: max_connections is"),
            "{:?}",
            recorded.all()
        );
        let refused = check_settings(&target.target, &source, true, &recorded).unwrap_err();
        assert_eq!(refused.class(), Class::Preflight);
    }
}
