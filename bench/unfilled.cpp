// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// What a policy costs while its capacity is not reached: decode steps (append, attention, confirm) of a
// session that evicts nothing. The peer is the bare loop: the next slot and attention over the slots
// in use. Each sample also takes the bare loop a second time.
//   peer_ratio   step over bare loop, medians per layer, layers summed
//   append_us, confirm_us  parts of the step, per layer; the rest is attend
//   noise_ratio  bare loop over bare loop, the same way: what 1.0 means on this machine
#include "decode_model.hpp"

namespace bench {
namespace {

struct layer_times {
  std::vector<double> step, bare, again, append;
};

constexpr int warm_up = 2, n_samples = 100;

void unfilled(benchmark::State& state, point const& p, std::string const& policy) {
  decode_model m(p, policy, p.tokens);
  meter all(m.attention_work(p.tokens));
  std::vector<layer_times> times(m.layers());
  std::vector<double> confirms;
  double confirm = 0;  // of the step before, per layer
  index_t in_use = p.tokens;
  for (auto _ : state) {
    ++in_use;
    double total = 0;
    for (std::size_t layer = 0; layer < m.layers(); ++layer) {
      double const append = m.append(layer);
      m.write_token(layer);
      double const t = append + m.attend(layer) + confirm;
      double const bare = m.plain_attention(m.other(layer, 1), in_use, false);
      double const again = m.plain_attention(m.other(layer, 2), in_use, false);
      total += t;
      if (in_use <= p.tokens + warm_up) continue;
      all.add(t, bare);
      times[layer].step.push_back(t);
      times[layer].append.push_back(append);
      times[m.other(layer, 1)].bare.push_back(bare);
      times[m.other(layer, 2)].again.push_back(again);
    }
    confirm = m.confirm() / static_cast<double>(m.layers());
    confirms.push_back(confirm);
    state.SetIterationTime(total / static_cast<double>(m.layers()));
  }
  if (m.count().evicted != 0) state.SkipWithError("something was evicted");
  all.report(state);
  double step = 0, bare = 0, again = 0, append = 0;
  for (layer_times const& l : times) {
    append += quantile(l.append, 0.5);
    step += quantile(l.step, 0.5);
    bare += quantile(l.bare, 0.5);
    again += quantile(l.again, 0.5);
  }
  auto& c = state.counters;
  c["peer_ratio"] = step / bare;
  c["noise_ratio"] = again / bare;
  c["append_us"] = append * 1e6 / static_cast<double>(m.layers());
  c["confirm_us"] = quantile(confirms, 0.5) * 1e6;
}

void add(point const& p, std::string const& policy) {
  std::string const name = "unfilled/" + policy + named("T", p.tokens) + named("C", p.capacity) +
                           named("W", p.window) + named("B", p.batch) + named("Hkv", p.kv_heads) +
                           named("G", p.group) + named("D", p.dim) + "/" +
                           kvkeep::to_string(p.type);
  add_row(name, warm_up + n_samples, [=](benchmark::State& s) { unfilled(s, p, policy); });
}

}  // namespace
}  // namespace bench

int main(int argc, char** argv) {
  using namespace bench;
  bool const all = takes_all(argc, argv);
  for (char const* policy : {"fullkv", "streamingllm", "snapkv", "h2o", "tova", "knorm", "keydiff",
                             "morphkv", "morphkv-cached"})
    for (index_t b : {index_t{1}, index_t{8}}) {
      point p = base;
      p.tokens = 1024;
      p.capacity = 2048;
      p.batch = b;
      if (b == 1 || all) add(p, policy);
    }
  return run_rows(argc, argv);
}
