#!/bin/sh
# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
# compile_cost.sh RATIO KILOBYTES UNIT BASELINE COMMAND...: fails when COMMAND cannot compile UNIT or
# BASELINE, or takes more than RATIO times BASELINE's user time (the least of three each, in turn: machines
# differ, and what shares them only adds) or more resident memory than that for UNIT. Exits 77 (skipped)
# without GNU time.
max_ratio=$1 max_kilobytes=$2 unit=$3 baseline=$4
shift 4
if ! /usr/bin/time -f '%U %M' true >/dev/null 2>&1; then
  echo "skipped: no GNU time at /usr/bin/time"
  exit 77
fi
report=$(mktemp) || exit 1
trap 'rm -f "$report"' EXIT

# cost SOURCE COMMAND...: user seconds and kilobytes
cost() {
  source=$1
  shift
  /usr/bin/time -f '%U %M' -o "$report" "$@" "$source" || exit 1
  cat "$report"
}

pairs=$(for _ in 1 2 3; do
  ours=$(cost "$unit" "$@") && plain=$(cost "$baseline" "$@") || exit 1
  echo "$ours $plain"
done) || exit 1
printf '%s\n' "$pairs" | awk -v most="$max_ratio" -v kilobytes="$max_kilobytes" '
  NR == 1 || $1 < ours { ours = $1; size = $2 }
  NR == 1 || $3 < plain { plain = $3 }
  END {
    ratio = ours / (plain > 0.01 ? plain : 0.01)
    printf "%.2f s user, %.2f times the standard headers (at most %s), %d kB (at most %d)\n",
      ours, ratio, most, size, kilobytes
    exit !(ratio <= most + 0 && size + 0 <= kilobytes + 0)
  }'
