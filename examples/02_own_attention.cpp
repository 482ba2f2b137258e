// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// An engine with its own attention kernel and a batch of sequences of different lengths: it asks for slots
// and lengths, attends itself, and shows the session its queries afterwards. SnapKV cuts the prompt,
// H2O-like eviction would need all prompt queries, so MorphKV takes over while decoding.
#include "support/toy_model.hpp"

namespace {

using namespace kvkeep;

/// Stands for the engine's FlashAttention: one query head over the slots in use.
void flash(float const* q, float const* k, float const* v, index_t n, float* out) {
  std::vector<float> w(static_cast<std::size_t>(n));
  float top = -1e30F, sum = 0;
  for (index_t j = 0; j < n; ++j) {
    float z = 0;
    for (index_t d = 0; d < toy::dim; ++d) z += q[d] * k[j * toy::dim + d];
    w[static_cast<std::size_t>(j)] = z / std::sqrt(static_cast<float>(toy::dim));
    top = std::fmax(top, w[static_cast<std::size_t>(j)]);
  }
  for (auto& x : w) sum += x = std::exp(x - top);
  for (index_t d = 0; d < toy::dim; ++d) out[d] = 0;
  for (index_t j = 0; j < n; ++j)
    for (index_t d = 0; d < toy::dim; ++d)
      out[d] += w[static_cast<std::size_t>(j)] / sum * v[j * toy::dim + d];
}

}  // namespace

int main() {
  constexpr index_t capacity = 48, slots = 160, n_seq = 3, new_tokens = 60;
  cache_shape const shape{n_seq, toy::n_q_heads, toy::n_kv_heads, toy::dim, toy::dim, slots};
  std::size_t const floats = std::size_t{n_seq} * toy::n_kv_heads * slots * toy::dim;
  std::vector<std::vector<float>> k(toy::n_layers, std::vector<float>(floats)), v = k;
  auto const row = [&](index_t seq, index_t h, index_t slot) {
    return ((static_cast<std::ptrdiff_t>(seq) * toy::n_kv_heads + h) * slots + slot) * toy::dim;
  };
  std::vector<layer_spec<>> layers;
  for (std::size_t l = 0; l < toy::n_layers; ++l)
    layers.push_back(contiguous_view(k[l].data(), v[l].data(), shape));

  cpu::thread_pool pool(2);
  cpu::context ctx{&pool};
  limits lim;
  lim.max_sequences = n_seq;
  lim.prompt = prompt_offer::window_queries;  // the engine keeps only the last queries of a prompt
  auto s = bind_session(ctx, make_snapkv({.capacity = capacity, .window = 16}),
                        make_morphkv({.capacity = capacity, .window = 16}),
                        std::span<layer_spec<> const>(layers), lim);

  index_t ids[n_seq];
  for (index_t i = 0; i < n_seq; ++i) {
    index_t const tokens = 40 + 50 * i;
    toy::expect(s.begin(ids[i]), "begin");
    for (index_t l = 0; l < toy::n_layers; ++l) {
      auto const layer = static_cast<std::size_t>(l);
      for (index_t h = 0; h < toy::n_kv_heads; ++h)
        for (index_t p = 0; p < tokens; ++p)
          toy::write_token(k[layer].data() + row(ids[i], h, p), v[layer].data() + row(ids[i], h, p),
                           l, h, p);
      auto const q = toy::make_queries(l, tokens - 16, 16);
      queries last = make_queries(q.data(), toy::n_q_heads, 16, toy::dim);
      last.tokens = tokens;  // 16 rows stand for the whole prompt
      toy::expect(s.observe(l, ids[i], last), "observe");
    }
    toy::expect(s.end_prompt(ids[i]), "end_prompt");
  }

  batch const b{ids};
  std::vector<index_t> slot(n_seq * toy::n_kv_heads);
  std::vector<float> out(toy::dim);
  for (index_t t = 0; t < new_tokens; ++t) {
    for (index_t l = 0; l < toy::n_layers; ++l) {
      auto const layer = static_cast<std::size_t>(l);
      toy::expect(s.append(l, b, slot.data()), "append");
      std::vector<float> q;
      for (index_t i = 0; i < n_seq; ++i) {
        index_t const p = s.tokens(ids[i]);
        for (index_t h = 0; h < toy::n_kv_heads; ++h) {
          auto const at = row(ids[i], h, slot[static_cast<std::size_t>(i * toy::n_kv_heads + h)]);
          toy::write_token(k[layer].data() + at, v[layer].data() + at, l, h, p);
        }
        auto const own = toy::make_queries(l, p, 1);
        q.insert(q.end(), own.begin(), own.end());
      }
      auto const lengths = s.lengths(l);
      for (index_t i = 0; i < n_seq; ++i)
        for (index_t h = 0; h < toy::n_q_heads; ++h) {
          index_t const kv_head = h / shape.group();
          flash(q.data() + (i * toy::n_q_heads + h) * toy::dim,
                k[layer].data() + row(ids[i], kv_head, 0),
                v[layer].data() + row(ids[i], kv_head, 0), lengths(ids[i], kv_head), out.data());
        }
      toy::expect(s.observe(l, b, make_queries(q.data(), toy::n_q_heads, 1, toy::dim)), "observe");
    }
    toy::expect(s.confirm(b, 1), "confirm");
  }
  toy::expect(s.verify(), "verify");
  for (index_t const id : ids) {
    std::printf("sequence %d: %d tokens seen, %d slots in use\n", id, s.tokens(id),
                s.lengths(0)(id, 0));
    if (s.lengths(0)(id, 0) > capacity + 1) return 1;
    toy::expect(s.end(id), "end");
  }
  return 0;
}
