#!/bin/sh
# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
# compile_cost.sh RATIO KILOBYTES UNIT BASELINE COMMAND...: fails when COMMAND cannot compile UNIT or
# BASELINE, or takes more than RATIO times BASELINE's user time (medians of three: machines differ and
# are shared) or more resident memory than that for UNIT. Exits 77 (skipped) without GNU time.
max_ratio=$1 max_kilobytes=$2 unit=$3 baseline=$4
shift 4
if ! /usr/bin/time -f '%U %M' true >/dev/null 2>&1; then
  echo "skipped: no GNU time at /usr/bin/time"
  exit 77
fi
report=$(mktemp) || exit 1
trap 'rm -f "$report"' EXIT

# median SOURCE COMMAND...: user seconds and kilobytes
median() {
  source=$1
  shift
  for _ in 1 2 3; do
    /usr/bin/time -f '%U %M' -o "$report" "$@" "$source" || exit 1
    cat "$report"
  done | sort -n | sed -n 2p
}

ours=$(median "$unit" "$@") && [ -n "$ours" ] || exit 1
plain=$(median "$baseline" "$@") && [ -n "$plain" ] || exit 1
echo "$ours $plain" | awk -v most="$max_ratio" -v kilobytes="$max_kilobytes" '{
  ratio = $1 / ($3 > 0.01 ? $3 : 0.01)
  printf "%.2f s user, %.2f times the standard headers (at most %s), %d kB (at most %d)\n",
    $1, ratio, most, $2, kilobytes
  exit !(ratio <= most + 0 && $2 + 0 <= kilobytes + 0)
}'
