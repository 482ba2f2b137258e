#!/bin/sh
# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
# compile_cost.sh SECONDS KILOBYTES COMMAND...: fails when COMMAND fails, or takes more user time or
# resident memory than that. Exits 77 (skipped) without GNU time.
max_seconds=$1 max_kilobytes=$2
shift 2
if ! /usr/bin/time -f '%U %M' true >/dev/null 2>&1; then
  echo "skipped: no GNU time at /usr/bin/time"
  exit 77
fi
report=$(mktemp) || exit 1
trap 'rm -f "$report"' EXIT
/usr/bin/time -f '%U %M' -o "$report" "$@" || exit 1
read -r seconds kilobytes <"$report"
echo "$seconds s user (at most $max_seconds), $kilobytes kB (at most $max_kilobytes)"
awk -v s="$seconds" -v S="$max_seconds" -v k="$kilobytes" -v K="$max_kilobytes" \
  'BEGIN { exit !(s + 0 <= S + 0 && k + 0 <= K + 0) }'
