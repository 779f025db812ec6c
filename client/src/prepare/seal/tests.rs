//! Stages and seals what an in-memory source has, without a server.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use pg_format::{Covered, Lsn};

use super::*;
use crate::config::{Config, Connections};
use crate::prepare::claim::Kept;
use crate::prepare::stage::stage;
use crate::prepare::wal_follower::WalFollower;
use crate::source::link::{Buffers, Link};
use crate::source::{Answering, Patience, connect_by};
use crate::target::wal_context;
use crate::task::Stop;
use crate::test_peer::{Reply, TestPeer, honest};
use crate::test_values::{
    EmptyTarget, RecordingMonitor, config, described, node, planned, snapshot, wal_of_noops,
};

fn sealed(end: u64, directory: u8) -> Sealed {
    let node = node([directory; 16]);
    Sealed { end: Lsn::new(end), end_timeline: node.timeline, node }
}

fn replayed(end: u64) -> Replayed {
    let (end, covered) = (Lsn::new(end), Covered::new(Lsn::new(0)));
    Replayed { hazards: Vec::new(), covered, end }
}

#[test]
fn another_life_of_the_source_is_planned_for_anew() {
    let source = snapshot(0..1, Lsn::new(100));
    assert!(check_same_life(&source, &sealed(200, 1)).is_ok());
    let other = check_same_life(&source, &sealed(200, 2)).unwrap_err();
    assert!(matches!(other, Abort::Replan { reason: Replan::SourceChanged, .. }));
}

#[test]
fn wal_around_the_fork_that_does_not_fit_is_done_without_where_that_is_possible() {
    let judge =
        |wanted, strategy, end| check_fork_fits(wanted, strategy, &replayed(end), &sealed(200, 1));
    use Strategy::{Fork, Latest};
    use StrategyChoice::{Auto, Only};
    assert!(judge(Auto, Fork, 200).is_ok());
    let short = judge(Auto, Fork, 150).unwrap_err();
    assert!(matches!(short, Abort::Replan { reason: Replan::ForkImpossible, .. }));
    // The check of the end refuses it.
    assert!(judge(Only(Fork), Fork, 150).is_ok());
    assert!(judge(Auto, Latest, 150).is_ok());
}

const RECORDS: usize = 20;

fn wal() -> BTreeMap<String, Vec<u8>> {
    [("pg_wal/000000010000000000000003".to_owned(), wal_of_noops(RECORDS).0)].into()
}

fn end() -> Lsn {
    wal_of_noops(RECORDS).1
}

fn peer(answer: impl Fn(&Unit) -> Reply + Send + Sync + 'static) -> TestPeer {
    TestPeer::new(described(3..4, planned().start.redo, 0), answer).ending(end())
}

/// A rewind from a peer, from the claim on.
struct Rewind {
    target: EmptyTarget,
    cx: Context,
    config: Config,
    planned: Planned,
}

impl Rewind {
    fn new() -> Self {
        let cx = Context::new(Arc::new(RecordingMonitor::default()), Stop::default());
        Self { target: EmptyTarget::new(), cx, config: config(), planned: planned() }
    }

    async fn source(&self, peer: &TestPeer) -> Source {
        let link = Link {
            connections: Connections::Fixed(1),
            patience: Duration::from_secs(20),
            max_rate: None,
            buffers: Buffers::default(),
        };
        let answering = connect_by(Arc::new(peer.clone()), link, Patience::None).await;
        answering.and_then(Answering::judged).expect("a source")
    }

    fn claim(&self) -> Claim {
        Claim::take(&self.target.target, &self.cx.monitor, Kept::Nothing, 1).expect("taken")
    }

    /// Stages what is planned, with WAL up to `announced`.
    async fn stage(&self, source: &Source, claim: &Claim, announced: Lsn) -> Result<Staged, Abort> {
        let target = &self.target.target;
        let context = wal_context(&target.control.file);
        let start = self.planned.start.redo.page_start();
        let follower = WalFollower::new(source, &target.disk, context, start);
        let job = Job { config: &self.config, target, source, planned: &self.planned };
        stage(&self.cx, job, claim, BeforeImages::Saved, follower, announced, 0).await
    }

    async fn seal(
        &self,
        source: &Source,
        claim: &Claim,
        staged: Staged,
    ) -> Result<SealedRewind, Abort> {
        let target = &self.target.target;
        let job = Job { config: &self.config, target, source, planned: &self.planned };
        seal(&self.cx, job, claim, BeforeImages::Saved, staged).await
    }

    fn is_sealed(&self) -> bool {
        self.target.names().iter().any(|name| name == ".pgrejoin/sealed")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_planned_is_staged_and_its_wal_is_read() {
    let rewind = Rewind::new();
    let source = rewind.source(&peer(honest(wal()))).await;
    let claim = rewind.claim();
    let staged = rewind.stage(&source, &claim, end()).await.unwrap();
    assert_eq!(staged.follower.staged().len(), 1);
    assert!(staged.images.is_empty() && staged.fetched.notes.pages == 0);
    assert!(!rewind.is_sealed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stage_whose_wal_is_gone_means_another_plan() {
    let rewind = Rewind::new();
    let source = rewind.source(&peer(honest(BTreeMap::new()))).await;
    let claim = rewind.claim();
    let abort = rewind.stage(&source, &claim, end()).await.unwrap_err();
    assert!(matches!(abort, Abort::Replan { reason: Replan::WalUnavailable, .. }), "{abort:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sealed_rewind_is_complete_and_durable() {
    let rewind = Rewind::new();
    let source = rewind.source(&peer(honest(wal()))).await;
    let claim = rewind.claim();
    let staged = rewind.stage(&source, &claim, end()).await.unwrap();
    let sealed = rewind.seal(&source, &claim, staged).await.unwrap();
    assert!(rewind.is_sealed());
    assert!(sealed.manifest.undo.is_some(), "it can be taken back");
    claim.leave();
}

#[tokio::test(flavor = "multi_thread")]
async fn another_life_at_the_seal_means_another_plan() {
    let rewind = Rewind::new();
    let peer = peer(honest(wal()));
    let source = rewind.source(&peer).await;
    let claim = rewind.claim();
    let staged = rewind.stage(&source, &claim, end()).await.unwrap();
    let mut restarted = described(3..4, planned().start.redo, 0);
    restarted.node.postmaster = Some((2, 1_700_000_100));
    peer.say(Ok(restarted));
    let abort = rewind.seal(&source, &claim, staged).await.unwrap_err();
    assert!(matches!(abort, Abort::Replan { reason: Replan::SourceChanged, .. }), "{abort:?}");
    assert!(!rewind.is_sealed());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_before_the_checkpoint_is_refused() {
    let rewind = Rewind::new();
    let answer = honest(wal());
    let peer = TestPeer::new(described(3..4, planned().start.redo, 0), answer);
    let source = rewind.source(&peer.ending(Lsn::new(0x300_0048))).await;
    let claim = rewind.claim();
    let staged = rewind.stage(&source, &claim, end()).await.unwrap();
    assert!(matches!(rewind.seal(&source, &claim, staged).await, Err(Abort::Failed(_))));
    assert!(!rewind.is_sealed());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_replan_leaves_is_a_cache_and_nothing_that_stops_a_server() {
    let rewind = Rewind::new();
    let source = rewind.source(&peer(honest(BTreeMap::new()))).await;
    let claim = rewind.claim();
    let life = source.snapshot.description.node.life();
    claim.save_plan(&rewind.config, &rewind.target.target, life, &rewind.planned).unwrap();
    let abort = rewind.stage(&source, &claim, end()).await.unwrap_err();
    let leftover = claim.settle(&abort);
    assert!(matches!(leftover, crate::prepare::claim::Leftover::Cache(_)), "{leftover:?}");
    assert!(!rewind.is_sealed());
}
