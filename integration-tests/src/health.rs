//! Is a node healthy, beyond being equal? What a promoted node must be able to do.

use crate::cluster::Node;

/// Queries whose answer must not depend on whether an index is used: one at least for each index method.
const BY_INDEX: [&str; 16] = [
    "select count(*), sum(id) from plain where n between 10 and 20",
    "select count(*) from plain where body = (select min(body) from plain)",
    "select count(*) from plain where id between 100 and 5000",
    "select count(*), sum(id) from plain where id > 0",
    "select count(*) from words where tags @> array[3]",
    "select count(*) from words where place <@ box '((10,10),(40,40))'",
    "select count(*) from words where label = 'w77'",
    "select count(*) from words where label > 'w5'",
    "select count(*) from toasted where id > 3",
    "select count(*), sum(id) from watched where id > 0",
    "select count(*) from watched where label = 'w77'",
    "select count(*) from watched where label > 'a'",
    "select count(*) from watched where tags @> array[3]",
    "select count(*) from watched where place <@ box '((0,0),(2000,2000))'",
    "select count(*) from watched where id between 10 and 1200",
    "select count(*), sum(id) from watched_prepared where id > 0",
];

/// Each query whose table is there must have one answer by heap and by index.
pub fn same_by_heap_and_by_index(node: &Node) {
    let names = node.sql("select relname from pg_class where relkind = 'r'");
    let there = |query: &&&str| names.lines().any(|name| query.contains(&format!(" from {name} ")));
    let queries: Vec<&str> = BY_INDEX.iter().filter(there).copied().collect();
    let all = queries.join("; ");
    let (heap, index) = (by(node, &all, "off"), by(node, &all, "on"));
    for ((query, heap), index) in queries.iter().zip(heap.lines()).zip(index.lines()) {
        assert_eq!(heap, index, "by heap and by index: {query}");
    }
    assert_eq!((heap.lines().count(), index.lines().count()), (queries.len(), queries.len()));
}

/// The answer to a query with indexes off or on; with them on nothing else is used where it can be helped.
pub fn by(node: &Node, query: &str, indexes: &str) -> String {
    let heap = if indexes == "on" { "off" } else { "on" };
    node.sql(&format!(
        "set enable_seqscan = {heap}; set enable_indexscan = {indexes}; set enable_bitmapscan = {indexes}; \
         set enable_indexonlyscan = {indexes}; {query}"
    ))
}

/// Writes rows into indexes of every method.
pub fn write_into_every_index(node: &Node) {
    let there =
        |table: &str| node.sql(&format!("select to_regclass('{table}') is not null")) == "t";
    if there("plain") {
        node.sql(
            "insert into plain select 2000000 + g, md5(g::text), g % 100 from generate_series(1, 400) g on conflict do nothing",
        );
    }
    if there("words") {
        node.sql(
            "insert into words select g, array[g % 10, g % 7], point(g % 100, g % 90), chr(97 + g % 26) || md5(g::text) from generate_series(1, 600) g",
        );
    }
    if there("watched") {
        node.sql(
            "insert into watched select 5000 + g, 'i' || g, array[g % 10], point(g, g) from generate_series(1, 600) g",
        );
    }
    if there("toasted") {
        node.sql(
            "insert into toasted select 3000 + g, repeat(md5(g::text), 200) from generate_series(1, 20) g on conflict do nothing",
        );
    }
}

/// Every row of every database must be one that can be frozen.
pub fn freeze(node: &Node) {
    let names = node.sql("select datname from pg_database where datallowconn order by 1");
    for database in names.lines() {
        node.sql_in(database, "vacuum (freeze)");
    }
}

/// All of it, for a node that accepts writes.
pub fn check(node: &Node) {
    same_by_heap_and_by_index(node);
    write_into_every_index(node);
    freeze(node);
    same_by_heap_and_by_index(node);
}
