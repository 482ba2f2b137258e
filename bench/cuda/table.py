# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
"""Ours, the floor, the best peer and the target, as one Markdown table.

  python3 bench/cuda/table.py DIR/kvkeep.json [DIR/peers.json]
  python3 bench/cuda/table.py --page DIR/table.md DIR/kvkeep.json DIR/peers.json   # the table there, a summary here

Needs the standard library alone. A target without the figures that it asks for is "not measured", never met.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import results

CALIBRATION = [("empty_node_us", "empty graph node", "us"), ("copy_gb_per_s", "copy", "GB/s"),
               ("read_gb_per_s", "read", "GB/s"), ("mma_tflops", "mma.sync bf16", "TFLOP/s"),
               ("wgmma_tflops", "wgmma bf16", "TFLOP/s"), ("fma_tflops", "fp32 multiply-add", "TFLOP/s"), ("exp2_t_per_s", "exponentials", "T/s")]


class Row:
    """One row of ours, and its peers by name."""

    def __init__(self, entry, peers, rows):
        self.name = results.row_name(entry["name"])
        parts = self.name.split("/")
        self.kind, self.words = parts[0], set(parts[1:])
        self.number = {p.split(":")[0]: int(p.split(":")[1]) for p in parts if re.fullmatch(r"\w+:\d+", p)}
        self.entry, self.rows = entry, rows
        # Graphs are the rule; whoever was timed call by call says so.
        self.peers = {p["peer"] + (f", by {p['timing']}" if p.get("timing", "graph") != "graph" else ""): p["us"]
                      for p in peers if p["row"] == self.name}

    def get(self, key):
        return self.entry.get(key)

    def batch(self):
        return self.number.get("B", 1)

    def peer(self, start=""):
        """The fastest of the peers whose names begin so, as (us, name)."""
        return min(((us, name) for name, us in self.peers.items() if name.startswith(start)), default=None)

    def times(self, start):
        """How many times longer that peer takes."""
        best = self.peer(start)
        return best[0] / self.get("us") if best else None


# -- targets: (what, kinds, applies, value, limit, whether more is better) ------------------------------------------


def long_step(r):
    return r.batch() * r.number["C"] >= 8192


def folds(r):
    return bool(r.words & {"h2o", "tova", "morphkv"})


def fold_cost(r, relative):
    """A fold over the attention without it."""
    plain = r.rows.get(r.name.replace("attend_fold", "attend", 1))
    if plain is None:
        return None
    more = r.get("us") - plain.get("us")
    return more / plain.get("us") if relative else more


TARGETS = [
    ("floor", ["window"], lambda r: r.number["T"] >= 32768 and not r.get("warpgroups"),
     lambda r: r.get("floor_ratio"), 1.6, False),
    ("floor", ["window"], lambda r: r.number["T"] >= 32768 and r.get("warpgroups"),
     lambda r: r.get("floor_ratio"), 1.3, False),
    ("floor", ["window_mma"], lambda r: r.number["T"] >= 32768, lambda r: r.get("floor_ratio"), 1.6, False),
    ("torch eager", ["window"], lambda r: True, lambda r: r.times("torch eager"), 8, True),
    ("torch.compile", ["window"], lambda r: True, lambda r: r.times("torch.compile"), 3, True),
    ("floor", ["h2o_prompt", "h2o_prompt_mma"], lambda r: True, lambda r: r.get("floor_ratio"), 1.6, False),
    ("torch.topk", ["select_k"], lambda r: r.number["n"] >= 8192, lambda r: r.times("torch.topk"), 4, True),
    ("us", ["select_k"], lambda r: r.number["rows"] == 8 and r.number["n"] == 8192, lambda r: r.get("us"), 7, False),
    ("floor", ["compact"], lambda r: True, lambda r: r.get("floor_ratio"), 1.2, False),
    ("best peer's time", ["attend"], lambda r: True, lambda r: r.peer() and r.get("us") / r.peer()[0], 1.1, False),
    ("overhead", ["attend_fold"], long_step, lambda r: fold_cost(r, True), 0.05, False),
    ("overhead, us", ["attend_fold"], lambda r: not long_step(r), lambda r: fold_cost(r, False), 1.5, False),
    ("overhead", ["step", "aside"], lambda r: folds(r) and long_step(r), lambda r: r.get("overhead"), 0.05, False),
    ("overhead, us", ["step", "aside"], lambda r: folds(r) and not long_step(r), lambda r: r.get("overhead_us"), 1.5, False),
    ("overhead", ["step", "aside"], lambda r: "morphkv-direct" in r.words and long_step(r),
     lambda r: r.get("overhead"), 0.25, False),
    ("published MorphKV", ["step"], lambda r: "morphkv" in r.words and r.batch() == 1,
     lambda r: r.times("published MorphKV"), 20, True),
    ("drift, either way", ["steady"], lambda r: True,
     lambda r: abs(r.get("drift")) if r.get("drift") is not None else None, 0.02, False),
    ("p99 / median", ["steady"], lambda r: True, lambda r: r.get("p99_ratio"), 1.1, False),
]


def number(x):
    return "-" if x is None else f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"


def judged(r):
    """Targets of a row as (target, figure, whether it is met); None where nothing was measured."""
    found = []
    for what, kinds, applies, value, limit, more in TARGETS:
        if r.kind not in kinds or not applies(r):
            continue
        got = value(r)
        target = f"{what} {'>=' if more else '<='} {number(limit)}{'x' if more or what == 'floor' else ''}"
        found.append((target, got, None if got is None else got >= limit if more else got <= limit))
    return found


def line(r):
    verdicts = judged(r)
    target = "; ".join(t for t, _, _ in verdicts) or "-"
    result = "; ".join("not measured" if met is None else f"{'met' if met else '**missed**'} ({number(got)})"
                       for _, got, met in verdicts) or "-"
    best = r.peer()
    name = r.name + (" (mma.sync alone)" if r.get("products") == "warps" else "")
    return [name, number(r.get("us")), number(r.get("spread")), number(r.get("launches")), number(r.get("floor_us")),
            number(r.get("floor_ratio")), best[1] if best else "-", number(best[0]) if best else "-",
            number(best[0] / r.get("us")) if best else "-", target, result]


def markdown(cells):
    return "| " + " | ".join(cells) + " |"


def device(ours):
    """The device and its rates."""
    context = dict(ours["context"])
    for entry in ours["benchmarks"]:  # known once rows have run
        if results.row_name(entry["name"]) == "calibration/wgmma" and "TFLOP/s" in entry:
            context["wgmma_tflops"] = entry["TFLOP/s"]
    return (f"Device: {context.get('device', 'unknown')}, driver {context.get('driver', '?')},"
            f" runtime {context.get('runtime', '?')}; {context.get('heads', 'heads unknown')}. "
            + ", ".join(f"{what} {number(float(context[key]))} {unit}" for key, what, unit in CALIBRATION
                        if key in context) + ".")


def sorted_out(ours, peers):
    """Rows that were measured, by name (the first of a name), and lines about those that were not."""
    rows, failures, left_out = {}, [], []
    if ours["context"].get("incomplete"):
        failures.append(f"- incomplete: {ours['context']['incomplete']}")
    for entry in ours["benchmarks"]:
        if entry.get("run_type", "iteration") != "iteration":
            continue
        r = Row(entry, peers["rows"], rows)
        message = entry.get("error_message", "")
        if not entry.get("error_occurred"):
            if r.kind != "calibration":
                rows.setdefault(r.name, r)
        elif message.startswith("skipped: "):
            left_out.append(f"- {r.name} {message}")
        else:
            failures.append(f"- {r.name} failed: {message}")
    return rows, failures, left_out


def skipped_peers(peers):
    reasons = {}
    for s in peers["skipped"]:
        reasons.setdefault((s["peer"], s["reason"]), []).append(s["row"])
    return [f"- {peer} skipped: {reason} ({len(names)} row{'s' * (len(names) > 1)})"
            for (peer, reason), names in reasons.items()]


def table(ours, peers):
    """@return the whole page, as lines"""
    rows, failures, left_out = sorted_out(ours, peers)
    heads = ["row", "us", "spread", "launches", "floor us", "x floor", "best peer", "peer us", "peer / ours", "target",
             "verdict"]
    return ([device(ours), "", markdown(heads), markdown(["---"] + ["---:"] * 5 + ["---", "---:", "---:", "---", "---"])]
            + [markdown(line(r)) for r in rows.values()] + [""] + failures + left_out + skipped_peers(peers))


def first(lines, most):
    return lines if len(lines) <= most else lines[:most] + [f"  ... and {len(lines) - most} more"]


def summary(ours, peers):
    """@return failures, then each target: how often it is met, and where it is missed"""
    rows, failures, left_out = sorted_out(ours, peers)
    targets = {}
    for r in rows.values():
        for target, got, met in judged(r):
            targets.setdefault(f"{r.kind}, {target}", []).append((r.name, got, met))
    lines = [device(ours)] + first(failures, 20) + first(left_out, 10)
    timed = [p["peer"] for p in peers["rows"]]
    lines.append(f"{len(rows)} rows; {len(timed)} times of {len(set(timed))} peers, {len(peers['skipped'])} skipped")
    for target, all_of in targets.items():
        count = {word: sum(met is value for _, _, met in all_of)
                 for word, value in (("met", True), ("missed", False), ("not measured", None))}
        lines.append(f"{target}: " + ", ".join(f"{n} {word}" for word, n in count.items() if n))
        lines += first([f"  missed: {name}, {number(got)}" for name, got, met in all_of if met is False], 6)
    return lines


def main():
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    a.add_argument("ours", type=Path)
    a.add_argument("peers", type=Path, nargs="?")
    a.add_argument("--page", type=Path, help="where the table goes; a summary is printed")
    a = a.parse_args()
    peers = {"rows": [], "skipped": [{"row": "all", "peer": "all", "reason": "no file of peers"}]}
    if a.peers and a.peers.exists():
        try:
            peers = json.loads(a.peers.read_text())
        except json.JSONDecodeError:
            peers["skipped"][0]["reason"] = f"{a.peers} is no JSON"
    try:
        ours = results.read(a.ours)
    except results.Unreadable as e:
        sys.exit(f"no table: {e}")
    if not ours["benchmarks"]:
        sys.exit(f"no table: no row was measured. {ours['context'].get('incomplete', '')}")
    page = "\n".join(table(ours, peers)) + "\n"
    if a.page:
        a.page.write_text(page)
        page = "\n".join(summary(ours, peers)) + "\n"
    sys.stdout.write(page)


if __name__ == "__main__":
    main()
