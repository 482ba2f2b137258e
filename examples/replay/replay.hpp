// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// What the files of kvkeep-replay share: results, errors, the handlers of each kind of case.
#pragma once

#include <map>

#include <nlohmann/json.hpp>

#include "backend.hpp"
#include "support/case.hpp"

namespace kvkeep::replay {

using tools::npy_array;
using tools::recorded_case;

/// What a handler made of a case: every output that it knows, named as in case.json.
struct replayed {
  std::map<std::string, npy_array> outputs;
  nlohmann::ordered_json parameters;  ///< as resolved, defaults included
  index_t near_ties = 0;              ///< decisions taken from the record, see guide.hpp
};

/// prefill_select, prefill_select_ragged: one cut at the end of a prompt.
replayed run_prefill(backend& b, recorded_case const& c, layout_kind layout);
/// decode_trace: a prompt, then one token per step.
/// @param follow  judge each step from the recorded set before it, see guide.hpp
replayed run_decode(backend& b, recorded_case const& c, layout_kind layout, bool follow = false);
/// layer_budget, layer_budget_from_scores: DynamicKV over the layers of a model.
replayed run_layers(backend& b, recorded_case const& c, layout_kind layout);
/// budget: PyramidKV's lengths, apportioned totals.
replayed run_budget(backend& b, recorded_case const& c);
/// select: the k best of each row.
replayed run_select(backend& b, recorded_case const& c);

}  // namespace kvkeep::replay
