// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "generate/oracle.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace kvkeep::generate {

namespace {

template <class T>
T& entry(std::vector<T>& live, index_t id) {
  auto const i = static_cast<std::size_t>(id);
  if (live.size() <= i) live.resize(i + 1);
  return live[i];
}

bool begins(step_observer::token const& t) { return t.layer == 0 && t.position == 0; }

}  // namespace

future_attention::future_attention(index_t n_layers, index_t n_kv_heads, index_t first)
    : n_kv_heads_(n_kv_heads), first_(first), sums_(product(n_layers, n_kv_heads)) {}

void future_attention::add(index_t layer, index_t kv_head, std::vector<float> weights) {
  sums_[at(layer, kv_head)].push_back(std::move(weights));
}

void future_attention::finish() {
  for (auto& rows : sums_)
    for (std::size_t q = rows.size(); q-- > 1;)
      for (std::size_t p = 0; p < rows[q - 1].size(); ++p) rows[q - 1][p] += rows[q][p];
}

float future_attention::remaining(index_t layer, index_t kv_head, index_t query,
                                  index_t position) const {
  auto const& rows = sums_[at(layer, kv_head)];
  auto const q = static_cast<std::size_t>(std::max(0, query - first_));
  auto const p = static_cast<std::size_t>(position);
  return q < rows.size() && p < rows[q].size() ? rows[q][p] : 0;
}

void attention_recorder::on_token(token const& t) {
  sequence& s = entry(live_, t.id);
  if (begins(t)) {
    s = {futures_.size(), false, {}};
    s.keys.resize(product(config_.n_layers, config_.n_kv_heads));
    futures_.emplace_back();
  }
  index_t const dim = config_.head_dim, group = config_.n_q_heads / config_.n_kv_heads;
  for (index_t h = 0; h < config_.n_kv_heads; ++h) {
    auto& keys = s.keys[product(t.layer, config_.n_kv_heads) + static_cast<std::size_t>(h)];
    float const* const k = t.k + offset_t{h} * dim;
    keys.insert(keys.end(), k, k + dim);
    if (s.decodes)
      futures_[s.number].add(t.layer, h, weights(keys, t.q + offset_t{h} * group * dim));
  }
}

/// Attention weights of a group's query heads, summed.
std::vector<float> attention_recorder::weights(std::vector<float> const& keys,
                                               float const* group) const {
  auto const dim = static_cast<std::size_t>(config_.head_dim);
  std::size_t const n = keys.size() / dim;
  float const scale = 1 / std::sqrt(static_cast<float>(dim));
  std::vector<float> sum(n), w(n);
  for (index_t g = 0; g < config_.n_q_heads / config_.n_kv_heads; ++g) {
    float const* const q = group + offset_t{g} * config_.head_dim;
    for (std::size_t p = 0; p < n; ++p)
      w[p] = scale * std::inner_product(q, q + dim, keys.data() + p * dim, 0.0F);
    float const most = *std::max_element(w.begin(), w.end());
    double total = 0;
    for (float& x : w) total += x = std::exp(x - most);
    for (std::size_t p = 0; p < n; ++p) sum[p] += static_cast<float>(w[p] / total);
  }
  return sum;
}

void attention_recorder::on_confirmed(std::span<index_t const> ids) {
  for (index_t const id : ids) {
    sequence& s = entry(live_, id);
    if (s.decodes) continue;
    s.decodes = true;
    auto const prompt = s.keys[0].size() / static_cast<std::size_t>(config_.head_dim);
    futures_[s.number] =
        future_attention(config_.n_layers, config_.n_kv_heads, static_cast<index_t>(prompt));
  }
}

std::vector<future_attention> attention_recorder::take() {
  for (future_attention& f : futures_) f.finish();
  live_.clear();
  return std::exchange(futures_, {});
}

void oracle::on_token(token const& t) {
  sequence& s = entry(live_, t.id);
  if (begins(t)) s.number = begun_++;
  s.tokens = t.position + 1;
  layer_ = t.layer;
  id_ = t.id;
}

float oracle::score(index_t id, index_t kv_head, index_t position) const {
  sequence const& s = live_[static_cast<std::size_t>(id)];
  if (s.number >= futures_.size()) return 0;
  return futures_[s.number].remaining(layer_, kv_head, s.tokens, position);
}

policy_pair make_oracle_pair(std::shared_ptr<oracle const> run, index_t capacity) {
  policy_pair p;
  p.name = "oracle";
  p.prompt = p.decode = erase_policy<cpu::context>(
      policy<oracle_score>{"oracle", {{}, std::move(run)}, {capacity}, {}, {}, {}, {}});
  return p;
}

}  // namespace kvkeep::generate
