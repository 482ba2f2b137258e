// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Which threads of a pool take part in a call.
#include <kvkeep/backend/cpu/context.hpp>

#include "../support/catch.hpp"

using namespace kvkeep;

TEST_CASE("a call has no more workers than tasks: there is scratch for so many") {
  cpu::thread_pool pool(8);
  cpu::context const ctx{&pool};
  for (index_t const n : {2, 3, 7, 20}) {
    INFO(n << " tasks");
    std::atomic<int> most{0}, done{0};
    auto const task = [&](index_t, int worker) {
      int seen = most.load();
      while (worker > seen && !most.compare_exchange_weak(seen, worker)) {
      }
      done.fetch_add(1);
    };
    for (int i = 0; i < 3000; ++i) pool.parallel_for(n, task);
    CHECK(most < ctx.workers(n));
    CHECK(done == 3000 * n);
  }
}
