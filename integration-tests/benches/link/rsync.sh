#!/bin/bash
# A node made equal by rsync while the source runs: a low-level base backup laid over the old files.
# Arguments: psql, connection, rsync URL, data directory, patterns to leave alone.
set -euo pipefail
psql=$1 connection=$2 source=$3 data=$4
set -f
excludes=()
for pattern in $5; do excludes+=("--exclude=$pattern"); done
coproc SQL { "$psql" -X -A -t -q -v ON_ERROR_STOP=1 "$connection"; }
echo "select 'started', pg_backup_start('bench', true);" >&"${SQL[1]}"
read -r answer <&"${SQL[0]}"
[[ $answer == started* ]]
# Files vanish on a live source: 24 says so, and replay repairs it.
rsync -az --inplace --delete "${excludes[@]}" --exclude=/pg_wal/ "$source/" "$data/" || [ $? = 24 ]
echo "select labelfile || '=end=' from pg_backup_stop(false);" >&"${SQL[1]}"
label=
while read -r line <&"${SQL[0]}"; do
    [[ $line == =end=* ]] && break
    label+=$line$'\n'
done
printf '%s' "$label" >"$data/backup_label"
rsync -az --inplace --delete "$source/pg_wal/" "$data/pg_wal/" || [ $? = 24 ]
/bin/sync -f "$data"
