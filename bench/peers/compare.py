# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
"""Our benchmarks against torch twins of published programs, in one job.

  cmake --preset gcc && cmake --build --preset gcc --target kvkeep_bench
  python3 bench/peers/compare.py --json DIR/peers.json

A round takes a sample of ours (a run of a bench_* program for one row), then one of each twin, each followed
by the rate of a matrix product in torch; every other round takes ours last. Every figure is a median over
rounds, every ratio (a twin's time over ours) a median of the rounds' ratios. Both sides run one thread, are
timed by that thread's CPU time, and work on random inputs that rotate through more memory than the last cache
holds.

"eviction" is a step less the attention of that step alone, on both sides: for the published twins the
attention includes append by concatenation and keys and values repeated per query head, which their programs
do without eviction as well.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"  # read once, when torch is loaded

try:
    import torch
except ModuleNotFoundError:
    print("torch is not installed: comparison skipped (see bench/peers/requirements.txt)")
    sys.exit(0)

import twins

KINDS = {
    "published MorphKV": twins.PublishedMorph,
    "lean MorphKV": twins.LeanMorph,
    "lean MorphKV, cached logits": twins.LeanMorphCached,
    "published H2O": twins.PublishedH2O,
    "lean H2O": twins.LeanH2O,
}


def median(values):
    v = sorted(values)
    return v[len(v) // 2] if len(v) % 2 else (v[len(v) // 2 - 1] + v[len(v) // 2]) / 2


def timed(f):
    """Microseconds of this thread. Another thread at work would show in the process's time."""
    process, thread = time.process_time(), time.thread_time()
    f()
    thread = time.thread_time() - thread
    process = time.process_time() - process
    if process > 1.2 * thread + 1e-3:
        sys.exit("torch works on more than one thread: the comparison would not be fair")
    return thread * 1e6


def sgemm_rate():
    """GFLOP/s of a product in a near cache."""
    a, b = torch.randn(512, 512), torch.randn(512, 512)
    out = torch.empty(512, 512)
    torch.mm(a, b, out=out)
    return 2 * 512**3 / median([timed(lambda: torch.mm(a, b, out=out)) for _ in range(7)]) * 1e-3


def math_library():
    """Names of the libraries behind a matrix product: the whole configuration also says where it was built."""
    words = ("Math Kernel Library", "MKL-DNN", "OpenBLAS", "CPU capability", "BLAS_INFO")
    parts = (p.strip(" -") for line in torch.__config__.show().splitlines() for p in line.split(", "))
    return [p.removeprefix("Build settings: ") for p in parts if any(w in p for w in words)]


# -- twins ----------------------------------------------------------------------------------------------


def check(kind):
    """The kept set of a lean twin is the published one's, step by step."""
    p = SimpleNamespace(kv_heads=2, group=4, dim=32, capacity=48, window=8)
    data = twins.Layers(p, 3)
    lean, full = KINDS["lean " + kind](p, data), KINDS["published " + kind.split(",")[0]](p, data)
    n = p.capacity + 1
    start = n if "MorphKV" in kind else p.capacity  # H2O's published step ends with C tokens
    lean.v[:, :, 0] = torch.arange(n)
    full.k, full.v = lean.k[:, n - start:].clone(), lean.v[:, n - start:].clone()
    if "MorphKV" in kind:
        rows = p.window - 1
        for age in range(rows):  # the newest query has age 0
            full.ring[:, -1 - age] = lean.ring[:, :, (n - age) % rows].flatten(0, 1)
        if hasattr(lean, "kept"):
            lean.refill()
        lean.decide()
    else:
        full.sums = lean.sums[:, 1:].clone()
    for _ in range(3 * n):
        q, k, v = (x.clone() for x in data.token())
        v[:, 0] = lean.now
        full.step(q, k, v)
        lean.step(q, k, v)
        for h in range(p.kv_heads):
            ours = set(lean.position[h].tolist())
            if "H2O" in kind:
                ours.discard(lean.position[h, lean.slot[h]].item())
            if ours != set(int(x) for x in full.v[h, :, 0]):
                sys.exit(f"lean {kind}: another kept set than the published form's")


class StepTwin:
    """Decode steps through layers that rotate."""

    def __init__(self, p, kind):
        bytes_of_layer = 8 * p.kv_heads * p.capacity * p.dim
        n = max(3, min(32, 72_000_000 // bytes_of_layer))
        self.data = twins.Layers(p, 1)
        self.layers = [KINDS[kind](p, self.data) for _ in range(n)]
        self.sample()

    def sample(self):
        step, alone = [], []
        half = len(self.layers) // 2
        for i, layer in enumerate(self.layers):
            q, k, v = self.data.token()
            step.append(timed(lambda: layer.step(q, k, v)))
            other = self.layers[(i + half) % len(self.layers)]
            q, k, v = self.data.token()
            alone.append(timed(lambda: other.attention_alone(q, k, v)))
        return {"step": median(step), "alone": median(alone), "eviction": median(step) - median(alone)}


class PromptTwin:
    def __init__(self, p, kind):
        data = twins.Layers(p, 2)
        self.layers = [kind(p, data) for _ in range(2)]
        self.sample()

    def sample(self):
        return {"scores": median([timed(layer.scores) for layer in self.layers]),
                "cut": median([timed(layer.cut) for layer in self.layers])}


# -- ours -----------------------------------------------------------------------------------------------


def run_ours(folder, program, row):
    """The counters of one row."""
    command = [str(folder / program), f"--benchmark_filter=^{row}/iterations:", "--benchmark_format=json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    if len(found.get("benchmarks", [])) != 1:
        sys.exit(f"{program} has no row {row}")
    return found["benchmarks"][0], float(found["context"]["fma_peak_gflops"])


def step_of_ours(folder, p, policy):
    row, peak = run_ours(folder, "bench_policy_step",
                         f"policy_step/{policy}/C:{p.capacity}/W:{p.window}/B:1/Hkv:{p.kv_heads}"
                         f"/G:{p.group}/D:{p.dim}/f32/hnd")
    return {"step": row["us"], "alone": row["us"] / row["peer_ratio"],
            "eviction": row["decision_us_per_head"] * p.kv_heads, "fma": peak}


def prompt_of_ours(folder, p):
    shape = f"/Hkv:{p.kv_heads}/G:{p.group}/D:{p.dim}/f32"
    score, peak = run_ours(folder, "bench_window_score", f"window_score/T:{p.tokens}/W:{p.window}/B:1"
                           f"{shape}/hnd/no_lse")
    given, _ = run_ours(folder, "bench_window_score", f"window_score/T:{p.tokens}/W:{p.window}/B:1"
                        f"{shape}/hnd/lse")
    cut, _ = run_ours(folder, "bench_prefill",
                      f"prompt_cut/snapkv/T:{p.tokens}/C:{p.capacity}/W:{p.window}{shape}")
    return {"scores": score["us"], "scores, log-sum-exp given": given["us"], "cut": cut["us"], "fma": peak}


# -- the table ------------------------------------------------------------------------------------------


def comparisons(p, folder):
    """Per comparison: a function that samples ours, twins by name, and rows (what, ours' key, theirs)."""
    step_rows = [("eviction", "eviction", "eviction"), ("attention + eviction", "step", "step"),
                 ("attention alone", "alone", "alone")]
    steps = {"MorphKV": ("morphkv", ["published MorphKV", "lean MorphKV", "lean MorphKV, cached logits"]),
             "H2O": ("h2o", ["published H2O", "lean H2O"])}
    for name, (policy, kinds) in steps.items():
        yield (f"{name} step, C = {p.capacity}", lambda policy=policy: step_of_ours(folder, p, policy),
               {k: StepTwin(p, k) for k in kinds}, step_rows)
    yield (f"SnapKV prompt, T = {p.tokens}", lambda: prompt_of_ours(folder, p),
           {"published SnapKV": PromptTwin(p, twins.PublishedSnap),
            "lean SnapKV": PromptTwin(p, twins.LeanSnap)},
           [("scores", "scores", "scores"), ("scores, log-sum-exp given", "scores, log-sum-exp given", "scores"),
            ("scores, pooling, choice, gather", "cut", "cut")])


def compare(p, folder, rounds):
    table = []
    for title, ours, peers, rows in comparisons(p, folder):
        taken = []
        for r in range(rounds):
            one = {"ours": ours()} if r % 2 == 0 else {}
            for name, twin in peers.items():
                one[name] = dict(twin.sample(), sgemm=sgemm_rate())
            if r % 2:
                one["ours"] = ours()
            taken.append(one)
        for what, mine, theirs in rows:
            for name in peers:
                pairs = [(o["ours"][mine], o[name][theirs]) for o in taken]
                ratios = sorted(b / a for a, b in pairs)
                table.append({"row": f"{title}: {what}", "twin": name,
                              "kvkeep_us": median(a for a, _ in pairs), "twin_us": median(b for _, b in pairs),
                              "ratio": median(ratios), "ratio_least": ratios[0], "ratio_most": ratios[-1],
                              "sgemm_gflops": median(o[name]["sgemm"] for o in taken),
                              "fma_gflops": median(o["ours"]["fma"] for o in taken), "rounds": rounds})
                print_row(table[-1])
    return table


def print_row(r):
    print(f"{r['row']:<58} {r['twin']:<28} {r['kvkeep_us']:>10.0f} {r['twin_us']:>10.0f} {r['ratio']:>7.1f}"
          f"  {r['ratio_least']:>5.1f} .. {r['ratio_most']:<6.1f} {r['fma_gflops']:>5.0f} {r['sgemm_gflops']:>5.0f}",
          flush=True)


def main():
    root = Path(__file__).resolve().parents[2]
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    a.add_argument("--bench", type=Path, default=root / "build/gcc/bench", help="folder of the bench_* programs")
    a.add_argument("--rounds", type=int, default=9)
    a.add_argument("--json", type=Path)
    a = a.parse_args()
    p = SimpleNamespace(kv_heads=8, group=4, dim=128, capacity=1024, window=32, tokens=8192)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    for kind in ("MorphKV", "MorphKV, cached logits", "H2O"):
        check(kind)
    print("\n".join(math_library()))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread; {p.kv_heads} KV heads, {p.group} query"
          f" heads each, D = {p.dim}, W = {p.window}, batch 1, fp32")
    print(f"{'row':<58} {'twin':<28} {'kvkeep us':>10} {'twin us':>10} {'ratio':>7}  {'range':^15}"
          f" {'fma':>5} {'sgemm':>5}  (GFLOP/s)")
    table = compare(p, a.bench, a.rounds)
    if a.json:
        context = {"torch": torch.__version__, "math_library": math_library(), "threads": torch.get_num_threads(),
                   "shape": vars(p)}
        a.json.write_text(json.dumps({"context": context, "rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
