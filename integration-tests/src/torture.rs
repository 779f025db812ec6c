//! Random forks: work on both sides, a kill at a moment the seed chooses, and the way back.

use std::thread::sleep;
use std::time::Duration;

use crate::client::Rewind;
use crate::cluster::{Pair, Shape};
use crate::oracle;
use crate::server::{Pki, Server};

/// Work of every kind, over and over; `side` keeps the rows of the two nodes apart.
pub fn work(side: &str, seed: u32) -> String {
    format!(
        "update plain set n = n + 1, body = md5(body) where id % 997 = (random() * 996)::int;
         insert into grow select (random() * 1e6)::int, repeat('{side}', 20 + {seed} % 7) from generate_series(1, 60);
         delete from shrink where id % 401 = (random() * 400)::int;
         insert into words select g, array[g % 10], point(g % 100, {seed} % 50), '{side}' || random() from generate_series(1, 20) g;
         create table churn_{side}(id int, t text); insert into churn_{side} select g, md5(g::text) from generate_series(1, 300) g;
         create index on churn_{side}(t); truncate churn_{side}; insert into churn_{side} values (1, 'x'); drop table churn_{side};
         vacuum shrink;"
    )
}

/// One fork: the target is killed under load, with or without a checkpoint after the fork.
pub fn killed(major: u32, seed: u32) {
    let pair = Pair::new(major, Shape::default());
    let early = pair.a.load(&work("c", seed));
    sleep(Duration::from_millis(300 + u64::from(seed % 5) * 150));
    pair.b.promote();
    let old = pair.a.load(&work("o", seed));
    let new = pair.b.load(&work("n", seed));
    sleep(Duration::from_millis(500 + u64::from(seed % 7) * 100));
    if seed.is_multiple_of(2) {
        pair.a.sql("checkpoint");
        sleep(Duration::from_millis(200));
    }
    pair.a.kill();
    drop((early, old));
    if seed.is_multiple_of(3) {
        pair.b.sql("checkpoint");
    }
    let pki = Pki::new(pair.home.path());
    let server = Server::start(&pair.b, &pki);
    let ended = Rewind::new(&pair.a, &server, &pki).following(&pair.b).succeed();
    assert_eq!(ended.field("result"), "rewound", "seed {seed}: {}", ended.text);
    assert_eq!(ended.field("strategy"), "fork", "seed {seed}: {}", ended.text);
    pair.a.start();
    sleep(Duration::from_millis(300));
    drop(new);
    oracle::verify(&pair.a, &pair.b);
}
