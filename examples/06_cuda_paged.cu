// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// A paged engine in the manner of vLLM, on CUDA: one block table per sequence, shared by all layers and KV heads, so
// one kept set per sequence. The engine allocates blocks, writes keys and values, attends (left out here), and says
// when to decide. Whole blocks leave and no token moves. Two graphs serve all of decoding: a token of the batch, and a
// decision with its report. The session asks the host to wait for the second one alone, once in a block of tokens, to
// learn which blocks are free; this one waits for tokens too, because its model runs on the host.
// Exits with 77 where there is no device.
#include <kvkeep/cuda.cuh>
#include <kvkeep/engine/device_session.hpp>

#include <algorithm>
#include <array>
#include <numeric>

#include "support/cuda_engine.hpp"
#include "support/toy_model.hpp"

namespace {

using namespace kvkeep;

constexpr index_t block = 8, n_blocks = 64, per_table = 24, capacity = 64;
constexpr index_t n_sequences = 2, new_tokens = 100;
constexpr std::array<index_t, n_sequences> prompt_tokens{120, 75};
constexpr cache_shape shape{n_sequences, toy::n_q_heads, toy::n_kv_heads,
                            toy::dim,    toy::dim,       per_table* block};

/// What a session reports of a sequence, in memory that it can write.
struct report_memory {
  index_t *lengths, *freed, *freed_of, *table, *size, *faults;

  explicit report_memory(toy::managed_memory& m)
      : lengths(m.take<index_t>(product(toy::n_layers, toy::n_kv_heads))),
        freed(m.take<index_t>(product(per_table))),
        freed_of(m.take<index_t>(1)),
        table(m.take<index_t>(product(per_table))),
        size(m.take<index_t>(1)),
        faults(m.take<index_t>(1)) {}
  report_buffer buffer() const {
    return {{lengths, product(toy::n_layers, toy::n_kv_heads)},
            {freed, product(per_table)},
            {freed_of, 1},
            {table, product(per_table)},
            {size, 1},
            {faults, 1}};
  }
};

/// The engine's side: pools `[block, slot, kv_head, dim]` of every layer, free blocks, and a table per sequence.
class block_pool {
 public:
  explicit block_pool(toy::managed_memory& m)
      : table_(m.take<index_t>(product(n_sequences, per_table))), free_(n_blocks) {
    std::iota(free_.begin(), free_.end(), 0);
    std::fill_n(table_, n_sequences * per_table, 0);
    for (index_t l = 0; l < toy::n_layers; ++l) {
      k_.push_back(m.take<float>(product(n_blocks, block * toy::n_kv_heads, toy::dim)));
      v_.push_back(m.take<float>(product(n_blocks, block * toy::n_kv_heads, toy::dim)));
    }
  }
  std::vector<layer_spec<device_space>> views() const {
    std::vector<layer_spec<device_space>> all;
    for (std::size_t l = 0; l < k_.size(); ++l)
      all.push_back(
          paged_view<device_space>(k_[l], v_[l], shape, {block, n_blocks, table_, per_table}));
    return all;
  }
  index_t length(index_t s) const { return length_[at(s)]; }
  index_t blocks_in_use() const { return n_blocks - static_cast<index_t>(free_.size()); }

  /// Room for one more token; returns its row of the pool.
  std::int64_t extend(index_t s) {
    index_t const slot = length_[at(s)]++;
    if (slot / block == in_table_[at(s)]) {
      table_[s * per_table + in_table_[at(s)]++] = free_.back();
      free_.pop_back();
    }
    return std::int64_t{table_[s * per_table + slot / block]} * block + slot % block;
  }
  /// What the model computes for a token, in all layers.
  void write(std::int64_t row, index_t position) {
    for (index_t l = 0; l < toy::n_layers; ++l)
      for (index_t h = 0; h < toy::n_kv_heads; ++h) {
        auto const to = (row * toy::n_kv_heads + h) * toy::dim;
        toy::write_token(k_[at(l)] + to, v_[at(l)] + to, l, h, position);
      }
  }
  /// A decision has been reported: its blocks are free, and the table is shorter.
  void adopt(index_t s, report_memory const& r) {
    toy::expect(*r.faults == 0 ? status::ok : status::bad_order, "what a sequence reports");
    free_.insert(free_.end(), r.freed, r.freed + *r.freed_of);
    std::copy_n(r.table, *r.size, table_ + s * per_table);
    in_table_[at(s)] = *r.size;
    length_[at(s)] = r.lengths[0];
  }

 private:
  static std::size_t at(index_t i) { return static_cast<std::size_t>(i); }
  index_t* table_;
  std::vector<float*> k_, v_;
  std::vector<index_t> free_;
  std::array<index_t, n_sequences> in_table_{}, length_{};
};

/// The whole prompt of one sequence, in place.
template <class Session>
void run_prompt(Session& s, index_t id, block_pool& pool, report_memory const& r,
                cudaStream_t stream) {
  toy::managed_memory memory;
  index_t const n = prompt_tokens[static_cast<std::size_t>(id)];
  for (index_t p = 0; p < n; ++p) pool.write(pool.extend(id), p);
  for (index_t l = 0; l < toy::n_layers; ++l) {
    std::vector<float> const made = toy::make_queries(l, 0, n);
    auto* const q = memory.take<float>(made.size());
    std::copy(made.begin(), made.end(), q);
    toy::expect(s.observe(l, id, make_queries(q, toy::n_q_heads, n, toy::dim)), "observe");
  }
  toy::expect(s.end_prompt(id), "end_prompt");
  toy::expect(s.report(id, r.buffer()), "report");
  toy::expect(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  pool.adopt(id, r);
}

/// Rows, ids, slots and queries of a token of the batch.
struct batch_memory {
  index_t *rows, *ids;
  std::int64_t* slots;
  std::vector<float*> q;  ///< [layer], each [entry, q_head, dim]

  explicit batch_memory(toy::managed_memory& m)
      : rows(m.take<index_t>(n_sequences)),
        ids(m.take<index_t>(n_sequences)),
        slots(m.take<std::int64_t>(n_sequences)) {
    for (index_t l = 0; l < toy::n_layers; ++l)
      q.push_back(m.take<float>(product(n_sequences, toy::n_q_heads, toy::dim)));
  }
  batch_ref<device_space> batch() const { return {n_sequences, rows, ids}; }
  queries shown(index_t l) const {
    return make_queries(q[static_cast<std::size_t>(l)], toy::n_q_heads, 1, toy::dim);
  }
  /// The model's queries of entry `i`.
  void bring(index_t i, index_t position) {
    for (index_t l = 0; l < toy::n_layers; ++l) {
      std::vector<float> const made = toy::make_queries(l, position, 1);
      std::copy(made.begin(), made.end(),
                q[static_cast<std::size_t>(l)] + i * toy::n_q_heads * toy::dim);
    }
  }
};

}  // namespace

int main() {
  if (!toy::has_device()) return 77;
  cuda::context ctx = toy::new_context();
  toy::managed_memory memory;
  block_pool pool(memory);
  batch_memory token(memory);
  std::vector<report_memory> reports;
  for (index_t i = 0; i < n_sequences; ++i) reports.emplace_back(memory);

  policy<heavy_hitter_score, uniform, whole_blocks> keep{
      "h2o by blocks", {}, {capacity}, {block}, {4, 16}};
  keep.per = scope::sequence;
  limits lim;
  lim.max_sequences = n_sequences;
  lim.engine_commits = true;
  auto const specs = pool.views();
  std::span<layer_spec<device_space> const> const views(specs);
  std::size_t const bytes = device_session_bytes(ctx, keep, keep, views, lim);
  auto s = bind_device_session(ctx, keep, keep, views, lim,
                               std::span(memory.take<std::byte>(bytes), bytes));
  for (index_t i = 0; i < n_sequences; ++i) {
    toy::expect(s.begin(i), "begin");
    token.rows[i] = token.ids[i] = i;
    run_prompt(s, i, pool, reports[static_cast<std::size_t>(i)], ctx.stream);
  }

  cudaGraphExec_t const step = toy::record(ctx.stream, [&] {
    toy::expect(s.append_at(token.batch(), token.slots), "append_at");
    for (index_t l = 0; l < toy::n_layers; ++l)  // after the engine's own attention
      toy::expect(s.observe(l, token.batch(), token.shown(l)), "observe");
  });
  cudaGraphExec_t const decision = toy::record(ctx.stream, [&] {
    plan<device_space> chosen;
    toy::expect(s.choose(token.batch(), chosen), "choose");
    toy::expect(s.commit(chosen), "commit");
    for (index_t i = 0; i < n_sequences; ++i)
      toy::expect(s.report(i, reports[static_cast<std::size_t>(i)].buffer()), "report");
  });

  index_t most = 0, decisions = 0;
  for (index_t t = 0; t < new_tokens; ++t) {
    bool full = false;
    for (index_t i = 0; i < n_sequences; ++i) {
      index_t const position = prompt_tokens[static_cast<std::size_t>(i)] + t;
      token.slots[i] = pool.extend(i);
      pool.write(token.slots[i], position);
      token.bring(i, position);
      full = full || (pool.length(i) > capacity && pool.length(i) % block == 0);
    }
    toy::launch(step, ctx.stream);
    most = std::max(most, pool.blocks_in_use());
    if (!full) continue;
    toy::launch(decision, ctx.stream);
    ++decisions;
    for (index_t i = 0; i < n_sequences; ++i) pool.adopt(i, reports[static_cast<std::size_t>(i)]);
  }
  cudaGraphExecDestroy(decision);
  cudaGraphExecDestroy(step);

  bool good = most <= n_sequences * (capacity / block + 1);
  for (index_t i = 0; i < n_sequences; ++i) {
    good = good && s.faults()[i] == 0 && s.lengths(0)(i, 0) == pool.length(i);
    std::printf("sequence %d: %d tokens seen, %d slots in use, faults %d\n", i, s.tokens(0)[i],
                pool.length(i), s.faults()[i]);
  }
  std::printf("%d decisions; at most %d of %d blocks in use\n", decisions, most, n_blocks);
  toy::destroy(ctx);
  return good ? 0 : 1;
}
