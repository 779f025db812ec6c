//! Every number both ends rely on, with its reason.

use std::time::Duration;

/// TCP port when none is given.
pub const DEFAULT_PORT: u16 = 7432;

/// A frame's batch is closed when it has this many bytes. Compressed it is a message of 64 to 256
/// KiB, the range in which HTTP/2 carries most. Each frame is a zstd frame of its
/// own, so a cut connection loses at most one and the client can store what it received as it is.
pub const BATCH_BYTES: usize = 512 << 10;

/// No batch is longer than this: a full one plus one item.
pub const BATCH_BYTES_MAX: usize = 2 << 20;

/// Longest message a client accepts: an incompressible batch and its envelope.
pub const FRAME_MESSAGE_BYTES_MAX: usize = BATCH_BYTES_MAX + (64 << 10);

/// Longest message a server accepts. Requests are lists of block ranges.
pub const REQUEST_MESSAGE_BYTES_MAX: usize = 1 << 20;

/// Longest describe or seal reply: 200,000 WAL segments and their histories.
pub const NODE_MESSAGE_BYTES_MAX: usize = 8 << 20;

/// Bytes of a file in one item.
pub const CHUNK_BYTES: usize = 256 << 10;

/// Blocks one unit may name: 8 MiB of pages. Small enough to spread a plan over the connections,
/// large enough that units cost nothing beside their content.
pub const UNIT_BLOCKS_MAX: u32 = 1024;

/// Pages one unit may ask hashes for: 64 MiB of pages, 128 KiB of hashes.
pub const UNIT_HASHES_MAX: u32 = 8192;

/// Pages in a run: hashes of runs are compared before hashes of single pages. 1 MiB.
pub const RUN_PAGES: u32 = 128;

/// Bytes of a file or of WAL one unit may ask for.
pub const UNIT_BYTES_MAX: u64 = 8 << 20;

/// Entries in one message of a file list: enough to compress well.
pub const LIST_BATCH_ENTRIES: usize = 4096;

/// Bytes of such a message when decompressed; one with very long names has fewer entries.
pub const LIST_BATCH_BYTES_MAX: usize = 4 << 20;

/// Entries a client takes in a file list: some gigabytes of memory. The largest clusters known have a
/// few millions.
pub const LIST_ENTRIES_MAX: usize = 20_000_000;

/// Connections one identity may have open: the client's maximum of 16, twice, so that a client
/// that lost its connections is not refused while the server still waits for the old ones.
pub const CONNECTIONS_PER_IDENTITY_MAX: usize = 32;

/// Connections that a server has open at the same time, of all clients together.
pub const CONNECTIONS_MAX: usize = 64;

/// Connections whose TLS handshake is not finished.
pub const HANDSHAKES_MAX: usize = 32;

/// Time a TLS handshake may take.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Streams on one connection; a client uses one or two.
pub const STREAMS_PER_CONNECTION_MAX: u32 = 32;

/// Longest list of request headers; ours are far shorter (CONTINUATION floods).
pub const HEADER_BYTES_MAX: u32 = 16 << 10;

/// Streams that a peer may reset before the server has processed them (CVE-2023-44487); h2's own default.
pub const PENDING_RESETS_MAX: usize = 20;

/// Streams the server itself may have to reset before the connection is given up; h2's own default.
pub const LOCAL_RESETS_MAX: usize = 1024;

/// How often a silent connection is probed, and how long the answer may take.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
/// See [`KEEPALIVE_INTERVAL`].
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Time a unary call may take: a seal syncs and reads the WAL since the last checkpoint.
pub const UNARY_TIMEOUT: Duration = Duration::from_secs(300);

/// A stream that brings nothing for so long has stalled.
pub const PROGRESS_TIMEOUT: Duration = Duration::from_secs(60);

/// A stream on which the client neither asks for anything nor takes anything for so long is ended:
/// it holds one of the server's threads. Far longer than a client waits for its own disk.
pub const STREAM_IDLE_TIMEOUT: Duration = Duration::from_secs(600);

/// Blocking workers that one identity may use at the same time: one for the stream of each connection, and
/// some for other calls.
pub const WORKERS_PER_IDENTITY_MAX: usize = CONNECTIONS_PER_IDENTITY_MAX + 8;

/// Connections of clients that are not on the allow list: how many at a time, and how long each may last.
/// They are accepted so that the client learns why it is refused. It opens all its connections at once and
/// sends its first request on any of them.
pub const STRANGERS_MAX: usize = CONNECTIONS_CLIENT_MAX + 1;
/// See [`STRANGERS_MAX`].
pub const STRANGER_LIFE: Duration = Duration::from_secs(10);

/// Units in one message of a client; a unit names at most 1024 ranges of at most 12 bytes.
pub const UNITS_PER_MESSAGE_MAX: usize = REQUEST_MESSAGE_BYTES_MAX / (16 << 10);

/// Sum of all connections' receive windows on the client.
pub const RECEIVE_BUDGET_BYTES: u32 = 96 << 20;

/// Connections a client opens unless told otherwise, and at most.
pub const CONNECTIONS_DEFAULT: usize = 4;
/// See [`CONNECTIONS_DEFAULT`].
pub const CONNECTIONS_CLIENT_MAX: usize = 16;

/// zstd level of frames: level 1 is faster than the links this is for and packs semi-random rows
/// better than 3.
pub const ZSTD_LEVEL: i32 = 1;
