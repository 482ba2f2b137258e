// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <kvkeep/policy/morphkv.hpp>

#include "steps.hpp"

namespace bench {
namespace {

parts_of_unit const steps_morphkv(
    {{"steps of morphkv", [](suite& s) {
        auto const add = [&](char const* name, std::optional<morph_rows> form) {
          add_policy_rows(s, name, false, [form](point const& p) {
            return make_morphkv({.capacity = p.capacity, .window = p.window, .evaluation = form});
          });
        };
        add("morphkv", {});
        add("morphkv-cached", morph_rows::cached);
        add("morphkv-direct", morph_rows::direct);
      }}});

}  // namespace
}  // namespace bench
