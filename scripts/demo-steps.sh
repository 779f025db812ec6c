#!/usr/bin/env bash
# The steps of the demo; runs unprivileged. $1: a directory of its own.
set -euo pipefail
home=$1
bin=${PGREJOIN_POSTGRES:-/var/tmp/pgrejoin-postgres}/15/bin
cd "$home"
export LC_ALL=C.UTF-8
old="-h $home -p 5401 -U postgres -d postgres -X -At -q"
new="-h $home -p 5402 -U postgres -d postgres -X -At -q"
say() { printf '\n== %s\n' "$*"; }
stop() {
    [ -n "${server:-}" ] && kill "$server" 2>/dev/null || true
    for node in old new; do
        [ -f $node/postmaster.pid ] && "$bin/pg_ctl" stop -D $node -m immediate -s || true
    done
}
trap stop EXIT
start() { "$bin/pg_ctl" start -D "$1" -l "$1.log" -w -s -o "-k $home -p $2 -c listen_addresses=''" </dev/null >/dev/null 2>&1; }

say "A primary ..."
"$bin/initdb" -D old -k -A trust -U postgres -N >/dev/null
printf "wal_keep_size = 256MB\n" >>old/postgresql.conf
start old 5401
"$bin/psql" $old -c "create table orders(id int primary key, what text)" \
    -c "insert into orders select g, 'before the failover' from generate_series(1, 20000) g"
say "... and a standby that follows it"
"$bin/pg_basebackup" -h "$home" -p 5401 -U postgres -D new -R -c fast
start new 5402
sleep 1

say "Failover: the standby is promoted while the old primary still takes writes"
"$bin/pg_ctl" promote -D new -w -s
"$bin/psql" $old -c "update orders set what = 'lost' where id % 10 = 0" \
    -c "create table only_on_the_old_node as select * from orders"
"$bin/psql" $new -c "update orders set what = 'after the failover' where id % 7 = 0" \
    -c "insert into orders values (20001, 'after the failover')" -c "checkpoint"
say "The old primary dies (kill -9 of all its processes)"
postmaster=$(head -1 old/postmaster.pid)
children=$(ps -o pid= --ppid "$postmaster")
kill -9 "$postmaster"
# Some end by themselves when their postmaster is gone.
kill -9 $children 2>/dev/null || true
sleep 0.5
rm -f .s.PGSQL.5401.lock

say "Certificates, and the server beside the new primary"
./pgrejoin-certs init --out pki
./pgrejoin-certs issue --ca pki --name new --san 127.0.0.1 --out pki
./pgrejoin-certs issue --ca pki --name old --out pki
./pgrejoin-server --pgdata new --listen 127.0.0.1:5403 --cert pki/new.crt --key pki/new.key \
    --client-ca pki/ca.crt --allow old 2>server.log &
server=$!
for _ in $(seq 50); do grep -q serving server.log && break; sleep 0.1; done

say "pgrejoin rewind, over mutual TLS"
./pgrejoin rewind --target-pgdata old --source https://127.0.0.1:5403 \
    --cert pki/old.crt --key pki/old.key --ca pki/ca.crt \
    -R --primary-conninfo "host=$home port=5402 user=postgres"

say "The old node starts as a standby of the new one"
start old 5401
"$bin/psql" $new -c "insert into orders values (20002, 'written while it streams')"
for _ in $(seq 100); do
    [ "$("$bin/psql" $old -c "select count(*) from orders where id = 20002")" = 1 ] && break
    sleep 0.1
done
streaming=$("$bin/psql" $old -c "select status from pg_stat_wal_receiver")
lost=$("$bin/psql" $old -c "select count(*) from orders where what = 'lost'")
table=$("$bin/psql" $old -c "select count(*) from pg_class where relname = 'only_on_the_old_node'")
fresh=$("$bin/psql" $old -c "select count(*) from orders where what like 'after%' or what like 'written%'")
there=$("$bin/psql" $new -c "select count(*) from orders where what like 'after%' or what like 'written%'")
echo "WAL receiver: $streaming; lost rows: $lost, lost tables: $table; new rows: $fresh of $there"
[ "$streaming" = streaming ] && [ "$lost" = 0 ] && [ "$table" = 0 ] && [ "$fresh" = "$there" ]
say "Done: the old primary follows the new one"
