//! `postmaster.pid`: who holds a data directory (`utils/pidfile.h`).

/// The lines of the file. A server writes them one after the other while it starts, so all but the
/// first may be missing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PostmasterPid {
    /// Process id; negative when the holder is not a postmaster (single-user mode, or a rewind).
    pub pid: i64,
    /// When the postmaster started, seconds since 1970.
    pub start_time: Option<i64>,
    /// Port of the sockets.
    pub port: Option<u16>,
    /// First Unix socket directory.
    pub socket_directory: Option<String>,
    /// System V shared memory id.
    pub shared_memory_id: Option<i64>,
    /// `starting`, `stopping`, `ready` or `standby`.
    pub status: Option<String>,
}

impl PostmasterPid {
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
            shared_memory_id: line(7)
                .and_then(|text| text.split_whitespace().nth(1))
                .and_then(|text| text.parse().ok()),
            status: line(8).map(|text| (*text).to_owned()),
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
        assert_eq!((pid.pid, pid.port, pid.shared_memory_id), (123, Some(5433), Some(360_448)));
        assert_eq!(pid.status.as_deref(), Some("ready"));
        assert_eq!(PostmasterPid::parse("-77\n").unwrap().pid, -77);
        assert_eq!(PostmasterPid::parse("\n"), None);
        assert_eq!(PostmasterPid::parse("0\n"), None);
    }
}
