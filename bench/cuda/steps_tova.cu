// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <kvkeep/policy/tova.hpp>

#include "steps.hpp"

namespace bench {
namespace {

parts_of_unit const steps_tova({{"steps of tova", [](suite& s) {
                                   add_policy_rows(s, "tova", false, [](point const& p) {
                                     return make_tova({.capacity = p.capacity});
                                   });
                                 }}});

}  // namespace
}  // namespace bench
