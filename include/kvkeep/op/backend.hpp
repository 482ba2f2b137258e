// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// How a backend is plugged in: a context type, its traits, and an `enqueue` overload per op.
#pragma once

#include <concepts>

#include "../core/status.hpp"
#include "../core/workspace.hpp"

namespace kvkeep {

/// Specialised once per backend: `using space`, `static constexpr char const* name`.
template <class Ctx>
struct backend_traits;

/// A context whose traits name a memory space.
template <class Ctx>
concept backend = requires {
  typename backend_traits<Ctx>::space;
  { backend_traits<Ctx>::name } -> std::convertible_to<char const*>;
} && memory_space<typename backend_traits<Ctx>::space>;

template <backend Ctx>
using space_of = typename backend_traits<Ctx>::space;

/// The op works on the memory that the backend reads.
template <class Ctx, class Op>
concept same_memory = backend<Ctx> && std::same_as<typename Op::space, space_of<Ctx>>;

/// The backend has the op: `enqueue(ctx, op, workspace) -> status`, found through the context's
/// namespace. With a measuring workspace the op only counts its scratch, and refuses what it
/// could not run.
template <class Ctx, class Op>
concept runs = same_memory<Ctx, Op> && requires(Ctx& c, Op const& o, workspace& w) {
  { enqueue(c, o, w) } -> std::same_as<status>;
};

/// Runs an op; a missing op, or one on the wrong memory, fails this one constraint by name.
template <class Ctx, class Op>
  requires runs<Ctx, Op>
status run(Ctx& ctx, Op const& op, workspace& ws) {
  return enqueue(ctx, op, ws);
}

/// A context can wait for what has been enqueued in another one: `follow(later, earlier) -> status`, found through
/// their namespace. It only enqueues.
template <class Ctx>
concept orders = backend<Ctx> && requires(Ctx& c) {
  { follow(c, c) } -> std::same_as<status>;
};

}  // namespace kvkeep
