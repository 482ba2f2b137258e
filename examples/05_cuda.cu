// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// An engine on CUDA: cache, batch and the session's state are memory of the device. The prompt is longer than the cache
// and passes through a buffer of one layer. A decode step of all layers is recorded as a graph once, then replayed for
// every token. The session writes new keys and values itself, and what
// it decides about a layer runs in a second stream, beside the next layers. The host reads nothing until the end.
// Exits with 77 where there is no device.
#include <kvkeep/cuda.cuh>
#include <kvkeep/engine/device_session.hpp>

#include "support/cuda_engine.hpp"
#include "support/toy_model.hpp"

namespace {

using namespace kvkeep;

constexpr index_t capacity = 64, prompt_tokens = 200, new_tokens = 100;
constexpr cache_shape shape_of(index_t slots) {
  return {1, toy::n_q_heads, toy::n_kv_heads, toy::dim, toy::dim, slots};
}
constexpr cache_shape shape = shape_of(capacity + 1), prompt_shape = shape_of(prompt_tokens);

/// One layer's cache `[kv_head, slot, dim]`, and what a token brings and gets.
struct layer_memory {
  float *k, *v, *new_k, *new_v, *q, *out;

  explicit layer_memory(toy::managed_memory& m)
      : k(m.take<float>(product(toy::n_kv_heads, shape.max_slots, toy::dim))),
        v(m.take<float>(product(toy::n_kv_heads, shape.max_slots, toy::dim))),
        new_k(m.take<float>(product(toy::n_kv_heads, toy::dim))),
        new_v(m.take<float>(product(toy::n_kv_heads, toy::dim))),
        q(m.take<float>(product(toy::n_q_heads, toy::dim))),
        out(m.take<float>(product(toy::n_q_heads, toy::dim))) {}
};

/// Layer after layer: keys and values lie in slots 0, 1, ... of the buffer, the queries are shown, and what survives
/// the first cut comes into the cache.
template <class Session>
void run_prompt(Session& s, index_t id, cudaStream_t stream) {
  toy::managed_memory memory;
  std::size_t const rows = product(toy::n_kv_heads, prompt_tokens, toy::dim);
  float* const k = memory.take<float>(rows);
  float* const v = memory.take<float>(rows);
  float* const q = memory.take<float>(product(toy::n_q_heads, prompt_tokens, toy::dim));
  kv_ref<device_space> const prompt = contiguous_view<device_space>(k, v, prompt_shape);
  for (index_t l = 0; l < toy::n_layers; ++l) {
    for (index_t h = 0; h < toy::n_kv_heads; ++h)
      for (index_t p = 0; p < prompt_tokens; ++p) {
        auto const at = (h * prompt_tokens + p) * toy::dim;
        toy::write_token(k + at, v + at, l, h, p);
      }
    std::vector<float> const made = toy::make_queries(l, 0, prompt_tokens);
    std::copy(made.begin(), made.end(), q);
    queries const shown = make_queries(q, toy::n_q_heads, prompt_tokens, toy::dim);
    toy::expect(s.observe(l, id, shown, &prompt), "observe");
    toy::expect(s.end_prompt(l, id, &prompt), "end_prompt");
    toy::expect(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  }
}

/// Enqueues one token in every layer: nothing here depends on lengths or positions.
template <class Session>
void enqueue_step(Session& s, batch_ref<device_space> const& b,
                  std::vector<layer_memory> const& layers) {
  for (index_t l = 0; l < toy::n_layers; ++l) {
    layer_memory const& m = layers[static_cast<std::size_t>(l)];
    token_io const token{make_token_kv(m.new_k, m.new_v, shape),
                         make_queries(m.q, toy::n_q_heads, 1, toy::dim), m.out};
    toy::expect(s.decode(l, b, token), "decode");
  }
  toy::expect(s.join(), "join");  // the step ends when its last decision has been made
}

/// What the model computes for the next token, where the recorded step finds it.
void bring_token(std::vector<layer_memory> const& layers, index_t position) {
  for (index_t l = 0; l < toy::n_layers; ++l) {
    layer_memory const& m = layers[static_cast<std::size_t>(l)];
    for (index_t h = 0; h < toy::n_kv_heads; ++h)
      toy::write_token(m.new_k + h * toy::dim, m.new_v + h * toy::dim, l, h, position);
    std::vector<float> const q = toy::make_queries(l, position, 1);
    std::copy(q.begin(), q.end(), m.q);
  }
}

}  // namespace

int main() {
  if (!toy::has_device()) return 77;
  cuda::context ctx = toy::new_context(), beside = toy::new_context();
  cudaStream_t const stream = ctx.stream;

  toy::managed_memory memory;
  std::vector<layer_memory> layers;
  std::vector<layer_spec<device_space>> specs;
  for (index_t l = 0; l < toy::n_layers; ++l) {
    layer_memory const m(memory);
    layers.push_back(m);
    specs.push_back(contiguous_view<device_space>(m.k, m.v, shape));
  }
  std::span<layer_spec<device_space> const> const views(specs);
  auto const policy = make_morphkv({.capacity = capacity, .window = 16});
  limits lim;
  lim.max_prompt = prompt_tokens;
  std::size_t const bytes = device_session_bytes(ctx, policy, policy, views, lim);
  auto s = bind_device_session(ctx, policy, policy, views, lim,
                               std::span(memory.take<std::byte>(bytes), bytes));
  std::size_t const aside = s.aside_bytes(beside);
  toy::expect(s.decide_in(beside, std::span(memory.take<std::byte>(aside), aside)), "decide_in");

  index_t id = 0;
  toy::expect(s.begin(id), "begin");
  run_prompt(s, id, stream);

  // The batch: rows of the views and ids of sequences.
  index_t* const row = memory.take<index_t>(1);
  index_t* const ids = memory.take<index_t>(1);
  *row = 0, *ids = id;
  cudaGraphExec_t const step = toy::record(stream, [&] { enqueue_step(s, {1, row, ids}, layers); });

  for (index_t p = prompt_tokens; p < prompt_tokens + new_tokens; ++p) {
    bring_token(layers, p);
    toy::launch(step, stream);
  }
  cudaGraphExecDestroy(step);

  index_t const slots = s.lengths(0)(id, 0);  // managed memory too, and nothing runs
  std::printf(
      "%d tokens seen, %d slots in use per head, faults %d, %zu bytes of state and scratch\n",
      s.tokens(0)[id], slots, s.faults()[id], bytes + aside);
  bool const good = slots == capacity + 1 && s.faults()[id] == 0;
  toy::destroy(beside);
  toy::destroy(ctx);
  return good ? 0 : 1;
}
