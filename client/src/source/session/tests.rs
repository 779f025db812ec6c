//! Sessions with an in-memory source, and what is done when it is lost.

use pg_format::{DataPath, Lsn};
use proto::fetch::{BlockRange, UnitKind};
use proto::model::FileEntry;
use proto::{Reason, Refusal};

use super::*;
use crate::error::Class;
use crate::test_peer::{Reply, TestPeer, honest, pages};
use crate::test_values::{control, described, least_files};

const BUDGET: u32 = 64 << 20;

fn windows(connections: Connections, first: usize) -> Vec<u32> {
    let buffers = Buffers { receive_bytes: BUDGET, ..Buffers::default() };
    let patience = Duration::from_secs(1);
    let link = Link { connections, patience, max_rate: None, buffers };
    (0..connections.most()).map(|number| link.window(number, first)).collect()
}

#[test]
fn the_receive_budget_is_shared_out_once() {
    for (connections, first) in
        [(Connections::Fixed(3), 3), (Connections::Adaptive, 4), (Connections::Adaptive, 8)]
    {
        let windows = windows(connections, first);
        // The connection that asks questions has the share of a first one.
        let sum: u64 = windows.iter().chain(windows.first()).map(|share| u64::from(*share)).sum();
        assert!(sum <= u64::from(BUDGET), "{connections:?}: {sum}");
        assert!(sum > u64::from(BUDGET) * 9 / 10, "{connections:?}: {sum} is wasted");
    }
}

#[test]
fn a_share_does_not_change_when_connections_are_added() {
    let windows = windows(Connections::Adaptive, 4);
    assert!(windows[..4].iter().all(|share| *share == windows[0]));
    assert!(windows[4..].iter().all(|share| *share == windows[4]));
}

/// Where the newest checkpoint of the source begins.
fn redo() -> Lsn {
    control().checkpoint_copy.redo
}

fn source() -> Description {
    described(3..6, redo(), 0)
}

/// The same node in another life.
fn restarted() -> Description {
    let mut source = source();
    source.node.postmaster = Some((2, 1_700_000_100));
    source
}

fn not_ready() -> Refusal {
    Refusal::new(Reason::NotReady, "it is between two roles")
}

fn link(connections: usize, patience: Duration) -> Link {
    let connections = Connections::Fixed(connections);
    Link { connections, patience, max_rate: None, buffers: Buffers::default() }
}

const PATIENCE: Duration = Duration::from_secs(20);
/// For tests that wait for its end.
const IMPATIENCE: Duration = Duration::from_millis(400);

async fn open_with(peer: &TestPeer, link: Link) -> Session {
    Session::open(Arc::new(peer.clone()), link).await.expect("a session").0
}

fn blocks(count: u32) -> Vec<Unit> {
    let path = DataPath::new("base/5/16384").unwrap();
    let ranges = vec![BlockRange { first: 0, count }];
    vec![Unit { id: 0, kind: UnitKind::Blocks { path, ranges, signatures: None } }]
}

fn listed_files() -> Vec<FileEntry> {
    let path = |name: &str| DataPath::new(name).unwrap();
    let entry = |(name, bytes): (&str, Option<u64>)| FileEntry { path: path(name), bytes };
    least_files().into_iter().map(entry).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_answer_is_what_the_source_is() {
    let peer = TestPeer::new(source(), honest(Default::default()));
    let (_, description) =
        Session::open(Arc::new(peer), link(1, PATIENCE)).await.expect("a session");
    assert_eq!(description.wal_segments.len(), 3);
    assert!(description.node.same_life(&source().node));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_list_that_was_asked_for_first_is_used_once() {
    let peer = TestPeer::new(source(), honest(Default::default()));
    let peer = peer.listing(listed_files(), redo());
    let mut session = open_with(&peer, link(1, PATIENCE)).await;
    let list = session.list().await.unwrap();
    assert_eq!((list.len(), peer.lists()), (least_files().len(), 1));
    session.list().await.unwrap();
    assert_eq!(peer.lists(), 2, "what was listed may have changed since");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_that_began_at_another_checkpoint_is_asked_for_again() {
    let peer = TestPeer::new(source(), honest(Default::default()));
    let peer = peer.listing(listed_files(), Lsn::new(40));
    let mut session = open_with(&peer, link(1, PATIENCE)).await;
    session.list().await.unwrap();
    assert_eq!(peer.lists(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_without_what_every_cluster_has_is_refused() {
    let peer = TestPeer::new(source(), honest(Default::default()));
    let mut session = open_with(&peer, link(1, PATIENCE)).await;
    assert!(session.list().await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_connection_is_made_again_and_the_call_with_it() {
    let peer = TestPeer::new(source(), honest(Default::default()));
    let mut session = open_with(&peer, link(1, PATIENCE)).await;
    let before = peer.connections();
    peer.cut();
    session.describe().await.unwrap();
    assert!(peer.connections() > before);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_life_behind_a_new_connection_means_another_plan() {
    let peer = TestPeer::new(source(), honest(Default::default()));
    let mut session = open_with(&peer, link(1, PATIENCE)).await;
    peer.say(Ok(restarted()));
    peer.cut();
    let error = session.seal().await.unwrap_err();
    assert_eq!(error.remedy(), Remedy::Replan(Replan::SourceChanged));
    let error = session.reconnect(5).await.unwrap_err();
    assert_eq!(error.remedy(), Remedy::Replan(Replan::SourceChanged));
    let error = session.try_take(5).await.unwrap_err();
    assert_eq!(error.remedy(), Remedy::Replan(Replan::SourceChanged));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_is_not_there_is_waited_for_no_longer_than_its_patience() {
    let peer = TestPeer::new(source(), honest(Default::default()));
    let mut session = open_with(&peer, link(1, IMPATIENCE)).await;
    peer.limit_connections(0);
    peer.cut();
    let error = session.describe().await.unwrap_err();
    assert_eq!((error.class(), error.remedy()), (Class::Transient, Remedy::Retry));
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_refused_does_not_try_again() {
    let refusal = Refusal::new(Reason::NotAllowed, "target.example is not on the list");
    let peer = TestPeer::new(source(), honest(Default::default()));
    peer.say(Err(refusal));
    let opened = Session::open_again(Arc::new(peer.clone()), link(1, PATIENCE)).await;
    assert_eq!(opened.err().map(|error| error.class()), Some(Class::Authentication));
    assert!(peer.connections() <= 2, "the one that asks and the one for data");
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_begins_does_not_wait_for_a_source_between_two_roles() {
    let peer = TestPeer::new(source(), honest(Default::default()));
    peer.say(Err(not_ready()));
    let opened = Session::open(Arc::new(peer.clone()), link(1, PATIENCE)).await;
    assert_eq!(opened.err().map(|error| error.remedy()), Some(Remedy::Retry));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_has_begun_waits_for_a_source_between_two_roles() {
    let peer = TestPeer::new(source(), honest(Default::default()));
    peer.say(Err(not_ready()));
    let opening = tokio::spawn(Session::open_again(Arc::new(peer.clone()), link(1, PATIENCE)));
    while peer.connections() < 3 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    peer.say(Ok(source()));
    opening.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_few_questions_are_answered_whole() {
    let peer = TestPeer::new(source(), honest(Default::default()));
    let mut session = open_with(&peer, link(1, PATIENCE)).await;
    let waits = session.waits();
    let items = session.collect(blocks(3)).await.unwrap();
    assert_eq!(items.len(), 4, "three pages and the end");
    assert_eq!(session.waits(), waits + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_was_cut_is_asked_for_again_and_counted_once() {
    let first = std::sync::atomic::AtomicBool::new(true);
    let peer = TestPeer::new(source(), move |unit| {
        let UnitKind::Blocks { ranges, .. } = &unit.kind else { panic!("{unit:?}") };
        let mut pages = pages(ranges);
        if first.swap(false, Ordering::Relaxed) {
            pages.truncate(1);
            return Reply::Cut(pages);
        }
        Reply::Whole(pages)
    });
    let mut session = open_with(&peer, link(1, PATIENCE)).await;
    let items = session.collect(blocks(3)).await.unwrap();
    assert_eq!((items.len(), peer.asked().len()), (4, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_to_another_question_is_refused_at_once() {
    let peer = TestPeer::new(source(), |_| {
        let hashes = vec![proto::PageHash::of(b"page")];
        Reply::Whole(vec![ItemBody::PageHashes { first: 0, hashes }])
    });
    let mut session = open_with(&peer, link(1, PATIENCE)).await;
    let error = session.collect(blocks(3)).await.unwrap_err();
    assert_eq!((error.class(), peer.asked().len()), (Class::Other, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_says_nothing_any_more_has_stalled() {
    let peer = TestPeer::new(source(), |_| Reply::Silence);
    let mut session = open_with(&peer, link(1, IMPATIENCE)).await;
    let error = session.collect(blocks(3)).await.unwrap_err();
    assert_eq!(error.class(), Class::Transient);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_more_connection_is_tried_once_and_done_without() {
    let peer = TestPeer::new(source(), honest(Default::default()));
    let session = open_with(&peer, link(1, PATIENCE)).await;
    peer.limit_connections(0);
    assert!(session.try_take(7).await.unwrap().is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_was_given_back_is_used_again() {
    let peer = TestPeer::new(source(), honest(Default::default()));
    let session = open_with(&peer, link(1, PATIENCE)).await;
    let connection = session.take(0).await.unwrap();
    let made = peer.connections();
    session.give(0, connection);
    drop(session.take(0).await.unwrap());
    assert_eq!(peer.connections(), made);
    // One that was added later has another window.
    let added = session.take(3).await.unwrap();
    session.give(3, added);
    drop(session.take(0).await.unwrap());
    assert_eq!(peer.connections(), made + 2);
}
