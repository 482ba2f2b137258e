// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// A decode step per policy in the steady state: append, attention with evidence and decision,
// confirm. Each sample also takes, on other layers of the same size, the attention of such a step
// alone (the peer) and the attention that hands over its weights, where the policy asks for them.
//   decision_ratio  (step - attention with evidence) / attention: slots, fold, score, guard, argmin
//   evidence_ratio  attention with evidence / attention - 1
// Layers rotate, so that K, V and all state come from memory. Floor: reading K and V once, or the
// fused multiply-adds.
#include "decode_model.hpp"

namespace bench {
namespace {

/// Times of one layer. Layers differ a little (their memory does), so each has its own median.
struct layer_times {
  std::vector<double> step, plain, evidence;
};

constexpr int warm_up = 2;

void policy_step(benchmark::State& state, point const& p, std::string const& policy) {
  bool const weighs =
      policy == "morphkv" ||
      policy == "morphkv-cached";  // the others fold the weights while they are at hand
  index_t const in_use = p.capacity + 1;
  decode_model m(p, policy, in_use);
  double const heads = 1.0 * p.batch * p.kv_heads;
  meter all(m.attention_work(in_use));
  std::vector<layer_times> times(m.layers());
  double confirm = 0;  // of the step before, per layer
  int step = -warm_up;
  for (auto _ : state) {
    double total = 0;
    for (std::size_t layer = 0; layer < m.layers(); ++layer) {
      double t = m.append(layer);
      m.write_token(layer);
      t += m.attend(layer) + confirm;
      double const plain = m.plain_attention(m.other(layer, 1), in_use, false);
      double const evidence = m.plain_attention(m.other(layer, 2), in_use, weighs);
      total += t;
      if (step < 0) continue;
      all.add(t, plain);
      times[layer].step.push_back(t);
      times[m.other(layer, 1)].plain.push_back(plain);
      times[m.other(layer, 2)].evidence.push_back(evidence);
    }
    confirm = m.confirm() / static_cast<double>(m.layers());
    ++step;
    state.SetIterationTime(total / static_cast<double>(m.layers()));
  }
  all.report(state);
  double mine = 0, plain = 0, evidence = 0;
  for (layer_times const& l : times) {
    mine += quantile(l.step, 0.5);
    plain += quantile(l.plain, 0.5);
    evidence += quantile(l.evidence, 0.5);
  }
  auto& c = state.counters;
  c["peer_ratio"] = mine / plain;
  c["decision_ratio"] = (mine - evidence) / plain;
  c["decision_us_per_head"] = (mine - evidence) * 1e6 / static_cast<double>(m.layers()) / heads;
  c["evidence_ratio"] = evidence / plain - 1;
  c["attention_floor_ratio"] = static_cast<double>(c["floor_ratio"]) * plain / mine;
  c["victims"] = static_cast<double>(m.count().victims);
}

void add(point const& p, std::string const& policy) {
  std::string const name = "policy_step/" + policy + named("C", p.capacity) + named("W", p.window) +
                           named("B", p.batch) + named("Hkv", p.kv_heads) + named("G", p.group) +
                           named("D", p.dim) + "/" + kvkeep::to_string(p.type) + "/" +
                           to_string(p.where);
  // The larger a layer, the fewer samples of it.
  add_row(name, warm_up + (decode_model::layers_for(p, p.capacity) > 2 ? 120 : 80),
          [=](benchmark::State& s) { policy_step(s, p, policy); });
}

}  // namespace
}  // namespace bench

int main(int argc, char** argv) {
  using namespace bench;
  bool const all = takes_all(argc, argv);
  for (char const* policy :
       {"streamingllm", "h2o", "tova", "knorm", "morphkv", "morphkv-cached", "keydiff"}) {
    for (dtype t : {dtype::f32, dtype::bf16})
      for (index_t b : {index_t{1}, index_t{8}}) {
        point p = base;
        p.type = t;
        p.batch = b;
        add(p, policy);
      }
    for (index_t c : all_step_capacities)
      for (index_t b : {index_t{1}, index_t{8}}) {
        point p = base;
        p.capacity = c;
        p.batch = b;
        if (all) add(p, policy);
      }
  }
  for (char const* policy : {"h2o", "morphkv", "morphkv-cached"}) {
    auto const vary = [&](auto change) {
      point p = base;
      change(p);
      add(p, policy);
    };
    for (index_t c : {256, 512, 4096}) vary([=](point& p) { p.capacity = c; });
    for (layout l : all_layouts) vary([=](point& p) { p.where = l; });
    for (dtype t : all_types) vary([=](point& p) { p.type = t; });
    for (index_t g : all_groups) vary([=](point& p) { p.group = g; });
    for (index_t d : all_dims) vary([=](point& p) { p.dim = d; });
    vary([](point& p) { p.window = 8; });
  }
  return run_rows(argc, argv);
}
