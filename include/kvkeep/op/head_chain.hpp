// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Ops that follow each other, head by head.
#pragma once

#include "score_slots.hpp"

namespace kvkeep {

/// Values one after another. Trivially copyable where they are.
template <class... T>
struct sequence {};
template <class First, class... Rest>
struct sequence<First, Rest...> {
  First first;
  sequence<Rest...> rest;
};

template <class... T>
constexpr sequence<T...> make_sequence(T const&... x) {
  if constexpr (sizeof...(T) == 0)
    return {};
  else
    return [](auto const& first, auto const&... rest) {
      return sequence<T...>{first, make_sequence(rest...)};
    }(x...);
}

namespace op {

/// Ops one after another, each of which does for every place (entry and KV head) what neither reads nor
/// changes anything that another of them does for another place. So a backend may run them op by op or
/// place by place: the results have the same bits.
/// With `n_heads` 1 a place is an entry with all of its heads. A for_each of m indices per place gives place
/// `entry * n_heads + head` the m indices from `place * m` on.
/// At most one of them is op::attend: it may begin before those in front of it, and its output may come last. So
/// the others do not read that, and change nothing that it reads.
/// Bytes and operations: those of the ops. All of them have their scratch at the same time.
template <class Space, class... Ops>
struct head_chain {
  using space = Space;
  index_t n_entries = 0;
  index_t n_heads = 0;
  index_t max_slots = 0;  ///< most slots of a head
  sequence<Ops...> ops{};
};

template <class Space, class... Ops>
constexpr head_chain<Space, Ops...> make_chain(index_t n_entries, index_t n_heads,
                                               index_t max_slots, Ops const&... ops) {
  return {n_entries, n_heads, max_slots, make_sequence(ops...)};
}

/// A chain over heads, then one over their entries (its `n_heads` is 1), which may read what the heads' ops have made.
/// `bad_argument`, and nothing runs, if the second is no such chain, or if tickets are missing: a backend whose
/// blocks do not wait for each other tells by them which of an entry's is last. The CPU has no need of them.
template <class Space, class Heads, class Entries>
struct joined_chain {
  using space = Space;
  Heads heads{};
  Entries entries{};
  index_t* tickets = nullptr;  ///< [entry] 0, and so again afterwards

  constexpr bool fits() const noexcept {
    return entries.n_heads == 1 && entries.n_entries == heads.n_entries;
  }
};

template <class Heads, class Entries>
constexpr joined_chain<typename Heads::space, Heads, Entries> join_chains(Heads const& heads,
                                                                          Entries const& entries,
                                                                          index_t* tickets) {
  return {heads, entries, tickets};
}

}  // namespace op
}  // namespace kvkeep
