// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Layers over plain arrays, and both kinds of session bound to them: for tests of calls alone.
#pragma once

#include <kvkeep/kvkeep.hpp>
#include <numeric>
#include <optional>

#include "aligned_block.hpp"
#include "catch.hpp"
#include "session_run.hpp"

namespace kvkeep::test {

inline constexpr index_t plain_dim = 8, plain_block = 4;

inline std::vector<float> numbers(std::size_t n) {
  std::vector<float> x(n);
  for (std::size_t i = 0; i < n; ++i) x[i] = static_cast<float>(i * 7919 % 1013) / 1013.0F - 0.5F;
  return x;
}

/// Layers of one KV head, in pages or not, and how they are bound.
struct plain_model {
  index_t n_seq = 2;
  limits lim{};
  std::vector<std::vector<float>> rows{};
  std::vector<std::vector<index_t>> tables{};
  std::vector<layer_spec<>> specs{};
  cpu::context ctx{};
  std::optional<aligned_block> memory{};

  plain_model() { lim.max_sequences = n_seq; }
  cache_shape shape(index_t slots) const { return {n_seq, 2, 1, plain_dim, plain_dim, slots}; }
  void add(index_t slots) {
    rows.push_back(numbers(uz(n_seq * slots * plain_dim)));
    specs.push_back(contiguous_view(rows.back().data(), rows.back().data(), shape(slots)));
  }
  /// Entries of a table count from 100 times the layer.
  void add_pages(index_t slots) {
    index_t const each = slots / plain_block, first = 100 * static_cast<index_t>(specs.size());
    tables.emplace_back(uz(n_seq * each));
    std::iota(tables.back().begin(), tables.back().end(), first);
    index_t const n_blocks = first + n_seq * each;
    rows.push_back(numbers(uz(n_blocks * plain_block * plain_dim)));
    page_geometry const g{plain_block, n_blocks, tables.back().data(), each};
    specs.push_back(paged_view(rows.back().data(), rows.back().data(), shape(slots), g));
  }
  std::span<layer_spec<> const> layers() const { return specs; }

  template <class P, class D>
  auto bind(std::false_type, P const& p, D const& d) {
    memory.emplace(session_bytes(ctx, p, d, layers(), lim));
    return bind_session(ctx, p, d, layers(), lim, memory->span());
  }
  template <class P, class D>
  auto bind(std::true_type, P const& p, D const& d) {
    memory.emplace(device_session_bytes(ctx, p, d, layers(), lim));
    return bind_device_session(ctx, p, d, layers(), lim, memory->span());
  }
  auto bind(auto kind, auto const& p) { return bind(kind, p, p); }
  std::string refusal_of(bool device, auto const& p) {
    return refusal([&] {
      if (device)
        (void)bind(std::true_type{}, p);
      else
        (void)bind(std::false_type{}, p);
    });
  }
};

/// A batch of one, as each kind of session takes it.
struct one {
  index_t id;
  batch host() const { return {{&id, 1}}; }
  batch_ref<> device() const { return {1, &id, &id}; }
};
template <class S>
auto of(S const&, one const& b) {
  if constexpr (requires(S & s, plan<> p) { s.choose(b.device(), p); })
    return b.device();
  else
    return b.host();
}

}  // namespace kvkeep::test
