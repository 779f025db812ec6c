//! Pages that come as differences to this node's own: signs its pages when they are asked for, and rebuilds
//! what comes before anything of it is kept.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use bytes::Bytes;
use data_dir::DataDir;
use data_dir::dir::read_at;
use parking_lot::{Mutex, MutexGuard};
use pg_format::{BLOCK_BYTES, BLOCK_SIZE, BlockRange, DataPath};
use proto::delta::AnyOffset;
use proto::fetch::{Item, ItemBody, PageContent, Signatures, Unit, UnitKind};

use crate::error::{Class, RewindError};
use crate::source::prepare::{Announce, Prepare};

/// Cost of the units that are signed before the first of them is sent: one unit, so that the source works on
/// it while the next ones are signed and sent.
const COST_AT_ONCE: u64 = 64 << 10;

/// Pages that could not be rebuilt, by their unit.
pub type Wrong = BTreeMap<u64, BTreeSet<u32>>;

/// This node's own pages. They do not change until the rewind is sealed.
#[derive(Debug)]
pub struct OwnPages {
    directory: Arc<DataDir>,
    seed: u64,
    codec: AnyOffset,
    signature_bytes: AtomicU64,
    wrong: Mutex<Wrong>,
    /// Units that were asked for whole at once.
    whole: Mutex<BTreeSet<u64>>,
}

/// A file whose pages are rebuilt one after the other.
pub type Open = Option<(DataPath, File)>;

impl OwnPages {
    /// The target's pages with a new seed, so that pages whose hashes collided in one run do not in the next.
    pub fn new(directory: Arc<DataDir>) -> Self {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let seed = u64::from(now.subsec_nanos()) ^ now.as_secs().rotate_left(32);
        Self {
            directory,
            seed,
            codec: AnyOffset::new(seed),
            signature_bytes: AtomicU64::new(0),
            wrong: Mutex::default(),
            whole: Mutex::default(),
        }
    }

    /// Bytes of signatures that were sent with requests.
    pub fn signature_bytes(&self) -> u64 {
        self.signature_bytes.load(Ordering::Relaxed)
    }

    fn wrong(&self) -> MutexGuard<'_, Wrong> {
        self.wrong.lock()
    }

    /// Takes the pages that must be asked for whole.
    pub fn take_wrong(&self) -> Wrong {
        std::mem::take(&mut *self.wrong())
    }

    /// Takes the pages of a unit that has ended which must be asked for whole. It does so once for each unit:
    /// a source that goes on sending differences must not be asked for ever.
    pub fn take_wrong_of(&self, unit: u64) -> Option<(u64, BTreeSet<u32>)> {
        let mut wrong = self.wrong();
        let blocks = wrong.get(&unit)?.clone();
        let first = self.whole.lock().insert(unit);
        first.then(|| {
            wrong.remove(&unit);
            (unit, blocks)
        })
    }

    fn sign(&self, path: &DataPath, ranges: &[BlockRange]) -> io::Result<Bytes> {
        let file = self.directory.open_file(path)?;
        let mut signatures = Vec::new();
        for range in ranges {
            let mut pages = vec![0; range.count as usize * BLOCK_SIZE];
            read_at(&file, &mut pages, u64::from(range.first) * BLOCK_BYTES)?;
            pages.chunks_exact(BLOCK_SIZE).for_each(|page| {
                signatures.extend_from_slice(&self.codec.sign(page));
            });
        }
        Ok(signatures.into())
    }

    /// The reply with its page rebuilt; a reply without a difference is returned as it is. `None` if the
    /// rebuilt page does not have the hash that came with it, because a hash in the signature collided: the
    /// page is noted and must be asked for whole.
    pub fn rebuild(
        &self,
        path: &DataPath,
        item: &Item,
        open: &mut Open,
    ) -> Result<Option<Item>, RewindError> {
        let ItemBody::Page { block, content: PageContent::Difference(difference) } = &item.body
        else {
            return Ok(Some(item.clone()));
        };
        let own = self.page(path, *block, open).map_err(|error| unreadable(path, error))?;
        let Some(page) = difference.rebuild(&self.codec, &own) else {
            self.wrong().entry(item.unit).or_default().insert(*block);
            return Ok(None);
        };
        let body = ItemBody::Page { block: *block, content: PageContent::Present(page) };
        Ok(Some(Item { unit: item.unit, body }))
    }

    fn page(&self, path: &DataPath, block: u32, open: &mut Open) -> io::Result<Vec<u8>> {
        let file = match open {
            Some((opened, file)) if opened == path => file,
            _ => &mut open.insert((path.clone(), self.directory.open_file(path)?)).1,
        };
        let mut page = vec![0; BLOCK_SIZE];
        read_at(file, &mut page, u64::from(block) * BLOCK_BYTES)?;
        Ok(page)
    }
}

fn unreadable(path: &DataPath, error: io::Error) -> RewindError {
    RewindError::because(Class::Target, format!("could not read {path}"), error)
}

impl Prepare for OwnPages {
    fn prepare(&self, unit: &mut Unit) -> Result<Announce, RewindError> {
        if let UnitKind::Blocks { path, ranges, signatures: Some(signatures) } = &mut unit.kind {
            let pages = self.sign(path, ranges).map_err(|error| unreadable(path, error))?;
            self.signature_bytes.fetch_add(pages.len() as u64, Ordering::Relaxed);
            *signatures = Signatures { seed: self.seed, pages };
        }
        Ok(Box::new(|| {}))
    }

    fn cost_at_once(&self) -> u64 {
        COST_AT_ONCE
    }
}

#[cfg(test)]
mod tests {
    use proto::PageHash;
    use proto::fetch::PageDifference;

    use super::*;

    /// A page that is not what its hash says, as after a collision in its signature.
    #[test]
    fn a_wrong_page_is_asked_for_whole_once_as_soon_as_its_unit_ends() {
        let home = tempfile::tempdir().unwrap();
        for directory in ["base/5", "pg_tblspc", "pg_wal"] {
            std::fs::create_dir_all(home.path().join(directory)).unwrap();
        }
        File::create(home.path().join("PG_VERSION")).unwrap();
        let mut file = File::create(home.path().join("base/5/16384")).unwrap();
        io::Write::write_all(&mut file, &vec![1; BLOCK_SIZE * 3]).unwrap();
        let own = OwnPages::new(Arc::new(DataDir::open(home.path()).unwrap()));
        let path = DataPath::new("base/5/16384").unwrap();
        let (here, there) = (vec![1; BLOCK_SIZE], vec![2; BLOCK_SIZE]);
        let signature = own.codec.sign(&here);
        let delta: Bytes = own.codec.encode(&signature, &here).unwrap().into();
        let difference = |hash: PageHash| {
            let content = PageContent::Difference(PageDifference { hash, delta: delta.clone() });
            Item { unit: 7, body: ItemBody::Page { block: 2, content } }
        };
        let right = difference(PageHash::of(&here));
        let wrong = difference(PageHash::of(&there));
        assert!(own.rebuild(&path, &right, &mut None).unwrap().is_some());
        assert_eq!(own.take_wrong_of(7), None);
        assert!(own.rebuild(&path, &wrong, &mut None).unwrap().is_none());
        assert_eq!(own.take_wrong_of(8), None);
        assert_eq!(own.take_wrong_of(7), Some((7, BTreeSet::from([2]))));
        assert_eq!(own.take_wrong(), Wrong::new());
        // A source that sends differences again is left to whoever counts how often it was asked.
        assert!(own.rebuild(&path, &wrong, &mut None).unwrap().is_none());
        assert_eq!(own.take_wrong_of(7), None);
        assert_eq!(own.take_wrong(), Wrong::from([(7, BTreeSet::from([2]))]));
    }
}
