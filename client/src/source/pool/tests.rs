//! Many requests to an in-memory source, over connections that are cut, refused and missing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use parking_lot::Mutex;
use pg_format::DataPath;
use proto::fetch::{BlockRange, Item, ItemBody, PageContent, UnitKind};
use proto::frame::Frame;
use proto::{Reason, Refusal};

use super::*;
use crate::config::Connections;
use crate::error::Remedy;
use crate::source::link::{Buffers, Link};
use crate::source::prepare::{Announce, AsTheyAre};
use crate::test_peer::{Reply, TestPeer, honest, page_of, pages};
use crate::test_values::{RecordingMonitor, described, planned};

/// What came: how often each page did, and how many units ended.
#[derive(Debug, Default)]
struct Came {
    pages: BTreeMap<(u64, u32), usize>,
    ends: usize,
    finished: usize,
}

struct Counting {
    came: Arc<Mutex<Came>>,
    /// What it asks for once because of the first frame.
    more: Vec<Unit>,
    /// What it says to the first frame.
    error: Option<RewindError>,
}

impl Sink for Counting {
    fn receive(&mut self, _frame: &Frame, items: &[Item]) -> Result<Vec<Unit>, RewindError> {
        if let Some(error) = self.error.take() {
            return Err(error);
        }
        let mut came = self.came.lock();
        for item in items {
            match &item.body {
                ItemBody::Page { block, .. } => {
                    *came.pages.entry((item.unit, *block)).or_default() += 1;
                }
                ItemBody::End { .. } => came.ends += 1,
                _ => {}
            }
        }
        Ok(std::mem::take(&mut self.more))
    }

    fn finish(&mut self) -> Result<(), RewindError> {
        self.came.lock().finished += 1;
        Ok(())
    }
}

const PATIENCE: Duration = Duration::from_secs(20);

async fn session_with(peer: &TestPeer, connections: usize, patience: Duration) -> Session {
    let connections = Connections::Fixed(connections);
    let link = Link { connections, patience, max_rate: None, buffers: Buffers::default() };
    Session::open(Arc::new(peer.clone()), link).await.expect("a session").0
}

fn unit(id: u64, count: u32) -> Unit {
    let path = DataPath::new("base/5/16384").unwrap();
    let ranges = vec![BlockRange { first: 0, count }];
    Unit { id, kind: UnitKind::Blocks { path, ranges, signatures: None } }
}

fn work(units: Vec<Unit>) -> Work {
    Work { units, later: None, prepare: Arc::new(AsTheyAre), start: PoolStart::Together }
}

async fn fetched(session: &Session, work: Work) -> (Result<Carried, RewindError>, Came) {
    fetched_by(session, work, |came| Counting { came, more: Vec::new(), error: None }).await
}

async fn fetched_by(
    session: &Session,
    work: Work,
    sink: impl Fn(Arc<Mutex<Came>>) -> Counting + Send + Sync,
) -> (Result<Carried, RewindError>, Came) {
    let came = Arc::new(Mutex::new(Came::default()));
    let sinks = |_| Ok(Box::new(sink(Arc::clone(&came))) as Box<dyn Sink>);
    let carried = run(session, work, sinks, Arc::new(RecordingMonitor::default())).await;
    let came = std::mem::take(&mut *came.lock());
    (carried, came)
}

fn source() -> proto::model::Description {
    described(3..6, planned().start.redo, 0)
}

fn peer(answer: impl Fn(&Unit) -> Reply + Send + Sync + 'static) -> TestPeer {
    TestPeer::new(source(), answer)
}

fn ranges_of(unit: &Unit) -> &[BlockRange] {
    let UnitKind::Blocks { ranges, .. } = &unit.kind else { panic!("{unit:?}") };
    ranges
}

/// Answers honestly, but the first unit that it is asked for it cuts behind so many pages.
fn cutting(behind: usize) -> impl Fn(&Unit) -> Reply + Send + Sync {
    let first = AtomicUsize::new(0);
    move |unit| {
        let mut pages = pages(ranges_of(unit));
        if first.fetch_add(1, Ordering::Relaxed) == 0 {
            pages.truncate(behind);
            return Reply::Cut(pages);
        }
        Reply::Whole(pages)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_comes_once_over_all_connections() {
    let peer = peer(honest(BTreeMap::new()));
    let session = session_with(&peer, 3, PATIENCE).await;
    let units: Vec<_> = (0..200).map(|id| unit(id, 100)).collect();
    let (carried, came) = fetched(&session, work(units)).await;
    let carried = carried.unwrap();
    assert_eq!((came.pages.len(), came.ends, came.finished), (20_000, 200, 3));
    assert!(came.pages.values().all(|times| *times == 1), "a page came twice");
    assert_eq!((carried.payload_bytes.len(), carried.reconnects), (3, 0));
    assert!(carried.payload_bytes.iter().all(|bytes| *bytes > 0), "{carried:?}");
    assert_eq!(peer.asked().len(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_to_fetch_asks_for_nothing() {
    let peer = peer(honest(BTreeMap::new()));
    let session = session_with(&peer, 2, PATIENCE).await;
    let waits = session.waits();
    let (carried, came) = fetched(&session, work(Vec::new())).await;
    assert_eq!((carried.unwrap().total(), came.finished, peer.asked().len()), (0, 2, 0));
    assert_eq!(session.waits(), waits);
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_cut_only_what_did_not_come_is_asked_for() {
    let peer = peer(cutting(3));
    let session = session_with(&peer, 1, PATIENCE).await;
    let (carried, came) = fetched(&session, work(vec![unit(7, 10)])).await;
    assert_eq!(carried.unwrap().reconnects, 1);
    assert_eq!(came.pages.len(), 10);
    assert!(came.pages.values().all(|times| *times == 1), "a page was fetched twice: {came:?}");
    let asked = peer.asked();
    assert_eq!(ranges_of(&asked[1]), [BlockRange { first: 3, count: 7 }]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_unit_of_which_only_the_end_was_lost_is_not_asked_for_again() {
    let peer = peer(cutting(10));
    let session = session_with(&peer, 1, PATIENCE).await;
    let (carried, came) = fetched(&session, work(vec![unit(7, 10), unit(8, 1)])).await;
    carried.unwrap();
    assert_eq!(came.pages.len(), 11);
    let again = peer.asked().iter().skip(1).filter(|unit| unit.id == 7).count();
    assert_eq!(again, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_depends_on_other_units_comes_behind_them() {
    let peer = peer(honest(BTreeMap::new()));
    let session = session_with(&peer, 2, PATIENCE).await;
    let units = Box::pin(async { Ok(vec![unit(8, 2), unit(9, 2)]) });
    let later = Some(Later { cost: 1 << 20, units });
    let all = Work { later, ..work(vec![unit(7, 2)]) };
    let (carried, came) = fetched(&session, all).await;
    carried.unwrap();
    let ids: BTreeSet<u64> = came.pages.keys().map(|(unit, _)| *unit).collect();
    assert_eq!((ids, came.ends), (BTreeSet::from([7, 8, 9]), 3));
}

#[tokio::test(flavor = "multi_thread")]
async fn later_units_that_cannot_be_had_end_the_run() {
    let peer = peer(honest(BTreeMap::new()));
    let session = session_with(&peer, 2, PATIENCE).await;
    let units = Box::pin(async { Err(RewindError::new(Class::Rebuild, "no such WAL")) });
    let all = Work { later: Some(Later { cost: 1, units }), ..work(vec![unit(7, 2)]) };
    let (carried, _) = fetched(&session, all).await;
    assert_eq!(carried.unwrap_err().class(), Class::Rebuild);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sink_may_ask_for_more() {
    let peer = peer(honest(BTreeMap::new()));
    let session = session_with(&peer, 1, PATIENCE).await;
    let asking = |came| Counting { came, more: vec![unit(8, 3)], error: None };
    let (carried, came) = fetched_by(&session, work(vec![unit(7, 2)]), asking).await;
    carried.unwrap();
    assert_eq!((came.pages.len(), came.ends), (5, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_sink_cannot_keep_ends_the_run() {
    let peer = peer(honest(BTreeMap::new()));
    let session = session_with(&peer, 1, PATIENCE).await;
    let full = |came| {
        let error = Some(RewindError::new(Class::Preflight, "the disk is full"));
        Counting { came, more: Vec::new(), error }
    };
    let (carried, came) = fetched_by(&session, work(vec![unit(7, 2)]), full).await;
    assert_eq!((carried.unwrap_err().class(), came.finished), (Class::Preflight, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reply_that_does_not_belong_ends_the_run() {
    let wrong = [
        ItemBody::Page { block: 4, content: PageContent::Present(page_of(4)) },
        ItemBody::End { vanished: false, bytes: 0 },
        ItemBody::Same { first: 0, count: 1 },
    ];
    for body in wrong {
        let answer = body.clone();
        let peer = peer(move |_| Reply::Items(vec![answer.clone()]));
        let session = session_with(&peer, 1, PATIENCE).await;
        let (carried, came) = fetched(&session, work(vec![unit(7, 2)])).await;
        assert_eq!(carried.unwrap_err().class(), Class::Other, "{body:?}");
        assert_eq!((came.pages.len(), peer.asked().len()), (0, 1), "{body:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_with_nothing_in_it_ends_the_run() {
    let peer = peer(|_| Reply::EmptyFrame);
    let session = session_with(&peer, 1, PATIENCE).await;
    let (carried, _) = fetched(&session, work(vec![unit(7, 2)])).await;
    assert_eq!(carried.unwrap_err().class(), Class::Other);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_gone_is_an_answer() {
    let peer = peer(|_| Reply::Items(vec![ItemBody::End { vanished: true, bytes: 0 }]));
    let session = session_with(&peer, 1, PATIENCE).await;
    let (carried, came) = fetched(&session, work(vec![unit(7, 2)])).await;
    carried.unwrap();
    assert_eq!((came.pages.len(), came.ends), (0, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_that_stays_ends_the_run() {
    let peer = peer(|_| Reply::Refused(Refusal::new(Reason::NotServed, "not to anybody")));
    let session = session_with(&peer, 1, PATIENCE).await;
    let (carried, _) = fetched(&session, work(vec![unit(7, 2)])).await;
    assert!(matches!(carried.unwrap_err().remedy(), Remedy::DoWithout(_)));
    assert_eq!(peer.asked().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_that_passes_is_met_with_patience() {
    let asked = AtomicUsize::new(0);
    let peer = peer(move |unit| match asked.fetch_add(1, Ordering::Relaxed) {
        0 | 1 => Reply::Refused(Refusal::new(Reason::Overloaded, "later")),
        _ => Reply::Whole(pages(ranges_of(unit))),
    });
    let session = session_with(&peer, 1, PATIENCE).await;
    let (carried, came) = fetched(&session, work(vec![unit(7, 2)])).await;
    assert_eq!((carried.unwrap().reconnects, came.pages.len()), (2, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_sends_nothing_is_given_up_when_patience_ends() {
    let peer = peer(|_| Reply::Silence);
    let session = session_with(&peer, 1, Duration::from_millis(300)).await;
    let (carried, _) = fetched(&session, work(vec![unit(7, 2)])).await;
    assert_eq!(carried.unwrap_err().class(), Class::Transient);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_node_at_the_address_is_not_fetched_from() {
    let peer = peer(cutting(1));
    let session = session_with(&peer, 1, PATIENCE).await;
    // What was opened already still reaches the first one.
    let mut other = source();
    other.node.directory = [2; 16];
    let connection = session.take(0).await.unwrap();
    session.give(0, connection);
    peer.say(Ok(other));
    let (carried, came) = fetched(&session, work(vec![unit(7, 10)])).await;
    assert!(matches!(carried.unwrap_err().remedy(), Remedy::Replan(_)));
    assert_eq!(came.pages.len(), 1);
}

/// Cannot complete a unit of this number.
struct Unprepared(u64);

impl Prepare for Unprepared {
    fn prepare(&self, unit: &mut Unit) -> Result<Announce, RewindError> {
        match unit.id == self.0 {
            true => Err(RewindError::new(Class::Target, "its file cannot be read")),
            false => Ok(Box::new(|| {})),
        }
    }

    fn cost_at_once(&self) -> u64 {
        1
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_unit_that_cannot_be_completed_ends_the_run() {
    let peer = peer(honest(BTreeMap::new()));
    let session = session_with(&peer, 1, PATIENCE).await;
    let all = Work { prepare: Arc::new(Unprepared(8)), ..work(vec![unit(7, 2), unit(8, 2)]) };
    let (carried, _) = fetched(&session, all).await;
    assert_eq!(carried.unwrap_err().class(), Class::Target);
    assert!(peer.asked().iter().all(|unit| unit.id != 8));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_only_makes_it_faster_may_be_missing() {
    let peer = peer(honest(BTreeMap::new()));
    let session = session_with(&peer, CONNECTIONS_DEFAULT + 2, PATIENCE).await;
    let mut open = Vec::new();
    for number in 0..CONNECTIONS_DEFAULT {
        open.push(session.take(number).await.unwrap());
    }
    for (number, connection) in open.into_iter().enumerate() {
        session.give(number, connection);
    }
    peer.limit_connections(0);
    let units: Vec<_> = (0..20).map(|id| unit(id, 10)).collect();
    let (carried, came) = fetched(&session, work(units)).await;
    carried.unwrap();
    assert_eq!((came.pages.len(), came.ends), (200, 20));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_leaves_a_unit_without_an_end_is_noticed() {
    let asked = AtomicUsize::new(0);
    // The stream ends as if all were said; then nothing is said about the rest.
    let peer = peer(move |unit| match asked.fetch_add(1, Ordering::Relaxed) {
        0 => Reply::Cut(Vec::new()),
        _ => Reply::Whole(pages(ranges_of(unit))),
    });
    let session = session_with(&peer, 1, PATIENCE).await;
    let (carried, came) = fetched(&session, work(vec![unit(7, 2), unit(8, 2)])).await;
    carried.unwrap();
    assert_eq!(came.ends, 2);
}

#[test]
fn what_was_carried_later_is_added() {
    let mut carried = Carried { payload_bytes: vec![5], frames: 1, reconnects: 0 };
    carried.absorb(&Carried { payload_bytes: vec![1, 2], frames: 2, reconnects: 3 });
    assert_eq!(carried.payload_bytes, [6, 2]);
    assert_eq!((carried.total(), carried.frames, carried.reconnects), (8, 3, 3));
}

#[test]
fn a_fetch_is_whole_only_when_every_unit_has_ended() {
    let units = vec![unit(7, 1), unit(8, 1)];
    let shared =
        Shared::new(units, None, Arc::new(AsTheyAre), 1, Arc::new(RecordingMonitor::default()));
    assert_eq!(shared.progress.check_all_came().unwrap_err().class(), Class::Other);
    shared.progress.ended.store(2, Ordering::Relaxed);
    shared.progress.check_all_came().unwrap();
}
