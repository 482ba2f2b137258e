// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// A policy of your own: a functor per slot, and one line that composes it. It runs with every budget,
// selector, layout and element type, for prompts and while decoding.
#include "support/toy_model.hpp"

/// Keeps tokens whose value is long and whose key is short.
struct value_over_key {
  static constexpr char const* name = "value_over_key";
  static constexpr bool reads_k = true;
  static constexpr bool reads_v = true;
  KVKEEP_HD float operator()(kvkeep::slot_values const& s) const noexcept {
    float k = 1e-6F, v = 0;
    for (kvkeep::index_t d = 0; d < s.dim_k; ++d) k += s.k[d] * s.k[d];
    for (kvkeep::index_t d = 0; d < s.dim_v; ++d) v += s.v[d] * s.v[d];
    return v / k;
  }
};
using my_policy = kvkeep::policy<kvkeep::slot_score<value_over_key>>;

int main() {
  using namespace kvkeep;
  constexpr index_t capacity = 32, tokens = 100;
  cache_shape const shape{1, toy::n_q_heads, toy::n_kv_heads, toy::dim, toy::dim, tokens};
  std::vector<float> k(std::size_t{toy::n_kv_heads} * tokens * toy::dim), v = k;
  for (index_t h = 0; h < toy::n_kv_heads; ++h)
    for (index_t p = 0; p < tokens; ++p) {
      auto const at = (h * tokens + p) * toy::dim;
      toy::write_token(k.data() + at, v.data() + at, 0, h, p);
    }
  layer_spec<> const layers[] = {contiguous_view(k.data(), v.data(), shape)};

  cpu::context ctx;
  limits lim;
  lim.prompt = prompt_offer::nothing;  // this policy needs no queries
  lim.decode = decode_offer::nothing;
  my_policy const keep{"mine", {}, {capacity}, {}, {.sinks = 4, .recent = 8}};
  auto s = bind_session(ctx, keep, std::span<layer_spec<> const>(layers), lim);

  index_t id = 0;
  toy::expect(s.begin(id), "begin");
  toy::expect(s.observe(0, id, tokens_only(tokens)), "observe");
  toy::expect(s.end_prompt(id), "end_prompt");
  toy::expect(s.verify(), "verify");
  for (index_t h = 0; h < toy::n_kv_heads; ++h) {
    std::printf("KV head %d keeps", h);
    for (index_t j = 0; j < s.lengths(0)(id, h); ++j) std::printf(" %d", s.positions(0)(id, h, j));
    std::printf("\n");
    if (s.lengths(0)(id, h) != capacity) return 1;
  }
  return 0;
}
