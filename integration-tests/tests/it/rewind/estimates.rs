//! A dry run tells what each way would carry, and that is what the way then carries.

use integration_tests::oracle;
use integration_tests::pair::{Pair, Shape};
use integration_tests::steps::Served;
use serde_json::Value;

/// What travelled, both ways and compressed.
fn carried(result: &Value) -> u64 {
    let fields = ["bytes_data", "bytes_hashes", "bytes_signatures", "bytes_wal_payload"];
    fields.iter().map(|name| result[name].as_u64().expect("a number")).sum()
}

/// Rewinds by a way whose price a dry run told; the two must be within a quarter of each other.
fn costs_what_was_told(pair: &Pair, strategy: &str) -> Value {
    pair.a.stop("fast");
    let served = Served::start(pair.home.path(), &pair.b);
    let rewind = || served.rewind(&pair.a).following(&pair.b).args(["--strategy", strategy]);
    let dry = rewind().args(["-n"]).succeed();
    let dry = dry.result();
    let told = dry["prices"][strategy].as_u64().expect("a price");
    let ended = rewind().succeed();
    assert_eq!(ended.field("strategy"), strategy, "{}", ended.text);
    let carried = carried(ended.result());
    assert!(
        told * 4 >= carried * 3 && told * 4 <= carried * 5,
        "{told} told, {carried} carried: {}",
        ended.text
    );
    oracle::verify(&pair.a, &pair.b);
    dry.clone()
}

/// Both sides updated rows here and there, the source before its checkpoint.
fn scattered_updates() -> Pair {
    let pair = Pair::with(15, Shape::default(), "autovacuum = off");
    pair.a.script(
        "postgres",
        "create table rows as select g id, md5(g::text) a, md5((g * 7)::text) b from generate_series(1, 60000) g;
         create index on rows(a); create index on rows(id); checkpoint;",
    );
    pair.catch_up();
    pair.b.promote();
    for (node, side) in [(&pair.a, "old"), (&pair.b, "new")] {
        node.sql(&format!(
            "update rows set a = md5(a || '{side}') where id % 97 = length('{side}')"
        ));
    }
    pair.b.sql("update rows set b = md5(b) where id % 89 = 1");
    pair
}

#[test]
fn scattered_updates_by_latest() {
    let pair = scattered_updates();
    pair.b.sql("checkpoint");
    let dry = costs_what_was_told(&pair, "latest");
    let price = |name: &str| dry["prices"][name].as_u64().expect("a price");
    assert!(price("latest") < price("fork") && price("latest") < price("compare"), "{dry}");
    assert!(dry["source_checkpoint"]["age_seconds"].as_i64().expect("an age") < 60, "{dry}");
    assert!(dry["source_checkpoint"]["wal_since"].as_u64().expect("bytes") < 1 << 20, "{dry}");
}

#[test]
fn scattered_updates_by_fork() {
    costs_what_was_told(&scattered_updates(), "fork");
}

#[test]
fn scattered_updates_by_comparing() {
    costs_what_was_told(&scattered_updates(), "compare");
}

/// New relations, a longer one, and much WAL since the checkpoint that rebuilds most of it.
fn growth(before: bool) -> Pair {
    let pair = scattered_updates();
    let grow = |first: u32| {
        format!(
            "create table new_{first} as select g id, md5(g::text) a from generate_series(1, 40000) g;
             insert into rows select g, md5(g::text), 'x' from generate_series({first}, {first} + 20000) g;"
        )
    };
    if before {
        pair.b.script("postgres", &grow(100_000));
    }
    pair.b.sql("checkpoint");
    pair.b.script("postgres", &grow(200_000));
    pair
}

#[test]
fn growth_before_and_after_the_checkpoint_by_latest() {
    costs_what_was_told(&growth(true), "latest");
}

#[test]
fn growth_after_the_checkpoint_by_fork() {
    costs_what_was_told(&growth(false), "fork");
}
