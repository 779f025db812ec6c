//! Leaves out what replay rebuilds: it never travels.

use pg_format::{Covered, Fork, RelationSegment};
use proto::fetch::{Unit, UnitKind};

use crate::plan::units::without;

/// The segment file of a main fork whose pages a unit asks for: of nothing else replay alone decides.
fn main_fork(unit: &Unit) -> Option<RelationSegment> {
    match &unit.kind {
        UnitKind::Blocks { path, .. } => {
            RelationSegment::parse(path).filter(|segment| segment.fork == Fork::Main)
        }
        _ => None,
    }
}

/// Divides units into those that may ask for covered blocks, and the others.
pub(crate) fn divide(units: impl Iterator<Item = Unit>) -> (Vec<Unit>, Vec<Unit>) {
    units.partition(|unit| main_fork(unit).is_some())
}

/// The units without the blocks that replay rebuilds, and how many those are.
pub(crate) fn leave_out(units: Vec<Unit>, covered: &Covered) -> (Vec<Unit>, u64) {
    let mut count = 0;
    let left = units.into_iter().filter_map(|mut unit| {
        let segment = main_fork(&unit);
        if let (UnitKind::Blocks { ranges, .. }, Some(segment)) = (&mut unit.kind, segment) {
            let before: u64 = ranges.iter().map(|range| u64::from(range.count)).sum();
            *ranges = without(ranges, |block| covered.contains(&segment, block));
            count += before - ranges.iter().map(|range| u64::from(range.count)).sum::<u64>();
            if ranges.is_empty() {
                return None;
            }
        }
        Some(unit)
    });
    let left = left.collect();
    (left, count)
}
