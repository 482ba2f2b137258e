// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CPU: joint top-k counts over several score maps.
#pragma once

#include "../../op/layer_counts.hpp"
#include "context.hpp"
#include "kernels/select.hpp"

namespace kvkeep::cpu {
inline namespace KVKEEP_CPU_ISA {

/// The k best of a set of keys: all above `key`, and `ties` of those equal to it.
struct rank_limit {
  std::uint32_t key = 0;
  std::int64_t ties = 0;
};

/// The score as an unsigned key; larger is better.
inline std::uint32_t rank_key(float score) noexcept {
  return static_cast<std::uint32_t>(order_key(score)) ^ 0x80000000u;
}

/// Finds the limit of the k best, 1 <= k <= number of keys, by counting 11, 11 and 10 bits.
/// @param each each(f) calls f(key) for every key, the same ones each time
/// @param table [2048] scratch
template <class Each>
rank_limit find_limit(Each const& each, std::int64_t k, std::uint32_t* table) noexcept {
  std::uint32_t prefix = 0;
  for (int shift : {21, 10, 0}) {
    int const bits = shift == 0 ? 10 : 11;
    std::uint32_t const mask = (1u << bits) - 1u;
    std::fill_n(table, mask + 1, 0u);
    // At the first step every key has the (empty) prefix; a shift by 32 would not say so.
    each([&](std::uint32_t key) {
      if (shift == 21 || key >> (shift + bits) == prefix) ++table[(key >> shift) & mask];
    });
    std::uint32_t digit = mask;
    while (digit > 0 && k > table[digit]) k -= table[digit--];
    prefix = (prefix << bits) | digit;
  }
  return {prefix, k};
}

/// One entry's maps. A part is one KV head of one map, in map-major order.
struct count_job {
  op::layer_counts<host_space> const* o = nullptr;
  index_t entry = 0;
  index_t heads = 0;
  float* factor = nullptr;         ///< [parts]
  rank_limit* safe = nullptr;      ///< [parts]
  std::uint32_t* table = nullptr;  ///< [2048]

  index_t parts() const noexcept { return o->n_maps * heads; }
  index_t size(index_t part) const noexcept {
    return std::max<index_t>(0, o->candidates(entry, part % heads) - o->skip);
  }
  float const* scores(index_t part) const noexcept {
    return o->scores.at(part / heads, entry, part % heads, o->skip);
  }
  template <class F>
  void each_key(index_t part, F const& f) const noexcept {
    float const* const s = scores(part);
    index_t const n = size(part);
    for (index_t j = 0; j < n; ++j) f(rank_key(s[j] * factor[part]));
  }
  /// Keys that are not among the part's safe ones.
  template <class F>
  void each_open(index_t part, F const& f) const noexcept {
    std::uint32_t const above = safe[part].key;
    std::int64_t ties = safe[part].ties;
    each_key(part, [&](std::uint32_t key) {
      if (key > above) return;
      if (key == above && ties > 0)
        --ties;
      else
        f(key);
    });
  }
};

/// (Sum of the best `best` scores) / (sum of all), 0 where the latter is 0.
inline float share_of_best(count_job const& job, index_t part, index_t best) noexcept {
  index_t const n = job.size(part);
  float const* const s = job.scores(part);
  if (n == 0) return 1;
  auto const each = [&](auto const& f) { job.each_key(part, f); };
  rank_limit const limit = find_limit(each, std::clamp<std::int64_t>(best, 1, n), job.table);
  double all = 0, top = 0;
  std::int64_t ties = limit.ties;
  for (index_t j = 0; j < n; ++j) {
    std::uint32_t const key = rank_key(s[j]);
    all += static_cast<double>(s[j]);
    if (key > limit.key || (key == limit.key && ties-- > 0)) top += static_cast<double>(s[j]);
  }
  return all == 0 || best <= 0 ? 0.0F : static_cast<float>(top / all);
}

inline void count_entry(count_job const& job) noexcept {
  auto const& o = *job.o;
  index_t const parts = job.parts();
  auto const out = [&](index_t part) -> index_t& {
    return o.out(part / job.heads, job.entry, part % job.heads);
  };
  std::int64_t total = 0;
  for (index_t p = 0; p < parts; ++p) {
    job.factor[p] = 1;
    if (o.normalize) job.factor[p] = share_of_best(job, p, o.best_per_head);
    index_t const n = job.size(p), safe = std::clamp<index_t>(o.safe, 0, n);
    job.safe[p] = {0xffffffffu, 0};  // above every key: none is safe
    if (safe > 0)
      job.safe[p] = find_limit([&](auto const& f) { job.each_key(p, f); }, safe, job.table);
    total += n;
  }
  std::int64_t left = std::clamp<std::int64_t>(std::int64_t{o.best_per_head} * parts, 0, total);
  for (index_t p = 0; p < parts; ++p) {
    std::int64_t const safe = std::clamp<index_t>(o.safe, 0, job.size(p));
    out(p) = static_cast<index_t>(std::min(safe, left));
    left -= out(p);
  }
  if (left == 0) return;
  auto const each = [&](auto const& f) {
    for (index_t p = 0; p < parts; ++p) job.each_open(p, f);
  };
  rank_limit limit = find_limit(each, left, job.table);
  for (index_t p = 0; p < parts; ++p) {
    std::int64_t above = 0, equal = 0;
    job.each_open(p, [&](std::uint32_t key) {
      above += key > limit.key;
      equal += key == limit.key;
    });
    equal = std::min(equal, limit.ties);
    limit.ties -= equal;
    out(p) += static_cast<index_t>(above + equal);
  }
}

/// Joint counts, one task per entry. Cost: 4 to 7 passes over the scores.
KVKEEP_CPU_OP status enqueue(context& c, op::layer_counts<host_space> const& o,
                             workspace& ws) noexcept {
  if (!slots_contiguous(o.scores) || (o.normalize && o.n_maps != 1) || o.skip < 0)
    return status::bad_argument;
  workspace::frame const frame(ws);
  index_t const heads = o.candidates.extent[1];
  int const workers = c.workers(o.batch.n);
  std::size_t const parts = size_of(o.n_maps) * size_of(heads);
  auto const factors = take_each<float>(ws, workers, parts);
  auto const limits = take_each<rank_limit>(ws, workers, parts);
  auto const tables = take_each<std::uint32_t>(ws, workers, 2048);
  if (!placed(ws)) return not_placed(ws);
  for_heads(c, o.batch.n, 1, [&](index_t b, index_t, int worker) {
    count_entry({&o, b, heads, factors(worker), limits(worker), tables(worker)});
  });
  return status::ok;
}

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::cpu
