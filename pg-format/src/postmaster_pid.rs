//! `postmaster.pid`: which process uses a data directory (`utils/pidfile.h`).

/// The lines of the file. A server writes them one after the other while it starts, so all but the
/// first may be missing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PostmasterPid {
    /// Process id; negative if the process is not a postmaster (single-user mode, or a rewind).
    pub pid: i64,
    /// When the postmaster started, seconds since 1970.
    pub start_time: Option<i64>,
    /// Port of the sockets.
    pub port: Option<u16>,
    /// First Unix socket directory.
    pub socket_directory: Option<String>,
    /// System V shared memory.
    pub shared_memory: Option<SharedMemory>,
    /// What the server says of itself; `None` if it does not, or says what is not known.
    pub status: Option<ServerStatus>,
}

/// The status in a `postmaster.pid` (`PM_STATUS_*` in `pidfile.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerStatus {
    /// It is starting, or recovers and does not accept connections yet.
    Starting,
    /// It is stopping.
    Stopping,
    /// It accepts connections.
    Ready,
    /// It recovers, and accepts read-only connections or would if `hot_standby` were on.
    Standby,
}

impl ServerStatus {
    fn parse(text: &str) -> Option<Self> {
        let all = [Self::Starting, Self::Stopping, Self::Ready, Self::Standby];
        all.into_iter().find(|status| status.name() == text)
    }

    /// The word in the file.
    pub fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Stopping => "stopping",
            Self::Ready => "ready",
            Self::Standby => "standby",
        }
    }
}

/// A System V shared memory segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedMemory {
    /// Its key, 32 bits, made from the data directory's inode.
    pub key: u32,
    /// Its id, which another segment may have after a reboot.
    pub id: i64,
}

impl SharedMemory {
    /// Reads key and id; the key is printed as a signed number in some places and as an unsigned
    /// one of 64 bits in others.
    pub fn parse(key: &str, id: &str) -> Option<Self> {
        let wide =
            key.parse::<i64>().ok().or_else(|| key.parse::<u64>().ok().map(u64::cast_signed))?;
        let key = u32::try_from(wide & 0xFFFF_FFFF).ok()?;
        Some(Self { key, id: id.parse().ok()? })
    }
}

impl PostmasterPid {
    /// Whether the server has reached a consistent state.
    pub fn is_up(&self) -> bool {
        matches!(self.status, Some(ServerStatus::Ready | ServerStatus::Standby))
    }

    /// The file of a process that is no postmaster, as single-user mode writes it (`CreateLockFile` in `miscinit.c`): the
    /// process id is negative, so a server refuses to start and `pg_ctl` signals nobody.
    pub fn text_of_another_program(pid: u32, directory: &str, started: u64) -> String {
        format!("-{pid}\n{directory}\n{started}\n")
    }

    /// Whether a file is one of a process that is no postmaster.
    pub fn is_of_another_program(text: &str) -> bool {
        text.starts_with('-')
    }

    /// Reads the file; `None` if its first line is no process id.
    pub fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        let pid = lines.next()?.trim().parse().ok().filter(|pid| *pid != 0)?;
        let lines: Vec<&str> = lines.map(str::trim).collect();
        let line = |number: usize| lines.get(number - 2).filter(|line| !line.is_empty());
        Some(Self {
            pid,
            start_time: line(3).and_then(|text| text.parse().ok()),
            port: line(4).and_then(|text| text.parse().ok()),
            socket_directory: line(5).map(|text| (*text).to_owned()),
            shared_memory: line(7)
                .and_then(|text| text.split_once(char::is_whitespace))
                .and_then(|(key, id)| SharedMemory::parse(key, id.trim())),
            status: line(8).and_then(|text| ServerStatus::parse(text)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_a_postmaster_writes() {
        let text = "123\n/data\n1700000000\n5433\n/tmp\n127.0.0.1\n  5433001    360448\nready   \n";
        let pid = PostmasterPid::parse(text).unwrap();
        let shared_memory = SharedMemory { key: 5_433_001, id: 360_448 };
        assert_eq!((pid.pid, pid.port), (123, Some(5433)));
        assert_eq!(pid.shared_memory, Some(shared_memory));
        // A negative key: as the kernel's table and as the file have it.
        let as_table = SharedMemory::parse("-2", "7");
        assert!(as_table.is_some());
        assert_eq!(as_table, SharedMemory::parse("18446744073709551614", "7"));
        assert_eq!(pid.status, Some(ServerStatus::Ready));
        assert!(pid.is_up());
        let starting = PostmasterPid::parse(&text.replace("ready   ", "starting")).unwrap();
        assert_eq!(starting.status, Some(ServerStatus::Starting));
        assert!(!starting.is_up());
        assert_eq!(PostmasterPid::parse(&text.replace("ready", "other")).unwrap().status, None);
        assert_eq!(PostmasterPid::parse("-77\n").unwrap().pid, -77);
        assert_eq!(PostmasterPid::parse("\n"), None);
        assert_eq!(PostmasterPid::parse("0\n"), None);
    }
}
