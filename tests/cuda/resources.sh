#!/bin/sh
# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
# usage: resources.sh CUOBJDUMP OBJECT...
# Prints registers and stack of every kernel, and fails if one keeps anything on a stack (spilled
# registers, arrays that registers cannot hold) or the objects hold no kernel.
set -eu
dump=$1
shift
"$dump" --dump-resource-usage "$@" | awk '
  /^ *Function / { name = $2; sub(/:$/, "", name) }
  /REG:/ {
    ++kernels
    split("", value)
    for (i = 1; i <= NF; ++i) { split($i, part, ":"); value[part[1]] = part[2] }
    printf "%3d registers, %d bytes of stack: %s\n", value["REG"], value["STACK"], name
    if (value["STACK"] > 0 || value["LOCAL"] > 0) { ++bad; print "  ^ uses a stack" }
  }
  END {
    printf "%d kernels, %d with a stack\n", kernels, bad
    exit kernels == 0 || bad > 0
  }'
