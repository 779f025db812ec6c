//! The plain cases, on every major: both sides changed after the fork.

use integration_tests::oracle;
use integration_tests::pair::{Pair, Shape};
use integration_tests::steps::Served;

/// Changes of every kind on one side.
fn diverge(node: &integration_tests::cluster::Node, side: &str) {
    node.script(
        "postgres",
        &format!(
            "update plain set body = '{side}' || body, n = n + 1 where id % 7 = 0;
             insert into plain select g, '{side}' || g, g % 90 from generate_series(30000, 32000) g;
             delete from words where id % 5 = 0;
             insert into words select g, array[g % 10], point(g % 100, g), '{side}' || g from generate_series(1, 1500) g;
             update toasted set big = repeat('{side}', 4000) where id % 3 = 0;
             create table made_{side} as select * from plain where id % 2 = 0;
             create index on made_{side}(n);
             select nextval('counter') from generate_series(1, 40);
             select lo_from_bytea(0, decode(repeat('cd', 3000), 'hex'));
             refresh materialized view summary;
             begin; insert into plain values (90001, '{side}', 1); savepoint s; insert into plain values (90002, '{side}', 2); rollback to s; commit;
             begin; insert into parent values (90000); prepare transaction 'left_{side}';
             begin; insert into parent values (90001); prepare transaction 'done_{side}';
             commit prepared 'done_{side}';
             begin; select * from parent where id < 50 for key share; savepoint x; update parent set id = id where id = 1; commit;
             create temp table t_{side}(id int); insert into t_{side} values (1);
             reindex index plain_n; cluster plain using plain_pkey; vacuum full words;
             vacuum freeze parent; insert into scratch values (1);"
        ),
    );
}

fn basic(major: u32, strategy: &str, stop: &str) {
    let pair = Pair::new(major, Shape::default());
    pair.a.sql("update plain set n = 5 where id < 1000");
    pair.a.sql("checkpoint");
    pair.a.sql("update plain set n = 6 where id between 1000 and 3000");
    pair.catch_up();
    pair.b.promote();
    diverge(&pair.a, "old");
    diverge(&pair.b, "new");
    match stop {
        "kill" => pair.a.kill(),
        mode => pair.a.stop(mode),
    }
    pair.b.sql("checkpoint");
    let served = Served::start(pair.home.path(), &pair.b);
    let ended = served.rewind(&pair.a).following(&pair.b).args(["--strategy", strategy]).succeed();
    assert_eq!(ended.field("result"), "rewound");
    assert_eq!(ended.field("strategy"), strategy, "{}", ended.text);
    oracle::verify(&pair.a, &pair.b);
}

macro_rules! on_major {
    ($($name:ident $major:literal),*) => { $(mod $name {
        #[test]
        fn compare_of_a_clean_fork() { super::basic($major, "compare", "fast"); }
        #[test]
        fn fork_of_a_clean_fork() { super::basic($major, "fork", "fast"); }
        #[test]
        fn fork_of_a_killed_target() { super::basic($major, "fork", "kill"); }
        #[test]
        fn latest_of_a_clean_fork() { super::basic($major, "latest", "fast"); }
        #[test]
        fn latest_of_a_killed_target() { super::basic($major, "latest", "kill"); }
    })* };
}
on_major!(pg14 14, pg15 15, pg16 16, pg17 17, pg18 18);
