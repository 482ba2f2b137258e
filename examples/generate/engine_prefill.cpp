// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <algorithm>
#include <numeric>

#include "generate/engine_state.hpp"

namespace kvkeep::generate {

using detail::expect;
using detail::stopwatch;

namespace {

bool works_in_place(policy_pair const& p, engine_options const& o) {
  return o.in_place || !p.cuts_prompt() || p.joins_layers();
}

limits limits_of(policy_pair const& p, engine_options const& o) {
  limits lim;
  lim.max_sequences = o.max_sequences;
  lim.max_prompt = works_in_place(p, o) ? 0 : o.max_prompt;
  lim.max_chunk = o.chunk;
  return lim;
}

cache_shape shape_of(model const& m, policy_pair const& p, engine_options const& o) {
  model_config const& c = m.config;
  cache_shape s{o.max_sequences, c.n_q_heads, c.n_kv_heads, c.head_dim, c.head_dim, 1};
  cache_demand d{s, c.n_layers, -1, limits_of(p, o)};
  d.longest_prompt = o.max_prompt;
  d.longest_sequence = o.max_tokens;
  s.max_slots = slots_needed(p.prompt, p.decode, d);
  if (s.max_slots > most_tokens)
    throw std::invalid_argument("--budget: expected at most " + std::to_string(most_tokens) +
                                " slots");
  return s;
}

engine_options checked(engine_options o) {
  auto const at_least = [](char const* field, index_t v, index_t least) {
    if (v < least)
      throw std::invalid_argument(std::string(field) + ": " + std::to_string(v) +
                                  ": expected at least " + std::to_string(least));
  };
  at_least("chunk", o.chunk, 1);
  at_least("batch", o.max_sequences, 1);
  at_least("max_prompt", o.max_prompt, 1);
  at_least("max_tokens", o.max_tokens, o.max_prompt);
  o.chunk = std::min(o.chunk, o.max_prompt);
  return o;
}

}  // namespace

engine::state::state(runtime& r, model const& weights, policy_pair const& policies,
                     engine_options const& o)
    : rt(r),
      config(weights.config),
      options(checked(o)),
      evicts(policies.cuts_decode()),
      in_place(works_in_place(policies, o)),
      offers_lse(policies.prompt.score.traits().prompt != evidence::all_queries),
      blocks(r, weights, std::max(options.chunk, options.max_sequences)),
      cache(shape_of(weights, policies, options), config.n_layers, o.layout),
      kv(bind(policies)),
      live(static_cast<std::size_t>(options.max_sequences)),
      logits(product(options.max_sequences, config.vocabulary)),
      x(product(std::max(in_place ? options.chunk : options.max_prompt, options.max_sequences),
                config.dim)) {
  if (!in_place) {
    cache_shape one = cache.shape();
    one.n_seq = 1;
    one.max_slots = options.max_prompt;
    prompt_cache = std::make_unique<kv_cache>(one, 1, kv_cache::layout_options{});
  }
  usage.slot_bytes = product(2, config.head_dim) * sizeof(float);
  usage.session_bytes = kv.bytes();
  index_t const rows = std::max(options.chunk, options.max_sequences);
  lengths.resize(product(rows, config.n_kv_heads));
  lse.resize(product(rows, config.n_q_heads));
  slots.resize(product(options.max_sequences, config.n_kv_heads));
  step_logits.resize(logits.size());
  // Attention alone needs scratch for the wider of its two caches.
  for (kv_cache const* c :
       {static_cast<kv_cache const*>(&cache), static_cast<kv_cache const*>(prompt_cache.get())}) {
    if (c == nullptr) continue;
    op::attend<> a;
    a.batch.n = rows;
    a.layer.kv = c->view(0);
    a.out = row_major<host_space>(blocks.attention(), rows, config.n_q_heads, config.head_dim);
    a.q = row_major<host_space>(blocks.q(0), rows, config.n_q_heads, config.head_dim);
    workspace counting;
    expect(run(rt.ctx, a, counting), "op::attend");
    scratch.resize(std::max(scratch.size(), counting.peak() + workspace::alignment));
  }
}

any_cpu_session engine::state::bind(policy_pair const& policies) {
  std::vector<layer_spec<>> layers;
  for (index_t l = 0; l < config.n_layers; ++l) layers.push_back(cache.view(l));
  return bind_session(rt.ctx, policies.prompt, policies.decode,
                      std::span<layer_spec<> const>(layers), limits_of(policies, options));
}

void engine::state::check_token(index_t token) const {
  if (token < 0 || token >= config.vocabulary)
    throw bad_input("token " + std::to_string(token), "id",
                    "expected 0.." + std::to_string(config.vocabulary - 1));
}

void engine::state::prefill(index_t id, std::span<index_t const> prompt) {
  for (index_t l = 0; l < config.n_layers; ++l)
    cache.resize(l, id, in_place ? static_cast<index_t>(prompt.size()) : cache.shape().max_slots);
  if (in_place)
    prefill_by_chunks(id, prompt);
  else
    prefill_by_layers(id, prompt);
  ids.assign(1, id);
  note_peak();
  trim();
  usage.prompt_tokens += static_cast<std::int64_t>(prompt.size());
}

/// A layer sees the whole prompt, chunk by chunk, before the next one: K and V of one layer are in memory,
/// and what the policy keeps of them goes into the cache.
void engine::state::prefill_by_layers(index_t id, std::span<index_t const> prompt) {
  auto const tokens = static_cast<index_t>(prompt.size());
  blocks.embed(prompt, x.data());
  for (index_t l = 0; l < config.n_layers; ++l) {
    for (index_t first = 0; first < tokens; first += options.chunk)
      prefill_chunk({id, l, first, std::min(options.chunk, tokens - first)},
                    x.data() + offset_t{first} * config.dim);
    stopwatch const time(usage.end_prompt);
    expect(kv.end_prompt(l, id, &prompt_cache->view(0)), "end_prompt");
  }
  blocks.logits({x.data() + offset_t{tokens - 1} * config.dim, 1}, logits_of(id));
}

/// A chunk passes through all layers before the next one.
void engine::state::prefill_by_chunks(index_t id, std::span<index_t const> prompt) {
  auto const tokens = static_cast<index_t>(prompt.size());
  index_t n = 0;
  for (index_t first = 0; first < tokens; first += n) {
    n = std::min(options.chunk, tokens - first);
    blocks.embed(prompt.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(n)),
                 x.data());
    for (index_t l = 0; l < config.n_layers; ++l) prefill_chunk({id, l, first, n}, x.data());
  }
  blocks.logits({x.data() + offset_t{n - 1} * config.dim, 1}, logits_of(id));
  stopwatch const time(usage.end_prompt);
  expect(kv.end_prompt(id), "end_prompt");
}

void engine::state::prefill_chunk(chunk const& c, float* rows) {
  positions.resize(static_cast<std::size_t>(c.n));
  std::iota(positions.begin(), positions.end(), c.first);
  blocks.set_positions(positions);
  blocks.project(c.layer, {rows, c.n});
  write_chunk(c);
  attend_chunk(c);
  {
    queries q;
    q.data = blocks.q(0);
    q.head_stride = config.head_dim;
    q.row_stride = config.q_width();
    q.n_rows = c.n;
    if (offers_lse) {
      q.lse = lse.data();
      q.lse_head_stride = c.n;
    }
    stopwatch const time(usage.observe);
    expect(kv.observe(c.layer, c.id, q, in_place ? nullptr : &prompt_cache->view(0)), "observe");
  }
  if (options.observer != nullptr) note_prompt(c);
  blocks.finish(c.layer, rows, c.n);
}

void engine::state::note_prompt(chunk const& c) {
  for (index_t i = 0; i < c.n; ++i)
    options.observer->on_token({c.layer, c.id, c.first + i, blocks.q(i), blocks.k(i), blocks.v(i)});
}

/// Keys and values of a chunk go to the slots that equal their positions.
void engine::state::write_chunk(chunk const& c) {
  index_t const dim = config.head_dim;
  kv_cache& to = in_place ? cache : *prompt_cache;
  for (index_t i = 0; i < c.n; ++i)
    for (index_t h = 0; h < config.n_kv_heads; ++h) {
      kv_cache::place const p{in_place ? c.layer : 0, in_place ? c.id : 0, h, c.first + i};
      std::copy_n(blocks.k(i) + offset_t{h} * dim, dim, to.k(p));
      std::copy_n(blocks.v(i) + offset_t{h} * dim, dim, to.v(p));
    }
}

/// Causal attention: row i is an entry of a batch whose length is its position + 1. The op is the one that
/// decodes, so a token gets the same bits from either phase and from any chunk.
void engine::state::attend_chunk(chunk const& c) {
  std::vector<index_t> row(static_cast<std::size_t>(c.n), in_place ? c.id : 0);
  for (index_t i = 0; i < c.n; ++i)
    std::fill_n(lengths.begin() + offset_t{i} * config.n_kv_heads, config.n_kv_heads,
                c.first + i + 1);
  op::attend<> a;
  a.batch.n = c.n;
  a.batch.row = row.data();
  a.layer.kv = in_place ? cache.view(c.layer) : prompt_cache->view(0);
  a.layer.slots.lengths = row_major<host_space>(lengths.data(), c.n, config.n_kv_heads);
  a.q = row_major<host_space>(blocks.q(0), c.n, config.n_q_heads, config.head_dim);
  a.out = row_major<host_space>(blocks.attention(), c.n, config.n_q_heads, config.head_dim);
  a.lse = row_major<host_space>(lse.data(), c.n, config.n_q_heads);
  a.lse.stride[0] = 1;  // as queries want it: [q_head, row]
  a.lse.stride[1] = c.n;
  workspace w{std::span<std::byte>(scratch)};
  expect(run(rt.ctx, a, w), "op::attend");
}

}  // namespace kvkeep::generate
