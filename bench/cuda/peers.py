# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
"""What others offer for the rows of the CUDA benchmarks: the same shapes, in the same job.

  python3 bench/cuda/peers.py --ours DIR/kvkeep.json --json DIR/peers.json
  python3 bench/cuda/peers.py --check      # every peer's result on small shapes; on the CPU too, without times

A peer's calls rotate through more inputs than the last cache holds, are captured as a graph, and replayed
between events, as ours are; the median of up to 200 replays counts (fewer where one takes long, at least five).
What cannot be captured (published programs read sizes back) is timed on the stream, and says so. A peer that is
not there, fails or does not fit into the time is listed with the reason. Peers run in a process of its own; after
a capture or a peer that failed, crashed or hung the next ones get a new process, for CUDA and torch may be left in
any state. The JSON is written anew after each of them. Figures of peers need a device: without one there are none.
"""

import argparse
import contextlib
import importlib
import json
import math
import multiprocessing
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import results

try:
    import torch
except ModuleNotFoundError:
    torch = None

HEADS, GROUP, DIM = 8, 4, 128
TYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
NO_PEER = {"e4m3"}  # element types of ours alone
ROTATE_BYTES, SAMPLES = 256e6, 200
MOST_SECONDS = 60  # of one peer and row


class Skip(Exception):
    """This peer does not serve this row; the argument says why."""


class NotCaptured(Exception):
    """Something in a call cannot be captured as a graph; this process is not to be trusted any more."""


def optional(name):
    try:
        return importlib.import_module(name)
    except Exception as e:  # an installation may be broken in any way
        raise Skip(f"{name} cannot be imported ({type(e).__name__}: {e})") from e


# -- rows ---------------------------------------------------------------------------------------------------


def parse(name):
    """A row's name as kind and shape: window/T:8192/W:32/bf16/lse, step/h2o/C:1024/B:8/bf16, ..."""
    row = results.row_name(name)
    parts = row.split("/")
    shape = SimpleNamespace(row=row, kind=parts[0], B=1, W=32, words=set(), dtype="bf16", heads=HEADS)
    for part in parts[1:]:
        key, colon, value = part.partition(":")
        if colon:
            setattr(shape, key, int(value))
        elif key in TYPES or key in NO_PEER:
            shape.dtype = key
        else:
            shape.words.add(key)
    return shape


def normal(s, *extents):
    if s.dtype in NO_PEER:
        raise Skip("of 16 or 32 bits")
    return torch.randn(*extents, device=s.device, dtype=getattr(torch, TYPES[s.dtype]))


def sets_for(s, set_bytes):
    return 1 if s.tiny else max(1, min(1024, math.ceil(ROTATE_BYTES / set_bytes)))


# A peer is made for a shape: it returns (sets, call), where call(i) works on the i-th inputs and returns its
# output, and `reference(i)` of the kind the same in float64.

# -- scoring by query rows ------------------------------------------------------------------------------------


class Scoring:
    """Queries [set, B, KV head, group, row, dim], keys [set, B, KV head, T, dim]; rows are the last ones."""

    def __init__(self, s):
        self.s = s
        self.rows = s.T if s.kind == "h2o_prompt" else s.W
        self.given = "lse" in s.words
        element = 4 if s.dtype == "f32" else 2
        self.sets = sets_for(s, element * s.B * s.heads * DIM * (s.T + GROUP * self.rows))
        self.k = normal(s, self.sets, s.B, s.heads, s.T, DIM)
        self.q = normal(s, self.sets, s.B, s.heads, GROUP, self.rows, DIM)
        self.scale = 1 / math.sqrt(DIM)
        self.lse = torch.full((s.B, s.heads, GROUP, self.rows), math.log(s.T) + 0.5, device=s.device)
        self.later = later(min(self.rows, 512), s.device)

    def reference(self, i):
        z = torch.einsum("bhgrd,bhtd->bhgrt", self.q[i].double(), self.k[i].double()) * self.scale
        z[..., -self.rows:].masked_fill_(later(self.rows, self.s.device), -math.inf)
        p = (z - self.lse.double()[..., None]).exp() if self.given else z.softmax(dim=-1)
        return p.sum(dim=(2, 3))


def later(n, device):
    """Which of the last n keys each of the last n rows does not see."""
    return torch.ones(n, n, device=device, dtype=torch.bool).triu(1)


def scored(q, k, scale, hidden, lse):
    """Lean: one product per KV head for all its queries, a mask where rows and keys meet."""
    b, h, g, r, d = q.shape
    z = torch.matmul(q.reshape(b, h, g * r, d), k.transpose(-1, -2)).view(b, h, g, r, -1).float() * scale
    z[..., -r:].masked_fill_(hidden, -math.inf)
    p = torch.exp(z - lse[..., None]) if lse is not None else torch.softmax(z, dim=-1)
    return p.sum(dim=(2, 3))


def score_eager(s):
    c = Scoring(s)
    lse = c.lse if c.given else None
    return c, lambda i: scored(c.q[i], c.k[i], c.scale, c.later, lse)


def score_published(s):
    """As published programs do it: keys repeated per query head (once, beforehand), softmax in fp32."""
    c = Scoring(s)
    if c.given:
        raise Skip("published programs score a window, and compute their own softmax")
    q = c.q.reshape(c.sets, s.B, s.heads * GROUP, c.rows, DIM)
    k = [x.repeat_interleave(GROUP, dim=1) for x in c.k]

    def call(i):
        z = torch.matmul(q[i], k[i].transpose(-1, -2)) * c.scale
        z[..., -c.rows:] += torch.full((c.rows, c.rows), -math.inf, device=s.device, dtype=z.dtype).triu(1)
        p = torch.softmax(z, dim=-1, dtype=torch.float32)
        return p.view(s.B, s.heads, GROUP, c.rows, s.T).sum(dim=(2, 3))

    return c, call


def score_compiled(s):
    if s.device == "cpu":
        raise Skip("torch.compile is timed on a device only")
    if s.W != 32 or s.B != 1 or s.kind != "window":
        raise Skip("compiled for W = 32, batch 1 alone: each shape takes seconds to compile")
    c = Scoring(s)
    torch.compiler.reset()  # after eight shapes of one function it would quietly run eager
    compiled = torch.compile(scored, dynamic=False)
    lse = c.lse if c.given else None
    return c, lambda i: compiled(c.q[i], c.k[i], c.scale, c.later, lse)


def score_blocked(s):
    """All rows of a prompt in eager torch: blocks of rows, so that memory stays linear in T."""
    c = Scoring(s)
    if c.rows < s.T:
        raise Skip("for whole prompts")
    step = min(512, s.T // 4)

    def call(i):
        sums = torch.zeros(s.B, s.heads, s.T, device=s.device)
        for r in range(0, s.T, step):
            end = min(r + step, s.T)
            hidden = c.later[:end - r, :end - r]
            sums[..., :end] += scored(c.q[i][..., r:end, :], c.k[i][..., :end, :], c.scale, hidden,
                                      c.lse[..., r:end])
        return sums

    return c, call


def score_triton(s):
    if s.device == "cpu" and not os.environ.get("TRITON_INTERPRET"):
        raise Skip("Triton needs a device, or TRITON_INTERPRET=1")
    if s.device == "cpu" and s.dtype == "bf16":
        raise Skip("Triton's interpreter has no products of bf16")
    if s.dtype == "f32":
        raise Skip("its products round fp32")
    optional("triton")
    import triton_twin
    c = Scoring(s)
    return c, triton_twin.scorer(c)


# -- selection ------------------------------------------------------------------------------------------------


class Selection:
    def __init__(self, s):
        self.s = s
        self.sets = sets_for(s, 8 * s.rows * s.n)
        x = torch.rand(self.sets, s.rows, s.n, device=s.device)
        if "heavy_tailed" in s.words:
            x = 1.234e-4 / (1 - x).square()
        elif "few_values" in s.words:
            x = (x * 16).floor()
        elif "mostly_zero" in s.words:
            x = (torch.randn_like(x) - 1.5).relu()
        elif "all_equal" in s.words:
            x = torch.ones_like(x)
        self.scores = x

    def reference(self, i):
        """Scores of the chosen, in descending order: which of equal ones a peer takes is its own affair."""
        return self.scores[i].sort(dim=-1, descending=True).values[:, :self.s.k]

    def seen(self, i, chosen):
        return self.scores[i].gather(1, chosen.long()).sort(dim=-1, descending=True).values


def topk(s):
    c = Selection(s)
    return c, lambda i: torch.topk(c.scores[i], s.k, dim=-1, sorted=False).indices


def topk_ascending(s):
    """What an engine needs to gather: the indices in order, as ours are."""
    c = Selection(s)
    return c, lambda i: torch.topk(c.scores[i], s.k, dim=-1, sorted=False).indices.sort(dim=-1).values


def sort_stable(s):
    """A stable sort (segmented radix sort of CUB), the one way in torch to ties by position."""
    c = Selection(s)
    return c, lambda i: torch.sort(c.scores[i], dim=-1, descending=True, stable=True).indices[:, :s.k]


def sort_cupy(s):
    if s.device == "cpu":
        raise Skip("CuPy needs a device")
    cupy = optional("cupy")
    c = Selection(s)
    c.captures = False  # it allocates and waits
    arrays = [cupy.asarray(x) for x in c.scores]

    def call(i):
        with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            return torch.as_tensor(cupy.argsort(arrays[i], axis=-1)[:, -s.k:], device=s.device)

    return c, call


# -- moving ---------------------------------------------------------------------------------------------------


class Moving:
    def __init__(self, s):
        self.s = s
        element = 4 if s.dtype == "f32" else 2
        self.sets = sets_for(s, 4 * element * s.B * s.heads * s.C * DIM)
        rows = s.B * s.heads
        self.k = normal(s, self.sets, rows * s.T, DIM)
        self.v = normal(s, self.sets, rows * s.T, DIM)
        kept = torch.rand(self.sets, rows, s.T, device=s.device).topk(s.C, dim=-1).indices.sort(dim=-1).values
        self.index = (kept + s.T * torch.arange(rows, device=s.device)[:, None]).flatten(1)
        self.to = normal(s, self.sets, 2, rows * s.C, DIM)

    def reference(self, i):
        return torch.stack([self.k[i][self.index[i]], self.v[i][self.index[i]]]).double()


def gather(s):
    c = Moving(s)

    def call(i):
        torch.index_select(c.k[i], 0, c.index[i], out=c.to[i, 0])
        torch.index_select(c.v[i], 0, c.index[i], out=c.to[i, 1])
        return c.to[i]

    return c, call


# -- attention --------------------------------------------------------------------------------------------------


class Decoding:
    def __init__(self, s):
        self.s = s
        element = 4 if s.dtype == "f32" else 2
        self.sets = sets_for(s, 2 * element * s.B * s.heads * s.C * DIM)
        self.k = normal(s, self.sets, s.B, s.heads, s.C, DIM)
        self.v = normal(s, self.sets, s.B, s.heads, s.C, DIM)
        self.q = normal(s, self.sets, s.B, s.heads, GROUP, DIM)

    def reference(self, i):
        z = torch.matmul(self.q[i].double(), self.k[i].double().transpose(-1, -2)) / math.sqrt(DIM)
        return torch.matmul(z.softmax(dim=-1), self.v[i].double())


def sdpa(backend, grouped):
    """@param grouped  query heads as such (enable_gqa); else those of a KV head as rows, which is the same"""

    def make(s):
        if s.device == "cpu" and backend != "MATH":
            raise Skip("this form of SDPA needs a device")
        attention = optional("torch.nn.attention")
        if not hasattr(attention.SDPBackend, backend):
            raise Skip(f"this torch has no {backend}")
        c = Decoding(s)
        one = getattr(attention.SDPBackend, backend)
        function = torch.nn.functional.scaled_dot_product_attention

        def call(i):
            with attention.sdpa_kernel(one):
                if grouped:
                    q = c.q[i].reshape(s.B, s.heads * GROUP, 1, DIM)
                    return function(q, c.k[i], c.v[i], enable_gqa=True).reshape(s.B, s.heads, GROUP, DIM)
                return function(c.q[i], c.k[i], c.v[i])

        return c, call

    return make


# -- decode steps: the twins of the CPU's comparison ---------------------------------------------------------------


@contextlib.contextmanager
def defaults(s):
    """The twins' set-up names neither device nor type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, TYPES[s.dtype]))
    try:
        with torch.device(s.device):
            yield
    finally:
        torch.set_default_dtype(before)


def twin(name, policies):
    def make(s):
        if not policies & s.words or s.B != 1:
            raise Skip("a twin of another policy, or for batch 1 alone")
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "peers"))
        import twins
        p = SimpleNamespace(kv_heads=s.heads, group=GROUP, dim=DIM, capacity=s.C, window=s.W)
        with defaults(s):
            data = twins.Layers(p, 1)
            n = sets_for(s, 2 * 2 * s.heads * s.C * DIM)
            layers = [getattr(twins, name)(p, data) for _ in range(n)]

        def call(i):  # outside of the defaults: a mode adds to the time of every call of torch
            return layers[i].step(*data.token())

        # Published programs read the number of kept tokens back.
        return SimpleNamespace(sets=n, captures=not name.startswith("Published")), call

    return make


PEERS = {
    "window": [("torch eager", score_eager), ("torch eager, published form", score_published),
               ("torch.compile", score_compiled), ("Triton twin", score_triton)],
    "h2o_prompt": [("torch eager, blocked", score_blocked), ("Triton twin", score_triton)],
    "select_k": [("torch.topk", topk), ("torch.topk, indices sorted", topk_ascending),
                 ("torch.sort (stable)", sort_stable), ("CuPy argsort", sort_cupy)],
    "compact": [("torch index_select", gather)],
    "attend": [("SDPA flash, enable_gqa", sdpa("FLASH_ATTENTION", True)),
               ("SDPA flash, group as rows", sdpa("FLASH_ATTENTION", False)),
               ("SDPA cuDNN, enable_gqa", sdpa("CUDNN_ATTENTION", True)),
               ("SDPA efficient, group as rows", sdpa("EFFICIENT_ATTENTION", False)),
               ("SDPA math, group as rows", sdpa("MATH", False))],
    "step": [("published MorphKV", twin("PublishedMorph", {"morphkv"})),
             ("lean MorphKV", twin("LeanMorph", {"morphkv"})),
             ("lean MorphKV, cached logits", twin("LeanMorphCached", {"morphkv"})),
             ("published H2O", twin("PublishedH2O", {"h2o"})), ("lean H2O", twin("LeanH2O", {"h2o"}))],
}


# -- time -------------------------------------------------------------------------------------------------------


def captured(calls):
    """One graph of all calls, and what they return: it must stay apart."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [call() for call in calls]
    return graph, outputs


def once(replay):
    """Seconds of one replay, by the host's clock."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    replay()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def take(call, sets, captures):
    """Median microseconds of a call, its spread, and how it was timed."""
    call(0)
    slow = once(lambda: call(0)) > 0.01  # of long calls one alone is not disturbed by the replay's start
    n = sets if slow or sets >= 4 else math.ceil(4 / sets) * sets
    calls = [lambda i=i: call(i % sets) for i in range(n)]
    graph = None
    if captures:
        try:
            graph, outputs = captured(calls)
        except RuntimeError as e:
            raise NotCaptured(first_line(e)) from e
    replay = graph.replay if graph else lambda: [f() for f in calls]
    replay()
    samples = int(min(SAMPLES, max(5, 0.2 / once(replay))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(samples)]
    for start, stop in events:
        start.record()
        replay()
        stop.record()
    torch.cuda.synchronize()
    us = sorted(1e3 * a.elapsed_time(b) / n for a, b in events)
    quarter = len(us) // 4
    return {"us": us[len(us) // 2], "spread": (us[-1 - quarter] - us[quarter]) / us[len(us) // 2],
            "timing": "graph" if graph else "stream", "samples": len(us), "calls": n, "sets": sets}


def finite(x):
    return not torch.is_tensor(x) or not x.is_floating_point() or bool(torch.isfinite(x).all())


def first_line(e):
    return f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"


def first_output(call):
    """@raises Skip where torch has no kernel for such inputs: it says so before anything runs"""
    try:
        return call(0)
    except RuntimeError as e:
        if str(e).startswith("No available kernel"):
            raise Skip(first_line(e)) from e
        raise


def time_one(row, name, captures):
    """(result or None, reason, whether this process can go on); NotCaptured is the reason of a second try."""
    try:
        s = parse(row)
        s.device, s.tiny = "cuda", False
        c, call = dict(PEERS[s.kind])[name](s)
        if not finite(first_output(call)):
            raise Skip("its output is not finite")
        return take(call, c.sets, captures and getattr(c, "captures", True)), None, True
    except Skip as e:
        return None, str(e), True
    except NotCaptured:
        return None, NotCaptured.__name__, False
    except torch.cuda.OutOfMemoryError as e:
        return None, first_line(e), True
    except Exception as e:  # a peer's failure is a line of the result
        return None, first_line(e), False


def work(pipe, todo):
    """The process that times peers: answers of `todo` in order, the last one where it cannot go on."""
    torch.set_grad_enabled(False)
    for one in todo:
        answer = time_one(*one)
        pipe.send(answer)
        if not answer[2]:
            return
        torch.cuda.empty_cache()


def answers(todo, end, worker):
    """Of one process, as long as it lives: the rest of `todo` is for the next."""
    processes = multiprocessing.get_context("spawn")
    here, there = processes.Pipe(duplex=False)
    child = processes.Process(target=worker, args=(there, todo))
    child.start()
    there.close()
    try:
        for _ in todo:
            limit = min(MOST_SECONDS, end - time.monotonic())
            try:
                yield here.recv() if here.poll(max(limit, 0)) else (None, f"took more than {limit:.0f} s", False)
            except EOFError:
                child.join()
                yield None, f"its process ended with {child.exitcode}", False
    finally:
        child.kill()
        child.join(10)  # one that the driver holds may not end


def compare(pairs, seconds, write, worker=work):
    """@param pairs  (row, peer)
    @param write  is given results and reasons whenever there is one more"""
    end = time.monotonic() + seconds
    todo, found, skipped = [(*p, True) for p in pairs], [], []
    while todo and time.monotonic() < end:
        for result, reason, good in answers(todo, end, worker):
            row, name, captures = todo.pop(0)
            if result:
                found.append({"row": row, "peer": name, **result})
                print(f"{row:<50} {name:<32} {result['us']:>10.1f} us ({result['timing']})", flush=True)
            elif captures and reason == NotCaptured.__name__:
                todo.insert(0, (row, name, False))
            else:
                skipped.append({"row": row, "peer": name, "reason": reason})
                print(f"{row:<50} {name:<32} {reason}", flush=True)
            write(found, skipped)
            if not good or time.monotonic() > end:
                break
    skipped += [{"row": row, "peer": name, "reason": f"the {seconds:.0f} s for peers are over"}
                for row, name, _ in todo]
    write(found, skipped)


def by_weight(pair):
    """Those that targets name come first; compiled ones, which take seconds each, after them."""
    name = pair[1]
    return 1 if name == "torch.compile" else 0 if name.startswith(("torch eager", "torch.topk", "SDPA", "published")) else 2


def pairs_of(ours):
    """(row, peer) of what was measured, each once, in the order to time them."""
    rows = dict.fromkeys(results.row_name(r["name"]) for r in ours if not r.get("error_occurred"))
    return sorted(((row, name) for row in rows for name, _ in PEERS.get(row.split("/")[0], [])), key=by_weight)


# -- check ------------------------------------------------------------------------------------------------------

SMALL = ["window/T:300/W:16/f32/lse", "window/T:300/W:16/f32/no_lse", "window/T:256/W:32/bf16/lse",
         "window/T:256/W:32/bf16/no_lse", "window/T:300/W:24/f16/lse", "window/T:300/W:24/B:2/f16/no_lse",
         "h2o_prompt/T:300/f16/lse", "h2o_prompt/T:256/bf16/lse", "h2o_prompt/T:200/f32/lse",
         "select_k/rows:8/n:500/k:100/heavy_tailed", "select_k/rows:3/n:500/k:100/few_values",
         "compact/T:300/C:64/bf16", "attend/C:200/B:2/bf16", "attend/C:200/f32", "step/morphkv/C:64/bf16",
         "step/h2o/C:64/bf16"]


def check_one(s, make):
    """What came of a peer's result against float64."""
    c, call = make(s)
    got = call(0)
    if hasattr(c, "seen"):
        return "agrees" if got.shape[-1] == s.k and torch.equal(c.seen(0, got), c.reference(0)) else "WRONG"
    if not hasattr(c, "reference"):
        return "agrees" if finite(got) else "WRONG: not finite"
    want = c.reference(0)
    error = ((got.double() - want).norm() / want.norm()).item()
    return "agrees" if error <= (1e-4 if s.dtype == "f32" else 2e-2) else f"WRONG: off by {error:.2g}"


def check(device):
    """All peers that can run here. @return whether none is wrong"""
    torch.manual_seed(5)
    counts = {}
    for row in SMALL:
        s = parse(row)
        s.device, s.tiny, s.heads = device, True, 2
        for name, make in PEERS[s.kind]:
            try:
                what = check_one(s, make)
            except Skip as e:
                what = f"skipped: {e}"
            except RuntimeError as e:  # some forms of SDPA have no fp32
                what = f"refused: {first_line(e)}"
            print(f"{row:<45} {name:<32} {what}")
            word = what.split(":")[0]
            counts[word] = counts.get(word, 0) + 1
    print(f"peers on {device}: " + ", ".join(f"{n} {word}" for word, n in counts.items()))
    return counts.get("agrees", 0) > 0 and "WRONG" not in counts


def main():
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    a.add_argument("--ours", type=Path, help="our JSON: its rows name the shapes")
    a.add_argument("--json", type=Path)
    a.add_argument("--seconds", type=float, default=180, help="time for all peers; the rest is listed as skipped")
    a.add_argument("--check", action="store_true")
    a = a.parse_args()
    reason = None if torch else "torch is not installed"
    if a.check:
        if reason:
            sys.exit(f"SKIPPED: {reason}")
        sys.exit(0 if check("cuda" if torch.cuda.is_available() else "cpu") else 1)
    if not reason and not torch.cuda.is_available():
        reason = "torch sees no device"
    context = {} if reason else {"torch": torch.__version__, "device": torch.cuda.get_device_name()}

    def write(found, skipped):
        if a.json:
            a.json.write_text(json.dumps({"context": context, "rows": found, "skipped": skipped}, indent=1) + "\n")

    if reason:
        print(f"peers SKIPPED: {reason}")
        write([], [{"row": "all", "peer": "all", "reason": reason}])
        return
    try:
        pairs = pairs_of(results.read(a.ours)["benchmarks"])
    except results.Unreadable as e:
        sys.exit(f"no shapes: {e}")
    compare(pairs, a.seconds, write)


if __name__ == "__main__":
    main()
