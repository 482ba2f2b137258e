// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// A contiguous cache of constant size: the prompt is longer than the cache, every new token takes the slot
// of the token that MorphKV lets go, and nothing else moves. The library's own attention is used.
#include "support/toy_model.hpp"

int main() {
  using namespace kvkeep;
  constexpr index_t capacity = 64, prompt_tokens = 200, new_tokens = 300;

  // The engine's cache: C + 1 slots per KV head, K and V as [seq, kv_head, slot, dim].
  cache_shape const shape{1, toy::n_q_heads, toy::n_kv_heads, toy::dim, toy::dim, capacity + 1};
  std::size_t const floats = std::size_t{toy::n_kv_heads} * shape.max_slots * toy::dim;
  std::vector<std::vector<float>> k(toy::n_layers, std::vector<float>(floats)), v = k;
  std::vector<layer_spec<>> layers;
  for (std::size_t l = 0; l < toy::n_layers; ++l)
    layers.push_back(contiguous_view(k[l].data(), v[l].data(), shape));

  cpu::context ctx;
  limits lim;
  lim.max_prompt = prompt_tokens;  // prompts come through a one-layer view of this many slots
  auto s = bind_session(ctx, make_morphkv({.capacity = capacity, .window = 16}),
                        std::span<layer_spec<> const>(layers), lim);

  index_t id = 0;
  toy::expect(s.begin(id), "begin");

  // Prompt: one layer at a time in a transient buffer; what survives goes into the cache.
  cache_shape tmp_shape = shape;
  tmp_shape.max_slots = prompt_tokens;
  std::vector<float> tmp_k(std::size_t{toy::n_kv_heads} * prompt_tokens * toy::dim), tmp_v = tmp_k;
  kv_ref<> const tmp = contiguous_view(tmp_k.data(), tmp_v.data(), tmp_shape);
  for (index_t l = 0; l < toy::n_layers; ++l) {
    for (index_t h = 0; h < toy::n_kv_heads; ++h)
      for (index_t p = 0; p < prompt_tokens; ++p) {
        auto const at = (h * prompt_tokens + p) * toy::dim;
        toy::write_token(tmp_k.data() + at, tmp_v.data() + at, l, h, p);
      }
    auto const q = toy::make_queries(l, 0, prompt_tokens);
    toy::expect(
        s.observe(l, id, make_queries(q.data(), toy::n_q_heads, prompt_tokens, toy::dim), &tmp),
        "observe");
    toy::expect(s.end_prompt(l, id, &tmp), "end_prompt");
  }

  // Decoding.
  index_t const ids[] = {id};
  batch const b{ids};
  std::vector<float> new_k(toy::n_kv_heads * toy::dim), new_v = new_k;
  std::vector<float> out(toy::n_q_heads * toy::dim);
  for (index_t p = prompt_tokens; p < prompt_tokens + new_tokens; ++p) {
    for (index_t l = 0; l < toy::n_layers; ++l) {
      for (index_t h = 0; h < toy::n_kv_heads; ++h)
        toy::write_token(new_k.data() + h * toy::dim, new_v.data() + h * toy::dim, l, h, p);
      auto const q = toy::make_queries(l, p, 1);
      token_io const token{make_token_kv(new_k.data(), new_v.data(), shape),
                           make_queries(q.data(), toy::n_q_heads, 1, toy::dim), out.data()};
      toy::expect(s.decode(l, b, token), "decode");
    }
    toy::expect(s.confirm(b, 1), "confirm");
  }
  toy::expect(s.verify(), "verify");

  counters const c = s.count();
  std::printf(
      "%d tokens seen, %d slots in use per head, %lld victims reused in place, %lld cuts, "
      "%zu bytes of policy state\n",
      s.tokens(id), s.lengths(0)(id, 0), static_cast<long long>(c.victims),
      static_cast<long long>(c.cuts), c.state_bytes);
  bool const constant = s.lengths(0)(id, 0) == capacity + 1;
  toy::expect(s.end(id), "end");
  return constant ? 0 : 1;
}
