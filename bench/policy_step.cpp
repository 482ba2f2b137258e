// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// A decode step per policy in the steady state: append, attention with evidence and decision,
// confirm. Each sample also takes, on other layers of the same size, the attention of such a step
// alone (the peer) and the attention that hands over its weights, where the policy asks for them.
//   decision_ratio  (step - attention with evidence) / attention: slots, fold, score, guard, argmin
//   evidence_ratio  attention with evidence / attention - 1
// Layers rotate, so that K, V and all state come from memory. Floor: reading K and V once, or the
// fused multiply-adds.
#include <memory>

#include <kvkeep/engine/policy_table.hpp>

#include "inputs.hpp"

namespace bench {
namespace {

constexpr std::size_t query_sets = 61;

/// A model's caches under one session, and what its decode steps need.
class model {
 public:
  model(point const& p, std::string const& policy) : p_(p), shape_(shape_of(p, p.capacity + 2)) {
    random_bits r{5};
    double const bytes = 2.0 * p.batch * p.kv_heads * p.capacity * p.dim * dtype_bytes(p.type);
    // 3 i + 2 layers: then each of the three comes to a layer after equally many others.
    auto const n = static_cast<std::size_t>(std::clamp(72e6 / bytes, 5.0, 32.0)) / 3 * 3 + 2;
    for (std::size_t i = 0; i < n; ++i)
      with_type(p.type, [&](auto t) { caches_.emplace_back(t, shape_, p.where, r); });
    std::vector<layer_spec<>> layers;
    for (auto const& c : caches_) layers.push_back(c.view);
    policy_options o;
    o.capacity = p.capacity;
    o.window = p.window;
    o.sinks = policy == "streamingllm" ? 4 : 0;
    limits lim;
    lim.max_sequences = p.batch;
    std::string const name = policy.substr(0, policy.find('-'));
    if (policy == "morphkv-cached") o.evaluation = morph_rows::cached;
    session_ = std::make_unique<session_type>(bind_session(
        ctx_, make_policy<cpu::context>(name, o), std::span<layer_spec<> const>(layers), lim));
    queries_ = random_rows<float>(query_sets * static_cast<std::size_t>(row_floats()), r);
    rows_ = random_rows<float>(4096 + 2 * static_cast<std::size_t>(p.dim), r);
    out_.resize(static_cast<std::size_t>(row_floats()));
    slot_.resize(static_cast<std::size_t>(p.batch * p.kv_heads));
    for (index_t i = 0; i < p.batch; ++i) prompt(r);
    ids_.resize(static_cast<std::size_t>(p.batch));
    std::iota(ids_.begin(), ids_.end(), 0);
    prepare_plain();
  }

  std::size_t layers() const { return caches_.size(); }
  /// The layer for the attention alone (1) or with evidence (2) while `layer` makes its step.
  std::size_t other(std::size_t layer, std::size_t which) const {
    return (layer + which * (layers() + 1) / 3) % layers();
  }

  double append(std::size_t layer) {
    return timed(
        [&] { expect(session_->append(int_of(layer), entries(), slot_.data()), "append"); });
  }
  /// The engine's part: the new token's rows.
  void write_token(std::size_t layer) {
    for (index_t i = 0; i < p_.batch * p_.kv_heads; ++i)
      for (auto const* plane : {&caches_[layer].view.k, &caches_[layer].view.v})
        write_row(*plane, i / p_.kv_heads, i % p_.kv_heads, slot_[static_cast<std::size_t>(i)]);
  }
  double attend(std::size_t layer) {
    queries const q = make_queries(next_queries(), shape_.n_q_heads, 1, p_.dim);
    return timed(
        [&] { expect(session_->attend(int_of(layer), entries(), q, out_.data()), "attend"); });
  }
  double confirm() {
    return timed([&] { expect(session_->confirm(entries(), 1), "confirm"); });
  }
  double plain_attention(std::size_t layer, bool evidence) {
    plain_.layer.kv = caches_[layer].view;
    plain_.q.data = next_queries();
    plain_.weights = {};
    plain_.weight_sum = {};
    if (evidence) {
      index_t const group = p_.group, stride = p_.capacity + 16;
      plain_.weights = row_major(weights_[layer].data(), p_.batch, p_.kv_heads, group, stride);
      plain_.weight_sum = row_major(weight_sums_.data(), p_.batch, p_.kv_heads, group, 1);
    }
    workspace ws(scratch_);
    return timed([&] { expect(run(ctx_, plain_, ws), "attention"); });
  }
  counters count() const { return session_->count(); }

 private:
  using session_type = session<cpu::context, any_policy<cpu::context>>;

  static index_t int_of(std::size_t n) { return static_cast<index_t>(n); }
  batch entries() const { return {ids_}; }
  index_t row_floats() const { return p_.batch * shape_.n_q_heads * p_.dim; }
  float const* next_queries() {
    turn_ = (turn_ + 1) % query_sets;
    return queries_.data() + turn_ * static_cast<std::size_t>(row_floats());
  }
  /// One sequence with C + 1 tokens, cut to C.
  void prompt(random_bits& r) {
    index_t id = 0;
    expect(session_->begin(id), "begin");
    index_t const n = p_.capacity + 1;
    auto const q = random_rows<float>(product(shape_.n_q_heads, n, p_.dim), r);
    for (std::size_t l = 0; l < layers(); ++l) {
      expect(session_->observe(int_of(l), id, make_queries(q.data(), shape_.n_q_heads, n, p_.dim)),
             "observe");
      expect(session_->end_prompt(int_of(l), id), "end_prompt");
    }
  }
  void write_row(plane_ref<> const& plane, index_t seq, index_t head, index_t slot) {
    float const* const from = rows_.data() + (row_at_ += 7) % 4096;
    offset_t const at =
        visit_layout(plane.layout, [&](auto const& l) { return l.offset(seq, head, slot); });
    with_type(p_.type, [&](auto t) {
      using T = decltype(t);
      T* const to = reinterpret_cast<T*>(plane.data) + at;
      for (index_t d = 0; d < p_.dim; ++d) to[d] = from_float<T>(from[d]);
    });
  }
  void prepare_plain() {
    lengths_.assign(slot_.size(), p_.capacity + 1);
    plain_.batch.n = p_.batch;
    plain_.layer.kv = caches_[0].view;
    plain_.layer.slots.lengths = row_major(lengths_.data(), p_.batch, p_.kv_heads);
    plain_.q =
        row_major(static_cast<float const*>(queries_.data()), p_.batch, shape_.n_q_heads, p_.dim);
    plain_.out = row_major(out_.data(), p_.batch, shape_.n_q_heads, p_.dim);
    scratch_ = scratch_for(ctx_, plain_);
    weight_sums_.resize(static_cast<std::size_t>(p_.batch * shape_.n_q_heads));
    weights_.assign(layers(), std::vector<float>(weight_sums_.size() *
                                                 static_cast<std::size_t>(p_.capacity + 16)));
  }

  point p_;
  cache_shape shape_;
  cpu::context ctx_;
  std::vector<layer_cache> caches_;
  std::unique_ptr<session_type> session_;
  std::vector<float> queries_, rows_, out_, weight_sums_;
  std::vector<std::vector<float>> weights_;
  std::vector<index_t> ids_, slot_, lengths_;
  std::vector<std::byte> scratch_;
  op::attend<> plain_;
  std::size_t turn_ = 0, row_at_ = 0;
};

/// Times of one layer. Layers differ a little (their memory does), so each has its own median.
struct layer_times {
  std::vector<double> step, plain, evidence;
};

constexpr int warm_up = 2;

void policy_step(benchmark::State& state, point const& p, std::string const& policy) {
  bool const weighs =
      policy == "morphkv" ||
      policy == "morphkv-cached";  // the others fold the weights while they are at hand
  model m(p, policy);
  double const heads = 1.0 * p.batch * p.kv_heads;
  double const rows = 2.0 * heads * (p.capacity + 1) * p.dim;  // of K and V, in elements
  work const attention_work{rows * dtype_bytes(p.type), rows * 2 * p.group};
  meter all(attention_work);
  std::vector<layer_times> times(m.layers());
  double confirm = 0;  // of the step before, per layer
  int step = -warm_up;
  for (auto _ : state) {
    double total = 0;
    for (std::size_t layer = 0; layer < m.layers(); ++layer) {
      double t = m.append(layer);
      m.write_token(layer);
      t += m.attend(layer) + confirm;
      double const plain = m.plain_attention(m.other(layer, 1), false);
      double const evidence = m.plain_attention(m.other(layer, 2), weighs);
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
  // About equally many samples of layers for all sizes.
  add_row(name, warm_up + (p.batch > 1 ? 60 : 120),
          [=](benchmark::State& s) { policy_step(s, p, policy); });
}

}  // namespace
}  // namespace bench

int main(int argc, char** argv) {
  using namespace bench;
  for (char const* policy :
       {"streamingllm", "h2o", "tova", "knorm", "morphkv", "morphkv-cached", "keydiff"})
    for (dtype t : {dtype::f32, dtype::bf16})
      for (index_t b : {index_t{1}, index_t{8}}) {
        point p = base;
        p.type = t;
        p.batch = b;
        add(p, policy);
      }
  for (char const* policy : {"h2o", "morphkv", "morphkv-cached"}) {
    auto const vary = [&](auto change) {
      point p = base;
      change(p);
      add(p, policy);
    };
    for (index_t c : all_capacities) vary([=](point& p) { p.capacity = c; });
    for (layout l : all_layouts) vary([=](point& p) { p.where = l; });
    for (dtype t : all_types) vary([=](point& p) { p.type = t; });
    for (index_t g : all_groups) vary([=](point& p) { p.group = g; });
    for (index_t d : all_dims) vary([=](point& p) { p.dim = d; });
    vary([](point& p) { p.window = 8; });
  }
  return run_rows(argc, argv);
}
