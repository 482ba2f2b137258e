// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// What a policy adds to a prompt, for one layer.
//
// prefill: causal attention over the prompt in chunks of 128 rows, each chunk shown to the session with
// its log-sum-exp, then end_prompt with its scores and first cut. The peer, "prefill alone", is the
// attention of the same pass: op::attend with one entry per row, as kvkeep-generate calls it. It reads K
// and V once per row, so a blocked kernel would take less; a model's projections, which both sides need
// too, are left out.
//   peer_ratio  (attention + observe + end_prompt) / attention
//   floor_cost  (observe + end_prompt) / the multiply-adds of causal attention at this machine's peak:
//               the cost beside the fastest attention there could be
// prompt_cut: observe (the window's queries, no log-sum-exp) and end_prompt alone, for long prompts.
#include <memory>

#include <kvkeep/engine/policy_table.hpp>

#include "inputs.hpp"

namespace bench {
namespace {

constexpr index_t chunk = 128;

/// A session over layers of one sequence, and a prompt for it.
class prompt_model {
 public:
  prompt_model(point const& p, std::string const& policy, std::size_t layers, bool window_only)
      : p_(p), shape_(shape_of(p, p.tokens + 1)) {
    random_bits r{9};
    std::vector<layer_spec<>> specs;
    for (std::size_t i = 0; i < layers; ++i)
      with_type(p.type, [&](auto t) { caches_.emplace_back(t, shape_, p.where, r); });
    for (auto const& c : caches_) specs.push_back(c.view);
    policy_options o;
    o.capacity = p.capacity;
    o.window = p.window;
    o.sinks =
        policy == "streamingllm" || policy == "lagkv" || policy == "expected_attention" ? 4 : 0;
    limits lim;
    lim.max_chunk = chunk;
    if (window_only) lim.prompt = prompt_offer::window_queries;
    session_ = std::make_unique<any_cpu_session>(bind_session(
        ctx_, make_policy<cpu::context>(policy, o), std::span<layer_spec<> const>(specs), lim));
    index_t const rows = window_only ? p.window : p.tokens;
    q_ = random_rows<float>(product(rows, shape_.n_q_heads, p.dim), r);
    if (!window_only) prepare_attention();
  }

  void begin() { expect(session_->begin(id_), "begin"); }
  void end() { expect(session_->end(id_), "end"); }

  /// Causal attention of a chunk that starts at position `first`.
  double attend(index_t first) {
    for (index_t i = 0; i < chunk; ++i)
      std::fill_n(lengths_.data() + product(i, p_.kv_heads), p_.kv_heads, first + i + 1);
    attend_.q.data = row(first);
    return timed([&] {
      workspace ws(scratch_);
      expect(run(ctx_, attend_, ws), "attention");
    });
  }
  /// Shows that chunk to the session.
  double observe(index_t first) {
    queries q = by_token(first, chunk);
    q.lse = lse_.data();
    q.lse_head_stride = chunk;
    return timed([&] { expect(session_->observe(0, id_, q), "observe"); });
  }
  double end_prompt() {
    return timed([&] { expect(session_->end_prompt(0, id_), "end_prompt"); });
  }
  /// A layer's whole part of a prompt of which only the window's queries are shown.
  double cut(index_t layer) {
    queries q = by_token(0, p_.window);
    q.tokens = p_.tokens;
    return timed([&] {
      expect(session_->observe(layer, id_, q), "observe");
      expect(session_->end_prompt(layer, id_), "end_prompt");
    });
  }

 private:
  float const* row(index_t i) const { return q_.data() + product(i, shape_.n_q_heads, p_.dim); }
  queries by_token(index_t first, index_t n) const {  // [row, q_head, dim]
    queries q;
    q.data = row(first);
    q.head_stride = p_.dim;
    q.row_stride = offset_t{shape_.n_q_heads} * p_.dim;
    q.n_rows = n;
    return q;
  }
  void prepare_attention() {
    out_.resize(product(chunk, shape_.n_q_heads, p_.dim));
    lse_.resize(product(chunk, shape_.n_q_heads));
    lengths_.resize(product(chunk, p_.kv_heads), 1);
    attend_.batch.n = chunk;
    attend_.batch.row = sequence_.data();
    attend_.layer.kv = caches_[0].view;
    attend_.layer.slots.lengths = row_major(lengths_.data(), chunk, p_.kv_heads);
    attend_.q = row_major(static_cast<float const*>(q_.data()), chunk, shape_.n_q_heads, p_.dim);
    attend_.out = row_major(out_.data(), chunk, shape_.n_q_heads, p_.dim);
    attend_.lse = row_major(lse_.data(), chunk, shape_.n_q_heads);
    attend_.lse.stride[0] = 1;  // as queries want it: [q_head, row]
    attend_.lse.stride[1] = chunk;
    scratch_ = scratch_for(ctx_, attend_);
  }

  point p_;
  cache_shape shape_;
  cpu::context ctx_;
  std::vector<layer_cache> caches_;
  std::unique_ptr<any_cpu_session> session_;
  std::vector<float> q_, out_, lse_;
  std::vector<index_t> lengths_, sequence_ = std::vector<index_t>(chunk, 0);
  std::vector<std::byte> scratch_;
  op::attend<> attend_;
  index_t id_ = 0;
};

void prefill(benchmark::State& state, point const& p, std::string const& policy) {
  prompt_model m(p, policy, 1, false);
  double const pairs = 0.5 * p.kv_heads * p.group * p.tokens * (p.tokens + 1.0);
  meter all({0, 4 * pairs * p.dim});
  std::vector<double> end;
  for (auto _ : state) {
    double attention = 0, policy_time = 0;
    m.begin();
    for (index_t first = 0; first < p.tokens; first += chunk) {
      attention += m.attend(first);
      policy_time += m.observe(first);
    }
    end.push_back(m.end_prompt());
    m.end();
    all.add(attention + policy_time + end.back(), attention);
    state.SetIterationTime(attention + policy_time + end.back());
  }
  all.report(state);
  auto& c = state.counters;
  c["floor_cost"] = c["floor_ratio"] * (1 - 1 / c["peer_ratio"]);
  c["end_prompt_us"] = quantile(end, 0.5) * 1e6;
}

void prompt_cut(benchmark::State& state, point const& p, std::string const& policy) {
  constexpr index_t layers = 2;
  prompt_model m(p, policy, layers, true);
  double const keys = 1.0 * p.kv_heads * p.tokens;
  meter all({keys * p.dim * dtype_bytes(p.type), 2 * keys * p.group * p.window * p.dim});
  for (auto _ : state) {
    double total = 0;
    m.begin();
    for (index_t l = 0; l < layers; ++l) {
      double const t = m.cut(l);
      all.add(t, 0);
      total += t;
    }
    m.end();
    state.SetIterationTime(total / layers);
  }
  all.report(state);
}

template <class F>
void add(char const* what, point const& p, std::string const& policy, int samples, F f) {
  std::string const name = what + ("/" + policy) + named("T", p.tokens) + named("C", p.capacity) +
                           named("W", p.window) + named("Hkv", p.kv_heads) + named("G", p.group) +
                           named("D", p.dim) + "/" + kvkeep::to_string(p.type);
  add_row(name, samples, [=](benchmark::State& s) { f(s, p, policy); });
}

}  // namespace
}  // namespace bench

int main(int argc, char** argv) {
  using namespace bench;
  bool const all = takes_all(argc, argv);
  for (char const* policy :
       {"fullkv", "snapkv", "h2o", "morphkv", "streamingllm", "pyramidkv", "dynamickv", "cake",
        "adakv", "tova", "knorm", "keydiff", "lagkv", "expected_attention"})
    for (index_t t : {index_t{2048}, index_t{4096}}) {
      point p = base;
      p.tokens = t;
      std::string_view const name = policy;
      bool const brief = t == 2048 && (name == "snapkv" || name == "h2o" || name == "morphkv");
      if (brief || all) add("prefill", p, policy, 3, prefill);
    }
  for (char const* policy : {"snapkv", "morphkv"}) add("prompt_cut", base, policy, 15, prompt_cut);
  for (char const* policy : {"pyramidkv", "adakv"})
    if (all) add("prompt_cut", base, policy, 15, prompt_cut);
  return run_rows(argc, argv);
}
