//! What an earlier run had fetched for the same plan: it is read back from the packs, checked, and need not
//! be asked for again. Only the content decides: every frame has its CRC and every page its hash.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;

use pg_format::DataPath;
use proto::fetch::{Item, ItemBody, Unit, UnitKind};

use crate::plan::Plan;
use crate::plan::units::without;
use crate::staging::disk::Disk;
use crate::staging::manifest::PackDigest;
use crate::staging::notes::Notes;
use crate::staging::{layout, pack};

/// See the module.
#[derive(Debug, Default)]
pub struct Recovered {
    /// The packs, each cut behind its last sound frame.
    pub packs: Vec<PackDigest>,
    /// What the source had reported.
    pub notes: Notes,
    arrived: HashMap<u64, Arrived>,
}

/// What came of one unit.
#[derive(Debug, Default)]
struct Arrived {
    blocks: BTreeSet<u32>,
    /// Bytes by their offset.
    chunks: BTreeMap<u64, u64>,
    ended: bool,
    /// The file was gone.
    vanished: bool,
}

impl Recovered {
    /// Reads all packs there are for a plan and makes what is sound of them durable.
    pub fn read(disk: &dyn Disk, plan: &Plan) -> io::Result<Self> {
        let mut recovered = Self { notes: Notes::of(plan), ..Self::default() };
        let directory = DataPath::new(layout::STAGED_DIRECTORIES[0]).map_err(io::Error::other)?;
        let mut names = match disk.is_directory(&directory)? {
            Some(true) => disk.names(&directory)?,
            _ => Vec::new(),
        };
        names.sort();
        for name in names {
            let path = layout::pack(&name);
            let signer = pack::Signer::new(disk, &name);
            let sound = pack::recover(disk.open(&path)?, signer, &mut |items| {
                items.iter().for_each(|item| recovered.take(item));
                Ok(())
            });
            match sound.map_err(pack::PackError::into_io)? {
                Some((bytes, crc)) => {
                    disk.set_length(&path, bytes)?;
                    disk.sync_file(&path)?;
                    recovered.packs.push(PackDigest { name, bytes, crc });
                }
                None => disk.remove_file(&path)?,
            }
        }
        Ok(recovered)
    }

    fn take(&mut self, item: &Item) {
        self.notes.take(item);
        let arrived = self.arrived.entry(item.unit).or_default();
        match &item.body {
            ItemBody::Page { block, .. } => drop(arrived.blocks.insert(*block)),
            ItemBody::Chunk(chunk) => {
                arrived.chunks.insert(chunk.offset(), chunk.data().len() as u64);
            }
            ItemBody::End { vanished, .. } => {
                arrived.ended = true;
                arrived.vanished |= vanished;
            }
            ItemBody::PageHashes { .. }
            | ItemBody::Same { .. }
            | ItemBody::Waiting
            | ItemBody::SegmentDigest { .. }
            | ItemBody::RecordCrc { .. }
            | ItemBody::Change(_) => {}
        }
    }

    /// What is left of a unit; `None` if all of it came.
    pub fn left(&self, unit: Unit) -> Option<Unit> {
        let Some(arrived) = self.arrived.get(&unit.id) else {
            return Some(unit);
        };
        if arrived.vanished {
            return None;
        }
        let kind = match unit.kind {
            // Even a unit that has ended may lack a page that could not be rebuilt.
            UnitKind::Blocks { path, ranges, signatures } => {
                let ranges = without(&ranges, |block| arrived.blocks.contains(&block));
                if ranges.is_empty() {
                    return None;
                }
                UnitKind::Blocks { path, ranges, signatures }
            }
            _ if arrived.ended => return None,
            UnitKind::File { path, mut offset, mut length } => {
                while let Some(bytes) = arrived.chunks.get(&offset).filter(|bytes| **bytes > 0) {
                    offset += bytes;
                    length = length.saturating_sub(*bytes);
                }
                if length == 0 {
                    return None;
                }
                UnitKind::File { path, offset, length }
            }
            other => other,
        };
        Some(Unit { id: unit.id, kind })
    }
}

#[cfg(test)]
mod tests {
    use proto::fetch::BlockRange;

    use super::*;

    #[test]
    fn only_what_did_not_come_is_asked_for() {
        let ranges = [BlockRange { first: 5, count: 4 }, BlockRange { first: 20, count: 1 }];
        let left = without(&ranges, |block| [5, 7, 20].contains(&block));
        assert_eq!(left, [BlockRange { first: 6, count: 1 }, BlockRange { first: 8, count: 1 }]);
        let path = DataPath::new("PG_VERSION").unwrap();
        let file = |offset, length| Unit {
            id: 3,
            kind: UnitKind::File { path: path.clone(), offset, length },
        };
        let mut recovered = Recovered::default();
        let arrived = recovered.arrived.entry(3).or_default();
        arrived.chunks.extend([(0, 100), (100, 50), (200, 10)]);
        assert_eq!(recovered.left(file(0, 1000)), Some(file(150, 850)));
        assert_eq!(recovered.left(file(0, 150)), None);
        recovered.arrived.entry(3).or_default().ended = true;
        assert_eq!(recovered.left(file(0, 1000)), None);
    }
}
