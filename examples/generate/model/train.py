# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
"""Trains the bundled model. Started again with the same folder, it goes on from its last checkpoint.

usage: train.py FOLDER [--stages STAGE,STAGE,...]
a stage is: tokens x episodes x steps x percent of drill x percent of rules
"""

import argparse
import ctypes
import json
import os
import random
import subprocess
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import tasks
from model import Model, Shape, initialise, merge_heads

SEED = 1
RATE = 3e-3
KINDS = ["", "once", "range", "periodic", "default", "passkey", "recall", "requery", "drill", "rules", "end"]
MIX = {"diary": 0.55, "passkey": 0.15, "recall": 0.15, "requery": 0.15}
STAGES = "80x40x200x100x0,80x40x300x15x45,128x28x100x10x25,128x28x300x5x45,256x14x100x0x30,512x8x560x0x12"


def load_attention(folder):
    """Compiles attention.cpp and wraps it as a differentiable function of q, k, v."""
    path = Path(folder) / "attention.so"
    source = Path(__file__).with_name("attention.cpp")
    subprocess.run(["g++", "-O3", "-march=native", "-ffast-math", "-fPIC", "-shared", source, "-o", path], check=True)
    library = ctypes.CDLL(str(path))
    address = lambda tensor: ctypes.c_void_p(tensor.data_ptr())

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
            batch, heads, tokens, _ = q.shape
            o, lse = torch.empty_like(q), torch.empty(batch, heads, tokens)
            library.forward(*map(address, (q, k, v, o, lse)), batch, heads, k.shape[1], tokens)
            ctx.save_for_backward(q, k, v, o, lse)
            return o

        @staticmethod
        def backward(ctx, grad):
            q, k, v, o, lse = ctx.saved_tensors
            grad = grad.contiguous()
            dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
            library.backward(*map(address, (q, k, v, o, lse, grad, dq, dk, dv)), q.shape[0], q.shape[1], k.shape[1],
                             q.shape[2])
            return dq, dk, dv

    return lambda q, k, v: merge_heads(Attention.apply(q, k, v))


def batch(step, length, count, drill, rules):
    """Tokens, loss weights and kinds of the answers, aligned to the token that is predicted."""
    rng = random.Random(f"{SEED}/{step}")
    mix = {name: share * (100 - drill - rules) for name, share in MIX.items()} | {"drill": drill, "rules": rules}
    names = rng.choices(list(mix), mix.values(), k=count)
    episodes = [tasks.episode(name, f"train/{SEED}/{step}/{i}", length) for i, name in enumerate(names)]
    width = (max(map(len, episodes)) + 2) // 4 * 4 + 1  # one more than a multiple of 4: the last is only predicted
    tokens = np.zeros((count, width), np.int64)
    weights = np.zeros((count, width), np.float32)
    kinds = np.zeros((count, width), np.int64)
    for i, e in enumerate(episodes):
        start = len(e.prompt)
        tokens[i, : len(e)] = e.prompt + e.response
        weights[i, start: len(e)] = e.weights
        for check in e.checks:
            kinds[i, start + check["at"]] = KINDS.index("rules" if e.task == "rules" else check["kind"])
        if e.task == "diary":
            kinds[i, len(e) - 1] = KINDS.index("end")
    return torch.from_numpy(tokens), torch.from_numpy(weights[:, 1:].copy()), torch.from_numpy(kinds[:, 1:].copy())


def rate(step, total, fade):
    """Warm-up, then constant, then linear to 2% over the last `fade` steps."""
    return RATE * min(1, (step + 1) / 60, max(0.02, (total - step) / fade))


def set_up_memory():
    """Large blocks come from the heap and stay there: without this every tensor is mapped and zeroed anew."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
    libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def train(folder, stages, fade, threads):
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    set_up_memory()
    folder.mkdir(parents=True, exist_ok=True)
    attention = load_attention(folder)
    model = Model(Shape(len(tasks.WORDS)))
    initialise(model, [tasks.IDS[n] for n in tasks.NUMBERS])
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    step, seconds, accuracy, seen = 0, 0.0, {}, 0
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, seconds, accuracy, seen = saved["step"], saved["seconds"], saved["accuracy"], saved["seen"]
    curve = folder / "curve.jsonl"
    past = curve.read_text().splitlines(True) if curve.exists() else []
    curve.write_text("".join(line for line in past if json.loads(line)["step"] <= step))
    print("parameters", sum(p.numel() for p in model.parameters()), "from step", step, flush=True)

    plan = [(length, count, *drills) for length, count, steps, *drills in stages for _ in range(steps)]
    total = len(plan)
    began = time.time() - seconds
    while step < total:
        length = plan[step][0]
        for group in optimizer.param_groups:
            group["lr"] = rate(step, total, fade)
        tokens, weights, kinds = batch(step, *plan[step])
        targets = tokens[:, 1:]
        rows = weights > 0
        logits = model(tokens[:, :-1], attention, rows)
        losses = F.cross_entropy(logits, targets[rows], reduction="none")
        loss = (losses * weights[rows]).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        right = (logits.argmax(-1) == targets[rows]).float()
        for i, kind in enumerate(KINDS):
            which = kinds[rows] == i
            if which.any():
                now = right[which].mean().item()
                accuracy[kind] = 0.95 * accuracy.get(kind, now) + 0.05 * now
        step, seen = step + 1, seen + tokens.numel()

        if step % 25 == 0 or step == total:
            seconds = time.time() - began
            line = dict(step=step, seconds=round(seconds), context=length, tokens=seen, loss=round(loss.item(), 4),
                        accuracy={kind or "other": round(value, 4) for kind, value in accuracy.items()})
            print(json.dumps(line), flush=True)
            with open(curve, "a") as file:
                file.write(json.dumps(line) + "\n")
        if step % 50 == 0 or step == total:
            state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step,
                         seconds=time.time() - began, accuracy=accuracy, seen=seen)
            torch.save(state, folder / "checkpoint.tmp")
            os.replace(folder / "checkpoint.tmp", checkpoint)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stages", default=STAGES)
    parser.add_argument("--fade", type=int, default=500, help="steps at the end over which the rate falls")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    stages = [tuple(map(int, stage.split("x"))) for stage in given.stages.split(",")]
    train(given.folder, stages, given.fade, given.threads)


if __name__ == "__main__":
    main()
