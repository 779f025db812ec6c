//! The target's WAL, wherever each segment still is: its own `pg_wal`, then an archive, then the
//! source, which has the common part too (R14).

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use data_dir::wal::{LocalWal, Segments};
use parking_lot::Mutex;
use pg_format::TimelineId;
use pg_format::wal::SegmentName;

/// Pauses before a `restore_command` that failed is run again.
const RESTORE_PAUSES: [Duration; 2] = [Duration::from_millis(100), Duration::from_millis(400)];
/// Histories that are looked for at most.
const HISTORIES_TRIED_MAX: usize = 1000;

/// Gets the segment of a number from the source; `None` if it does not have it.
pub type FromSource<'a> = dyn Fn(u64) -> io::Result<Option<File>> + Send + Sync + 'a;

/// A segment of the common history that the target's `pg_wal` does not have any more.
#[derive(Debug)]
pub struct RestoredSegment {
    /// Its name.
    pub name: SegmentName,
    /// Its content, in a file without a name.
    pub file: File,
}

impl RestoredSegment {
    fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { name: self.name, file: self.file.try_clone()? })
    }
}

/// Where segments are looked for besides `pg_wal`.
pub struct Elsewhere<'a> {
    /// `--wal-archive`
    pub archive: Option<PathBuf>,
    /// `restore_command`
    pub restore_command: Option<String>,
    /// The source, and the number of the first segment that it must not be asked for: from the fork point on
    /// its WAL differs.
    pub source: Option<(&'a FromSource<'a>, u64)>,
}

/// See the module.
pub struct TargetWal<'a> {
    local: LocalWal<'a>,
    elsewhere: Elsewhere<'a>,
    /// Segments that were found outside `pg_wal`; `None` for those that nobody has. Their files have no name,
    /// so that the search changes nothing on disk.
    found: Mutex<HashMap<u64, Option<RestoredSegment>>>,
}

impl std::fmt::Debug for TargetWal<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TargetWal").field("local", &self.local).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Elsewhere<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Elsewhere").field("archive", &self.archive).finish_non_exhaustive()
    }
}

impl<'a> TargetWal<'a> {
    /// The target's WAL.
    pub fn new(local: LocalWal<'a>, elsewhere: Elsewhere<'a>) -> Self {
        Self { local, elsewhere, found: Mutex::default() }
    }

    /// What is in `pg_wal` itself.
    pub fn local(&self) -> &LocalWal<'a> {
        &self.local
    }

    /// Segments that came from elsewhere, in order.
    pub fn restored(&self) -> io::Result<Vec<RestoredSegment>> {
        let found = self.found.lock();
        let segments = found.values().flatten().map(RestoredSegment::try_clone);
        let mut list = segments.collect::<io::Result<Vec<_>>>()?;
        list.sort_by_key(|segment| segment.name);
        Ok(list)
    }

    fn look_elsewhere(&self, number: u64) -> io::Result<Option<RestoredSegment>> {
        let size = self.local.context.segment_size;
        let spans = self.local.history.spans().iter().rev();
        for span in spans.filter(|span| size.segment_of(span.begin) <= number) {
            let name = SegmentName { timeline: span.timeline, number };
            let mut file = None;
            if let Some(archive) = &self.elsewhere.archive {
                file = open_if_exists(&archive.join(name.file_name(size)))?;
            }
            if let (None, Some(command)) = (&file, &self.elsewhere.restore_command) {
                file = restore_with_patience(
                    command,
                    &name.file_name(size),
                    self.local.directory.path(),
                )?;
            }
            if let (None, Some((source, end))) = (&file, &self.elsewhere.source)
                && number < *end
            {
                file = source(number)?;
            }
            if let Some(file) = file.filter(|file| self.is_segment(file)) {
                return Ok(Some(RestoredSegment { name, file }));
            }
        }
        Ok(None)
    }

    /// Whether a file has a segment's length; its content is checked when it is decoded.
    fn is_segment(&self, file: &File) -> bool {
        let bytes = self.local.context.segment_size.bytes();
        file.metadata().is_ok_and(|metadata| metadata.len() == bytes)
    }
}

impl Segments for TargetWal<'_> {
    fn open(&self, number: u64) -> io::Result<Option<File>> {
        if let Some(file) = self.local.open(number)? {
            return Ok(Some(file));
        }
        let mut found = self.found.lock();
        let known = match found.entry(number) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(unknown) => unknown.insert(self.look_elsewhere(number)?),
        };
        known.as_ref().map(|segment| segment.file.try_clone()).transpose()
    }
}

fn open_if_exists(path: &Path) -> io::Result<Option<File>> {
    match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        result => result.map(Some),
    }
}

/// A file without a name, gone when it is closed.
pub fn nameless_file() -> io::Result<File> {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    Ok(File::from(rustix::fs::memfd_create("pgrejoin-wal", flags)?))
}

/// Runs `restore_command` for one segment. The command writes to a private temporary directory that is
/// removed at once. It may take as long as it needs, as under the server: archives on tape do. A command that
/// fails says that it does not have the segment.
fn restore(command: &str, name: &str, pgdata: &Path) -> io::Result<Option<File>> {
    // Nobody else may put a file, or a link to one of ours, where the command writes.
    let home = tempfile::Builder::new().prefix("pgrejoin-restore-").tempdir()?;
    let path = home.path().join(name);
    let text = expand(command, name, &path.to_string_lossy());
    // The command runs where the server would run it, in the data directory.
    let mut shell = Command::new("/bin/sh");
    shell.arg("-c").arg(&text).current_dir(pgdata).stdin(Stdio::null());
    // Its output must not mix with our results, and it must not see our secrets in its environment.
    shell.stdout(io::stderr()).env_remove("PGREJOIN_PRIMARY_CONNINFO");
    // A command that cannot even be started may be mended by the time of the next segment.
    if shell.status().is_ok_and(|status| status.success()) {
        open_if_exists(&path)
    } else {
        Ok(None)
    }
}

/// [`restore`], tried again after a moment: an archive behind a network may fail once.
fn restore_with_patience(command: &str, name: &str, pgdata: &Path) -> io::Result<Option<File>> {
    for pause in RESTORE_PAUSES {
        if let Some(file) = restore(command, name, pgdata)? {
            return Ok(Some(file));
        }
        std::thread::sleep(pause);
    }
    restore(command, name, pgdata)
}

/// The newest timeline above `timeline` whose history file the archive has, as recovery looks for it: one number after
/// the other, until one is missing.
pub fn newest_history(command: &str, timeline: TimelineId, pgdata: &Path) -> Option<TimelineId> {
    let above = (timeline.get()..).skip(1).take(HISTORIES_TRIED_MAX);
    let found = above.map_while(|number| {
        let timeline = TimelineId::new(number).ok()?;
        restore(command, &timeline.history_file_name(), pgdata).ok()??;
        Some(timeline)
    });
    found.last()
}

/// Replaces `%f`, `%p`, `%r` and `%%` as the server does (`BuildRestoreCommand`).
fn expand(command: &str, name: &str, path: &str) -> String {
    let mut text = String::new();
    let mut chars = command.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            text.push(c);
            continue;
        }
        match chars.next() {
            Some('f') => text.push_str(name),
            Some('p') => text.push_str(path),
            // Oldest segment that must be kept: all of them.
            Some('r') => text.push_str("000000010000000000000000"),
            Some('%') => text.push('%'),
            Some(other) => text.extend(['%', other]),
            None => text.push('%'),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_values::put_file;

    #[test]
    fn a_command_that_fails_once_is_tried_again() {
        let home = tempfile::tempdir().unwrap();
        let archive = home.path().join("archive");
        std::fs::create_dir(&archive).unwrap();
        put_file(&archive.join("SEGMENT"), b"wal");
        // It makes a file, and only where that is there does it answer.
        let once = "test -e tried && cp archive/%f \"%p\" || { touch tried; false; }";
        let restored = restore_with_patience(once, "SEGMENT", home.path()).unwrap();
        assert!(restored.is_some());
        assert!(
            restore_with_patience("cp archive/%f \"%p\"", "OTHER", home.path()).unwrap().is_none()
        );
    }

    #[test]
    fn histories_are_looked_for_as_recovery_does() {
        let home = tempfile::tempdir().unwrap();
        let one = TimelineId::new(1).unwrap();
        let newest = || newest_history("cp %f \"%p\"", one, home.path()).map(TimelineId::get);
        assert_eq!(newest(), None);
        put_file(&home.path().join("00000003.history"), b"1\t0/3000000\tx\n");
        assert_eq!(newest(), None, "2 is missing");
        put_file(&home.path().join("00000002.history"), b"1\t0/3000000\tx\n");
        assert_eq!(newest(), Some(3));
    }

    #[test]
    fn placeholders_are_expanded() {
        assert_eq!(expand("cp /a/%f \"%p\" 100%% %x %", "F", "P"), "cp /a/F \"P\" 100% %x %");
    }
}
