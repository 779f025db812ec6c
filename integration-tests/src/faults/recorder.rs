//! The door to the disk with a log behind it, and with a fault at any place of it.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use client::staging::disk::{Disk, FileStat};
use data_dir::DataDir;
use pg_format::DataPath;

/// One mutation, or one barrier behind which mutations are durable.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are those of the door's functions")]
pub enum Op {
    CreateDirectory(DataPath),
    CreateFile(DataPath),
    Write {
        path: DataPath,
        offset: u64,
        bytes: Vec<u8>,
    },
    SetLength(DataPath, u64),
    SetMode(DataPath, u32),
    Link(DataPath, DataPath),
    Rename(DataPath, DataPath),
    Symlink(String, DataPath),
    RemoveFile(DataPath),
    RemoveDirectory(DataPath),
    SyncFile(DataPath),
    SyncDirectory(Option<DataPath>),
    SyncAll,
    /// A barrier that failed: what it should have made durable is lost, whatever comes later.
    FailedSync(Option<DataPath>),
}

/// A fault at one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The operation does nothing and reports this.
    Errno(rustix::io::Errno),
    /// Half of a write is done, then the disk is full; other operations as with `ENOSPC`.
    ShortWrite,
    /// Barriers report an I/O error and have done nothing; other operations likewise.
    FailedSync,
}

impl Fault {
    fn error(self) -> io::Error {
        io::Error::from(match self {
            Self::Errno(errno) => errno,
            Self::ShortWrite => rustix::io::Errno::NOSPC,
            Self::FailedSync => rustix::io::Errno::IO,
        })
    }
}

/// What is shared by a door and those opened again behind it.
#[derive(Debug, Default)]
struct Log {
    ops: Vec<Op>,
    /// Operations seen, those that failed included.
    count: usize,
    fault: Option<(usize, Fault)>,
    /// Whether the fault has struck.
    struck: bool,
}

/// A disk that records.
#[derive(Debug, Clone)]
pub struct Recorder {
    inner: Arc<dyn Disk>,
    log: Arc<Mutex<Log>>,
}

impl Recorder {
    /// Records what happens to `inner`.
    pub fn new(inner: Arc<dyn Disk>) -> Self {
        Self { inner, log: Arc::default() }
    }

    /// The same, with a fault at the operation of that number.
    pub fn failing(inner: Arc<dyn Disk>, at: usize, fault: Fault) -> Self {
        let log = Log { fault: Some((at, fault)), ..Log::default() };
        Self { inner, log: Arc::new(Mutex::new(log)) }
    }

    fn log(&self) -> std::sync::MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything that was done.
    pub fn ops(&self) -> Vec<Op> {
        self.log().ops.clone()
    }

    /// Whether the fault has struck.
    pub fn struck(&self) -> bool {
        self.log().struck
    }

    /// Does an operation and logs it; both under one lock, so that the log has the disk's order.
    fn mutate(&self, op: Op, work: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let mut log = self.log();
        let number = log.count;
        log.count += 1;
        if let Some((at, fault)) = log.fault
            && at == number
        {
            log.struck = true;
            if let (Fault::ShortWrite, Op::Write { path, offset, bytes }) = (fault, &op) {
                let half = bytes.get(..bytes.len() / 2).unwrap_or_default();
                self.inner.write_at(path, *offset, half)?;
                let (path, offset, bytes) = (path.clone(), *offset, half.to_vec());
                log.ops.push(Op::Write { path, offset, bytes });
            }
            match op {
                Op::SyncFile(path) => log.ops.push(Op::FailedSync(Some(path))),
                Op::SyncAll => log.ops.push(Op::FailedSync(None)),
                _ => {}
            }
            return Err(fault.error());
        }
        work()?;
        log.ops.push(op);
        Ok(())
    }
}

impl Disk for Recorder {
    fn create_directory(&self, path: &DataPath) -> io::Result<()> {
        let op = Op::CreateDirectory(path.clone());
        self.mutate(op, || self.inner.create_directory(path))
    }
    fn create_file(&self, path: &DataPath) -> io::Result<()> {
        self.mutate(Op::CreateFile(path.clone()), || self.inner.create_file(path))
    }
    fn write_at(&self, path: &DataPath, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let op = Op::Write { path: path.clone(), offset, bytes: bytes.to_vec() };
        self.mutate(op, || self.inner.write_at(path, offset, bytes))
    }
    fn allocate(&self, path: &DataPath, bytes: u64) -> io::Result<()> {
        self.mutate(Op::SetLength(path.clone(), bytes), || self.inner.allocate(path, bytes))
    }
    fn set_length(&self, path: &DataPath, bytes: u64) -> io::Result<()> {
        self.mutate(Op::SetLength(path.clone(), bytes), || self.inner.set_length(path, bytes))
    }
    fn set_mode(&self, path: &DataPath, mode: u32) -> io::Result<()> {
        self.mutate(Op::SetMode(path.clone(), mode), || self.inner.set_mode(path, mode))
    }
    fn link(&self, from: &DataPath, to: &DataPath) -> io::Result<()> {
        self.mutate(Op::Link(from.clone(), to.clone()), || self.inner.link(from, to))
    }
    fn rename(&self, from: &DataPath, to: &DataPath) -> io::Result<()> {
        self.mutate(Op::Rename(from.clone(), to.clone()), || self.inner.rename(from, to))
    }
    fn symlink(&self, target: &str, path: &DataPath) -> io::Result<()> {
        let op = Op::Symlink(target.to_owned(), path.clone());
        self.mutate(op, || self.inner.symlink(target, path))
    }
    fn remove_file(&self, path: &DataPath) -> io::Result<()> {
        self.mutate(Op::RemoveFile(path.clone()), || self.inner.remove_file(path))
    }
    fn remove_directory(&self, path: &DataPath) -> io::Result<()> {
        let op = Op::RemoveDirectory(path.clone());
        self.mutate(op, || self.inner.remove_directory(path))
    }
    fn sync_file(&self, path: &DataPath) -> io::Result<()> {
        self.mutate(Op::SyncFile(path.clone()), || self.inner.sync_file(path))
    }
    fn sync_directory(&self, path: Option<&DataPath>) -> io::Result<()> {
        self.mutate(Op::SyncDirectory(path.cloned()), || self.inner.sync_directory(path))
    }
    fn sync_all(&self) -> io::Result<()> {
        self.mutate(Op::SyncAll, || self.inner.sync_all())
    }
    fn reopen(&self, directory: &Arc<DataDir>) -> io::Result<Box<dyn Disk>> {
        let inner = Arc::from(self.inner.reopen(directory)?);
        Ok(Box::new(Self { inner, log: Arc::clone(&self.log) }))
    }
    fn staging_key(&self) -> Option<[u8; 32]> {
        self.inner.staging_key()
    }
    fn stat(&self, path: &DataPath) -> io::Result<Option<FileStat>> {
        self.inner.stat(path)
    }
    fn open(&self, path: &DataPath) -> io::Result<File> {
        self.inner.open(path)
    }
    fn names(&self, path: &DataPath) -> io::Result<Vec<String>> {
        self.inner.names(path)
    }
    fn is_directory(&self, path: &DataPath) -> io::Result<Option<bool>> {
        self.inner.is_directory(path)
    }
}
