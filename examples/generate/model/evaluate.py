# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
"""Accuracy of diary.gguf on episodes.json with the full cache, and with recent tokens only; needs the PyPI package gguf.

usage: evaluate.py [FOLDER] [--checkpoint FILE]     FILE: also compare with the float32 weights it was exported from
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import gguf
import numpy as np
import torch

import tasks
from export import gguf_name
from model import Model, Shape, masked_attention

SINKS = 4
WINDOWS = (0.12, 0.25, 0.5)


def load_gguf(path):
    reader = gguf.GGUFReader(path)
    field = lambda name: reader.fields[name].contents()
    shape = Shape(field("llama.vocab_size"), field("llama.embedding_length"), field("llama.feed_forward_length"),
                  field("llama.block_count"), field("llama.attention.head_count"),
                  field("llama.attention.head_count_kv"), field("llama.context_length"),
                  field("llama.rope.freq_base"), field("llama.attention.layer_norm_rms_epsilon"))
    assert field("tokenizer.ggml.tokens") == tasks.WORDS
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    model = Model(shape)
    state = {name: torch.from_numpy(np.array(tensors[gguf_name(name)], np.float32)) for name in model.state_dict()}
    model.load_state_dict(state)
    return model


def teacher_forced(model, episode, window=None):
    """Logits for every response token. With a window, response tokens see the sinks and the last `window` tokens."""
    tokens = torch.tensor(episode["prompt"] + episode["response"])[:-1]
    i, j = torch.meshgrid(torch.arange(len(tokens)), torch.arange(len(tokens)), indexing="ij")
    hidden = j > i
    if window:
        hidden |= (i >= len(episode["prompt"])) & (j >= SINKS) & (j <= i - window)
    mask = torch.zeros(hidden.shape).masked_fill(hidden, -1e9)
    wanted = torch.arange(len(tokens))[None] >= len(episode["prompt"]) - 1
    return model(tokens[None], lambda q, k, v: masked_attention(q, k, v, mask), wanted)


def free_running(model, prompt, most):
    """Greedy continuation of the prompt, up to the end token or `most` tokens."""
    keys = [[None, None] for _ in model.layers]
    tokens, written, at = torch.tensor(prompt), [], 0
    while True:
        count = len(tokens)
        x = model.embedding(tokens[None])
        mask = torch.triu(torch.full((count, at + count), -1e9), at + 1)
        for layer, cache in zip(model.layers, keys):
            q, *fresh = layer.project(x, model.cos[at: at + count], model.sin[at: at + count])
            cache[:] = fresh if at == 0 else [torch.cat(pair, 2) for pair in zip(cache, fresh)]
            x = layer.finish(x, masked_attention(q, *cache, mask))
        at += count
        written.append(model.logits(x[:, -1]).argmax().item())
        if written[-1] == tasks.EOS or len(written) == most:
            return written
        tokens = torch.tensor(written[-1:])


def find(sequence, pattern):
    """The index after the first occurrence of the pattern, or -1."""
    for i in range(len(sequence) - len(pattern) + 1):
        if sequence[i: i + len(pattern)] == pattern:
            return i + len(pattern)
    return -1


class Score:
    def __init__(self):
        self.right, self.total = defaultdict(int), defaultdict(int)

    def add(self, name, right):
        self.right[name] += bool(right)
        self.total[name] += 1

    def __str__(self):
        return "  ".join(f"{name} {self.right[name] / self.total[name]:.4f} ({self.total[name]})" for name in self.total)


def score_teacher_forced(model, episodes, share=None):
    score = Score()
    for episode in episodes:
        length = len(episode["prompt"]) + len(episode["response"])
        best = teacher_forced(model, episode, share and round(share * length) - SINKS).argmax(-1).tolist()
        for check in episode["checks"]:
            span = slice(check["at"], check["at"] + check["n"])
            score.add(f"{episode['task']}/{check['kind']}", best[span] == episode["response"][span])
        if episode["task"] == "diary":
            score.add("diary/end", best[-1] == tasks.EOS)
    return score


def score_free_running(model, episodes):
    score = Score()
    for episode in episodes:
        written = free_running(model, episode["prompt"], len(episode["response"]) + 32)
        for check in episode["checks"]:
            at = find(written, check["anchor"])
            wanted = episode["response"][check["at"]: check["at"] + check["n"]]
            score.add(f"{episode['task']}/{check['kind']}", at >= 0 and written[at: at + check["n"]] == wanted)
        score.add("whole diary", written == episode["response"])
    return score


def compare(model, reference, episodes):
    """How often the float32 and the F16 weights choose differently, and by how much at most they differ."""
    different, total, error, margin = 0, 0, 0.0, 0.0
    for episode in episodes:
        a, b = teacher_forced(model, episode), teacher_forced(reference, episode)
        other = a.argmax(-1) != b.argmax(-1)
        different, total = different + other.sum().item(), total + len(other)
        error = max(error, (a - b).abs().max().item())
        if other.any():
            top = b[other].topk(2).values
            margin = max(margin, (top[:, 0] - top[:, 1]).max().item())
    print(f"float32 against F16: {different} of {total} choices differ (margin at most {margin:.3g}), logits by {error:.3g}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent)
    parser.add_argument("--checkpoint", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)

    model = load_gguf(given.folder / "diary.gguf")
    content = json.loads((given.folder / "episodes.json").read_text())
    assert content["vocabulary_sha256"] == tasks.VOCABULARY_SHA256
    episodes = content["episodes"]
    print("teacher-forced:", score_teacher_forced(model, episodes))
    print("free-running:  ", score_free_running(model, [e for e in episodes if e["task"] == "diary"]))
    for share in WINDOWS:
        print(f"{SINKS} sinks and recent tokens, {share:.0%}:", score_teacher_forced(model, episodes, share))
    if given.checkpoint:
        reference = Model(model.shape)
        reference.load_state_dict(torch.load(given.checkpoint)["model"])
        compare(model, reference, episodes)


if __name__ == "__main__":
    main()
