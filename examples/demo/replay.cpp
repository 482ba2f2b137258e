// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "replay.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <stdexcept>

namespace kvkeep::demo {

namespace {

using clock = std::chrono::steady_clock;

double microseconds(clock::time_point from, clock::time_point to) {
  return std::chrono::duration<double, std::micro>(to - from).count();
}

/// The engine: a cache with few slots, and a session that says which.
class engine {
 public:
  engine(contestant const& c, trace const& t, full_attention const& full)
      : trace_(t),
        full_(full),
        shape_(t.shape(c.max_slots)),
        k_(t.layers.size(), std::vector<float>(rows() * static_cast<std::size_t>(t.dim_k))),
        v_(t.layers.size(), std::vector<float>(rows() * static_cast<std::size_t>(t.dim_v))),
        views_(views()),
        session_(bind(c)),
        slot_(static_cast<std::size_t>(t.n_kv_heads)),
        length_(slot_.size()),
        q_(static_cast<std::size_t>(t.n_q_heads) * static_cast<std::size_t>(t.dim_k)),
        out_(static_cast<std::size_t>(t.n_q_heads) * static_cast<std::size_t>(t.dim_v)) {
    expect(session_.begin(id_), "begin");
    length_.assign(slot_.size(), c.max_slots);
    workspace counting;
    expect(kvkeep::run(ctx_, attend_op(0), counting), "op::attend");
    scratch_.resize(counting.peak() + workspace::alignment);
  }

  outcome run() {
    prompt();
    result_.state_bytes = session_.saved_bytes();
    index_t asked = 0;
    for (index_t p = trace_.prompt(); p < trace_.tokens; ++p) {
      bool const asks = trace_.asks[static_cast<std::size_t>(p)] != 0;
      quality const step = decode(p);
      add(result_.all, step);
      if (asks) add(result_.answers, step);
      asked += asks ? 1 : 0;
    }
    expect(session_.verify(), "verify");
    divide(result_.all, trace_.tokens - trace_.prompt());
    divide(result_.answers, asked);
    return result_;
  }

 private:
  using session_type = session<cpu::context, any, any>;

  std::size_t rows() const {
    return static_cast<std::size_t>(shape_.n_kv_heads) * static_cast<std::size_t>(shape_.max_slots);
  }
  std::vector<kv_ref<>> views() {
    std::vector<kv_ref<>> list;
    for (std::size_t l = 0; l < k_.size(); ++l)
      list.push_back(contiguous_view(k_[l].data(), v_[l].data(), shape_));
    return list;
  }
  session_type bind(contestant const& c) {
    std::vector<layer_spec<>> const layers(views_.begin(), views_.end());
    limits lim;
    lim.max_prompt = trace_.prompt();
    return bind_session(ctx_, c.prompt, c.decode, std::span<layer_spec<> const>(layers), lim);
  }

  static void expect(status s, char const* call) {
    if (s != status::ok) throw std::runtime_error(std::string(call) + ": " + to_string(s));
  }
  static void add(quality& to, quality const& q) {
    to.error += q.error;
    to.mass += q.mass;
  }
  static void divide(quality& q, index_t n) {
    q.error /= n;
    q.mass /= n;
  }

  /// One layer at a time through a buffer of one layer; what the policy keeps goes into the cache.
  void prompt() {
    trace const& t = trace_;
    cache_shape const shape = t.shape(t.prompt());
    auto const rows = static_cast<std::size_t>(t.n_kv_heads) * static_cast<std::size_t>(t.prompt());
    std::vector<float> k(rows * static_cast<std::size_t>(t.dim_k));
    std::vector<float> v(rows * static_cast<std::size_t>(t.dim_v));
    kv_ref<> const view = contiguous_view(k.data(), v.data(), shape);
    for (index_t l = 0; l < t.n_layers(); ++l) {
      for (index_t h = 0; h < t.n_kv_heads; ++h) {
        std::copy_n(t.k(l, h, 0), t.prompt() * t.dim_k,
                    k.begin() + offset_t{h} * t.prompt() * t.dim_k);
        std::copy_n(t.v(l, h, 0), t.prompt() * t.dim_v,
                    v.begin() + offset_t{h} * t.prompt() * t.dim_v);
      }
      queries q = make_queries(t.q(l, 0, 0), t.n_q_heads, t.tokens, t.dim_k);
      q.n_rows = t.prompt();  // the first rows of each head
      expect(session_.observe(l, id_, q, &view), "observe");
      expect(session_.end_prompt(l, id_, &view), "end_prompt");
    }
  }

  /// One token through all layers.
  quality decode(index_t p) {
    quality sum;
    double step_us = 0, plain_us = 0;
    std::int64_t slots = 0;
    for (index_t l = 0; l < trace_.n_layers(); ++l) {
      index_t const ids[] = {id_};
      auto const start = clock::now();
      expect(session_.append(l, {ids}, slot_.data()), "append");
      auto const appended = clock::now();
      write(l, p);
      sum.mass += mass(l, p);
      for (index_t h = 0; h < trace_.n_kv_heads; ++h)
        slots += length_[static_cast<std::size_t>(h)] = session_.lengths(l)(id_, h);
      attend_only(l);  // the data is then in the first-level cache for both that are timed
      plain_us += attend_only(l);
      queries const q = make_queries(q_.data(), trace_.n_q_heads, 1, trace_.dim_k);
      auto const written = clock::now();
      expect(session_.attend(l, {ids}, q, out_.data()), "attend");
      step_us += microseconds(start, appended) + microseconds(written, clock::now());
      sum.error += error(l, p);
    }
    index_t const ids[] = {id_};
    auto const start = clock::now();
    expect(session_.confirm({ids}, 1), "confirm");
    step_us += microseconds(start, clock::now());
    result_.step_us.push_back(step_us / trace_.n_layers());
    result_.plain_us.push_back(plain_us / trace_.n_layers());
    result_.peak_slots = std::max(result_.peak_slots, slots);
    divide(sum, trace_.n_layers());
    return sum;
  }

  /// The token's key, value and queries.
  void write(index_t l, index_t p) {
    auto const layer = static_cast<std::size_t>(l);
    for (index_t h = 0; h < trace_.n_kv_heads; ++h) {
      offset_t const row = offset_t{h} * shape_.max_slots + slot_[static_cast<std::size_t>(h)];
      std::copy_n(trace_.k(l, h, p), trace_.dim_k, k_[layer].begin() + row * trace_.dim_k);
      std::copy_n(trace_.v(l, h, p), trace_.dim_v, v_[layer].begin() + row * trace_.dim_v);
    }
    for (index_t h = 0; h < trace_.n_q_heads; ++h)
      std::copy_n(trace_.q(l, h, p), trace_.dim_k, q_.begin() + offset_t{h} * trace_.dim_k);
  }

  /// Microseconds of the library's attention over the slots in use, without any policy.
  double attend_only(index_t l) {
    op::attend<> const a = attend_op(l);
    workspace w{std::span<std::byte>(scratch_)};
    auto const start = clock::now();
    expect(kvkeep::run(ctx_, a, w), "op::attend");
    return microseconds(start, clock::now());
  }
  op::attend<> attend_op(index_t l) {
    op::attend<> a;
    a.batch.n = 1;
    a.layer.kv = views_[static_cast<std::size_t>(l)];
    a.layer.slots.lengths = row_major<host_space>(length_.data(), 1, trace_.n_kv_heads);
    a.q = row_major<host_space>(static_cast<float const*>(q_.data()), 1, trace_.n_q_heads,
                                trace_.dim_k);
    a.out = row_major<host_space>(out_.data(), 1, trace_.n_q_heads, trace_.dim_v);
    return a;
  }

  /// Mean over query heads of the full attention's probability of the tokens in the slots in use.
  double mass(index_t l, index_t p) {
    auto const positions = session_.positions(l);
    auto const lengths = session_.lengths(l);
    auto const free = session_.free_slots(l);
    double sum = 0;
    for (index_t h = 0; h < trace_.n_q_heads; ++h) {
      index_t const kv = h / trace_.group();
      double const* prob = full_.probability(l, h, p);
      for (index_t s = 0; s < lengths(id_, kv); ++s)
        if (s != free(id_, kv)) sum += prob[positions(id_, kv, s)];
    }
    return sum / trace_.n_q_heads;
  }

  /// Mean over query heads of the relative error of the attention output.
  double error(index_t l, index_t p) const {
    double sum = 0;
    for (index_t h = 0; h < trace_.n_q_heads; ++h) {
      double const* want = full_.out(l, h, p);
      float const* have = out_.data() + offset_t{h} * trace_.dim_v;
      double off = 0, norm = 0;
      for (index_t d = 0; d < trace_.dim_v; ++d) {
        off += (double{have[d]} - want[d]) * (double{have[d]} - want[d]);
        norm += want[d] * want[d];
      }
      sum += norm > 0 ? std::sqrt(off / norm) : 0;
    }
    return sum / trace_.n_q_heads;
  }

  trace const& trace_;
  full_attention const& full_;
  cache_shape shape_;
  cpu::context ctx_;
  std::vector<std::vector<float>> k_, v_;
  std::vector<kv_ref<>> views_;
  session_type session_;
  index_t id_ = 0;
  std::vector<index_t> slot_, length_;
  std::vector<float> q_, out_;
  std::vector<std::byte> scratch_;
  outcome result_;
};

}  // namespace

outcome replay(contestant const& c, trace const& t, full_attention const& full) {
  return engine(c, t, full).run();
}

}  // namespace kvkeep::demo
