// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Constant size means constant work: the time of a decode step (append, attention, decision, confirm)
// from token 1,000 to token 100,000 of one sequence, per policy.
//   drift      median of the last 10,000 steps over that of the first 10,000, minus 1
//   slope      least-squares line through the medians of 1,000 steps each, in percent per 100,000 tokens
//   p99_ratio  99th percentile over the median, all steps
//   amortised  mean step over the mean attention, minus 1: bursts included
// The peer is the attention of such a step alone, taken between the steps. The cache is small and stays
// warm: what is asked here is whether time grows, not how long a step takes (bench_policy_step does).
#include <memory>

#include <kvkeep/engine/policy_table.hpp>

#include "inputs.hpp"

namespace bench {
namespace {

constexpr index_t first_token = 1000, last_token = 100'000, stretch = 1000;

/// One sequence in one layer, and random tokens for it.
class sequence {
 public:
  sequence(point const& p, std::string const& policy) : shape_(shape_of(p, 2 * first_token)) {
    random_bits r{7};
    cache_ = std::make_unique<layer_cache>(float{}, shape_, layout::hnd, r);
    rows_ = random_rows<float>(row_sets * static_cast<std::size_t>(shape_.n_q_heads * p.dim), r);
    out_.resize(static_cast<std::size_t>(shape_.n_q_heads * p.dim));
    slot_.resize(static_cast<std::size_t>(p.kv_heads));
    policy_options o;
    o.capacity = p.capacity;
    o.window = p.window;
    o.sinks = policy == "streamingllm" ? 4 : 0;
    if (policy == "morphkv-cached") o.evaluation = morph_rows::cached;
    if (policy == "morphkv-burst") o.evict_after = 1.1;
    layer_spec<> const layers[] = {cache_->view};
    session_ = std::make_unique<any_cpu_session>(
        bind_session(ctx_, make_policy<cpu::context>(policy.substr(0, policy.find('-')), o),
                     std::span<layer_spec<> const>(layers), limits{}));
    expect(session_->begin(id_), "begin");
    auto const q = random_rows<float>(product(shape_.n_q_heads, first_token, p.dim), r);
    expect(session_->observe(0, id_, make_queries(q.data(), shape_.n_q_heads, first_token, p.dim)),
           "observe");
    expect(session_->end_prompt(id_), "end_prompt");
    plain_.batch.n = 1;
    plain_.layer.kv = cache_->view;
    lengths_.assign(slot_.size(), p.capacity + 1);
    plain_.layer.slots.lengths = row_major(lengths_.data(), 1, p.kv_heads);
    plain_.q = row_major(static_cast<float const*>(rows_.data()), 1, shape_.n_q_heads, p.dim);
    plain_.out = row_major(out_.data(), 1, shape_.n_q_heads, p.dim);
    scratch_ = scratch_for(ctx_, plain_);
  }

  double step() {
    batch const b{{&id_, 1}};
    double t = timed([&] { expect(session_->append(0, b, slot_.data()), "append"); });
    for (index_t h = 0; h < shape_.n_kv_heads; ++h)
      for (auto const* plane : {&cache_->view.k, &cache_->view.v}) {
        offset_t const at = visit_layout(plane->layout, [&](auto const& l) {
          return l.offset(0, h, slot_[static_cast<std::size_t>(h)]);
        });
        std::copy_n(next_rows(), shape_.dim_k, reinterpret_cast<float*>(plane->data) + at);
      }
    queries const q = make_queries(next_rows(), shape_.n_q_heads, 1, shape_.dim_k);
    t += timed([&] { expect(session_->attend(0, b, q, out_.data()), "attend"); });
    return t + timed([&] { expect(session_->confirm(b, 1), "confirm"); });
  }
  double attention() {
    plain_.q.data = next_rows();
    lengths_.assign(lengths_.size(), session_->lengths(0)(0, 0));
    workspace ws(scratch_);
    return timed([&] { expect(run(ctx_, plain_, ws), "attention"); });
  }

 private:
  static constexpr std::size_t row_sets = 1021;

  float const* next_rows() {
    turn_ = (turn_ + 1) % row_sets;
    return rows_.data() + turn_ * static_cast<std::size_t>(shape_.n_q_heads * shape_.dim_k);
  }

  cache_shape shape_;
  cpu::context ctx_;
  std::unique_ptr<layer_cache> cache_;
  std::unique_ptr<any_cpu_session> session_;
  std::vector<float> rows_, out_;
  std::vector<index_t> slot_, lengths_;
  std::vector<std::byte> scratch_;
  op::attend<> plain_;
  index_t id_ = 0;
  std::size_t turn_ = 0;
};

/// Slope of the least-squares line through values at 0, 1, 2, ...
double slope_of(std::vector<double> const& y) {
  double const n = static_cast<double>(y.size()), middle = (n - 1) / 2;
  double above = 0, below = 0;
  for (std::size_t i = 0; i < y.size(); ++i) {
    double const x = static_cast<double>(i) - middle;
    above += x * y[i];
    below += x * x;
  }
  return above / below;
}

void steady(benchmark::State& state, point const& p, std::string const& policy) {
  sequence s(p, policy);
  std::vector<double> all, part, medians, plain;
  auto const mean = [](std::vector<double> const& v) {
    return std::accumulate(v.begin(), v.end(), 0.0) / static_cast<double>(v.size());
  };
  for (auto _ : state) {
    for (index_t token = first_token; token < last_token; ++token) {
      part.push_back(s.step());
      if (token % 16 == 0) plain.push_back(s.attention());
      if (part.size() < static_cast<std::size_t>(stretch)) continue;
      medians.push_back(quantile(part, 0.5));
      all.insert(all.end(), part.begin(), part.end());
      part.clear();
    }
    state.SetIterationTime(std::accumulate(all.begin(), all.end(), 0.0));
  }
  constexpr std::ptrdiff_t tenth = 10'000;
  double const median = quantile(all, 0.5);
  auto& c = state.counters;
  c["us"] = median * 1e6;
  c["peer_us"] = quantile(plain, 0.5) * 1e6;
  c["peer_ratio"] = median / quantile(plain, 0.5);
  c["p99_ratio"] = quantile(all, 0.99) / median;
  c["drift"] = quantile({all.end() - tenth, all.end()}, 0.5) /
                   quantile({all.begin(), all.begin() + tenth}, 0.5) -
               1;
  c["amortised"] = mean(all) / mean(plain) - 1;
  c["slope"] = slope_of(medians) / median * 100 * (100'000.0 / stretch);
}

}  // namespace
}  // namespace bench

int main(int argc, char** argv) {
  using namespace bench;
  point p = base;
  p.capacity = 256;
  p.kv_heads = 2;
  p.dim = 64;
  for (char const* policy : {"streamingllm", "h2o", "tova", "knorm", "morphkv", "morphkv-cached",
                             "morphkv-burst", "keydiff"})
    add_row(std::string("steady/") + policy + named("C", p.capacity) + named("W", p.window) +
                named("Hkv", p.kv_heads) + named("G", p.group) + named("D", p.dim),
            1, [=](benchmark::State& s) { steady(s, p, policy); });
  return run_rows(argc, argv);
}
