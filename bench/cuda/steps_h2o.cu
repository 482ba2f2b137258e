// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <kvkeep/policy/h2o.hpp>

#include "steps.hpp"

namespace bench {
namespace {

parts_of_unit const steps_h2o({{"steps of h2o", [](suite& s) {
                                  add_policy_rows(s, "h2o", true, [](point const& p) {
                                    return make_h2o({.capacity = p.capacity, .recent = p.window});
                                  });
                                }}});

}  // namespace
}  // namespace bench
