// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// MorphKV in bursts (evict_after = 1.1): the cache grows by a tenth, then is cut. Steps (append, attention,
// confirm) through whole bursts, each beside the attention over the same number of slots in another layer
// (the peer); bytes moved and slots kept between are part of what a burst costs.
//   amortised    mean step over mean attention, minus 1
//   burst_ratio  median of the steps that cut over the median attention
// Layers rotate, so that K, V and all state come from memory.
#include "decode_model.hpp"

namespace bench {
namespace {

constexpr int bursts = 3;

void burst_steps(benchmark::State& state, point const& p, index_t period) {
  decode_model m(p, "morphkv-burst", p.capacity + 1);
  meter all(m.attention_work(p.capacity + period / 2));
  std::vector<double> step, cut, plain;
  int token = 0;
  for (auto _ : state) {
    double total = 0;
    auto const before = m.count().evicted;
    std::vector<double> now;
    for (std::size_t layer = 0; layer < m.layers(); ++layer) {
      double t = m.append(layer);
      m.write_token(layer);
      index_t const in_use = m.in_use(layer);
      t += m.attend(layer);
      double const alone = m.plain_attention(m.other(layer, 1), in_use, false);
      now.push_back(t);
      if (token >= period) all.add(t, alone);
      if (token >= period) plain.push_back(alone);
      total += t;
    }
    double const confirm = m.confirm();
    bool const cuts = m.count().evicted != before;
    for (double t : now) {
      t += confirm / static_cast<double>(m.layers());
      if (token >= period) step.push_back(t);
      if (token >= period && cuts) cut.push_back(t);
    }
    ++token;
    state.SetIterationTime(total / static_cast<double>(m.layers()));
  }
  auto const mean = [](std::vector<double> const& v) {
    return std::accumulate(v.begin(), v.end(), 0.0) / static_cast<double>(v.size());
  };
  if (cut.size() != m.layers() * bursts) state.SkipWithError("not so many bursts");
  all.report(state);
  auto& c = state.counters;
  c["amortised"] = mean(step) / mean(plain) - 1;
  c["burst_ratio"] = quantile(cut, 0.5) / quantile(plain, 0.5);
}

void add(point const& p) {
  index_t const period = decode_model::burst_length(p);
  add_row("bursts/morphkv" + named("C", p.capacity) + named("W", p.window) + named("B", p.batch) +
              named("Hkv", p.kv_heads) + named("G", p.group) + named("D", p.dim) + "/" +
              kvkeep::to_string(p.type),
          (bursts + 1) * period, [=](benchmark::State& s) { burst_steps(s, p, period); });
}

}  // namespace
}  // namespace bench

int main(int argc, char** argv) {
  using namespace bench;
  for (index_t c : {256, 1024}) {
    point p = base;
    p.capacity = c;
    add(p);
  }
  return run_rows(argc, argv);
}
