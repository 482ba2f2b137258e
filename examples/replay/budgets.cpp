// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// budget and select: integers alone, no cache.
#include <numeric>

#include "arrays.hpp"
#include "parameters.hpp"

namespace kvkeep::replay {

namespace {

/// Column of each wanted name in params.columns, or their usual order.
std::vector<index_t> columns(recorded_case const& c, parameters const& p,
                             std::vector<char const*> const& names) {
  std::vector<index_t> at(names.size());
  std::iota(at.begin(), at.end(), 0);
  if (!p.has("columns")) return at;
  auto const& list = c.meta.at("params").at("columns");
  if (!list.is_array()) p.fail("columns", "not a list");
  for (std::size_t i = 0; i < names.size(); ++i) {
    auto const it = std::find(list.begin(), list.end(), nlohmann::json(names[i]));
    if (it == list.end()) p.fail("columns", std::string("'") + names[i] + "' is missing");
    at[i] = static_cast<index_t>(it - list.begin());
  }
  return at;
}

index_t row_count(recorded_case const& c, char const* input) {
  std::int64_t const rows = c.input(input).shape.empty() ? 0 : c.input(input).shape[0];
  return extent(c, "cases", static_cast<index_t>(std::max<std::int64_t>(rows, 1)));
}

replayed run_pyramid(backend& b, recorded_case const& c) {
  std::vector<char const*> const names{"num_layers", "capacity", "beta", "window", "q_len"};
  int_range const ranges[] = {
      {1, most_layers}, {2, most_tokens}, {1, most_tokens}, {1, most_tokens}, {1, most_tokens}};
  parameters params(c);
  std::vector<index_t> const at = columns(c, params, names);
  index_t const rows = row_count(c, "combos");
  npy_array const& combos = checked_table(c, "combos", rows, false);
  int_rows lengths;
  for (index_t r = 0; r < rows; ++r) {
    index_t v[5];
    auto const field = [&](std::size_t i) {
      return "inputs.combos[" + std::to_string(r) + "]." + names[i];
    };
    for (std::size_t i = 0; i < names.size(); ++i) {
      if (at[i] >= combos.shape[1]) c.fail(field(i), "the array has no such column");
      v[i] = combos.i32[uz(r) * uz(combos.shape[1]) + uz(at[i])];
      checked_integer(c, field(i), v[i], ranges[i]);
    }
    if (v[3] >= v[1]) c.fail(field(3), std::to_string(v[3]) + ", allowed: below the capacity");
    pyramid const budget{v[1], v[2], !c.is_official()};
    lengths.push_back(b.budgets(budget, v[0], v[3], v[4]));
  }
  replayed out;
  params.note("exact_total", !c.is_official());
  out.parameters = params.resolved();
  out.outputs["lengths"] = padded({rows}, lengths);
  return out;
}

/// Shares of layers, truncated and adjusted as published.
replayed run_cake(recorded_case const& c) {
  if (!c.is_official()) c.fail("origin", "allowed: official, others have preferences, not shares");
  std::vector<char const*> const names{"num_layers", "total", "cap"};
  parameters params(c);
  std::vector<index_t> const at = columns(c, params, names);
  index_t const rows = row_count(c, "raw");
  npy_array const& meta = checked_table(c, "meta", rows, false);
  npy_array const& raw = checked_table(c, "raw", rows, true);
  auto const width = static_cast<index_t>(raw.shape[1]);
  int_range const ranges[] = {{1, width}, {0, most_tokens}, {0, most_tokens}};
  int_rows budgets;
  for (index_t r = 0; r < rows; ++r) {
    std::string const row = "[" + std::to_string(r) + "]";
    index_t v[3];
    for (std::size_t i = 0; i < names.size(); ++i) {
      std::string const field = "inputs.meta" + row + "." + names[i];
      if (at[i] >= meta.shape[1]) c.fail(field, "the array has no such column");
      v[i] = meta.i32[uz(r) * uz(meta.shape[1]) + uz(at[i])];
      checked_integer(c, field, v[i], ranges[i]);
    }
    std::vector<offset_t> budget;
    for (index_t l = 0; l < v[0]; ++l) {
      float const share = raw.f32[uz(r) * uz(width) + uz(l)];
      if (!(share >= 0 && share <= static_cast<float>(most_tokens)))
        c.fail("inputs.raw" + row, "a share below zero or out of range");
      budget.push_back(static_cast<offset_t>(share));
    }
    published_cake_budgets(budget.data(), v[0], v[1], v[2]);
    budgets.emplace_back(budget.begin(), budget.end());
  }
  replayed out;
  params.note("published", true);
  out.parameters = params.resolved();
  out.outputs["budgets"] = padded({rows}, budgets);
  return out;
}

replayed run_apportion(backend& b, recorded_case const& c) {
  index_t const rows = row_count(c, "total");
  npy_array const& total = checked_input(c, "total", {rows}, false);
  npy_array const& caps = checked_table(c, "caps", rows, false);
  npy_array const& weights = checked_input(c, "weights", caps.shape, false);
  std::vector<index_t> counts;
  for (std::size_t r = 0; r < uz(rows); ++r) {
    std::size_t const width = uz(caps.shape[1]);
    index_t const* cap = caps.i32.data() + r * width;
    index_t const* weight = weights.i32.data() + r * width;
    std::size_t n = 0;  // the parts come first, then padding below zero
    while (n < width && cap[n] >= 0) ++n;
    for (std::size_t i = 0; i < width; ++i)
      if ((i < n && weight[i] < 0) || (i >= n && cap[i] >= 0))
        c.fail("inputs." + std::string(i < n ? "weights" : "caps") + "[" + std::to_string(r) + "]",
               "padding before a part");
    counts.push_back(static_cast<index_t>(n));
  }
  splits const s{rows,
                 static_cast<index_t>(caps.shape[1]),
                 total.i32.data(),
                 counts.data(),
                 weights.i32.data(),
                 caps.i32.data()};
  replayed out;
  out.parameters = nlohmann::ordered_json::object();
  out.outputs["parts"] = padded({rows}, b.parts(s));
  return out;
}

}  // namespace

replayed run_budget(backend& b, recorded_case const& c) {
  std::string const policy = c.policy();
  if (policy == "pyramidkv") return run_pyramid(b, c);
  if (policy == "cake") return run_cake(c);
  if (policy == "apportion") return run_apportion(b, c);
  throw unsupported(policy);
}

replayed run_select(backend& b, recorded_case const& c) {
  if (c.policy() != "topk") throw unsupported(c.policy());
  index_t const n = extent(c, "n");
  std::int64_t const first = c.input("scores").shape.empty() ? 1 : c.input("scores").shape[0];
  auto const rows = static_cast<index_t>(std::max<std::int64_t>(first, 1));
  npy_array const& scores = checked_input(c, "scores", {rows, n});
  npy_array const& k = checked_input(c, "k", {rows}, false);
  for (index_t r = 0; r < rows; ++r)
    checked_integer(c, "inputs.k[" + std::to_string(r) + "]", k.i32[uz(r)], {});

  replayed out;
  out.parameters = nlohmann::ordered_json::object();
  out.outputs["kept"] = padded({rows}, b.select(scores.f32.data(), k.i32.data(), rows, n));
  return out;
}

}  // namespace kvkeep::replay
