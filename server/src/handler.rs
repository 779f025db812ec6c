//! Answers the calls: checks the peer, moves the work to blocking threads.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use data_dir::private_keys::KeyVerdicts;
use parking_lot::Mutex;
use pg_format::file_class::OWN_DIRECTORY;
use proto::limits::{WAL_SEGMENTS_MAX, WORKERS_MAX, WORKERS_PER_IDENTITY_MAX};
use proto::model::{Description, Sealed, Tablespace};
use proto::service::{FileEntries, FrameReceiver, Handler, Units};
use proto::tls::Peer;
use proto::{Reason, Refusal};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::allow::AllowList;
use crate::audit::{AuditSessions, OpenCall};
use crate::config::Queues;
use crate::fetch::{self, QueuedUnits, StreamJob};
use crate::refusal_log::RefusalLog;
use crate::reply_stream::RateLimits;
use crate::request_budget::RequestBudget;
use crate::{list, node, wal_end};

/// Batches of a file list made but not sent.
const LIST_BATCHES_QUEUED: usize = 4;

/// Everything the calls need.
pub(crate) struct Calls {
    pub(crate) pgdata: PathBuf,
    pub(crate) allow: Arc<AllowList>,
    pub(crate) rates: Option<Arc<RateLimits>>,
    pub(crate) sessions: Arc<AuditSessions>,
    pub(crate) budget: RequestBudget,
    pub(crate) log: Arc<RefusalLog>,
    /// Which files were found to hold private keys.
    verdicts: Arc<KeyVerdicts>,
    queues: Queues,
    /// One permit for each blocking worker.
    workers: Arc<Semaphore>,
    /// The permits of each identity, by certificate fingerprint.
    held: Mutex<HashMap<String, Arc<Semaphore>>>,
}

/// The permits of a worker: one of all workers, and one of its client's.
struct Permit {
    _of_all: OwnedSemaphorePermit,
    _of_client: OwnedSemaphorePermit,
}

/// How long the server waits, when it stops, for workers to notice that their clients are gone.
const WORKERS_LEAVE: Duration = Duration::from_secs(2);

impl Calls {
    pub(crate) fn new(
        pgdata: PathBuf,
        allow: Arc<AllowList>,
        queues: Queues,
        rates: Option<Arc<RateLimits>>,
        sessions: Arc<AuditSessions>,
        log: Arc<RefusalLog>,
    ) -> Self {
        let workers = Arc::new(Semaphore::new(WORKERS_MAX));
        let (budget, verdicts) = (RequestBudget::default(), Arc::default());
        let held = Mutex::default();
        Self { pgdata, allow, rates, sessions, budget, log, verdicts, queues, workers, held }
    }

    /// Waits a moment for workers whose clients are gone, so that each session's line is written.
    pub(crate) async fn wind_down(&self) {
        let all = u32::try_from(WORKERS_MAX).unwrap_or(u32::MAX);
        let all = self.workers.acquire_many(all);
        drop(tokio::time::timeout(WORKERS_LEAVE, all).await);
    }

    /// Notes a call. Whether its client is allowed was checked before its request was read.
    fn begin(&self, peer: &Arc<Peer>, name: &'static str) -> OpenCall {
        let call = self.sessions.call(peer);
        call.session().served(name, 1);
        call
    }

    /// Notes why a call was refused.
    fn refused<T>(&self, peer: &Peer, answer: Result<T, Refusal>) -> Result<T, Refusal> {
        answer.inspect_err(|refusal| self.log.note("refused a call", peer.address, refusal))
    }

    /// Runs blocking work whose result is awaited.
    async fn blocking<T: Send + 'static>(
        &self,
        peer: &Peer,
        work: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Refusal> {
        let permit = self.permit(peer)?;
        let task = tokio::task::spawn_blocking(move || {
            let result = work();
            drop(permit);
            result
        });
        task.await.unwrap_or_else(|_| {
            Err(Refusal::new(Reason::Internal, "internal error: a worker thread failed"))
        })
    }

    fn permit(&self, peer: &Peer) -> Result<Permit, Refusal> {
        let busy =
            |_| Refusal::new(Reason::Overloaded, "the server has no free worker: try again later");
        let own = {
            let mut held = self.held.lock();
            held.retain(|_, own| own.available_permits() < WORKERS_PER_IDENTITY_MAX);
            let own = held.entry(peer.fingerprint.clone());
            Arc::clone(own.or_insert_with(|| Arc::new(Semaphore::new(WORKERS_PER_IDENTITY_MAX))))
        };
        let own = own.try_acquire_owned().map_err(busy)?;
        let all = Arc::clone(&self.workers).try_acquire_owned().map_err(busy)?;
        Ok(Permit { _of_all: all, _of_client: own })
    }
}

#[tonic::async_trait]
impl Handler for Calls {
    async fn describe(&self, peer: Arc<Peer>) -> Result<Description, Refusal> {
        let _call = self.begin(&peer, "describe");
        let pgdata = self.pgdata.clone();
        let congestion_control = peer.congestion_control.clone();
        let answer = self.blocking(&peer, move || describe(&pgdata, congestion_control)).await;
        self.refused(&peer, answer)
    }

    async fn list_files(&self, peer: Arc<Peer>) -> Result<FileEntries, Refusal> {
        let call = self.begin(&peer, "list");
        let (sender, receiver) = mpsc::channel(LIST_BATCHES_QUEUED);
        let pgdata = self.pgdata.clone();
        let permit = self.permit(&peer)?;
        let (log, verdicts) = (Arc::clone(&self.log), Arc::clone(&self.verdicts));
        let rates = self.rates.clone();
        tokio::task::spawn_blocking(move || {
            let address = peer.address;
            let mut reading = |bytes| {
                call.session().served("searched", bytes);
                // What comes later waits for it: a list has no sign of life.
                if let Some(rates) = &rates {
                    rates.disk.reserve(&peer.fingerprint, bytes);
                }
            };
            if let Err(refusal) = list::list(&pgdata, verdicts, &mut reading, &sender) {
                log.note("refused a call", address, &refusal);
                // If the client is gone there is nobody to tell.
                drop(list::give(&sender, Err(refusal)));
            }
            drop((permit, call));
        });
        Ok(receiver)
    }

    async fn fetch(&self, peer: Arc<Peer>, mut units: Units) -> Result<FrameReceiver, Refusal> {
        let call = self.begin(&peer, "fetch");
        let permit = self.permit(&peer)?;
        let (frames, receiver) = mpsc::channel(self.queues.frames);
        let (queue, queued) = mpsc::channel(self.queues.units);
        let allow = Arc::clone(&self.allow);
        let refusals = frames.clone();
        let (worker_allow, worker_peer) = (Arc::clone(&allow), Arc::clone(&peer));
        let budget = self.budget.clone();
        // Receiving requests and making replies are separate tasks: a client that sends much before
        // it reads must not stop the other half.
        tokio::spawn(async move {
            loop {
                let batch = match units.next().await {
                    Ok(Some(batch)) => {
                        let mut held = budget.of(&peer.fingerprint);
                        let added = allow.check(&peer).and_then(|_| held.add(batch.bytes));
                        added.map(|()| QueuedUnits { units: batch.units, _held: held })
                    }
                    Ok(None) => break,
                    Err(refusal) => Err(refusal),
                };
                let sent = match batch {
                    Ok(batch) => queue.send(batch).await.is_ok(),
                    Err(refusal) => {
                        drop(refusals.send(Err(refusal)).await);
                        false
                    }
                };
                if !sent {
                    break;
                }
            }
        });
        let (pgdata, rates, log) = (self.pgdata.clone(), self.rates.clone(), Arc::clone(&self.log));
        let verdicts = Arc::clone(&self.verdicts);
        tokio::task::spawn_blocking(move || {
            let job = StreamJob {
                pgdata,
                verdicts,
                units: queued,
                frames,
                rates,
                session: Arc::clone(call.session()),
                allow: worker_allow,
                peer: worker_peer,
            };
            fetch::run(job, &log);
            drop((permit, call));
        });
        Ok(receiver)
    }

    async fn seal(&self, peer: Arc<Peer>) -> Result<Sealed, Refusal> {
        let _call = self.begin(&peer, "seal");
        let pgdata = self.pgdata.clone();
        let answer = self.blocking(&peer, move || wal_end::seal(&pgdata)).await;
        self.refused(&peer, answer)
    }
}

fn describe(
    pgdata: &std::path::Path,
    congestion_control: Option<String>,
) -> Result<Description, Refusal> {
    let directory = node::open(pgdata)?;
    if directory.has(OWN_DIRECTORY) {
        tracing::debug!("this node was rewound itself and has a {OWN_DIRECTORY} directory");
    }
    let node = node::inspect(&directory)?;
    let mut wal_segments =
        directory.wal_segments(node.control.wal_segment_size).map_err(node::control_refusal)?;
    if wal_segments.len() > WAL_SEGMENTS_MAX {
        // Older ones are of no use to a rewind of the recent past.
        wal_segments.sort_by_key(|name| std::cmp::Reverse(name.number));
        wal_segments.truncate(WAL_SEGMENTS_MAX);
    }
    Ok(Description {
        program_version: env!("CARGO_PKG_VERSION").to_owned(),
        tablespaces: tablespaces(&directory)?,
        node,
        wal_segments,
        congestion_control,
    })
}

fn tablespaces(directory: &data_dir::DataDir) -> Result<Vec<Tablespace>, Refusal> {
    let path = pg_format::DataPath::of("pg_tblspc");
    let names = directory.names(&path).map_err(|error| node::internal("pg_tblspc", &error))?;
    let link = |name: &str| {
        directory
            .linked_tablespaces()
            .find(|(oid, ..)| *oid == name)
            .map(|(_, location, _)| location.to_string_lossy().into_owned())
    };
    let found = names.iter().filter_map(|name| {
        let oid = name.parse().ok()?;
        Some(Tablespace { oid, location: link(name) })
    });
    Ok(found.collect())
}
