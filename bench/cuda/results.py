# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
"""Reads what the CUDA benchmarks' programs wrote, also where one was stopped half-way; joins files into one.

  python3 bench/cuda/results.py DIR/attention.json DIR/scoring.json ... > kvkeep.json

Needs the standard library alone.
"""

import json
import re
import sys
from pathlib import Path


class Unreadable(Exception):
    """No rows can be had from a file; the argument says why."""


def row_name(entry_name):
    """Without what Google Benchmark appends."""
    return "/".join(p for p in entry_name.split("/") if not re.match(r"(iterations|repeats):|manual_time$", p))


def read(path):
    """@return context, benchmarks, and `cut_off`: whether the file ends after some row, as a stopped program's does"""
    try:
        text = Path(path).read_text()
    except OSError as e:
        raise Unreadable(f"{path}: {e.strerror}") from e
    whole = text[:text.rfind("}") + 1]  # rows hold no braces of their own
    for cut_off, form in (False, text), (True, whole + "]}"):
        try:
            found = json.loads(form)
            if isinstance(found, dict) and isinstance(found.get("benchmarks"), list):
                return {"context": {}, **found, "cut_off": cut_off}
        except json.JSONDecodeError:
            pass
    raise Unreadable(f"{path}: {'no row in it' if text.strip() else 'empty'}")


def joined(paths):
    """All rows under the first context (each program measures its rates anew), and what is wrong with the files."""
    context, rows, wrong = {}, [], []
    for path in map(Path, paths):
        try:
            one = read(path)
        except Unreadable as e:
            wrong.append(str(e))
            continue
        here = {k: v for k, v in one["context"].items() if k not in ("host_name", "executable")}
        context = context or here
        warps = {"products": "warps"} if here.get("products") == "warps" else {}
        rows += [{**row, **warps} for row in one["benchmarks"]]
        if one["cut_off"]:
            wrong.append(f"{path.name} was cut off: {len(one['benchmarks'])} rows kept")
    if wrong:
        context = {**context, "incomplete": "; ".join(wrong)}
    return {"context": context, "benchmarks": rows}


if __name__ == "__main__":
    json.dump(joined(sys.argv[1:]), sys.stdout, indent=1)
    print()
