// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "reference.hpp"

#include <vector>

#include <kvkeep/backend/cpu/cpu.hpp>

#include "../rows.hpp"

namespace bench {
namespace {

template <class Op>
void run_here(Op const& o) {
  cpu::context c;
  workspace counting;
  expect(run(c, o, counting), "measuring on the CPU");
  std::vector<std::byte> memory(counting.peak() + workspace::alignment);
  workspace ws(memory);
  expect(run(c, o, ws), "a check on the CPU");
}

}  // namespace

void run_on_cpu(op::column_moments<> const& o) { run_here(o); }
void run_on_cpu(op::column_sums<> const& o) { run_here(o); }
void run_on_cpu(op::fused_rows<> const& o) { run_here(o); }
void run_on_cpu(op::select_k<> const& o) { run_here(o); }
void run_on_cpu(op::compact<> const& o) { run_here(o); }
void run_on_cpu(op::attend<> const& o) { run_here(o); }
void run_on_cpu(op::query_moments<> const& o) { run_here(o); }
void run_on_cpu(op::quadratic_logits<> const& o) { run_here(o); }

}  // namespace bench
