// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Checked access to the numbers and words of a case; what was read is kept for result.json.
#pragma once

#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <span>
#include <string_view>

#include "replay.hpp"

namespace kvkeep::replay {

struct int_range {
  index_t least = 0;
  index_t most = std::numeric_limits<index_t>::max();
};

/// A word of case.json and what it stands for.
template <class E>
struct named {
  char const* name;
  E value;
};

/// Integer `value` of field `field`, within `r`.
inline index_t checked_integer(recorded_case const& c, std::string const& field,
                               nlohmann::json const& value, int_range r) {
  std::string const allowed =
      "allowed: an integer in " + std::to_string(r.least) + ".." + std::to_string(r.most);
  bool const huge = value.is_number_unsigned() &&
                    value.get<std::uint64_t>() > uz(std::numeric_limits<index_t>::max());
  if (!value.is_number_integer() || huge) c.fail(field, value.dump() + ", " + allowed);
  auto const n = value.get<std::int64_t>();
  if (n < r.least || n > r.most) c.fail(field, value.dump() + ", " + allowed);
  return static_cast<index_t>(n);
}

/// shape.FIELD, an extent >= 1 (`fallback` where it is missing).
inline index_t extent(recorded_case const& c, char const* field,
                      std::optional<index_t> fallback = {}) {
  auto const& shape = c.meta.at("shape");
  if (!shape.contains(field) && fallback) return *fallback;
  std::string const full = std::string("shape.") + field;
  if (!shape.contains(field)) c.fail(full, "missing");
  return checked_integer(c, full, shape.at(field), {1, 1 << 24});
}

/// The params of a case. A null counts as missing.
class parameters {
 public:
  explicit parameters(recorded_case const& c) : c_(c) {}

  index_t integer(char const* name, int_range r, std::optional<index_t> fallback = {}) {
    auto const* value = look_up(name, fallback.has_value());
    index_t const n = value == nullptr ? *fallback : checked_integer(c_, full(name), *value, r);
    resolved_[name] = n;
    return n;
  }
  double number(char const* name, double least, double most, std::optional<double> fallback = {}) {
    auto const* value = look_up(name, fallback.has_value());
    if (value != nullptr && !value->is_number()) fail(name, value->dump() + " is not a number");
    double const x = value == nullptr ? *fallback : value->get<double>();
    if (!(x >= least && x <= most)) {
      auto const text = [](double y) { return nlohmann::json(y).dump(); };
      fail(name, text(x) + ", allowed: " + text(least) + ".." + text(most));
    }
    resolved_[name] = x;
    return x;
  }
  bool flag(char const* name, bool fallback) {
    auto const* value = look_up(name, true);
    if (value != nullptr && !value->is_boolean())
      fail(name, value->dump() + ", allowed: true or false");
    bool const x = value == nullptr ? fallback : value->get<bool>();
    resolved_[name] = x;
    return x;
  }
  template <class E, std::size_t N>
  E word(char const* name, std::array<named<E>, N> const& words, char const* fallback) {
    auto const* value = look_up(name, fallback != nullptr);
    if (value != nullptr && !value->is_string()) fail(name, value->dump() + " is not a string");
    std::string const text = value == nullptr ? fallback : value->get<std::string>();
    std::string allowed;
    for (auto const& w : words) {
      if (text == w.name) {
        resolved_[name] = text;
        return w.value;
      }
      allowed += (allowed.empty() ? "" : ", ") + std::string(w.name);
    }
    fail(name, "'" + text + "', allowed: " + allowed);
  }
  /// List of integers >= 0, empty where it is missing.
  std::vector<index_t> integers(char const* name) {
    std::vector<index_t> list;
    auto const* value = look_up(name, true);
    if (value != nullptr && !value->is_array()) fail(name, value->dump() + " is not a list");
    if (value != nullptr)
      for (auto const& e : *value) list.push_back(checked_integer(c_, full(name), e, {}));
    resolved_[name] = list;
    return list;
  }
  /// A value that follows from others, for result.json.
  template <class T>
  void note(char const* name, T const& value) {
    resolved_[name] = value;
  }
  bool has(char const* name) const { return look_up(name, true) != nullptr; }
  [[noreturn]] void fail(char const* name, std::string const& what) const {
    c_.fail(full(name), what);
  }
  nlohmann::ordered_json const& resolved() const { return resolved_; }

 private:
  static std::string full(char const* name) { return std::string("params.") + name; }
  nlohmann::json const* look_up(char const* name, bool optional) const {
    auto const& params = c_.meta.at("params");
    auto const it = params.find(name);
    if (it != params.end() && !it->is_null()) return &*it;
    if (!optional) fail(name, "missing");
    return nullptr;
  }

  recorded_case const& c_;
  nlohmann::ordered_json resolved_ = nlohmann::ordered_json::object();
};

/// Limits far above any recorded case: sums stay below overflow, rings of queries fit into memory.
inline constexpr index_t most_tokens = 1 << 28;
inline constexpr index_t most_window = 1 << 16;
inline constexpr index_t most_layers = 1 << 12;

/// Reduction over the query heads of a group; `none` needs one head per group.
inline reduction read_group(parameters& p, index_t group) {
  static constexpr std::array<named<reduction>, 4> words{{{"none", reduction::mean},
                                                          {"mean", reduction::mean},
                                                          {"max", reduction::max},
                                                          {"sum", reduction::sum}}};
  reduction const r = p.word("gqa_agg", words, "mean");
  if (group > 1 && p.resolved()["gqa_agg"] == "none")
    p.fail("gqa_agg", "'none', allowed: mean, max, sum where shape.Hq > shape.Hkv");
  return r;
}

}  // namespace kvkeep::replay
