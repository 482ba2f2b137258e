# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
"""bench/cuda/peers.py without torch: what a peer that fails, crashes or hangs costs the others (nothing)."""

import os
import sys
import time
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench/cuda"))
import peers  # noqa: E402


def pretend(pipe, todo):
    """Does what a peer's name says. Every process tells its own number."""
    for row, name, captures in todo:
        result = {"us": 1.0, "timing": "graph" if captures else "stream", "process": os.getpid()}
        if name == "crash":
            os._exit(7)
        if name == "hang":
            time.sleep(600)
        answer = (result, None, True)
        if name == "skip":
            answer = (None, "not for this row", True)
        if name == "fail":
            answer = (None, "RuntimeError: broken", False)
        if name == "no capture" and captures:
            answer = (None, peers.NotCaptured.__name__, False)
        pipe.send(answer)
        if not answer[2]:
            return


class Peers(unittest.TestCase):
    def compare(self, *names, seconds=60.0):
        written = []
        peers.compare([("row", n) for n in names], seconds, lambda *x: written.append([list(y) for y in x]), pretend)
        found, skipped = written[-1]
        return {f["peer"]: f for f in found}, {s["peer"]: s["reason"] for s in skipped}, written

    def test_a_failure_costs_the_others_nothing(self):
        found, skipped, written = self.compare("a", "fail", "b", "crash", "c", "skip", "no capture", "d")
        self.assertEqual(list(found), ["a", "b", "c", "no capture", "d"])
        self.assertEqual(skipped, {"fail": "RuntimeError: broken", "crash": "its process ended with 7",
                                   "skip": "not for this row"})
        # What failed has its process to itself and those before it; a skipped row spoils none.
        process = {name: f["process"] for name, f in found.items()}
        self.assertEqual(len({process[n] for n in "abc"}), 3)
        self.assertNotEqual(process["c"], process["d"])
        self.assertEqual(found["no capture"]["timing"], "stream")
        self.assertEqual(found["d"]["timing"], "graph")
        self.assertGreater(len(written), 8)  # after each

    def test_one_that_hangs_is_stopped(self):
        most, peers.MOST_SECONDS = peers.MOST_SECONDS, 3
        try:
            found, skipped, _ = self.compare("hang", "a")
        finally:
            peers.MOST_SECONDS = most
        self.assertEqual(list(found), ["a"])
        self.assertEqual(skipped, {"hang": "took more than 3 s"})

    def test_what_does_not_fit_into_the_time_is_listed(self):
        found, skipped, _ = self.compare("hang", "a", "b", seconds=3.0)
        self.assertEqual(found, {})
        self.assertRegex(skipped["hang"], "took more than [23] s")
        self.assertEqual(skipped["b"], "the 3 s for peers are over")

    def test_targets_come_first(self):
        names = ["lean H2O", "torch.compile", "SDPA math, group as rows", "CuPy argsort", "torch eager"]
        self.assertEqual([n for _, n in sorted((("row", n) for n in names), key=peers.by_weight)],
                         ["SDPA math, group as rows", "torch eager", "torch.compile", "lean H2O", "CuPy argsort"])

    def test_one_that_torch_refuses_beforehand_spoils_no_process(self):
        def raises(reason):
            def call(i):
                raise RuntimeError(reason)
            return lambda s: (None, call)

        refusal = "No available kernel. Aborting execution."
        forms = [("refused", raises(refusal + "\nmore")), ("broken", raises("CUDA error"))]
        torch = SimpleNamespace(cuda=SimpleNamespace(OutOfMemoryError=MemoryError))
        with mock.patch.dict(peers.PEERS, {"attend": forms}), mock.patch.object(peers, "torch", torch):
            self.assertEqual(peers.time_one("attend/C:8/f32", "refused", True), (None, f"RuntimeError: {refusal}", True))
            self.assertEqual(peers.time_one("attend/C:8/f32", "broken", True), (None, "RuntimeError: CUDA error", False))

    def test_a_row_that_was_measured_twice_is_timed_once(self):
        name = "compact/T:300/C:64/bf16"
        ours = [{"name": "attend/C:8/bf16", "error_occurred": True}, {"name": name + "/iterations:200/manual_time"},
                {"name": name}]
        self.assertEqual(peers.pairs_of(ours), [(name, "torch index_select")])


@unittest.skipUnless(peers.torch, "torch is not installed")
class Twins(unittest.TestCase):
    def test_steps_take_device_and_type_from_what_they_work_on(self):
        """Defaults would be a mode, which adds to the time of every call of torch."""
        ran = 0
        for row in ("step/morphkv/C:64/bf16", "step/h2o/C:64/bf16"):
            s = peers.parse(row)
            s.device, s.tiny, s.heads = "cpu", True, 2
            for name, make in peers.PEERS["step"]:
                try:
                    _, call = make(s)
                except peers.Skip:
                    continue
                # What names no device would land on that one.
                with mock.patch.object(peers, "defaults", None), peers.torch.device("meta"):
                    out = [call(0) for _ in range(3)][-1]
                self.assertEqual((out.device.type, out.dtype), ("cpu", peers.torch.bfloat16), name)
                self.assertTrue(peers.finite(out), name)
                ran += 1
        self.assertEqual(ran, 5)


if __name__ == "__main__":
    unittest.main()
