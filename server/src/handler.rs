//! Answers the calls: checks the peer, moves the work to blocking threads.

use std::path::PathBuf;
use std::sync::Arc;

use pg_format::file_class::OWN_DIRECTORY;
use proto::limits::STREAMS_PER_CONNECTION_MAX;
use proto::model::{Description, Sealed, Tablespace};
use proto::rate::RateLimit;
use proto::service::{FileEntries, FrameReceiver, Handler, Units};
use proto::tls::Peer;
use proto::{Reason, Refusal};
use tokio::sync::{Semaphore, mpsc};

use crate::allow::AllowList;
use crate::audit::Audit;
use crate::fetch::{self, Job};
use crate::{end, list, node};

/// Frames made but not sent: enough to overlap reading with the network, and with
/// `CONNECTIONS_MAX` streams still little memory.
const FRAMES_QUEUED: usize = 4;
/// Messages with units received but not worked on. A message has at most
/// `REQUEST_MESSAGE_BYTES_MAX`.
const UNIT_BATCHES_QUEUED: usize = 2;
/// Batches of a file list made but not sent.
const LIST_BATCHES_QUEUED: usize = 4;

/// Everything the calls need.
pub(crate) struct Calls {
    pub(crate) pgdata: PathBuf,
    pub(crate) allow: Arc<AllowList>,
    pub(crate) rate: Option<Arc<RateLimit>>,
    /// One permit for each blocking worker.
    workers: Arc<Semaphore>,
}

impl Calls {
    pub(crate) fn new(
        pgdata: PathBuf,
        allow: Arc<AllowList>,
        rate: Option<Arc<RateLimit>>,
    ) -> Self {
        let workers = proto::limits::CONNECTIONS_MAX + STREAMS_PER_CONNECTION_MAX as usize;
        Self { pgdata, allow, rate, workers: Arc::new(Semaphore::new(workers)) }
    }

    /// Runs blocking work whose result is awaited.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Refusal> {
        let permit = self.permit()?;
        let task = tokio::task::spawn_blocking(move || {
            let result = work();
            drop(permit);
            result
        });
        task.await.unwrap_or_else(|_| Err(Refusal::new(Reason::Internal, "a worker failed")))
    }

    fn permit(&self) -> Result<tokio::sync::OwnedSemaphorePermit, Refusal> {
        Arc::clone(&self.workers).try_acquire_owned().map_err(|_| {
            Refusal::new(Reason::Overloaded, "the server has no free worker: try again later")
        })
    }
}

#[tonic::async_trait]
impl Handler for Calls {
    async fn describe(&self, peer: Arc<Peer>) -> Result<Description, Refusal> {
        self.allow.check(&peer)?;
        let pgdata = self.pgdata.clone();
        let congestion_control = peer.congestion_control.clone();
        self.blocking(move || describe(&pgdata, congestion_control)).await
    }

    async fn list_files(&self, peer: Arc<Peer>) -> Result<FileEntries, Refusal> {
        self.allow.check(&peer)?;
        let (sender, receiver) = mpsc::channel(LIST_BATCHES_QUEUED);
        let pgdata = self.pgdata.clone();
        let permit = self.permit()?;
        tokio::task::spawn_blocking(move || {
            if let Err(refusal) = list::list(&pgdata, &sender) {
                // If the client is gone there is nobody to tell.
                drop(sender.blocking_send(Err(refusal)));
            }
            drop(permit);
        });
        Ok(receiver)
    }

    async fn fetch(&self, peer: Arc<Peer>, mut units: Units) -> Result<FrameReceiver, Refusal> {
        self.allow.check(&peer)?;
        let permit = self.permit()?;
        let (frames, receiver) = mpsc::channel(FRAMES_QUEUED);
        let (queue, queued) = mpsc::channel(UNIT_BATCHES_QUEUED);
        let allow = Arc::clone(&self.allow);
        let audit = Audit::new(Arc::clone(&peer));
        let refusals = frames.clone();
        let (worker_allow, worker_peer) = (Arc::clone(&allow), Arc::clone(&peer));
        // Receiving requests and making replies are separate tasks: a client that sends much before
        // it reads must not stop the other half.
        tokio::spawn(async move {
            loop {
                let batch = match units.next().await {
                    Ok(Some(batch)) => allow.check(&peer).map(|()| batch),
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
        let (pgdata, rate) = (self.pgdata.clone(), self.rate.clone());
        tokio::task::spawn_blocking(move || {
            let job = Job {
                pgdata,
                units: queued,
                frames,
                rate,
                audit,
                allow: worker_allow,
                peer: worker_peer,
            };
            fetch::run(job);
            drop(permit);
        });
        Ok(receiver)
    }

    async fn seal(&self, peer: Arc<Peer>) -> Result<Sealed, Refusal> {
        self.allow.check(&peer)?;
        let pgdata = self.pgdata.clone();
        self.blocking(move || end::seal(&pgdata)).await
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
    let wal_segments =
        directory.wal_segments(node.control.wal_segment_size).map_err(node::control_refusal)?;
    Ok(Description {
        program_version: env!("CARGO_PKG_VERSION").to_owned(),
        tablespaces: tablespaces(&directory)?,
        node,
        wal_segments,
        congestion_control,
    })
}

fn tablespaces(directory: &data_dir::DataDir) -> Result<Vec<Tablespace>, Refusal> {
    let path = pg_format::DataPath::new("pg_tblspc")
        .map_err(|error| node::internal("pg_tblspc", &error))?;
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
