# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
"""bench/cuda/table.py and results.py on made-up inputs: ratios, targets met, missed and not measured, broken files."""

import json
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "bench/cuda"
SCRIPT = FOLDER / "table.py"


def row(name, us, **counters):
    return {"name": f"{name}/iterations:200/manual_time", "run_type": "iteration", "us": us, "floor_us": 10.0,
            "floor_ratio": us / 10.0, "spread": 0.01, "launches": 2, **counters}


def peer(name, who, us):
    return {"row": name, "peer": who, "us": us}


class Table(unittest.TestCase):
    def page(self, rows, peers=(), skipped=(), with_peers=True):
        """Cells by row name, and all lines."""
        with tempfile.TemporaryDirectory() as folder:
            ours, others = Path(folder) / "ours.json", Path(folder) / "peers.json"
            ours.write_text(json.dumps({"context": {"device": "made up", "empty_node_us": "1.5"}, "benchmarks": rows}))
            others.write_text(json.dumps({"context": {}, "rows": list(peers), "skipped": list(skipped)}))
            words = [str(ours)] + ([str(others)] if with_peers else [])
            done = subprocess.run([sys.executable, str(SCRIPT)] + words, capture_output=True, text=True, check=True)
        lines = done.stdout.splitlines()
        cells = {}
        for text in lines:
            if text.startswith("| ") and not text.startswith("| row") and "---" not in text:
                name, *rest = (c.strip() for c in text.strip("|").split("|"))
                cells[name] = rest
        return cells, lines

    def test_a_row_with_peers_meets_and_misses(self):
        name = "window/T:32768/W:32/bf16/lse"
        cells, lines = self.page([row("calibration/copy", 1), row(name, 20.0)],
                                 [peer(name, "torch eager", 300), peer(name, "torch eager, published form", 170),
                                  peer(name, "torch.compile", 50), peer("window/T:8192/W:32/bf16/lse", "x", 1)])
        self.assertEqual(list(cells), [name])
        us, _, launches, floor, ratio, best, peer_us, times, target, verdict = cells[name]
        self.assertEqual((us, launches, floor, ratio), ("20", "2", "10", "2"))
        self.assertEqual((best, peer_us, times), ("torch.compile", "50", "2.5"))
        self.assertEqual(target, "floor <= 1.6x; torch eager >= 8x; torch.compile >= 3x")
        self.assertEqual(verdict, "**missed** (2); met (8.5); **missed** (2.5)")
        self.assertIn("Device: made up", lines[0])
        self.assertIn("empty graph node 1.5 us", lines[0])

    def test_warpgroups_have_a_nearer_target(self):
        rows = [row("window/T:32768/W:32/bf16/lse", 14.0, warpgroups=1.0),
                row("window_mma/T:32768/W:32/bf16/lse", 14.0)]
        cells, _ = self.page(rows)
        self.assertEqual(cells["window/T:32768/W:32/bf16/lse"][-2:],
                         ["floor <= 1.3x; torch eager >= 8x; torch.compile >= 3x",
                          "**missed** (1.4); not measured; not measured"])
        self.assertEqual(cells["window_mma/T:32768/W:32/bf16/lse"][-2:], ["floor <= 1.6x", "met (1.4)"])

    def test_without_peers_nothing_is_met_by_them(self):
        cells, lines = self.page([row("window/T:8192/W:32/bf16/lse", 20.0), row("attend/C:512/bf16", 5.0)],
                                 with_peers=False)
        self.assertEqual(cells["window/T:8192/W:32/bf16/lse"][-1], "not measured; not measured")
        self.assertEqual(cells["attend/C:512/bf16"][-1], "not measured")
        self.assertIn("- all skipped: no file of peers (1 row)", lines)

    def test_decode_steps(self):
        rows = [row("step/h2o/C:1024/B:8/bf16", 20.0, overhead=0.04, overhead_us=0.8),
                row("step/h2o/C:4096/bf16", 8.0, overhead=0.3, overhead_us=1.6),
                row("step/morphkv/C:1024/bf16", 8.0, overhead=0.3, overhead_us=1.4),
                row("step/morphkv-cached/C:1024/bf16", 8.0, overhead=0.9, overhead_us=4.0),
                row("step/morphkv-direct/C:1024/B:8/bf16", 40.0, overhead=0.9, overhead_us=20.0),
                row("step/morphkv-direct/C:1024/bf16", 20.0, overhead=0.9, overhead_us=9.0),
                row("attend/C:1024/B:8/bf16", 20.0), row("attend_fold/C:1024/B:8/bf16", 22.0)]
        cells, _ = self.page(rows, [peer("step/morphkv/C:1024/bf16", "published MorphKV", 800),
                                    peer("step/morphkv/C:1024/bf16", "lean MorphKV", 80),
                                    peer("attend/C:1024/B:8/bf16", "SDPA", 18)])
        verdict = {name: c[-1] for name, c in cells.items()}
        self.assertEqual(verdict["step/h2o/C:1024/B:8/bf16"], "met (0.04)")
        self.assertEqual(verdict["step/h2o/C:4096/bf16"], "**missed** (1.6)")
        self.assertEqual(verdict["step/morphkv/C:1024/bf16"], "met (1.4); met (100)")
        self.assertEqual(verdict["step/morphkv-cached/C:1024/bf16"], "-")
        self.assertEqual(verdict["step/morphkv-direct/C:1024/B:8/bf16"], "**missed** (0.9)")
        self.assertEqual(verdict["step/morphkv-direct/C:1024/bf16"], "-")
        self.assertEqual(verdict["attend/C:1024/B:8/bf16"], "**missed** (1.11)")
        self.assertEqual(verdict["attend_fold/C:1024/B:8/bf16"], "**missed** (0.1)")

    def test_selection_moves_and_steady(self):
        rows = [row("select_k/rows:8/n:8192/k:1024/uniform", 6.0), row("select_k/rows:8/n:32768/k:1024/uniform", 9.0),
                row("compact/T:8192/C:1024/bf16", 11.9), row("h2o_prompt/T:8192/bf16/lse", 16.0),
                row("h2o_prompt_mma/T:8192/bf16/lse", 17.0),
                row("steady/tova/C:1024/bf16", 9.0, drift=-0.03, p99_ratio=1.02)]
        name = rows[0]["name"].replace("/iterations:200/manual_time", "")
        cells, _ = self.page(rows, [peer(name, "torch.topk", 30), peer(name, "torch.topk, indices sorted", 50)])
        verdict = {n: c[-1] for n, c in cells.items()}
        self.assertEqual(verdict[name], "met (5); met (6)")
        self.assertEqual(verdict["select_k/rows:8/n:32768/k:1024/uniform"], "not measured")
        self.assertEqual(verdict["compact/T:8192/C:1024/bf16"], "met (1.19)")
        self.assertEqual(verdict["h2o_prompt/T:8192/bf16/lse"], "met (1.6)")
        self.assertEqual(verdict["h2o_prompt_mma/T:8192/bf16/lse"], "**missed** (1.7)")
        self.assertEqual(verdict["steady/tova/C:1024/bf16"], "**missed** (0.03); met (1.02)")

    def test_failures_are_named_and_aggregates_left_out(self):
        failed = {"name": "attend/C:4096/B:64/bf16/iterations:200/manual_time", "run_type": "iteration",
                  "error_occurred": True, "error_message": "no memory"}
        mean = dict(row("attend/C:512/bf16_mean", 1.0), run_type="aggregate")
        cells, lines = self.page([failed, mean], skipped=[{"row": r, "peer": "CuPy", "reason": "absent"} for r in "ab"])
        self.assertEqual(cells, {})
        self.assertIn("- attend/C:4096/B:64/bf16 failed: no memory", lines)
        self.assertIn("- CuPy skipped: absent (2 rows)", lines)

    def test_who_was_not_timed_as_a_graph_says_so(self):
        name = "step/morphkv/C:1024/bf16"
        cells, _ = self.page([row(name, 8.0, overhead_us=1.0)],
                             [dict(peer(name, "published MorphKV", 400), timing="stream"),
                              dict(peer(name, "lean MorphKV", 500), timing="graph")])
        self.assertEqual(cells[name][5], "published MorphKV, by stream")
        self.assertEqual(cells[name][-1], "met (1); met (50)")

    def test_a_summary_names_failures_first_then_counts_targets(self):
        rows = [row("window/T:32768/W:32/bf16/lse", 20.0), row("window/T:32768/W:16/bf16/lse", 12.0),
                {"name": "attend/C:512/bf16", "error_occurred": True, "error_message": "a fault"},
                {"name": "overlapped/x/C:512/bf16", "error_occurred": True, "error_message": "skipped: none here"},
                row("calibration/wgmma", 1.0, **{"TFLOP/s": 612.0})]
        with tempfile.TemporaryDirectory() as folder:
            ours, others, page = (Path(folder) / n for n in ("ours.json", "peers.json", "table.md"))
            ours.write_text(json.dumps({"context": {"incomplete": "x was cut off"}, "benchmarks": rows}))
            others.write_text("{")
            lines = self.run_script("table.py", "--page", page, ours, others).stdout.splitlines()
            self.assertIn("| window/T:32768/W:32/bf16/lse |", page.read_text())
            self.assertIn("peers.json is no JSON", page.read_text())
        self.assertIn("wgmma bf16 612 TFLOP/s", lines[0])
        self.assertEqual(lines[1:4], ["- incomplete: x was cut off", "- attend/C:512/bf16 failed: a fault",
                                      "- overlapped/x/C:512/bf16 skipped: none here"])
        self.assertIn("window, floor <= 1.6x: 1 met, 1 missed", lines)
        self.assertIn("  missed: window/T:32768/W:32/bf16/lse, 2", lines)
        self.assertIn("window, torch eager >= 8x: 2 not measured", lines)

    def test_of_two_rows_of_a_name_the_first_that_was_measured_counts(self):
        failed = {"name": "window/T:8192/W:16/bf16/lse", "error_occurred": True, "error_message": "a fault"}
        again = [row(f"window/T:8192/W:{w}/bf16/lse", 20.0, products="warps") for w in (16, 32)]
        cells, lines = self.page([failed, row("window/T:8192/W:32/bf16/lse", 12.0)] + again)
        self.assertEqual({name: c[0] for name, c in cells.items()},
                         {"window/T:8192/W:16/bf16/lse (mma.sync alone)": "20", "window/T:8192/W:32/bf16/lse": "12"})
        self.assertIn("- window/T:8192/W:16/bf16/lse failed: a fault", lines)

    def run_script(self, name, *words):
        return subprocess.run([sys.executable, str(FOLDER / name), *map(str, words)], capture_output=True, text=True)

    def test_files_of_stopped_programs(self):
        whole = json.dumps({"context": {"device": "d", "host_name": "h"}, "benchmarks": [row("a/C:1", 1), row("b/C:1", 2)]},
                           indent=1)
        with tempfile.TemporaryDirectory() as folder:
            def file(name, text):
                (Path(folder) / name).write_text(text)
                return Path(folder) / name
            cut = [file("after_row.json", whole[:whole.rindex("}", 0, -4) + 1]),
                   file("within_row.json", whole[:whole.index('"b/C:1') + 9])]
            bad = [file("head.json", whole[:whole.index('{\n   "name"')]), file("empty.json", "")]
            warps = file("warps.json", json.dumps({"context": {"products": "warps"}, "benchmarks": [row("c/C:1", 3)]}))
            joined = json.loads(self.run_script("results.py", *cut, *bad, warps).stdout)
            none = self.run_script("table.py", file("none.json", json.dumps({"context": {}, "benchmarks": []})))
            failed = [self.run_script("table.py", f) for f in [*bad, Path(folder) / "missing.json"]]
        self.assertEqual([r["name"].split("/")[0] for r in joined["benchmarks"]], list("abac"))
        self.assertEqual(joined["benchmarks"][-1]["products"], "warps")
        self.assertEqual(joined["context"]["device"], "d")
        self.assertNotIn("host_name", joined["context"])
        for text in ("after_row.json was cut off: 2 rows", "within_row.json was cut off: 1 rows",
                     "head.json: no row in it", "empty.json: empty"):
            self.assertIn(text, joined["context"]["incomplete"])
        for done in [none, *failed]:
            self.assertEqual(done.returncode, 1)
            self.assertRegex(done.stderr, "^no table: ")
            self.assertNotIn("Traceback", done.stderr)


if __name__ == "__main__":
    unittest.main()
