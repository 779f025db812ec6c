//! What is done on the nodes of a life.

use std::time::Duration;

use crate::cluster::{Load, Node, Session};

/// Work of every kind, over and over; `side` keeps the rows of the nodes apart.
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

/// Tables that nobody writes to but the transactions that are open across checkpoint and fork: what readers
/// mark on their pages stays.
pub fn make_watched(primary: &Node) {
    primary.script(
        "postgres",
        "create table watched(id int primary key, label text, tags int[], place point);
         create index watched_hash on watched using hash(label);
         create index watched_gin on watched using gin(tags);
         create index watched_gist on watched using gist(place);
         create index watched_spgist on watched using spgist(label);
         create index watched_brin on watched using brin(id);
         create table watched_prepared(id int primary key);
         insert into watched select g, 'w' || g, array[g % 10], point(g, g) from generate_series(1, 500) g;
         insert into watched_prepared select generate_series(1, 300);",
    );
}

/// Transactions that are open across checkpoint and fork.
#[derive(Debug)]
pub struct Open {
    long: Option<Session>,
    is_prepared: bool,
}

impl Open {
    /// Begins them on the primary.
    pub fn begin(primary: &Node, long: bool, prepared: bool) -> Self {
        let long = long.then(|| {
            let mut session = primary.session();
            session.run(
                "begin; insert into watched select g, 'l' || g, array[g % 10], point(g, g) from generate_series(1001, 1400) g; \
                 savepoint s; delete from watched where id <= 50; release s;",
            );
            session
        });
        if prepared {
            primary.sql(
                "begin; insert into watched_prepared select generate_series(1001, 1300); \
                 delete from watched_prepared where id <= 50; prepare transaction 'open'",
            );
        }
        Self { long, is_prepared: prepared }
    }

    /// Ends them on the node where they began, which is a primary still.
    pub fn end_here(&mut self, node: &Node, commits: bool) {
        if let Some(mut session) = self.long.take() {
            session.run(if commits { "commit;" } else { "rollback;" });
        }
        self.end_prepared(node, commits);
    }

    /// Ends the prepared one on another node that was promoted, where the long one is gone.
    pub fn end_prepared(&self, node: &Node, commits: bool) {
        if self.is_prepared {
            let what = if commits { "commit" } else { "rollback" };
            node.try_sql("postgres", &format!("{what} prepared 'open'"));
        }
    }
}

/// Somebody who reads the watched tables by heap and by index.
pub fn read(node: &Node) -> Load {
    node.load_every(
        Duration::from_millis(30),
        "select count(*) from watched; select count(*) from watched_prepared; select count(*) from plain; \
         set enable_seqscan = off; select count(*) from watched where id > 0; select count(*) from watched_prepared where id > 0; \
         select count(*) from watched where tags @> array[3]; select count(*) from watched where label > 'a'; \
         select count(*) from words where label > 'w'; set enable_seqscan = on;",
    )
}

/// Reads once what [`read`] reads, so that it was read for certain.
pub fn read_once(node: &Node) {
    for rows in ["watched", "watched_prepared"] {
        for scan in ["off", "on"] {
            node.sql(&format!(
                "set enable_seqscan = {scan}; select count(*) from {rows} where id > 0"
            ));
        }
    }
}
