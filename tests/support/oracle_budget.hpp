// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Naive reference, part 3: budgets across layers and heads, and granularities wider than a KV
/// head.
#pragma once

#include <cstdint>

#include "oracle_core.hpp"

namespace kvkeep::oracle {

using counts = std::vector<index_t>;

inline std::int64_t total(counts const& x) {
  return std::accumulate(x.begin(), x.end(), std::int64_t{0});
}

/// Gives `amount` units, one each, to the largest remainders, lower index first.
inline void give_remainders(counts& out, std::vector<std::size_t> const& who,
                            std::vector<std::int64_t> const& remainder, std::int64_t amount) {
  std::vector<std::size_t> order(who.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return remainder[a] > remainder[b]; });
  for (std::size_t i = 0; i < order.size() && amount > 0; ++i, --amount) ++out[who[order[i]]];
}

/// Splits `amount` in proportion to the weights, each part at most its cap, exact total.
inline counts apportion(std::int64_t amount, counts const& weights, counts const& caps) {
  std::int64_t left = std::clamp<std::int64_t>(amount, 0, total(caps));
  counts out(caps.size(), 0);
  std::vector<std::size_t> open;
  for (std::size_t i = 0; i < caps.size(); ++i)
    if (caps[i] > 0) open.push_back(i);
  while (!open.empty() && left > 0) {
    std::int64_t sum = 0;
    for (std::size_t i : open) sum += weights[i];
    bool const equal = sum == 0;
    if (equal) sum = static_cast<std::int64_t>(open.size());
    auto const weight = [&](std::size_t i) { return equal ? std::int64_t{1} : weights[i]; };
    std::vector<std::size_t> rest;
    std::int64_t fixed = 0;
    for (std::size_t i : open) {
      if (left * weight(i) >= caps[i] * sum) {
        fixed += out[i] = caps[i];
      } else {
        rest.push_back(i);
      }
    }
    if (rest.size() < open.size()) {
      left -= fixed;
      open = rest;
      continue;
    }
    std::vector<std::int64_t> remainder;
    std::int64_t given = 0;
    for (std::size_t i : open) {
      given += out[i] = static_cast<index_t>(left * weight(i) / sum);
      remainder.push_back(left * weight(i) % sum);
    }
    give_remainders(out, open, remainder, left - given);
    left = 0;
  }
  return out;
}

/// PyramidKV: stored length of each layer after the prompt, window included. `exact` is the
/// canonical form whose total is L * capacity; otherwise the reference's integer arithmetic (needs
/// L > 1 there).
inline counts pyramid_lengths(index_t n_layers, index_t capacity, index_t beta, index_t window,
                              index_t n_tokens, bool exact) {
  index_t const base = capacity - window;
  if (n_tokens < capacity) return counts(uz(n_layers), n_tokens);
  if (n_tokens < 2 * base || (exact && n_layers == 1)) return counts(uz(n_layers), capacity);
  index_t lo = base / beta, hi = 2 * base - lo;
  if (hi >= n_tokens - window) {
    hi = n_tokens - window;
    lo = 2 * base - hi;
  }
  counts out;
  std::vector<std::int64_t> remainder;
  std::vector<std::size_t> who;
  std::int64_t const steps = n_layers - 1;
  for (index_t l = 0; l < n_layers; ++l) {
    std::int64_t const line = steps * hi - static_cast<std::int64_t>(l) * (hi - lo);
    out.push_back(exact ? static_cast<index_t>(line / steps)
                        : hi - l * static_cast<index_t>((hi - lo) / steps));
    remainder.push_back(line % steps);
    who.push_back(uz(l));
  }
  if (exact) {
    std::int64_t const missing = static_cast<std::int64_t>(n_layers) * base - total(out);
    give_remainders(out, who, remainder, missing);
  }
  for (index_t& x : out) x += window;
  return out;
}

/// How many of the best k entries of all parts fall into each part; ties: lower part, then lower
/// index.
inline counts joint_counts(std::vector<std::vector<double>> const& parts, std::int64_t k) {
  std::vector<double> flat;
  std::vector<std::size_t> owner;
  for (std::size_t i = 0; i < parts.size(); ++i)
    for (double x : parts[i]) {
      flat.push_back(x);
      owner.push_back(i);
    }
  kept_set const order = ranked(flat, iota_positions(count(flat)));
  counts out(parts.size(), 0);
  for (std::size_t i = 0; i < order.size() && static_cast<std::int64_t>(i) < k; ++i)
    ++out[owner[uz(order[i])]];
  return out;
}

/// DynamicKV: entries of each of the first n layers in the top base * H * n of their scores {L, H,
/// T'}.
inline counts dynamic_counts(array const& scores, index_t base, index_t n) {
  std::vector<std::vector<double>> parts;
  for (index_t l = 0; l < n; ++l) parts.push_back(scores.slice(l).data);
  return joint_counts(parts, static_cast<std::int64_t>(base) * scores.extent(1) * n);
}

/// Canonical DynamicKV: budgets (window excluded) of the layers seen, after every checkpoint.
inline std::vector<counts> dynamickv_canonical(array const& scores, index_t base, double r_max,
                                               double r_min, index_t every) {
  index_t const n_layers = scores.extent(0);
  index_t const cap = std::min(static_cast<index_t>(r_max * base), scores.extent(2));
  std::vector<counts> history;
  counts held;
  for (index_t l = 0; l < n_layers; ++l) {
    held.push_back(cap);
    if ((l + 1) % every != 0 && l + 1 != n_layers) continue;
    counts low, room;
    for (index_t h : held) {
      low.push_back(std::min(static_cast<index_t>(r_min * base), h));
      room.push_back(h - low.back());
    }
    std::int64_t const target = std::min(static_cast<std::int64_t>(base) * n_layers, total(held));
    counts const spare = apportion(target - total(low), dynamic_counts(scores, base, l + 1), room);
    for (std::size_t i = 0; i < held.size(); ++i) held[i] = low[i] + spare[i];
    history.push_back(held);
  }
  return history;
}

/// Floor division of doubles as Python does it, off-by-one cases included.
inline double python_floordiv(double a, double b) {
  double mod = std::fmod(a, b), div = (a - mod) / b;
  if (mod != 0 && (b < 0) != (mod < 0)) div -= 1;
  double floored = std::floor(div);
  return div - floored > 0.5 ? floored + 1 : floored;
}

/// The repository's budgets (window excluded) after n layers; `budget_size` is min(int(r_max *
/// base), T').
inline counts dynamickv_official(array const& scores, index_t base, index_t budget_size,
                                 index_t n) {
  index_t const n_layers = scores.extent(0), need = base * n_layers;
  counts b = dynamic_counts(scores, base, n);
  for (index_t& x : b) x /= n;
  if (n == n_layers)
    b.back() += base * scores.extent(1) * n / n_layers - static_cast<index_t>(total(b));
  if (total(b) == 0) throw std::domain_error("oracle: all DynamicKV counts are 0");
  float const sum = static_cast<float>(total(b));
  for (index_t& x : b)
    x = static_cast<index_t>(static_cast<float>(budget_size) * (static_cast<float>(x) / sum));
  if (total(b) == 0) throw std::domain_error("oracle: all DynamicKV shares are below 1");
  double const ratio = static_cast<double>(total(b)) / need;
  for (index_t& x : b) x = static_cast<index_t>(python_floordiv(x, ratio));
  b.back() += need - static_cast<index_t>(total(b));
  return b;
}

/// AdaKV: entries of each head of scores {H, T'} in the layer's top H * base. `normalize` scales a
/// head by the share of its best `base` scores in all of its scores first.
inline counts ada_counts(array const& scores, index_t base, bool normalize) {
  std::vector<std::vector<double>> parts;
  for (index_t h = 0; h < scores.extent(0); ++h) {
    auto row = scores.row(h);
    if (normalize) {
      kept_set const order = ranked(row, iota_positions(count(row)));
      double best = 0, all = 0;
      for (std::size_t i = 0; i < order.size(); ++i) {
        all += row[uz(order[i])];
        if (static_cast<index_t>(i) < base) best += row[uz(order[i])];
      }
      for (double& x : row) x *= all == 0 ? 0 : best / all;
    }
    parts.push_back(row);
  }
  return joint_counts(parts, static_cast<std::int64_t>(base) * scores.extent(0));
}

/// Head budgets (window excluded) as KVF and FFY0 compute them: fp32, round half to even.
inline counts adakv_official(counts const& raw, index_t base, double alpha) {
  float const low = static_cast<float>(static_cast<index_t>(base * alpha));
  counts out;
  for (index_t c : raw) {
    float const scaled = static_cast<float>(c) * static_cast<float>(1 - alpha);
    out.push_back(static_cast<index_t>(std::nearbyint(scaled + low)));
  }
  return out;
}

/// Head budgets (window excluded) with the exact total H * base; n_candidates is T'.
inline counts adakv_exact(counts const& raw, index_t base, double alpha, index_t n_candidates) {
  index_t const low = std::min(static_cast<index_t>(base * alpha), n_candidates);
  counts out = apportion(static_cast<std::int64_t>(base - low) * count(raw), raw,
                         counts(raw.size(), n_candidates - low));
  for (index_t& x : out) x += low;
  return out;
}

/// kvpress AdaKV: the best n_safe entries of every head are safe, then the layer keeps its best
/// H * capacity. Scores {H, T} include the window.
inline kept_sets adakv_safeguard(array scores, index_t capacity, index_t n_safe) {
  index_t const heads = scores.extent(0), n = scores.extent(1);
  for (index_t h = 0; h < heads; ++h)
    for (index_t p : top_positions(scores.row(h), iota_positions(n), n_safe))
      scores.at(h, p) = infinity;
  kept_sets kept(uz(heads));
  for (index_t i : top_positions(scores.data, iota_positions(heads * n), heads * capacity))
    kept[uz(i / n)].push_back(i % n);
  return kept;
}

/// Per layer: fp32 mean of scores {H, n} over the KV heads in head order. In float on purpose,
/// because the kept set must be equal.
inline std::vector<double> layer_scores(array const& scores) {
  std::vector<double> out;
  for (index_t j = 0; j < scores.extent(1); ++j) {
    float sum = 0;
    for (index_t h = 0; h < scores.extent(0); ++h) sum += static_cast<float>(scores.at(h, j));
    out.push_back(static_cast<double>(sum / static_cast<float>(scores.extent(0))));
  }
  return out;
}

/// Per sequence: fp32 mean of the per-layer scores over layers in order. scores {L, H, n}
inline std::vector<double> sequence_scores(array const& scores) {
  array joined({scores.extent(0), scores.extent(2)});
  for (index_t l = 0; l < scores.extent(0); ++l) {
    auto const row = layer_scores(scores.slice(l));
    for (index_t j = 0; j < scores.extent(2); ++j) joined.at(l, j) = row[uz(j)];
  }
  return layer_scores(joined);
}

/// Whole blocks of `block` slots: entries in slot order. The best floor(capacity / block) blocks
/// are kept besides the unfilled tail block; a protected token protects its block. Returns
/// positions, ascending.
inline kept_set select_blocks(std::vector<double> const& scores, kept_set const& positions,
                              index_t block, index_t capacity, guard const& keep = {},
                              bool use_maximum = false) {
  kept_set kept, open;  // an open block is named by the position of its first slot
  std::vector<double> open_scores;
  index_t n_protected = 0;
  index_t const n = count(positions);
  auto const take = [&](index_t first) {
    for (index_t i = first; i < std::min(first + block, n); ++i) kept.push_back(positions[uz(i)]);
  };
  for (index_t first = 0; first < n; first += block) {
    bool safe = false;
    float sum = 0, best = -std::numeric_limits<float>::infinity();
    for (index_t i = first; i < std::min(first + block, n); ++i) {
      float const x = static_cast<float>(scores[uz(i)]);
      sum += x;
      if (x > best) best = x;
      safe = safe || is_protected(keep, positions, positions[uz(i)]);
    }
    if (first + block > n || safe) {
      take(first);
      n_protected += first + block <= n;
    } else {
      open.push_back(positions[uz(first)]);
      open_scores.push_back(static_cast<double>(use_maximum ? best : sum));
    }
  }
  for (index_t p : top_positions(open_scores, open, capacity / block - n_protected))
    take(
        static_cast<index_t>(std::find(positions.begin(), positions.end(), p) - positions.begin()));
  std::sort(kept.begin(), kept.end());
  return kept;
}

}  // namespace kvkeep::oracle
