// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "guide.hpp"

#include <cmath>
#include <limits>
#include <numeric>

#include "arrays.hpp"

namespace kvkeep::replay {

namespace {

/// Attention probabilities of one query over the live keys of its KV head.
std::vector<double> probabilities(trace_data const& t, index_t seq, index_t q_head, index_t row,
                                  guide::positions const& live) {
  prompt_data const& p = t.tokens;
  cache_shape const& s = p.shape;
  index_t const dim = s.dim_k, head = q_head / s.group();
  float const* const q = p.q + ((offset_t{seq} * s.n_q_heads + q_head) * p.tokens + row) * dim;
  float const* const k = p.k + (offset_t{seq} * s.n_kv_heads + head) * p.tokens * dim;
  std::vector<double> w;
  for (index_t const j : live) {
    double dot = 0;
    for (index_t d = 0; d < dim; ++d) dot += double{q[d]} * double{k[offset_t{j} * dim + d]};
    w.push_back(dot / std::sqrt(static_cast<double>(dim)));
  }
  double const most = w.empty() ? 0 : *std::max_element(w.begin(), w.end());
  double sum = 0;
  for (double& x : w) sum += x = std::exp(x - most);
  for (double& x : w) x /= sum;
  return w;
}

/// Mean of a token's rows over query heads `first`..`first + n - 1`.
std::vector<double> mean_row(trace_data const& t, index_t seq, index_t first, index_t n,
                             index_t row, guide::positions const& live) {
  std::vector<double> mean(live.size());
  for (index_t h = first; h < first + n; ++h) {
    auto const w = probabilities(t, seq, h, row, live);
    for (std::size_t i = 0; i < w.size(); ++i) mean[i] += w[i] / n;
  }
  return mean;
}

std::vector<double> key(trace_data const& t, index_t seq, index_t head, index_t position) {
  prompt_data const& p = t.tokens;
  float const* const k =
      p.k + ((offset_t{seq} * p.shape.n_kv_heads + head) * p.tokens + position) * p.shape.dim_k;
  return {k, k + p.shape.dim_k};
}

double product_of(std::vector<double> const& a, std::vector<double> const& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

}  // namespace

guide::guide(recorded_case const& c, trace_data const& t, scores in_double, bool whole_layer)
    : kept_(c.output("kept")),
      heads_(t.tokens.shape.n_kv_heads),
      sequences_(t.tokens.shape.n_seq),
      prompt_(t.prompt),
      in_double_(std::move(in_double)),
      whole_layer_(whole_layer) {}

std::function<void(score_input<> const&, score_map<>)> guide::hold() {
  return [this](score_input<> const& in, score_map<> out) {
    for (index_t i = 0; i < in.batch.n; ++i)
      for (index_t h = 0; h < (whole_layer_ ? 1 : heads_); ++h) decide(in, out, i, h);
  };
}

guide::positions guide::recorded(index_t entry, index_t seq, index_t head) const {
  auto const width = uz(kept_.shape.back());
  auto const* const row =
      kept_.i32.data() + uz((std::int64_t{entry} * sequences_ + seq) * heads_ + head) * width;
  return {row, std::find(row, row + width, -1)};
}

/// Live tokens that nothing protects: the last of those that leave, the first of those that stay.
struct guide::candidates {
  double gone = -std::numeric_limits<double>::infinity();
  double stays = std::numeric_limits<double>::infinity();
  index_t gone_at = 0, stays_at = 0;  ///< positions

  void add(double score, index_t position, bool leaves) {
    if (leaves && score > gone) {
      gone = score;
      gone_at = position;
    } else if (!leaves && score <= stays) {
      stays = score;
      stays_at = position;
    }
  }
  bool ranked() const { return gone < stays || (gone == stays && stays_at < gone_at); }
  bool near() const { return gone - stays <= 1e-5 * std::max(std::abs(gone), std::abs(stays)); }
};

void guide::decide(score_input<> const& in, score_map<> out, index_t entry, index_t head) {
  index_t const id = in.batch.id_of(entry);
  auto const& slots = in.layer.slots;
  std::vector<std::pair<index_t, index_t>> live;  // position and slot
  for (index_t i = 0; i < slots.lengths(id, head); ++i)
    live.emplace_back(slots.positions(id, head, i), i);
  std::sort(live.begin(), live.end());
  positions all;
  for (auto const& [position, slot] : live) all.push_back(position);
  index_t const at = all.back() + 1 - prompt_;
  if (at >= static_cast<index_t>(kept_.shape[0])) return;
  auto const next = recorded(at, id, head);

  auto const own = [&](index_t slot) {
    double sum = 0;
    for (index_t h = 0; h < heads_; ++h) sum += double{out(entry, h, slot)};
    return whole_layer_ ? sum / heads_ : double{out(entry, head, slot)};
  };
  auto const exact = in_double_(id, head, all);
  candidates mine, judged;
  for (std::size_t i = 0; i < live.size(); ++i) {
    auto const [position, slot] = live[i];
    bool const leaves = !std::binary_search(next.begin(), next.end(), position);
    if (i < uz(in.guard.sinks) || i + uz(in.guard.recent) >= live.size()) continue;
    mine.add(own(slot), position, leaves);
    judged.add(exact[i], position, leaves);
  }
  if (mine.ranked() || !judged.near()) return;
  ++near_ties_;
  for (auto const& [position, slot] : live)
    if (!std::binary_search(next.begin(), next.end(), position))
      for (index_t h = 0; h < heads_; ++h)
        if (h == head || whole_layer_)
          out(entry, h, slot) = -std::numeric_limits<float>::infinity();
}

bool can_guide(recorded_case const& c) {
  if (c.kind() != "decode_trace" || c.is_official() || c.outputs.count("kept") == 0) return false;
  return c.policy() != "h2o" || c.outputs.count("acc") > 0;
}

guide::scores h2o_in_double(recorded_case const& c, trace_data const& t) {
  npy_array const& acc = c.output("acc");
  npy_array const& kept = c.output("kept");
  auto const all = c.outputs.find("acc_prompt");
  return [&t, &acc, &kept, prompt = all == c.outputs.end() ? nullptr : &all->second](
             index_t seq, index_t head, guide::positions const& live) {
    cache_shape const& s = t.tokens.shape;
    index_t const group = s.group(), newest = live.back(), entry = newest - t.prompt;
    std::vector<double> sums(live.size());
    auto const at = uz(std::int64_t{seq} * s.n_kv_heads + head);
    if (entry >= 0) {
      sums = mean_row(t, seq, head * group, group, newest, live);
      auto const width = uz(kept.shape.back());
      auto const row = (uz(entry) * uz(s.n_seq) * uz(s.n_kv_heads) + at) * width;
      for (std::size_t i = 0, j = 0; i < live.size(); ++i) {
        while (j < width && kept.i32[row + j] >= 0 && kept.i32[row + j] < live[i]) ++j;
        if (j < width && kept.i32[row + j] == live[i]) sums[i] += double{acc.f32[row + j]};
      }
    } else if (prompt != nullptr) {
      for (std::size_t i = 0; i < live.size(); ++i)
        sums[i] = double{prompt->f32[at * uz(t.prompt) + i]};
    } else {
      for (index_t row = 0; row < t.prompt; ++row) {
        auto const w =
            mean_row(t, seq, head * group, group, row, {live.begin(), live.begin() + row + 1});
        for (std::size_t i = 0; i < w.size(); ++i) sums[i] += w[i];
      }
    }
    return sums;
  };
}

guide::scores tova_in_double(trace_data const& t) {
  return [&t](index_t seq, index_t, guide::positions const& live) {
    return mean_row(t, seq, 0, t.tokens.shape.n_q_heads, live.back(), live);
  };
}

guide::scores morphkv_in_double(trace_data const& t, policy_options const& o) {
  index_t const window = o.window.value_or(morphkv_options{}.window);
  return [&t, o, window](index_t seq, index_t head, guide::positions const& live) {
    index_t const group = t.tokens.shape.group(), next = live.back() + 1;
    guide::positions old = live;
    old.resize(live.size() - std::min(live.size(), uz(window)));
    std::vector<double> fused(live.size());
    for (index_t row = std::max(next - o.n_rows, 0); row < next; ++row) {
      std::vector<double> best(old.size());
      for (index_t g = 0; g < group; ++g) {
        auto const w = probabilities(t, seq, head * group + g, row, old);
        for (std::size_t i = 0; i < w.size(); ++i) best[i] = std::max(best[i], w[i]);
      }
      for (std::size_t i = 0; i < old.size(); ++i)
        fused[i] = o.fusion == reduction::max ? std::max(fused[i], best[i]) : fused[i] + best[i];
    }
    return fused;
  };
}

guide::scores knorm_in_double(trace_data const& t) {
  return [&t](index_t seq, index_t head, guide::positions const& live) {
    std::vector<double> s;
    for (index_t const j : live) {
      auto const k = key(t, seq, head, j);
      s.push_back(-std::sqrt(product_of(k, k)));
    }
    return s;
  };
}

guide::scores keydiff_in_double(trace_data const& t) {
  return [&t](index_t seq, index_t head, guide::positions const& live) {
    std::vector<double> anchor(uz(t.tokens.shape.dim_k)), s;
    for (index_t const j : live) {
      auto const k = key(t, seq, head, j);
      double const norm = std::max(std::sqrt(product_of(k, k)), 1e-12);
      for (std::size_t d = 0; d < k.size(); ++d)
        anchor[d] += k[d] / norm / static_cast<double>(live.size());
    }
    for (index_t const j : live) {
      auto const k = key(t, seq, head, j);
      double const norms = std::sqrt(product_of(k, k) * product_of(anchor, anchor));
      s.push_back(-product_of(k, anchor) / std::max(norms, 1e-8));
    }
    return s;
  };
}

}  // namespace kvkeep::replay
