// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "generate/transformer.hpp"

#include <cmath>

namespace kvkeep::generate {

transformer::transformer(runtime& rt, model const& m, index_t max_rows)
    : rt_(rt), model_(m), config_(m.config) {
  for (index_t d = 0; d < config_.head_dim; d += 2)
    frequency_.push_back(std::pow(config_.rope_base, -static_cast<double>(d) / config_.head_dim));
  auto const rows = [&](std::vector<float>& v, index_t width) {
    v.resize(product(max_rows, width));
  };
  rows(angles_, config_.head_dim);
  rows(normed_, config_.dim);
  rows(q_, config_.q_width());
  rows(k_, config_.kv_width());
  rows(v_, config_.kv_width());
  rows(attention_, config_.q_width());
  rows(gate_, config_.hidden);
  rows(up_, config_.hidden);
  rows(added_, config_.dim);
}

void transformer::embed(std::span<index_t const> tokens, float* x) const {
  for (index_t const t : tokens) {
    model_.embedding.copy_row(t, x);
    x += config_.dim;
  }
}

void transformer::set_positions(std::span<index_t const> positions) {
  float* at = angles_.data();
  for (index_t const p : positions)
    for (double const f : frequency_) {
      *at++ = static_cast<float>(std::cos(p * f));
      *at++ = static_cast<float>(std::sin(p * f));
    }
}

void transformer::normalise(row_block x, std::vector<float> const& weight) {
  for (index_t i = 0; i < x.n; ++i) {
    offset_t const at = offset_t{i} * config_.dim;
    rms_norm(x.data + at, weight, config_.norm_epsilon, normed_.data() + at);
  }
}

void transformer::project(index_t layer, row_block x) {
  layer_weights const& w = model_.layers[static_cast<std::size_t>(layer)];
  normalise(x, w.attention_norm);
  row_block const in{normed_.data(), x.n};
  multiply(rt_, w.q, in, q_.data());
  multiply(rt_, w.k, in, k_.data());
  multiply(rt_, w.v, in, v_.data());
  index_t const dim = config_.head_dim;
  for (index_t i = 0; i < x.n; ++i) {
    float const* const table = angles_.data() + offset_t{i} * dim;
    rotate({q_.data() + offset_t{i} * config_.q_width(), config_.n_q_heads, dim}, table);
    rotate({k_.data() + offset_t{i} * config_.kv_width(), config_.n_kv_heads, dim}, table);
  }
}

void transformer::finish(index_t layer, float* x, index_t n) {
  layer_weights const& w = model_.layers[static_cast<std::size_t>(layer)];
  std::size_t const size = product(n, config_.dim), hidden = product(n, config_.hidden);
  multiply(rt_, w.output, {attention_.data(), n}, added_.data());
  add(x, added_.data(), size);
  normalise({x, n}, w.ffn_norm);
  multiply(rt_, w.gate, {normed_.data(), n}, gate_.data());
  multiply(rt_, w.up, {normed_.data(), n}, up_.data());
  gate_with_silu(gate_.data(), up_.data(), hidden);
  multiply(rt_, w.down, {gate_.data(), n}, added_.data());
  add(x, added_.data(), size);
}

void transformer::logits(row_block x, float* out) {
  normalise(x, model_.final_norm);
  multiply(rt_, model_.classifier(), {normed_.data(), x.n}, out);
}

}  // namespace kvkeep::generate
