//! Fetches plans from an in-memory source, honest and not.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use pg_format::{BlockRange, BlockSet, FileClass, Lsn, PageMap};
use proto::fetch::{ItemBody, PageContent, PageDifference};

use super::*;
use crate::config::Connections;
use crate::error::{Remedy, Replan};
use crate::plan::file_actions::{BytesWanted, FileAction, PagesWanted, PlannedFile};
use crate::prepare::claim::{Claim, Kept};
use crate::prepare::wal_pieces::Piece;
use crate::source::link::{Buffers, Link};
use crate::staging::layout;
use crate::staging::pack::{self, Signer};
use crate::test_peer::{Reply, TestPeer, honest, page_of, pages};
use crate::test_values::{EmptyTarget, RecordingMonitor, described, planned, wal_of_noops};

const RELATION: &str = "base/5/16384";

fn path(name: &str) -> DataPath {
    DataPath::new(name).unwrap()
}

/// Ten pages of a relation that this node does not have, and one small file.
fn plan() -> Plan {
    let file = |name, action| PlannedFile { path: path(name), action };
    let mut blocks = BlockSet::default();
    blocks.insert_range(0, 10);
    Plan {
        files: vec![
            file(RELATION, FileAction::Patch { bytes: 10 * 8192 }),
            file("base/5/pg_internal", FileAction::Replace { bytes: None }),
        ],
        pages: vec![PagesWanted { file: 0, blocks, end: 10, known: 0 }],
        whole: vec![BytesWanted { file: 1, bytes: 5 }],
        ..Plan::default()
    }
}

fn files() -> BTreeMap<String, Vec<u8>> {
    let wal = wal_of_noops(10).0;
    let files =
        [("base/5/pg_internal", b"small".to_vec()), ("pg_wal/000000010000000000000003", wal)];
    files.map(|(name, content)| (name.to_owned(), content)).into()
}

/// A target that was taken, and what is fetched into it.
struct Staging {
    target: EmptyTarget,
    /// Counts the runs: each names its packs by it.
    runs: AtomicU32,
    /// Given back when it is dropped.
    _claim: Claim,
}

impl Staging {
    fn new() -> Self {
        let target = EmptyTarget::new();
        let monitor: Arc<dyn Monitor> = Arc::new(RecordingMonitor::default());
        let claim = Claim::take(&target.target, &monitor, Kept::Nothing, 1).expect("taken");
        Self { target, runs: AtomicU32::new(1), _claim: claim }
    }

    fn disk(&self) -> &Arc<dyn Disk> {
        &self.target.target.disk
    }

    /// Fetches a plan over one connection; `covered` is what replay rebuilds, if anybody says it.
    async fn fetch(
        &self,
        peer: &TestPeer,
        plan: &Plan,
        pieces: &[Piece],
        covered: Option<Covered>,
    ) -> Result<Fetched, RewindError> {
        let link = Link {
            connections: Connections::Fixed(1),
            patience: Duration::from_secs(20),
            max_rate: None,
            buffers: Buffers::default(),
        };
        let session = Session::open(Arc::new(peer.clone()), link).await.expect("a session").0;
        let size = self.target.target.control.file.wal_segment_size;
        let wal = WalPieces::new(Arc::clone(self.disk()), size, pieces);
        for piece in pieces {
            let path = layout::staged_wal(&piece.name.file_name(size));
            self.disk().create_file(&path).expect("made");
        }
        let own = OwnPages::new(Arc::clone(&self.target.target.directory));
        let (say, heard) = oneshot::channel();
        match covered {
            Some(covered) => say.send(covered).expect("heard"),
            None => drop(say),
        }
        let run = self.runs.fetch_add(1, Ordering::Relaxed);
        let recovered = Recovered::read(&**self.disk(), plan).expect("readable");
        let wanted = FetchWanted { plan, run, recovered, wal, own, covered: heard };
        fetch(&session, self.disk(), wanted, Arc::new(RecordingMonitor::default())).await
    }

    /// Blocks of the relation that lie in the packs.
    fn blocks(&self, fetched: &Fetched) -> Vec<u32> {
        let mut blocks = Vec::new();
        for digest in &fetched.packs {
            let file = self.disk().open(&layout::pack(&digest.name)).expect("there");
            let signer = Signer::new(&**self.disk(), &digest.name);
            let read = pack::recover(file, signer, &mut |items| {
                blocks.extend(items.iter().filter_map(|item| match item.body {
                    ItemBody::Page { block, .. } => Some(block),
                    _ => None,
                }));
                Ok(())
            });
            assert!(read.is_ok_and(|sound| sound.is_some()));
        }
        blocks.sort_unstable();
        blocks
    }
}

fn nothing_covered() -> Option<Covered> {
    Some(Covered::new(Lsn::new(0x300_0028)))
}

fn peer(answer: impl Fn(&Unit) -> Reply + Send + Sync + 'static) -> TestPeer {
    TestPeer::new(described(3..6, planned().start.redo, 0), answer)
}

fn wal_piece() -> Piece {
    let timeline = pg_format::TimelineId::new(1).unwrap();
    let name = pg_format::wal::SegmentName { timeline, number: 3 };
    Piece { name, offset: 0, length: 8192 }
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_and_files_come_into_packs() {
    let staging = Staging::new();
    let peer = peer(honest(files()));
    let fetched = staging.fetch(&peer, &plan(), &[], nothing_covered()).await.unwrap();
    assert_eq!(staging.blocks(&fetched), Vec::from_iter(0..10));
    assert_eq!((fetched.notes.pages, fetched.recovered_pages, fetched.covered_pages), (10, 0, 0));
    assert!(fetched.notes.vanished.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn wal_comes_to_its_place_and_not_into_packs() {
    let staging = Staging::new();
    let peer = peer(honest(files()));
    let fetched = staging.fetch(&peer, &plan(), &[wal_piece()], nothing_covered()).await.unwrap();
    let staged = layout::staged_wal("000000010000000000000003");
    let staged = std::fs::read(staging.target.home.path().join(staged.as_str())).unwrap();
    assert!(staged == wal_of_noops(10).0);
    assert!(fetched.wal_payload_bytes > 0 && fetched.notes.pages == 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_replay_rebuilds_does_not_travel() {
    let staging = Staging::new();
    let peer = peer(honest(files()));
    let FileClass::Relation(segment) = FileClass::of(&path(RELATION)) else { panic!() };
    let mut blocks = BlockSet::default();
    blocks.insert_range(2, 5);
    let mut rebuilt = PageMap::default();
    rebuilt.absorb_segment(segment, &blocks);
    let mut covered = Covered::new(Lsn::new(0x300_0028));
    covered.absorb_blocks(rebuilt);
    let fetched = staging.fetch(&peer, &plan(), &[], Some(covered)).await.unwrap();
    assert_eq!(staging.blocks(&fetched), [0, 1, 5, 6, 7, 8, 9]);
    assert_eq!(fetched.covered_pages, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_wait_until_it_is_known_what_replay_rebuilds() {
    let staging = Staging::new();
    let peer = peer(honest(files()));
    let error = staging.fetch(&peer, &plan(), &[], None).await.unwrap_err();
    assert_eq!(error.class(), Class::Other);
    let pages =
        peer.asked().into_iter().filter(|unit| matches!(unit.kind, UnitKind::Blocks { .. }));
    assert_eq!(pages.count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_earlier_run_had_fetched_is_not_fetched_again() {
    let staging = Staging::new();
    let first = peer(honest(files()));
    drop(staging.fetch(&first, &plan(), &[], nothing_covered()).await.unwrap());
    let second = peer(honest(files()));
    let fetched = staging.fetch(&second, &plan(), &[], nothing_covered()).await.unwrap();
    assert_eq!((fetched.recovered_pages, second.asked().len()), (10, 0));
    assert_eq!(staging.blocks(&fetched), Vec::from_iter(0..10));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_gone_and_one_that_ends_are_noted() {
    let staging = Staging::new();
    let short = |unit: &Unit| {
        let UnitKind::Blocks { ranges, .. } = &unit.kind else {
            return Reply::Items(vec![ItemBody::End { vanished: true, bytes: 0 }]);
        };
        let mut items = pages(ranges);
        for item in items.iter_mut().skip(4) {
            let ItemBody::Page { content, .. } = item else { panic!("{item:?}") };
            *content = PageContent::BeyondEnd;
        }
        Reply::Items(
            items.into_iter().chain([ItemBody::End { vanished: false, bytes: 4 * 8192 }]).collect(),
        )
    };
    let fetched = staging.fetch(&peer(short), &plan(), &[], nothing_covered()).await.unwrap();
    assert_eq!(fetched.notes.vanished, BTreeSet::from([1]));
    assert_eq!(fetched.notes.shorter, BTreeMap::from([(0, 4 * 8192)]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_ends_and_is_longer_means_another_plan() {
    let staging = Staging::new();
    let contradicting = |unit: &Unit| {
        let UnitKind::Blocks { ranges, .. } = &unit.kind else {
            return Reply::Whole(Vec::new());
        };
        let mut items = pages(ranges);
        let ItemBody::Page { content, .. } = &mut items[4] else { panic!() };
        *content = PageContent::BeyondEnd;
        let end = ItemBody::End { vanished: false, bytes: 10 * 8192 };
        Reply::Items(items.into_iter().chain([end]).collect())
    };
    let error = staging.fetch(&peer(contradicting), &plan(), &[], nothing_covered()).await;
    assert_eq!(error.unwrap_err().remedy(), Remedy::Replan(Replan::SourceChanged));
}

#[tokio::test(flavor = "multi_thread")]
async fn wal_that_the_source_no_longer_has_means_another_plan() {
    let staging = Staging::new();
    let peer = peer(honest(BTreeMap::new()));
    let error = staging.fetch(&peer, &plan(), &[wal_piece()], nothing_covered()).await;
    assert_eq!(error.unwrap_err().remedy(), Remedy::Replan(Replan::WalUnavailable));
}

/// Answers with a difference to a page that nobody has, so many times.
fn differing(times: usize) -> impl Fn(&Unit) -> Reply + Send + Sync {
    let left = std::sync::atomic::AtomicUsize::new(times);
    move |unit| {
        let UnitKind::Blocks { ranges, .. } = &unit.kind else {
            return Reply::Whole(Vec::new());
        };
        let mut items = pages(ranges);
        let less = |left: usize| left.checked_sub(1);
        if left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok() {
            let ItemBody::Page { content, .. } = &mut items[0] else { panic!() };
            let (hash, delta) = (page_of(0).hash(), bytes::Bytes::from_static(b"no"));
            *content = PageContent::Difference(PageDifference { hash, delta });
        }
        Reply::Whole(items)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_that_cannot_be_rebuilt_is_fetched_whole() {
    let staging = Staging::new();
    let own = vec![0; 10 * 8192];
    std::fs::create_dir(staging.target.home.path().join("base/5")).unwrap();
    std::fs::File::create(staging.target.home.path().join(RELATION))
        .unwrap()
        .write_all(&own)
        .unwrap();
    let peer = peer(differing(1));
    let fetched = staging.fetch(&peer, &plan(), &[], nothing_covered()).await.unwrap();
    assert_eq!(staging.blocks(&fetched), Vec::from_iter(0..10));
    let asked = peer.asked();
    let last = asked.iter().rev().find_map(|unit| match &unit.kind {
        UnitKind::Blocks { ranges, .. } => Some(ranges.clone()),
        _ => None,
    });
    assert_eq!(last.unwrap(), [BlockRange { first: 0, count: 1 }]);
}
