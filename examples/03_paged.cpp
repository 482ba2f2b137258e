// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// A paged engine in the manner of vLLM: one block table per sequence, shared by all layers and KV heads, so
// one kept set per sequence. Whole blocks leave, no token moves; the engine frees what the report names.
#include "support/toy_model.hpp"

#include <algorithm>
#include <numeric>

int main() {
  using namespace kvkeep;
  constexpr index_t block = 8, n_blocks = 40, per_table = 24, capacity = 64;
  constexpr index_t prompt_tokens = 120, chunk = 48, new_tokens = 100;

  // The engine's pool (NHD inside a block), its free list, and one table.
  constexpr index_t max_slots = per_table * block;
  cache_shape const shape{1, toy::n_q_heads, toy::n_kv_heads, toy::dim, toy::dim, max_slots};
  std::size_t const floats = std::size_t{n_blocks} * block * toy::n_kv_heads * toy::dim;
  std::vector<std::vector<float>> k(toy::n_layers, std::vector<float>(floats)), v = k;
  std::vector<index_t> free(n_blocks), table(per_table, 0);
  std::iota(free.begin(), free.end(), 0);
  index_t in_table = 0;
  auto const allocate = [&](index_t slots) {  // blocks for that many slots
    for (; in_table * block < slots; ++in_table) {
      table[static_cast<std::size_t>(in_table)] = free.back();
      free.pop_back();
    }
  };
  std::vector<layer_spec<>> layers;
  for (std::size_t l = 0; l < toy::n_layers; ++l)
    layers.push_back(
        paged_view(k[l].data(), v[l].data(), shape, {block, n_blocks, table.data(), per_table}));
  auto const write = [&](index_t slot, index_t p) {
    for (index_t l = 0; l < toy::n_layers; ++l)
      for (index_t h = 0; h < toy::n_kv_heads; ++h) {
        auto const layer = static_cast<std::size_t>(l);
        auto const at =
            (static_cast<std::ptrdiff_t>(table[static_cast<std::size_t>(slot / block)]) * block +
             slot % block) *
                toy::n_kv_heads * toy::dim +
            h * toy::dim;
        toy::write_token(k[layer].data() + at, v[layer].data() + at, l, h, p);
      }
  };

  policy<heavy_hitter_score, uniform, whole_blocks> keep{
      "h2o by blocks", {}, {capacity}, {block}, {4, 16}};
  keep.per = scope::sequence;
  cpu::context ctx;
  limits lim;
  lim.engine_commits = true;
  auto s = bind_session(ctx, keep, std::span<layer_spec<> const>(layers), lim);

  std::vector<index_t> lengths(toy::n_layers * toy::n_kv_heads), freed(n_blocks), freed_of(1),
      new_table(per_table), size(1);
  report_buffer const report{lengths, freed, freed_of, new_table, size};
  auto const adopt = [&](index_t id) {
    toy::expect(s.report(id, report), "report");
    free.insert(free.end(), freed.begin(), freed.begin() + freed_of[0]);
    in_table = size[0];
    std::copy_n(new_table.begin(), in_table, table.begin());
  };

  index_t id = 0;
  toy::expect(s.begin(id), "begin");
  for (index_t first = 0; first < prompt_tokens; first += chunk) {
    index_t const n = std::min(chunk, prompt_tokens - first);
    allocate(first + n);
    for (index_t p = first; p < first + n; ++p) write(p, p);
    for (index_t l = 0; l < toy::n_layers; ++l) {
      auto const q = toy::make_queries(l, first, n);
      toy::expect(s.observe(l, id, make_queries(q.data(), toy::n_q_heads, n, toy::dim)), "observe");
    }
  }
  toy::expect(s.end_prompt(id), "end_prompt");
  adopt(id);

  index_t const ids[] = {id};
  batch const b{ids};
  index_t most = 0;
  for (index_t p = prompt_tokens; p < prompt_tokens + new_tokens; ++p) {
    index_t const slot = s.lengths(0)(id, 0);
    allocate(slot + 1);
    std::int64_t const mapping[] = {
        std::int64_t{table[static_cast<std::size_t>(slot / block)]} * block + slot % block};
    toy::expect(s.append_at(b, mapping), "append_at");
    write(slot, p);
    for (index_t l = 0; l < toy::n_layers; ++l) {
      auto const q = toy::make_queries(l, p, 1);  // after the engine's own attention
      toy::expect(s.observe(l, b, make_queries(q.data(), toy::n_q_heads, 1, toy::dim)), "observe");
    }
    toy::expect(s.confirm(b, 1), "confirm");
    if (s.due(b)) {
      plan<> chosen;
      toy::expect(s.choose(b, chosen), "choose");
      toy::expect(s.commit(chosen), "commit");
      adopt(id);
    }
    most = std::max(most, in_table);
  }
  toy::expect(s.verify(), "verify");
  std::printf("%d tokens seen; at most %d of %d blocks in use, %zu free at the end\n", s.tokens(id),
              most, n_blocks, free.size());
  toy::expect(s.end(id), "end");
  return most <= capacity / block + 1 ? 0 : 1;
}
