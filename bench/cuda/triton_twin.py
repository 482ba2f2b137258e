# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
"""The window scorer in Triton: what a skilled afternoon gives, as a peer for ours.

A program owns a block of keys of one KV head and goes through the queries of its group, so each key is read
once per pass. Without log-sum-exps a first pass leaves a maximum and a sum per query and block, which are joined
in torch.
"""

import math

import torch
import triton
import triton.language as tl


@triton.jit
def logits_of(q_ptr, k, head, r, j, n_queries, n_rows, T, scale2, DIM: tl.constexpr):
    d = tl.arange(0, DIM)
    q = tl.load(q_ptr + (head * n_queries + r)[:, None] * DIM + d[None, :], mask=r[:, None] < n_queries, other=0.0)
    z = tl.dot(q, k) * scale2
    position = T - n_rows + r % n_rows
    return tl.where((j[None, :] <= position[:, None]) & (r[:, None] < n_queries), z, -float("inf"))


@triton.jit
def keys_of(k_ptr, head, j, T, DIM: tl.constexpr):
    d = tl.arange(0, DIM)
    return tl.load(k_ptr + (head * T + j)[None, :] * DIM + d[:, None], mask=j[None, :] < T, other=0.0)


@triton.jit
def partial_sums(q_ptr, k_ptr, top_ptr, sum_ptr, n_queries, n_rows, T, scale2, DIM: tl.constexpr,
                 KEYS: tl.constexpr, QUERIES: tl.constexpr):
    head, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    j = block * KEYS + tl.arange(0, KEYS)
    k = keys_of(k_ptr, head, j, T, DIM)
    for first in range(0, n_queries, QUERIES):
        r = first + tl.arange(0, QUERIES)
        z = logits_of(q_ptr, k, head, r, j, n_queries, n_rows, T, scale2, DIM)
        z = tl.where(j[None, :] < T, z, -float("inf"))
        top = tl.maximum(tl.max(z, axis=1), -1e30)
        at = (head * tl.num_programs(1) + block) * n_queries + r
        tl.store(top_ptr + at, top, mask=r < n_queries)
        tl.store(sum_ptr + at, tl.sum(tl.exp2(z - top[:, None]), axis=1), mask=r < n_queries)


@triton.jit
def column_sums(q_ptr, k_ptr, lse2_ptr, out_ptr, n_queries, n_rows, T, scale2, DIM: tl.constexpr,
                KEYS: tl.constexpr, QUERIES: tl.constexpr):
    head, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    j = block * KEYS + tl.arange(0, KEYS)
    k = keys_of(k_ptr, head, j, T, DIM)
    sums = tl.zeros((KEYS,), dtype=tl.float32)
    # Rows of one query head follow each other; those before this block's first key see none of it.
    unseen = tl.maximum(block * KEYS - (T - n_rows), 0)
    for g in range(0, n_queries // n_rows):
        for first in range(unseen // QUERIES * QUERIES, n_rows, QUERIES):
            row = first + tl.arange(0, QUERIES)
            r = tl.where(row < n_rows, g * n_rows + row, n_queries)
            z = logits_of(q_ptr, k, head, r, j, n_queries, n_rows, T, scale2, DIM)
            lse2 = tl.load(lse2_ptr + head * n_queries + r, mask=r < n_queries, other=0.0)
            sums += tl.sum(tl.exp2(z - lse2[:, None]), axis=0)
    tl.store(out_ptr + head * T + j, sums, mask=j < T)


def scorer(c, keys=128):
    """@param c  a Scoring case of peers.py"""
    s, dim = c.s, c.k.shape[-1]
    heads, n_rows = s.B * s.heads, c.rows
    n_queries = c.q.shape[3] * n_rows
    queries = min(64, max(16, triton.next_power_of_2(n_rows)))
    scale2 = c.scale / math.log(2)
    blocks = triton.cdiv(s.T, keys)
    size = dict(DIM=dim, KEYS=keys, QUERIES=queries, num_warps=8 if queries == 64 else 4, num_stages=2)
    given = c.lse.reshape(heads, n_queries) / math.log(2)
    out = torch.empty(c.sets, s.B, s.heads, s.T, device=s.device)
    top = torch.empty(heads, blocks, n_queries, device=s.device)
    share = torch.empty_like(top)

    def call(i):
        lse2 = given
        if not c.given:
            partial_sums[(heads, blocks)](c.q[i], c.k[i], top, share, n_queries, n_rows, s.T, scale2, **size)
            most = top.amax(dim=1)
            lse2 = most + (share * torch.exp2(top - most[:, None])).sum(dim=1).log2()
        column_sums[(heads, blocks)](c.q[i], c.k[i], lse2, out[i], n_queries, n_rows, s.T, scale2, **size)
        return out[i]

    return call
