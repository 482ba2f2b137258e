// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// What the files of kvkeep-replay share: results, errors, the handlers of each kind of case.
#pragma once

#include <kvkeep/kvkeep.hpp>

#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "support/case.hpp"

namespace kvkeep::replay {

using tools::npy_array;
using tools::recorded_case;

/// A policy, or a form of one, that the library does not have. `what()` is its name.
struct unsupported : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// The library refused a call of a well-formed case: a failed check, not bad input.
struct call_failed : std::exception {
  explicit call_failed(std::string s) : text(std::move(s)) {}
  char const* what() const noexcept override { return text.c_str(); }
  std::string text;
};

inline void expect(status s, char const* call) {
  if (s != status::ok) throw call_failed(std::string(call) + " returned " + to_string(s));
}

constexpr std::size_t uz(std::int64_t n) { return static_cast<std::size_t>(n); }

/// What a handler made of a case: every output that it knows, named as in case.json.
struct replayed {
  std::map<std::string, npy_array> outputs;
  nlohmann::ordered_json parameters;  ///< as resolved, defaults included
  index_t near_ties = 0;              ///< decisions taken from the record, see guide.hpp
};

/// prefill_select, prefill_select_ragged: one cut at the end of a prompt.
replayed run_prefill(recorded_case const& c, layout_kind layout);
/// decode_trace: a prompt, then one token per step.
/// @param follow  judge each step from the recorded set before it, see guide.hpp
replayed run_decode(recorded_case const& c, layout_kind layout, bool follow = false);
/// layer_budget, layer_budget_from_scores: DynamicKV over the layers of a model.
replayed run_layers(recorded_case const& c, layout_kind layout);
/// budget: PyramidKV's lengths, apportioned totals.
replayed run_budget(recorded_case const& c);
/// select: the k best of each row.
replayed run_select(recorded_case const& c);

}  // namespace kvkeep::replay
