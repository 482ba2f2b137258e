// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Op tests on the CPU backend.
#pragma once

#include <kvkeep/backend/cpu/context.hpp>

namespace kvkeep::test {

using op_context = cpu::context;

inline cpu::context& one_thread() {
  static cpu::context ctx{};
  return ctx;
}
inline cpu::context& two_threads() {
  static cpu::thread_pool pool(2);
  static cpu::context ctx{&pool};
  return ctx;
}

inline cpu::context& other_context() { return two_threads(); }

/// Nothing is started that could run later.
inline long started_kernels() { return 0; }

template <class Op>
status call(op_context& ctx, Op const& op, workspace& ws) {
  return enqueue(ctx, op, ws);
}

}  // namespace kvkeep::test
