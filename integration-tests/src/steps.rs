//! Steps that many tests share.

use std::fs;
use std::path::Path;

use crate::client::{Ended, Rewind};
use crate::cluster::{Node, append};
use crate::oracle;
use crate::pair::Pair;
use crate::server::{Pki, Server};

/// A source that is served, with the certificates that its clients use.
#[derive(Debug)]
pub struct Served {
    /// The certificates.
    pub pki: Pki,
    /// The server.
    pub server: Server,
}

impl Served {
    /// Serves a node; its certificates lie in `home`.
    pub fn start(home: &Path, node: &Node) -> Self {
        Self::with(home, node, &[])
    }

    /// The same with options of the server.
    pub fn with(home: &Path, node: &Node, options: &[&str]) -> Self {
        let pki = Pki::new(home);
        let server = Server::with(node, &pki, 0, options);
        Self { pki, server }
    }

    /// A rewind of `target` onto the served node.
    pub fn rewind(&self, target: &Node) -> Rewind {
        Rewind::new(target, &self.server, &self.pki)
    }
}

/// Rewinds `target` onto `source` with its own certificates and server.
pub fn rewind(pair: &Pair, target: &Node, source: &Node, args: &[&str]) -> Ended {
    let pki_home = pair
        .home
        .path()
        .join(format!("pki-{}", source.socket.file_name().expect("name").to_string_lossy()));
    drop(fs::remove_dir_all(&pki_home));
    fs::create_dir_all(&pki_home).expect("directory");
    Served::start(&pki_home, source)
        .rewind(target)
        .following(source)
        .args(args.iter().copied())
        .succeed()
}

/// Rewinds `a` onto `b` and verifies.
pub fn rewound(pair: &Pair, args: &[&str]) -> Ended {
    let ended = rewind(pair, &pair.a, &pair.b, args);
    assert_eq!(ended.field("result"), "rewound", "{}", ended.text);
    oracle::verify(&pair.a, &pair.b);
    ended
}

/// Makes the nodes part: different rows on both sides.
pub fn part(pair: &Pair) {
    pair.b.promote();
    pair.a.sql("insert into plain select g, 'lost', 1 from generate_series(70001, 71000) g");
    pair.b.sql("update plain set body = 'new' where id < 500");
}

/// Makes a stopped node a standby without a primary.
pub fn write_signal(node: &Node) {
    let path = node.data.join("standby.signal");
    fs::File::create(&path).expect("signal");
    node.user.own(&path);
}

/// Makes a stopped standby follow another primary from its next start on.
pub fn follow_instead(node: &Node, primary: &Node) {
    let settings = format!("primary_conninfo = '{}'\n", primary.conninfo());
    append(&node.data.join("postgresql.auto.conf"), &settings);
}
