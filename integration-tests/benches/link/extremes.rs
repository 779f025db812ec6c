//! Clusters that are extreme in one way: nothing differs, very many files, very large sparse ones.
//! Dry runs of *compare*, which looks at all of it; over the loopback.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use integration_tests::client::Rewind;
use integration_tests::cluster::Node;
use integration_tests::pair::{Pair, Shape};
use integration_tests::server::{Pki, Server};

use crate::carried;
use crate::measure::watch;

/// Files of the second cluster.
const FILES: u32 = 200_000;
/// Segments of one GB of the third.
const SEGMENTS: u32 = 1024;

/// Measures all of them and prints a table.
pub(crate) fn print(major: u32) {
    println!(
        "| cluster | GB | s | bytes on the link | share of its size | a file | client MB | source MB |"
    );
    println!("{}", "|---".repeat(8) + "|");
    line(major, "two equal clusters", &|pair| {
        pair.a.start();
        pair.a.sql("create table filler as select g id, md5(g::text) || md5((g * 7)::text) body from generate_series(1, 8000000) g");
        pair.a.stop("fast");
        std::fs::remove_dir_all(&pair.b.data).expect("removed");
        let mut copy = pair.a.user.command("/bin/cp");
        integration_tests::command::run(copy.arg("-a").arg(&pair.a.data).arg(&pair.b.data));
    });
    line(major, "200,000 files", &|pair| {
        for node in [&pair.a, &pair.b] {
            for number in 0..FILES {
                relation_file(node, &format!("{}", 1_000_000 + number));
            }
        }
    });
    line(major, "1,024 sparse segments of 1 GB, a page of each differs", &|pair| {
        for (node, byte) in [(&pair.a, 1), (&pair.b, 2)] {
            for number in 0..SEGMENTS {
                let suffix = if number > 0 { format!(".{number}") } else { String::new() };
                let file = relation_file(node, &format!("1000000{suffix}"));
                file.set_len(1 << 30).expect("extended");
                // In the unused middle of a page without a header: an empty page to PostgreSQL.
                file.write_all_at(&[byte], (1 << 29) + 4096).expect("written");
            }
        }
    });
    println!();
}

fn relation_file(node: &Node, name: &str) -> File {
    let path = node.data.join("base/5").join(name);
    let file = File::create(&path).expect("created");
    node.user.own(&path);
    file
}

/// Bytes of all files below a directory, holes included.
fn size(directory: &Path) -> (u64, u64) {
    let (mut files, mut bytes) = (0, 0);
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => {
                let (more, size) = size(&entry.path());
                (files, bytes) = (files + more, bytes + size);
            }
            Ok(metadata) => (files, bytes) = (files + 1, bytes + metadata.len()),
            Err(_) => {}
        }
    }
    (files, bytes)
}

fn line(major: u32, name: &str, make: &dyn Fn(&Pair)) {
    // Without checksums: the pages are made up.
    let shape = Shape { checksums: false, wal_log_hints: true, ..Shape::default() };
    let pair = Pair::stopped(major, shape, "");
    make(&pair);
    let pki = Pki::new(pair.home.path());
    let server = Server::start(&pair.b, &pki);
    let rewind = Rewind::new(&pair.a, &server, &pki).timeout("120s");
    let command = rewind.args(["-n", "--strategy", "compare"]).into_command();
    let before = carried(None).0;
    let measured = watch(command, &[server.pid()], Path::new("/nonexistent"));
    // The loopback counts what both ends send once.
    let bytes = carried(None).0 - before;
    let (files, size) = size(&pair.b.data);
    println!(
        "| {name} | {:.1} | {:.2} | {bytes} | {:.4} % | {:.0} | {:.0} | {:.0} |",
        size as f64 / 1e9,
        measured.commit,
        bytes as f64 * 100.0 / size as f64,
        bytes as f64 / files as f64,
        measured.client_peak as f64 / 1e6,
        measured.source_peak as f64 / 1e6,
    );
}
