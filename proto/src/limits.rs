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

/// Items in a batch: the smallest has four bytes. An item takes far more memory than its bytes.
pub const BATCH_ITEMS_MAX: usize = BATCH_BYTES / 4 + 1;

/// Longest message a client accepts: an incompressible batch and its envelope.
pub const FRAME_MESSAGE_BYTES_MAX: usize = BATCH_BYTES_MAX + (64 << 10);

/// Longest message a server accepts. Requests are lists of block ranges.
pub const REQUEST_MESSAGE_BYTES_MAX: usize = 1 << 20;

/// Longest request of a call that asks for nothing in particular.
pub const EMPTY_REQUEST_BYTES_MAX: usize = 1 << 10;

/// Time until a request that has begun must be whole.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// Bytes of requests that a server holds of one client and of all: those that are being received, and those that
/// wait to be answered. A client sends signatures of pages, in messages of some hundred kilobytes, two of which
/// wait on each connection.
pub const REQUEST_BYTES_PER_IDENTITY_MAX: usize = 32 << 20;
/// See [`REQUEST_BYTES_PER_IDENTITY_MAX`].
pub const REQUEST_BYTES_MAX: usize = 96 << 20;

/// Bytes that a client may send on a connection before the server has looked at them (HTTP/2's window).
pub const REQUEST_WINDOW_BYTES: u32 = 1 << 20;

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

/// Bytes of all paths that a client takes in a file list.
pub const LIST_PATH_BYTES_MAX: usize = 1 << 30;

/// WAL segments that a client takes in a description: 3 TiB of 16 MiB. A server with more describes the newest.
pub const WAL_SEGMENTS_MAX: usize = 200_000;

/// History files and tablespaces that a client takes in a description.
pub const HISTORIES_MAX: usize = 10_000;
/// See [`HISTORIES_MAX`].
pub const TABLESPACES_MAX: usize = 10_000;

/// Connections one identity may have open: the client's maximum of 16 and its control connection, twice, so that
/// a client that lost its connections is not refused while the server still waits for the old ones.
pub const CONNECTIONS_PER_IDENTITY_MAX: usize = 2 * (CONNECTIONS_CLIENT_MAX + 1);

/// Connections that a server has open at the same time, of all clients together. Where all are taken, one without
/// a call gives way to a new one.
pub const CONNECTIONS_MAX: usize = 4 * CONNECTIONS_PER_IDENTITY_MAX;

/// Connections whose TLS handshake is not finished, of all addresses together.
pub const HANDSHAKES_MAX: usize = 4 * HANDSHAKES_PER_ADDRESS_MAX;

/// The same of one address: a client opens all its connections at once.
pub const HANDSHAKES_PER_ADDRESS_MAX: usize = CONNECTIONS_CLIENT_MAX + 4;

/// Time a TLS handshake may take.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Time until the first bytes of a new connection must have come: a client sends them at once.
pub const FIRST_BYTES_TIMEOUT: Duration = Duration::from_secs(3);

/// A connection without a call is closed after this time. The client opens another one when it needs it.
pub const CONNECTION_IDLE_TIMEOUT: Duration = Duration::from_secs(600);

/// A connection without a call for so long gives way where connections run out.
pub const CONNECTION_IDLE_MIN: Duration = Duration::from_secs(10);

/// Streams on one connection. A client uses some on its control connection while it plans, and one on each other.
pub const STREAMS_PER_CONNECTION_MAX: u32 = 8;

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

/// A server that waits because of `--max-rate` says so in these intervals, below any time that a client waits.
pub const WAITING_INTERVAL: Duration = Duration::from_millis(500);

/// In this time a stream must answer at least [`PACE_BYTES_MIN`], counted as bytes of the source's files and WAL that
/// its answers stand for. Twelve clients of a server that reads 128 KiB a second get a hundred times as much.
pub const PACE_WINDOW: Duration = Duration::from_secs(600);
/// See [`PACE_WINDOW`].
pub const PACE_BYTES_MIN: u64 = 64 << 10;

/// A stream on which the client neither asks for anything nor takes anything for so long is ended:
/// it holds one of the server's threads. Far longer than a client waits for its own disk.
pub const STREAM_IDLE_TIMEOUT: Duration = Duration::from_secs(600);

/// Blocking workers that one identity may use at the same time: one for the stream of each connection, and
/// some for other calls.
pub const WORKERS_PER_IDENTITY_MAX: usize = CONNECTIONS_PER_IDENTITY_MAX + 8;

/// Blocking workers of all clients together: enough for four that use all they may.
pub const WORKERS_MAX: usize = 4 * WORKERS_PER_IDENTITY_MAX;

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
