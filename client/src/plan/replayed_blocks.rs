//! Leaves out the blocks that replay rebuilds: they are not fetched.

use pg_format::{Covered, Fork, RelationSegment};
use proto::fetch::{Unit, UnitKind};

use crate::plan::units::without;

/// The main-fork segment file whose pages a unit asks for, if it does. Only blocks of main forks can be left
/// to replay.
fn main_fork(unit: &Unit) -> Option<RelationSegment> {
    match &unit.kind {
        UnitKind::Blocks { path, .. } => {
            RelationSegment::parse(path).filter(|segment| segment.fork == Fork::Main)
        }
        _ => None,
    }
}

/// Divides units into those with blocks that replay may rebuild, and all other units.
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

#[cfg(test)]
mod tests {
    use pg_format::{BlockRange, DataPath, Lsn, PageMap, RelationPath};

    use super::*;

    const RELATION: RelationPath = RelationPath { tablespace: 1663, database: 5, number: 16384 };

    fn blocks(id: u64, path: &str, first: u32, count: u32) -> Unit {
        let path = DataPath::new(path).unwrap();
        let ranges = vec![BlockRange { first, count }];
        Unit { id, kind: UnitKind::Blocks { path, ranges, signatures: None } }
    }

    fn rebuilt(numbers: &[u32]) -> Covered {
        let mut covered = Covered::new(Lsn::new(100));
        let mut named = PageMap::default();
        numbers.iter().for_each(|number| named.insert(RELATION, *number));
        covered.absorb_blocks(named);
        covered
    }

    #[test]
    fn only_main_forks_wait_for_what_replay_rebuilds() {
        let path = DataPath::new("PG_VERSION").unwrap();
        let units = [
            blocks(1, "base/5/16384", 0, 1),
            blocks(2, "base/5/16384_fsm", 0, 1),
            blocks(3, "pg_xact/0000", 0, 1),
            Unit { id: 4, kind: UnitKind::File { path, offset: 0, length: 3 } },
        ];
        let (coverable, others) = divide(units.into_iter());
        let numbers = |units: &[Unit]| units.iter().map(|unit| unit.id).collect::<Vec<_>>();
        assert_eq!((numbers(&coverable), numbers(&others)), (vec![1], vec![2, 3, 4]));
    }

    #[test]
    fn rebuilt_blocks_are_left_out_and_counted() {
        let units = vec![blocks(1, "base/5/16384", 0, 4), blocks(2, "base/5/16384", 8, 2)];
        let (left, count) = leave_out(units, &rebuilt(&[1, 2, 8, 9]));
        assert_eq!(count, 4);
        let [Unit { id: 1, kind: UnitKind::Blocks { ranges, .. } }] = &left[..] else {
            panic!("{left:?}");
        };
        let one = |first| BlockRange { first, count: 1 };
        assert_eq!(ranges[..], [one(0), one(3)]);
    }

    #[test]
    fn blocks_of_another_relation_are_not_left_out() {
        let units = vec![blocks(1, "base/5/16385", 1, 1), blocks(2, "base/6/16384", 1, 1)];
        let (left, count) = leave_out(units.clone(), &rebuilt(&[1]));
        assert_eq!((left, count), (units, 0));
    }

    #[test]
    fn a_block_of_a_later_segment_is_known_by_its_number_in_the_relation() {
        let units = vec![blocks(1, "base/5/16384.1", 0, 2)];
        let (left, count) = leave_out(units, &rebuilt(&[131_072]));
        assert_eq!((left.len(), count), (1, 1));
    }
}
