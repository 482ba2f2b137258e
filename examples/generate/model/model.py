# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
"""The network in torch: Llama layers (RMSNorm, interleaved RoPE, grouped-query attention, SwiGLU), tied classifier."""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class Shape:
    vocabulary: int
    dim: int = 128
    hidden: int = 256
    layers: int = 3
    heads: int = 8
    kv_heads: int = 2
    context: int = 512
    theta: float = 1000000.0
    epsilon: float = 1e-5

    @property
    def head_dim(self):
        return self.dim // self.heads


class Norm(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.dim))
        self.epsilon = shape.epsilon

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon) * self.weight


def rope_table(shape):
    frequency = shape.theta ** (-torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
    angle = torch.outer(torch.arange(shape.context).float(), frequency)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """x [..., tokens, head_dim]: pair (2i, 2i + 1) turns by its angle."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


def masked_attention(q, k, v, mask):
    """q [B, H, T, d], k and v [B, KV, S, d], mask [.., T, S] added to the logits."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask, -1)
    return merge_heads(weights @ v)


def merge_heads(x):
    """[B, H, T, d] -> [B, T, H d]"""
    return x.transpose(1, 2).flatten(2)


class Layer(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        linear = lambda inputs, outputs: nn.Linear(inputs, outputs, bias=False)
        wide, narrow = shape.dim, shape.kv_heads * shape.head_dim
        self.attn_norm, self.ffn_norm = Norm(shape), Norm(shape)
        self.wq, self.wk, self.wv, self.wo = linear(wide, wide), linear(wide, narrow), linear(wide, narrow), linear(wide, wide)
        self.gate, self.up, self.down = linear(wide, shape.hidden), linear(wide, shape.hidden), linear(shape.hidden, wide)

    def project(self, x, cos, sin):
        split = lambda y, heads: y.view(*y.shape[:2], heads, self.shape.head_dim).transpose(1, 2)
        h = self.attn_norm(x)
        return (rotate(split(self.wq(h), self.shape.heads), cos, sin),
                rotate(split(self.wk(h), self.shape.kv_heads), cos, sin), split(self.wv(h), self.shape.kv_heads))

    def finish(self, x, attended):
        x = x + self.wo(attended)
        h = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Model(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.dim)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = Norm(shape)
        self.cos, self.sin = rope_table(shape)

    def logits(self, x):
        return F.linear(self.norm(x), self.embedding.weight)

    def forward(self, tokens, attention, wanted):
        """Logits at the wanted positions, a mask [B, T]. attention(q, k, v) -> [B, T, dim]"""
        x = self.embedding(tokens)
        count = tokens.shape[1]
        for layer in self.layers:
            attended = attention(*layer.project(x, self.cos[:count], self.sin[:count]))
            if layer is self.layers[-1]:
                x, attended = x[wanted], attended[wanted]
            x = layer.finish(x, attended)
        return self.logits(x)


def initialise(model, numbers):
    """Random weights with three structures that the tasks need anyway and that are slow to find by chance.

    Previous tokens: a constant channel of the embedding drives the four query heads of KV head 0 in layer 0 to the tokens
    1, 2, 3 and 4 back. Look-up: in layer 1 a key holds the token one or two back, and queries look for the current token or
    for the one or two back (an induction head). Numbers: the embedding of number n starts with sines and cosines of n, for
    order and divisibility. `numbers` are the token ids of 0, 1, 2, ...
    """
    shape = model.shape
    width = shape.head_dim
    group = shape.heads // shape.kv_heads
    with torch.no_grad():
        nn.init.normal_(model.embedding.weight, 0, 0.3)
        model.norm.weight.fill_(0.3)
        deep = 1 / math.sqrt(2 * shape.layers)
        for layer in model.layers:
            for part in (layer.wq, layer.wk, layer.wv, layer.gate, layer.up):
                nn.init.normal_(part.weight, 0, 1 / math.sqrt(shape.dim))
            nn.init.orthogonal_(layer.wo.weight, deep)  # what each head writes can be told apart
            nn.init.normal_(layer.down.weight, 0, deep / math.sqrt(shape.hidden))

        model.embedding.weight[:, 0] = 1.5
        first, second = model.layers[:2]
        for pair in range(3):
            frequency = shape.theta ** (-2 * pair / width)
            first.wk.weight[2 * pair: 2 * pair + 2] *= 0.1
            first.wk.weight[2 * pair, 0] += 3
            for back in range(1, group + 1):
                row = (back - 1) * width + 2 * pair
                first.wq.weight[row: row + 2] *= 0.1
                first.wq.weight[row, 0] += 3 * math.cos(frequency * back)
                first.wq.weight[row + 1, 0] -= 3 * math.sin(frequency * back)

        nn.init.orthogonal_(first.wv.weight[:width])
        first.wv.weight[:width, 0] = 0
        slow = slice(6, width)  # pairs that hardly turn over the context: what a token is, not where
        back = [2 * first.wv.weight[:width][slow]] + [4 * first.wo.weight[:, i * width: (i + 1) * width].t()[slow] for i in range(2)]
        for kv, (key, queries) in enumerate(((2, (1, 1, 2, 2)), (1, (0, 0, 1, 1)))):
            second.wk.weight[kv * width: (kv + 1) * width][slow] = back[key]
            for i, query in enumerate(queries):
                row = (kv * group + i) * width
                second.wq.weight[row: row + width][slow] = back[query]

        n = torch.arange(len(numbers)).float()
        for i, period in enumerate((200, 100, 50, 25, 12, 10, 9, 8, 7, 6, 5, 4, 3)):
            angle = 2 * math.pi * n / period
            model.embedding.weight[numbers, 1 + 2 * i] += 0.45 * angle.cos()
            model.embedding.weight[numbers, 2 + 2 * i] += 0.45 * angle.sin()
