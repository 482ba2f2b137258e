# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
"""Writes diary.gguf (F16) and episodes.json from a checkpoint of train.py; needs the PyPI package gguf.

usage: export.py CHECKPOINT FOLDER [--llama2c FILE]     FILE: the float32 weights as a llama2.c "version 0" checkpoint
"""

import argparse
import json
import struct
from pathlib import Path

import gguf
import numpy as np
import torch

import tasks
from model import Model, Shape

SEEDS = range(1, 6)
EPISODES = {"diary": 8, "passkey": 16, "recall": 8, "requery": 8}  # of each task and seed
LAYER_NAMES = {"attn_norm": "attn_norm", "wq": "attn_q", "wk": "attn_k", "wv": "attn_v", "wo": "attn_output",
               "ffn_norm": "ffn_norm", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}


def gguf_name(name):
    if name == "embedding.weight":
        return "token_embd.weight"
    if name == "norm.weight":
        return "output_norm.weight"
    _, layer, part, _ = name.split(".")
    return f"blk.{layer}.{LAYER_NAMES[part]}.weight"


def write_gguf(path, shape, weights):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("kvkeep diary")
    writer.add_license("Apache-2.0 WITH LLVM-exception")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.dim)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(shape.epsilon)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.theta)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("no_vocab")  # a word list; llama.cpp then takes token ids
    writer.add_token_list(tasks.WORDS)
    writer.add_bos_token_id(tasks.BOS)
    writer.add_eos_token_id(tasks.EOS)
    for name, value in weights.items():
        writer.add_tensor(gguf_name(name), value.astype(np.float32 if value.ndim == 1 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_llama2c(path, shape, model, weights):
    stacked = lambda part: np.stack([weights[f"layers.{i}.{part}.weight"] for i in range(shape.layers)])
    order = ["attn_norm", "wq", "wk", "wv", "wo", "ffn_norm", "gate", "down", "up"]
    with open(path, "wb") as file:
        file.write(struct.pack("<7i", shape.dim, shape.hidden, shape.layers, shape.heads, shape.kv_heads,
                               shape.vocabulary, shape.context))
        for part in [weights["embedding.weight"], *map(stacked, order), weights["norm.weight"], model.cos.numpy(),
                     model.sin.numpy()]:
            file.write(part.astype("<f4").tobytes())


def evaluation_episodes():
    for seed in SEEDS:
        for task, count in EPISODES.items():
            for i in range(count):
                e = tasks.episode(task, f"evaluation/{seed}/{i}", Shape.context, fixed=True)
                yield dict(task=task, seed=seed, prompt=e.prompt, response=e.response, checks=e.checks)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--llama2c", type=Path)
    given = parser.parse_args()

    model = Model(Shape(len(tasks.WORDS)))
    model.load_state_dict(torch.load(given.checkpoint)["model"])
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    write_gguf(given.folder / "diary.gguf", model.shape, weights)
    if given.llama2c:
        write_llama2c(given.llama2c, model.shape, model, weights)
    content = dict(schema=1, vocabulary_sha256=tasks.VOCABULARY_SHA256, episodes=list(evaluation_episodes()))
    (given.folder / "episodes.json").write_text(json.dumps(content, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
