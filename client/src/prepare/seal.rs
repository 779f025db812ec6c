//! From a plan to a sealed manifest: fetches, follows the WAL, checks, and makes it all durable.

use std::collections::BTreeSet;
use std::pin::pin;
use std::sync::Arc;

use pg_format::wal::SegmentName;
use pg_format::{Covered, DataPath, FileClass, Lsn, RelationSegment, TimelineHistory};
use proto::fetch::{ItemBody, Unit, UnitKind};
use proto::model::{Description, Role, Sealed};
use tokio::sync::oneshot;
use tokio_util::task::AbortOnDropHandle;

use crate::apply::before_images::Gate;
use crate::apply::preflight::Room;
use crate::cli::StrategyArg;
use crate::config::Config;
use crate::divergence::common_wal::{Analysis, source_start};
use crate::error::{Class, RewindError};
use crate::monitor::steps::Steps;
use crate::monitor::{Monitor, Step};
use crate::outcome::Outcome;
use crate::plan::before_images::{cut_images, images};
use crate::plan::replay_hazards::Hazard;
use crate::plan::{Plan, SourceFiles, Strategy, units};
use crate::prepare::fetch::{self, Staged, Wanted};
use crate::prepare::page_cache;
use crate::prepare::prefetch::WalAhead;
use crate::prepare::replay_check::{FutureWal, Replayed, replay, switches_timeline};
use crate::prepare::save_before_images::PLANNED;
use crate::prepare::wal_follower::WalFollower;
use crate::prepare::wal_pieces::WalUnits;
use crate::source::Session;
use crate::source::page_delta::OwnPages;
use crate::source_checks::{check_contents, check_seal, check_shrink, what_is_left};
use crate::staging::disk::Disk;
use crate::staging::external::Staging;
use crate::staging::manifest::Manifest;
use crate::staging::partial_fetch::Recovered;
use crate::staging::{marks, reserve, staging};
use crate::strategy::candidates::Choice;
use crate::target::places::check_place;
use crate::target::{Target, local_wal};
use crate::task::{Stop, blocking};

/// How an attempt ended.
pub(crate) enum Attempt {
    /// Nothing more is to be done.
    Finished(Box<Outcome>),
    /// The staged set is complete.
    Sealed(Box<SealedRun>),
    /// The source changed, or the strategy turned out impossible: plan again.
    Again {
        /// What happened.
        why: String,
        /// Set if strategy *fork* must not be tried again.
        without_fork: Option<String>,
    },
}

/// A complete staged set.
pub(crate) struct SealedRun {
    pub(crate) manifest: Manifest,
    pub(crate) outcome: Outcome,
}

/// Lets nobody write WAL into staging once the fetch is over, however it ends.
struct Closing(Arc<WalUnits>);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// How the fetch ended.
enum Fetched {
    /// All is staged, and the WAL is followed no further.
    All(Box<(Staged, WalFollower, Covered)>),
    /// The WAL says that it must be planned anew.
    Again(Attempt),
}

/// Everything the way to the seal needs.
pub(crate) struct Sealing<'a> {
    pub(crate) config: &'a Config,
    pub(crate) target: &'a Arc<Target>,
    pub(crate) disk: &'a Arc<dyn Disk>,
    /// Where packs and WAL are staged, if not in the state directory.
    pub(crate) staging: Option<&'a Staging>,
    pub(crate) monitor: &'a Arc<dyn Monitor>,
    pub(crate) session: Session,
    /// Where the source's WAL ended before anything was copied.
    pub(crate) announced: Sealed,
    pub(crate) source: &'a Description,
    pub(crate) history: &'a TimelineHistory,
    pub(crate) analysis: &'a Analysis,
    pub(crate) choice: &'a Choice<'a>,
    /// Redo position of the source's newest checkpoint before anything was read from it: by an
    /// earlier run, if this one goes on with its plan.
    pub(crate) source_redo: Lsn,
    /// Counts the plans made and the runs begun for this rewind.
    pub(crate) attempt: u32,
    pub(crate) files: &'a SourceFiles,
    pub(crate) stop: &'a Stop,
    /// Payload bytes of page hashes that were compared.
    pub(crate) hash_bytes: u64,
    pub(crate) plan: Plan,
    pub(crate) kept: Vec<String>,
    /// WAL that was asked for before the plan was made.
    pub(crate) ahead: WalAhead,
    /// Files of a plan that does not hold any more, whose pages are a cache.
    pub(crate) cache: Option<Vec<DataPath>>,
    /// Whether what is overwritten is saved, and who may stop that.
    pub(crate) undo: Option<Arc<Gate>>,
}

impl Sealing<'_> {
    pub(crate) async fn run(mut self, steps: &mut Steps) -> Result<Attempt, RewindError> {
        steps.begin(Step::Fetch);
        let files = &self.target.files;
        let follower = self.follower()?;
        let now = self.announced.end;
        if let Some(again) = self.changed(&self.announced) {
            return Ok(again);
        }
        if let Some(files) = self.cache.take() {
            let what = (self.attempt, Arc::clone(self.monitor));
            let pages = (files, &*units::units(&self.plan));
            self.hash_bytes += page_cache::take_over(&self.session, self.disk, pages, what).await?;
        }
        // The old pages are saved while the new ones travel.
        let planned = self.images(PLANNED, images(&self.plan, files));
        let ((staged, mut follower, covered), mut images) = {
            let (mut planned, mut fetch) = (pin!(planned), pin!(self.fetch(follower, now)));
            let (mut saved, mut fetched) = (None, None);
            loop {
                match (fetched, saved) {
                    (Some(fetched), Some(saved)) => break (fetched, saved),
                    (one, other) => (fetched, saved) = (one, other),
                }
                tokio::select! {
                    images = &mut planned, if saved.is_none() => saved = Some(images?),
                    all = &mut fetch, if fetched.is_none() => match all? {
                        Fetched::All(all) => fetched = Some(*all),
                        // Images of this plan are not waited for.
                        Fetched::Again(again) => return Ok(again),
                    },
                }
            }
        };
        steps.begin(Step::Seal);
        self.session.waited();
        let described = self.described();
        let sealed = self.session.seal().await?;
        if let Some(again) = self.changed(&sealed) {
            return Ok(again);
        }
        check_seal(self.source, &sealed)?;
        self.check_end(&sealed)?;
        let notes = &staged.notes;
        let major = self.source.node.control.major;
        check_contents(&self.plan, self.files, &notes.contents, &notes.vanished, major)?;
        follower.advance_to(sealed.end).await?;
        follower.finish(sealed.end).map_err(staging)?;
        let torn = self.torn(&staged);
        let replayed = self.replay(follower.staged(), sealed.end).await?;
        if let Some(again) = self.hazards(&replayed.hazards).await? {
            return Ok(again);
        }
        if let Some(again) = self.ends_too_early(&replayed, &sealed) {
            return Ok(again);
        }
        self.check_replay(&replayed, &sealed, (&torn, &covered))?;
        let auto_conf = self.source_auto_conf().await?;
        let wal = self.with_timeline_ends(follower.staged(), sealed.end)?;
        let mut manifest = self.manifest(&sealed, &staged, &wal, auto_conf)?;
        images.extend(self.images("cut", cut_images(&manifest, self.plan.files.len())).await?);
        self.check_what_is_left(&manifest)?;
        manifest.undo = self.way_back(&manifest, images)?;
        self.check_room(&manifest, &wal)?;
        reserve::take(&**self.disk, &self.target.directory, &manifest).map_err(staging)?;
        let bytes = manifest.encode().map_err(|error| {
            RewindError::because(Class::Other, "the manifest cannot be written", error)
        })?;
        marks::seal(&**self.disk, &bytes).map_err(staging)?;
        let described = described.await.ok().flatten();
        let outcome = self.outcome(&sealed, &staged, (&follower, &manifest, described.as_ref()));
        Ok(Attempt::Sealed(Box::new(SealedRun { manifest, outcome })))
    }

    /// WAL around the fork that does not fit together is done without, where that is possible.
    fn ends_too_early(&self, replayed: &Replayed, sealed: &Sealed) -> Option<Attempt> {
        let can_do_without =
            self.choice.strategy == Strategy::Fork && self.config.strategy == StrategyArg::Auto;
        let why = format!("the WAL around the fork does not fit together at {}", replayed.end);
        (replayed.end < sealed.end && can_do_without)
            .then(|| Attempt::Again { without_fork: Some(why.clone()), why })
    }

    /// R8: another life of the source, or another node at its address, is planned for anew.
    fn changed(&self, now: &Sealed) -> Option<Attempt> {
        let why = "the source was restarted, promoted or stopped while it was read".to_owned();
        let same = now.node.same_life(&self.source.node);
        (!same).then_some(Attempt::Again { why, without_fork: None })
    }

    pub(crate) fn fork_segment(&self) -> u64 {
        let size = self.source.node.control.wal_segment_size;
        self.analysis.fork.map_or(0, |fork| size.segment_of(fork.lsn))
    }

    /// Decodes the WAL up to `to` as it will be replayed, beside whatever else goes on.
    async fn replay(
        &self,
        staged: &BTreeSet<SegmentName>,
        to: Lsn,
    ) -> Result<Replayed, RewindError> {
        let (target, disk) = (Arc::clone(self.target), Arc::clone(self.disk));
        let signals = Arc::clone(&self.stop.signals);
        let staged = staged.clone();
        let (from, fork_segment) = (self.choice.start.redo, self.fork_segment());
        let replayed = blocking(move || {
            let local = local_wal(&target);
            let context = local.context;
            let wal =
                FutureWal { disk: &*disk, staged: &staged, local, fork_segment, signals: &signals };
            replay(&wal, context, (from, to)).map_err(|error| {
                RewindError::because(Class::Other, "the WAL to be replayed is not usable", error)
            })
        })
        .await;
        self.go_on()?;
        replayed
    }

    /// Work that does not wait looks at the signal itself.
    pub(crate) fn go_on(&self) -> Result<(), RewindError> {
        if self.stop.signals.stop() {
            let message = "stopped by a signal; the target is as it was";
            return Err(RewindError::new(Class::Interrupted, message));
        }
        Ok(())
    }

    /// Judges what is left of each database by what came, which may be less than what was listed.
    fn check_what_is_left(&self, manifest: &Manifest) -> Result<(), RewindError> {
        if self.config.accept_shrink {
            return Ok(());
        }
        check_shrink(&self.target.files, &what_is_left(self.files, manifest))
    }

    /// Looks once more, with what is staged by now, whether there is room for the change itself.
    fn check_room(
        &self,
        manifest: &Manifest,
        wal: &BTreeSet<SegmentName>,
    ) -> Result<(), RewindError> {
        let size = self.source.node.control.wal_segment_size;
        let staging = self.config.staging_dir.as_deref();
        let directory = &self.target.directory;
        let mut room = Room::on(directory, staging);
        // What is staged already takes room no more, unless it must be copied to be put in place.
        if staging.is_some() || directory.wal_is_elsewhere() {
            room.copied_wal_bytes = size.bytes().saturating_mul(wal.len() as u64);
        }
        room.keeps_cut = manifest.undo.is_some();
        let plan = Plan { files: manifest.files.clone(), ..Plan::default() };
        room.check(&plan, &self.target.files)
    }

    /// What the source is at the end, for the report. A source that is gone by now does not make a complete set
    /// incomplete.
    fn described(&self) -> AbortOnDropHandle<Option<Description>> {
        let mut session = self.session.clone();
        AbortOnDropHandle::new(tokio::spawn(async move { session.describe().await.ok() }))
    }

    /// Fetches pages, files and the WAL up to `now` over all connections. As soon as the WAL is there
    /// it is looked at, and from then on what the source writes is followed.
    async fn fetch(&self, follower: WalFollower, now: Lsn) -> Result<Fetched, RewindError> {
        let (monitor, disk) = (Arc::clone(self.monitor), Arc::clone(self.disk));
        let plan = self.plan.clone();
        let recovered = blocking(move || Recovered::read(&*disk, &plan).map_err(staging)).await?;
        let (mut follower, pieces) = blocking(move || {
            let mut follower = follower;
            let pieces = follower.missing_to(now, units::UNIT_BYTES).map_err(staging)?;
            Ok((follower, pieces))
        })
        .await?;
        follower.count(pieces.iter().map(|piece| piece.length).sum());
        let size = self.source.node.control.wal_segment_size;
        let wal = WalUnits::new(Arc::clone(self.disk), size, &pieces);
        let announced = Arc::clone(&wal.1);
        let _closing = Closing(Arc::clone(&announced));
        let own = OwnPages::new(Arc::clone(&self.target.directory));
        let (say, covered) = oneshot::channel();
        let (plan, attempt) = (&self.plan, self.attempt);
        let wanted = Wanted { plan, attempt, recovered, wal, own, covered };
        let mut fetch = pin!(fetch::fetch(&self.session, self.disk, wanted, monitor));
        let look = self.look_at_wal(follower, &announced, now);
        let looked = tokio::select! {
            // It does not end before it was told what is covered.
            Err(error) = &mut fetch => return Err(error),
            looked = look => looked?,
        };
        let (mut follower, covered) = match looked {
            Ok(looked) => looked,
            Err(again) => return Ok(Fetched::Again(again)),
        };
        drop(say.send(covered.clone()));
        let staged = tokio::select! {
            staged = fetch => staged?,
            failed = follower.follow() => match failed? {},
        };
        Ok(Fetched::All(Box::new((staged, follower, covered))))
    }

    /// Waits for the announced WAL and decodes it; what it says about going on, and what it rebuilds, is
    /// known before the rest is asked for.
    async fn look_at_wal(
        &self,
        follower: WalFollower,
        announced: &WalUnits,
        now: Lsn,
    ) -> Result<Result<(WalFollower, Covered), Attempt>, RewindError> {
        announced.complete().await;
        let mut follower = blocking(move || {
            let mut follower = follower;
            follower.recover().map_err(staging)?;
            Ok(follower)
        })
        .await?;
        follower.advance_to(now).await?;
        let early = self.replay(follower.staged(), now).await?;
        let again = self.hazards(&early.hazards).await?;
        Ok(again.map_or(Ok((follower, early.covered)), Err))
    }

    /// Whether a tablespace of the source is to be elsewhere here: replay would use its literal path.
    fn is_mapped(&self, place: &str) -> bool {
        self.config.tablespace_mapping.iter().any(|(old, _)| old == place)
    }

    /// R9, R11, R12: plans again where another start of replay avoids the hazard, refuses where
    /// none does.
    async fn hazards(&self, hazards: &[Hazard]) -> Result<Option<Attempt>, RewindError> {
        let newest = self.source_redo;
        for hazard in hazards {
            match hazard {
                // Without a path it lies in place, and replay makes it there.
                Hazard::Tablespace { location: Some(place), .. }
                    if place.is_empty()
                        || (check_place(place).is_ok() && !self.is_mapped(place)) =>
                {
                    continue;
                }
                // Only pages read while they were written need it, and those changed later.
                Hazard::FullPageWritesOff { at } if *at < newest => continue,
                Hazard::FullPageWritesOff { .. } if self.source.node.role == Role::Stopped => {
                    continue;
                }
                _ => {}
            }
            if hazard.at() < newest && self.choice.strategy == Strategy::Fork {
                if self.config.strategy == StrategyArg::Fork {
                    return Err(RewindError::new(Class::Preflight, hazard.explain_to_fork()));
                }
                let why = hazard.explain_to_fork();
                let without_fork = Some(why.clone());
                return Ok(Some(Attempt::Again { why, without_fork }));
            }
            let now = self.session.clone().describe().await?;
            if source_start(&now).redo > hazard.at() {
                let why = format!("the source made a checkpoint after {}", hazard.at());
                return Ok(Some(Attempt::Again { why, without_fork: None }));
            }
            let advice = match self.config.strategy {
                StrategyArg::Fork => hazard.explain_to_fork_without_checkpoint(),
                _ => hazard.explain(),
            };
            return Err(RewindError::new(Class::Preflight, advice));
        }
        Ok(None)
    }

    /// R7: the end must be a place replay can reach on the timeline it is written for.
    fn check_end(&self, sealed: &Sealed) -> Result<(), RewindError> {
        let last = Lsn::new(sealed.end.as_u64().saturating_sub(1));
        let refuse = |message: String| Err(RewindError::new(Class::Other, message));
        if self.history.timeline_of(last) != sealed.end_timeline {
            return refuse(format!(
                "the source says {} is on timeline {}, its history says otherwise",
                sealed.end, sealed.end_timeline
            ));
        }
        if sealed.end <= self.choice.start.checkpoint {
            return refuse(format!(
                "the source's end of WAL {} lies before the checkpoint replay starts from",
                sealed.end
            ));
        }
        Ok(())
    }

    fn torn(&self, staged: &Staged) -> Vec<(RelationSegment, u32)> {
        let torn = staged.notes.torn.iter().filter_map(|(file, block)| {
            match FileClass::of(&self.plan.files.get(*file)?.path) {
                FileClass::Relation(segment) => Some((segment, *block)),
                _ => None,
            }
        });
        torn.collect()
    }

    fn check_replay(
        &self,
        replayed: &Replayed,
        sealed: &Sealed,
        (torn, covered): (&[(RelationSegment, u32)], &Covered),
    ) -> Result<(), RewindError> {
        if replayed.end < sealed.end {
            let message = format!(
                "the WAL to be replayed stops at {} although it must reach {}",
                replayed.end, sealed.end
            );
            return Err(RewindError::new(Class::Other, message));
        }
        if !replayed.covered.confirms(covered) {
            let message = "the staged WAL is not what it was when pages were left to its replay";
            return Err(RewindError::new(Class::Other, message));
        }
        let rebuilt = |(segment, block): &&(_, _)| replayed.covered.contains(segment, *block);
        if let Some((segment, block)) = torn.iter().find(|block| !rebuilt(block)) {
            let message = format!(
                "block {block} of relation {} on the source was torn whenever it was read and \
                 replay does not rebuild it: check the source for corruption, or try again later",
                segment.relation
            );
            return Err(RewindError::new(Class::Transient, message));
        }
        let switched = switches_timeline(self.history, self.source_redo, sealed.end);
        if self.source.node.role == Role::Standby && switched {
            // Full images are relative to the promoted node's restartpoint, not to this standby's.
            let checked = self.source.node.control.has_checksums() && torn.is_empty();
            if !checked {
                let message = "the source is a standby that changed timelines since its last \
                               restartpoint: run CHECKPOINT on the primary, then on the source, \
                               and try again";
                return Err(RewindError::new(Class::Transient, message));
            }
        }
        Ok(())
    }

    /// The source's automatic settings, when they replace the target's and are added to.
    async fn source_auto_conf(&mut self) -> Result<Option<Vec<u8>>, RewindError> {
        if !self.config.config_from_source {
            return Ok(None);
        }
        let path = DataPath::new("postgresql.auto.conf")
            .map_err(|error| staging(std::io::Error::other(error)))?;
        let kind = UnitKind::File { path, offset: 0, length: 1 << 20 };
        let mut text = Vec::new();
        for item in self.session.collect(vec![Unit { id: 0, kind }]).await? {
            if let ItemBody::Chunk(chunk) = item.body {
                text.extend_from_slice(chunk.data());
            }
        }
        Ok(Some(text))
    }
}
