//! The oracle itself: what PostgreSQL's own standbys show must pass.

use integration_tests::oracle;
use integration_tests::pair::{Pair, Shape};

/// Sessions that read one table at one time, and how often until a page was seen by two of them.
const READERS: usize = 6;
const ROUNDS: usize = 20;

/// Found with PostgreSQL alone: of two sessions that set a page's first hints at one time, both log
/// an image and one alone sets the LSN, so the standby's page is newer than the primary's.
#[test]
fn a_hint_that_two_sessions_logged_is_no_difference() {
    let pair = Pair::with(15, Shape::default(), "wal_keep_size = 1GB\nautovacuum = off");
    for _ in 0..ROUNDS {
        pair.a.sql("drop table if exists seen");
        pair.a.sql(
            "create table seen as select g, repeat('x', 100) from generate_series(1, 200000) g",
        );
        pair.a.sql("checkpoint");
        let read = "set max_parallel_workers_per_gather = 0; select count(*) from seen";
        let readers: Vec<_> = (0..READERS).map(|_| pair.a.background(read)).collect();
        for mut reader in readers {
            assert!(reader.wait().expect("a reader").success());
        }
        pair.catch_up();
        if oracle::compare_stopped(&pair.b, &pair.a) > 0 {
            return;
        }
        pair.a.start();
        pair.b.start();
    }
    panic!("no page was logged twice in {ROUNDS} rounds");
}
