//! Brings everything that a plan needs to this node's disk.

use std::pin::pin;
use std::sync::Arc;

use pg_format::{Covered, Lsn};
use tokio::sync::oneshot;

use super::claim::Claim;
use super::disk_space::BeforeImages;
use super::fetch::{self, FetchWanted, Fetched};
use super::save_before_images::{self, Which};
use super::wal_follower::WalFollower;
use super::wal_pieces::{WalPieces, WalReceiver};
use super::{hazards, replay_check};
use crate::config::Config;
use crate::error::{Abort, RewindError};
use crate::plan::Planned;
use crate::plan::before_images::images;
use crate::plan::units::UNIT_BYTES;
use crate::source::Source;
use crate::source::page_delta::OwnPages;
use crate::staging::manifest::PackDigest;
use crate::staging::partial_fetch::Recovered;
use crate::staging::{read_back_error, staging_error};
use crate::target::Target;
use crate::task::{Context, blocking};

/// All that is staged for a plan, while the source's WAL is still followed.
#[derive(Debug)]
pub struct Staged {
    /// Pages and files.
    pub fetched: Fetched,
    /// The WAL so far.
    pub follower: WalFollower,
    /// Blocks that were left to replay.
    pub covered: Covered,
    /// Undo images of what will be overwritten.
    pub images: Vec<PackDigest>,
    /// Payload bytes of WAL that was asked for before the plan was made.
    pub early_wal_bytes: u64,
}

/// What is planned, and for which nodes.
#[derive(Debug, Clone, Copy)]
pub struct Job<'a> {
    /// The operator's choices.
    pub config: &'a Config,
    /// The target.
    pub target: &'a Arc<Target>,
    /// The source.
    pub source: &'a Source,
    /// The plan.
    pub planned: &'a Planned,
}

/// Fetches pages, files, and WAL up to `announced`, and saves undo images meanwhile. `early_wal_bytes` are
/// the payload bytes of WAL that was asked for before the plan was made.
pub async fn stage(
    cx: &Context,
    job: Job<'_>,
    claim: &Claim,
    before_images: BeforeImages,
    follower: WalFollower,
    announced: Lsn,
    early_wal_bytes: u64,
) -> Result<Staged, Abort> {
    let Job { target, planned, .. } = job;
    let wanted = images(&planned.plan, &target.files);
    let save = save_before_images::save(target, claim, before_images, Which::Planned, wanted);
    let (mut save, mut fetch) = (pin!(save), pin!(fetch_all(cx, job, claim, follower, announced)));
    let (mut saved, mut fetched) = (None, None);
    loop {
        // A fetch that fails does not wait for the undo images of its plan.
        tokio::select! {
            images = &mut save, if saved.is_none() => saved = Some(images?),
            all = &mut fetch, if fetched.is_none() => fetched = Some(all?),
        }
        match (fetched, saved) {
            (Some(FetchedAll { fetched, follower, covered }), Some(images)) => {
                return Ok(Staged { fetched, follower, covered, images, early_wal_bytes });
            }
            (one, other) => (fetched, saved) = (one, other),
        }
    }
}

struct FetchedAll {
    fetched: Fetched,
    follower: WalFollower,
    covered: Covered,
}

/// Fetches everything over all connections. As soon as the WAL up to `announced` has come it is read; from
/// then on the source's new WAL is fetched as it is written.
async fn fetch_all(
    cx: &Context,
    job: Job<'_>,
    claim: &Claim,
    follower: WalFollower,
    announced: Lsn,
) -> Result<FetchedAll, Abort> {
    let Job { target, source, planned, .. } = job;
    let (disk, plan) = (Arc::clone(&target.disk), planned.plan.clone());
    let recovered =
        blocking(move || Recovered::read(&*disk, &plan).map_err(read_back_error)).await?;
    let (mut follower, missing) = blocking(move || {
        let mut follower = follower;
        let missing = follower.missing_to(announced, UNIT_BYTES).map_err(staging_error)?;
        Ok::<_, RewindError>((follower, missing))
    })
    .await?;
    follower.count(missing.iter().map(|piece| piece.length).sum());
    let size = source.snapshot.segment_size();
    let pieces = WalPieces::new(Arc::clone(&target.disk), size, &missing);
    // Nobody writes WAL into staging once the fetch is over, however it ends.
    let _closing = pieces.receiver.closing();
    let own = OwnPages::new(Arc::clone(&target.directory));
    let receiver = Arc::clone(&pieces.receiver);
    let (say, covered) = oneshot::channel();
    let wanted =
        FetchWanted { plan: &planned.plan, run: claim.run(), recovered, wal: pieces, own, covered };
    let mut fetch =
        pin!(fetch::fetch(&source.session, &target.disk, wanted, Arc::clone(&cx.monitor)));
    let look = look_at_wal(cx, job, follower, &receiver, announced);
    let LookedAt { mut follower, covered } = tokio::select! {
        // The fetch cannot succeed before it knows what replay rebuilds, so only an error ends it here.
        Err(error) = &mut fetch => return Err(error.into()),
        looked_at = look => looked_at?,
    };
    drop(say.send(covered.clone()));
    let fetched = tokio::select! {
        fetched = fetch => fetched?,
        failed = follower.follow() => match failed? {},
    };
    Ok(FetchedAll { fetched, follower, covered })
}

struct LookedAt {
    follower: WalFollower,
    covered: Covered,
}

/// Waits for the announced WAL and decodes it: its hazards and the blocks that replay rebuilds must be known
/// before the remaining pages are asked for.
async fn look_at_wal(
    cx: &Context,
    job: Job<'_>,
    follower: WalFollower,
    pieces: &WalReceiver,
    announced: Lsn,
) -> Result<LookedAt, Abort> {
    let Job { config, target, source, planned } = job;
    pieces.complete().await;
    let mut follower = blocking(move || {
        let mut follower = follower;
        follower.recover().map_err(read_back_error)?;
        Ok::<_, RewindError>(follower)
    })
    .await?;
    follower.advance_to(announced).await?;
    let staged = follower.staged().clone();
    let replayed = replay_check::read(cx, target, planned, staged, announced).await?;
    hazards::check(config, source, planned, &replayed.hazards).await?;
    Ok(LookedAt { follower, covered: replayed.covered })
}
