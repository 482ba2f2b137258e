# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
"""What published eviction programs do per step, in torch, fp32, one layer, batch 1.

Two kinds of each, both written from the policies' formulas:

- "as published" repeats what the authors' programs do with the cache: append by concatenation, keys and
  values repeated for every query head, boolean masks, and a gather of the whole cache;
- "lean" is what torch allows to one who cares: buffers of fixed size, a new token written over the one
  that left, one product per KV head for all its query heads, outputs into memory allocated once.

Set-up takes the default device and type; steps take them from the tensors at hand.

Shapes: queries [q_head, ...], keys and values [kv_head, slot, dim]. Query heads of a KV head are adjacent.
"""

import math

import torch


class Layers:
    """Random tokens; every call of `token` gives others."""

    def __init__(self, p, seed):
        self.p = p
        self.random = torch.Generator(torch.empty(0).device).manual_seed(seed)  # the default device's
        self.rows = torch.randn(257, p.kv_heads * (p.group + 2), p.dim, generator=self.random)
        self.turn = 0

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.random)

    def token(self):
        """Query, key and value of a new token."""
        self.turn = (self.turn + 1) % len(self.rows)
        h, hq = self.p.kv_heads, self.p.kv_heads * self.p.group
        row = self.rows[self.turn]
        return row[:hq], row[hq:hq + h], row[hq + h:]


def repeated(x, group):
    """[kv_head, n, dim] to [q_head, n, dim], copied."""
    h, n, d = x.shape
    return x[:, None].expand(h, group, n, d).reshape(h * group, n, d)


def appended(cache, row):
    return torch.cat([cache, row[:, None]], dim=1)


def gathered(cache, mask):
    """The rows of a boolean mask [kv_head, n], equally many per head."""
    h, n, d = cache.shape
    rows = mask.reshape(-1).nonzero(as_tuple=True)[0]
    return cache.reshape(h * n, d).index_select(0, rows).view(h, -1, d)


class PublishedStep:
    """A decode step without eviction: append, repeat, attend. The subclasses add theirs."""

    def __init__(self, p, data):
        self.p, self.scale = p, 1 / math.sqrt(p.dim)
        self.k = data.normal(p.kv_heads, p.capacity + 1, p.dim)
        self.v = data.normal(p.kv_heads, p.capacity + 1, p.dim)

    def attention_alone(self, q, k, v):
        """Leaves the cache as it was."""
        keys = repeated(appended(self.k, k), self.p.group)
        values = repeated(appended(self.v, v), self.p.group)
        logits = torch.matmul(q[:, None], keys.transpose(1, 2)) * self.scale
        return torch.matmul(torch.softmax(logits, dim=-1), values)[:, 0]


class PublishedMorph(PublishedStep):
    """MorphKV: the W newest queries against the whole cache, at every step."""

    def __init__(self, p, data):
        super().__init__(p, data)
        self.ring = data.normal(p.kv_heads * p.group, p.window, p.dim)

    def chosen(self, fused, heads, n):
        """An additive mask [heads, 1, n]: 0 for the best C - W old tokens and the W + 1 newest."""
        mask = fused.new_full((heads, 1, n), -math.inf)
        best = torch.topk(fused.sum(dim=1, keepdim=True), self.p.capacity - self.p.window, dim=-1)
        mask.scatter_(-1, best.indices, 0.0)
        mask[:, :, -(self.p.window + 1):] = 0.0
        return mask

    def step(self, q, k, v):
        p = self.p
        self.ring = torch.roll(self.ring, shifts=-1, dims=1)
        self.ring[:, -1] = q
        self.k, self.v = appended(self.k, k), appended(self.v, v)
        keys, values = repeated(self.k, p.group), repeated(self.v, p.group)
        logits = torch.matmul(self.ring, keys.transpose(1, 2)) * self.scale
        n, old = keys.shape[1], keys.shape[1] - (p.window + 1)
        rows = torch.softmax(logits[:, :-1, :old], dim=-1)
        per_query_head = self.chosen(rows, p.kv_heads * p.group, n)
        grouped = rows.view(p.kv_heads, p.group, p.window - 1, old).max(dim=1)[0]
        stays = (self.chosen(grouped, p.kv_heads, n) == 0)[:, 0]
        self.k, self.v = gathered(self.k, stays), gathered(self.v, stays)
        weights = torch.softmax(per_query_head + logits[:, -1:], dim=-1)
        return torch.matmul(weights, values)[:, 0]


class PublishedH2O(PublishedStep):
    """H2O: accumulated attention, the best and the most recent tokens; sums per KV head over the group."""

    def __init__(self, p, data):
        super().__init__(p, data)
        self.k, self.v = self.k[:, :-1].contiguous(), self.v[:, :-1].contiguous()
        self.sums = data.normal(p.kv_heads, p.capacity).abs()

    def step(self, q, k, v):
        p, recent = self.p, self.p.window
        self.k, self.v = appended(self.k, k), appended(self.v, v)
        keys, values = repeated(self.k, p.group), repeated(self.v, p.group)
        logits = torch.matmul(q[:, None], keys.transpose(1, 2)) * self.scale
        weights = torch.softmax(logits, dim=-1)
        out = torch.matmul(weights, values)[:, 0]
        n = keys.shape[1]
        row = weights.view(p.kv_heads, p.group, n).mean(dim=1)
        self.sums = torch.cat([self.sums, self.sums.new_zeros(p.kv_heads, 1)], dim=1) + row
        best = torch.topk(self.sums[:, :-recent], p.capacity - recent, dim=-1).indices.sort().values
        newest = torch.arange(n - recent, n, device=q.device).repeat(p.kv_heads, 1)
        stays = self.sums.new_zeros(p.kv_heads, n, dtype=torch.bool)
        stays.scatter_(-1, torch.cat([best, newest], dim=-1), True)
        self.k, self.v = gathered(self.k, stays), gathered(self.v, stays)
        self.sums = self.sums[stays].view(p.kv_heads, -1)
        return out


class LeanStep:
    """C + 1 slots; the victim of one step is the slot of the next token."""

    def __init__(self, p, data):
        h, n = p.kv_heads, p.capacity + 1
        self.p, self.scale, self.heads = p, 1 / math.sqrt(p.dim), torch.arange(h)
        self.k, self.v = data.normal(h, n, p.dim), data.normal(h, n, p.dim)
        self.position = torch.arange(n).repeat(h, 1)
        self.now = n
        self.slot = torch.zeros(h, dtype=torch.long)
        self.logits = torch.empty(h, p.group, n)
        self.weights = torch.empty(h, p.group, n)
        self.out = torch.empty(h, p.group, p.dim)

    def attend(self, q):
        torch.bmm(q.view(self.p.kv_heads, self.p.group, -1), self.k.transpose(1, 2), out=self.logits)
        self.logits.mul_(self.scale)
        torch.softmax(self.logits, dim=-1, out=self.weights)
        torch.bmm(self.weights, self.v, out=self.out)

    def attention_alone(self, q, k, v):
        self.k[self.heads, self.slot], self.v[self.heads, self.slot] = k, v
        self.attend(q)
        return self.out

    def write(self, k, v):
        self.k[self.heads, self.slot], self.v[self.heads, self.slot] = k, v
        self.position.scatter_(1, self.slot[:, None], self.now)  # a number as such: graphs refuse copies of one
        self.now += 1

    def protected(self):
        """The W newest tokens, [kv_head, slot]."""
        return self.position >= self.now - self.p.window


class LeanMorph(LeanStep):
    """MorphKV: logits of the W - 1 newest queries against the keys in place."""

    def __init__(self, p, data):
        super().__init__(p, data)
        h, n, r = p.kv_heads, p.capacity + 1, p.window - 1
        self.ring = data.normal(h, p.group, r, p.dim)
        self.rows = torch.empty(h, p.group * r, n)
        self.soft = torch.empty(h, p.group, r, n)
        self.fused = torch.empty(h, r, n)

    def remember(self, q):
        self.ring[:, :, self.now % (self.p.window - 1)] = q.view(self.p.kv_heads, self.p.group, -1)

    def masked_rows(self, mask):
        torch.bmm(self.ring.flatten(1, 2), self.k.transpose(1, 2), out=self.rows)
        rows = self.rows.view_as(self.soft)
        return torch.add(mask, rows, alpha=self.scale, out=rows)

    def decide(self):
        safe = self.protected()
        mask = self.k.new_zeros(safe.shape).masked_fill_(safe, -math.inf)
        torch.softmax(self.masked_rows(mask[:, None, None]), dim=-1, out=self.soft)
        torch.amax(self.soft, dim=1, out=self.fused)
        self.slot = self.fused.sum(dim=1).masked_fill_(safe, math.inf).argmin(dim=-1)

    def step(self, q, k, v):
        self.write(k, v)
        self.attend(q)
        self.remember(q)
        self.decide()
        return self.out


class LeanMorphCached(LeanMorph):
    """The same from logits kept of the last W - 1 steps: no key is read twice."""

    def __init__(self, p, data):
        super().__init__(p, data)
        self.kept = torch.empty_like(self.soft)
        self.refill()

    def refill(self):
        torch.bmm(self.ring.flatten(1, 2), self.k.transpose(1, 2), out=self.rows)
        torch.mul(self.rows.view_as(self.kept), self.scale, out=self.kept)

    def remember(self, q):
        self.kept[:, :, self.now % (self.p.window - 1)] = self.logits

    def masked_rows(self, mask):
        return torch.add(self.kept, mask, out=self.soft)


class LeanH2O(LeanStep):
    """H2O: sums per slot, one minimum."""

    def __init__(self, p, data):
        super().__init__(p, data)
        self.sums = data.normal(p.kv_heads, p.capacity + 1).abs()

    def step(self, q, k, v):
        self.write(k, v)
        self.sums.scatter_(1, self.slot[:, None], 0.0)
        self.attend(q)
        self.sums += self.weights.mean(dim=1)
        self.slot = self.sums.masked_fill(self.protected(), math.inf).argmin(dim=-1)
        return self.out


class PublishedSnap:
    """SnapKV at the end of a prompt, per query head on keys and values that the model has repeated."""

    def __init__(self, p, data):
        self.p, self.scale = p, 1 / math.sqrt(p.dim)
        hq, t, w = p.kv_heads * p.group, p.tokens, p.window
        self.q = data.normal(hq, w, p.dim)
        self.k = repeated(data.normal(p.kv_heads, t, p.dim), p.group)
        self.v = repeated(data.normal(p.kv_heads, t, p.dim), p.group)
        self.mask = torch.full((w, w), -math.inf).triu(1)

    def scores(self):
        logits = torch.matmul(self.q, self.k.transpose(1, 2)) * self.scale
        logits[:, :, -self.p.window:] += self.mask
        weights = torch.softmax(logits, dim=-1, dtype=torch.float32)
        return weights[:, :, :-self.p.window].sum(dim=1)

    def cut(self):
        p = self.p
        pooled = torch.nn.functional.avg_pool1d(self.scores(), kernel_size=5, padding=2, stride=1)
        best = pooled.topk(p.capacity - p.window, dim=-1).indices
        rows = best[:, :, None].expand(-1, -1, p.dim)
        return [torch.cat([x[:, :-p.window].gather(1, rows), x[:, -p.window:]], dim=1)
                for x in (self.k, self.v)]


class LeanSnap:
    """The same per KV head on keys as they are."""

    def __init__(self, p, data):
        self.p, self.scale = p, 1 / math.sqrt(p.dim)
        h, t, w = p.kv_heads, p.tokens, p.window
        self.q = data.normal(h, p.group * w, p.dim)
        self.k, self.v = data.normal(h, t, p.dim), data.normal(h, t, p.dim)
        self.mask = torch.full((w, w), -math.inf).triu(1).repeat(p.group, 1)
        self.logits, self.soft = torch.empty(h, p.group * w, t), torch.empty(h, p.group * w, t)

    def scores(self):
        torch.bmm(self.q * self.scale, self.k.transpose(1, 2), out=self.logits)
        self.logits[:, :, -self.p.window:] += self.mask
        torch.softmax(self.logits, dim=-1, out=self.soft)
        return self.soft[:, :, :-self.p.window].sum(dim=1)

    cut = PublishedSnap.cut
