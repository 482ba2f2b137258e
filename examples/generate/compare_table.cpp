// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <algorithm>
#include <cstdio>

#include <nlohmann/json.hpp>

#include "generate/compare.hpp"

namespace kvkeep::generate {

namespace {

constexpr char const* shown[] = {"complete", "once",    "range",  "periodic",
                                 "average",  "passkey", "recall", "requery"};

estimate const* find(comparison_row const& r, std::string const& column) {
  auto const it = r.columns.find(column);
  return it == r.columns.end() ? nullptr : &it->second;
}

void print_header() {
  std::printf("%-20s", "policy");
  for (char const* c : shown) std::printf(" %12s", c);
  std::printf(" | %8s %8s | %8s\n", "KV KB", "state KB", "tokens/s");
}

void print_row(comparison_row const& r) {
  std::printf("%-20s", r.policy.c_str());
  for (char const* c : shown) {
    estimate const* const e = find(r, c);
    if (e == nullptr)
      std::printf(" %12s", "-");
    else if (e->seeds < 2)
      std::printf(" %12.1f", 100 * e->mean);
    else
      std::printf("   %5.1f +-%3.0f", 100 * e->mean, 100 * e->half);
  }
  std::printf(" | %8.1f %8.1f | %8.0f\n", static_cast<double>(r.kv_bytes) / 1024,
              static_cast<double>(r.state_bytes) / 1024, r.tokens_per_second);
}

}  // namespace

void print_comparison(std::vector<comparison_row> const& rows) {
  std::vector<index_t> percents;
  for (comparison_row const& r : rows)
    if (r.policy != "fullkv" &&
        std::find(percents.begin(), percents.end(), r.percent) == percents.end())
      percents.push_back(r.percent);
  if (percents.empty()) percents.push_back(100);
  std::sort(percents.begin(), percents.end());
  for (index_t const percent : percents) {
    std::printf("\n%d%% of the final length (accuracy in percent, 95%% interval over seeds)\n",
                percent);
    print_header();
    for (comparison_row const& r : rows)
      if (r.percent == percent || r.policy == "fullkv") print_row(r);
  }
}

std::string comparison_csv(std::vector<comparison_row> const& rows) {
  std::string csv = "policy,percent,slots,column,mean,half_width_95,seeds\n";
  for (comparison_row const& r : rows) {
    auto const line = [&](std::string const& column, double mean, double half, int seeds) {
      char text[160];
      std::snprintf(text, sizeof text, "%s,%d,%d,%s,%.6g,%.6g,%d\n", r.policy.c_str(), r.percent,
                    r.capacity, column.c_str(), mean, half, seeds);
      csv += text;
    };
    for (auto const& [name, e] : r.columns) line(name, e.mean, e.half, e.seeds);
    line("kv_bytes", static_cast<double>(r.kv_bytes), 0, 0);
    line("state_bytes", static_cast<double>(r.state_bytes), 0, 0);
    line("tokens_per_second", r.tokens_per_second, 0, 0);
  }
  return csv;
}

std::string comparison_json(std::vector<comparison_row> const& rows) {
  nlohmann::ordered_json all = {{"schema", 1}};
  for (comparison_row const& r : rows) {
    nlohmann::ordered_json j = {
        {"policy", r.policy},           {"percent", r.percent},
        {"slots", r.capacity},          {"kv_bytes", r.kv_bytes},
        {"state_bytes", r.state_bytes}, {"tokens_per_second", r.tokens_per_second}};
    for (auto const& [name, e] : r.columns)
      j["accuracy"][name] = {{"mean", e.mean}, {"half_width_95", e.half}, {"seeds", e.seeds}};
    all["rows"].push_back(j);
  }
  return all.dump(1) + "\n";
}

}  // namespace kvkeep::generate
