//! Steps that many tests share.

use std::fs;

use crate::client::{Ended, Rewind};
use crate::cluster::{Node, append};
use crate::oracle;
use crate::pair::Pair;
use crate::server::{Pki, Server};

/// Rewinds `target` onto `source` with its own certificates and server.
pub fn rewind(pair: &Pair, target: &Node, source: &Node, args: &[&str]) -> Ended {
    let pki_home = pair
        .home
        .path()
        .join(format!("pki-{}", source.socket.file_name().expect("name").to_string_lossy()));
    drop(fs::remove_dir_all(&pki_home));
    fs::create_dir_all(&pki_home).expect("directory");
    let pki = Pki::new(&pki_home);
    let server = Server::start(source, &pki);
    Rewind::new(target, &server, &pki).following(source).args(args.iter().copied()).succeed()
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
