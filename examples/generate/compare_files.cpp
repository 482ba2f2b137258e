// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <cstdio>

#include <nlohmann/json.hpp>

#include "generate/compare.hpp"

namespace kvkeep::generate {

namespace {

nlohmann::ordered_json to_json(estimate const& e) {
  return {{"mean", e.mean}, {"half_width_95", e.half}, {"seeds", e.seeds}};
}

}  // namespace

std::string comparison_csv(std::vector<comparison_row> const& rows) {
  std::string csv = "policy,percent,slots,column,mean,half_width_95,seeds\n";
  for (comparison_row const& r : rows) {
    auto const line = [&](std::string const& column, estimate const& e) {
      char text[160];
      std::snprintf(text, sizeof text, "%s,%d,%d,%s,%.6g,%.6g,%d\n", r.policy.c_str(), r.percent,
                    r.capacity, column.c_str(), e.mean, e.half, e.seeds);
      csv += text;
    };
    for (auto const& [name, e] : r.columns) line(name, e);
    for (position_bucket const& b : r.by_position) {
      std::string const at = "@" + std::to_string(b.from) + "-" + std::to_string(b.to - 1);
      line("perplexity" + at, b.perplexity);
      line("kl_nats" + at, b.kl);
    }
    line("kv_bytes", {static_cast<double>(r.kv_bytes), 0, 0});
    line("state_bytes", {static_cast<double>(r.state_bytes), 0, 0});
    line("tokens_per_second", {r.tokens_per_second, 0, 0});
  }
  return csv;
}

std::string comparison_json(std::vector<comparison_row> const& rows) {
  nlohmann::ordered_json all = {{"schema", 1}};
  all["by_position"] =
      "of the reference responses of all tasks without their questions, teacher-forced: positions "
      "of predicted tokens in [from, to), all of them last; perplexity; kl_nats per token: "
      "divergence of the policy's prediction from the full cache's";
  for (comparison_row const& r : rows) {
    nlohmann::ordered_json j = {
        {"policy", r.policy},           {"percent", r.percent},
        {"slots", r.capacity},          {"kv_bytes", r.kv_bytes},
        {"state_bytes", r.state_bytes}, {"tokens_per_second", r.tokens_per_second}};
    for (auto const& [name, e] : r.columns) j["accuracy"][name] = to_json(e);
    for (position_bucket const& b : r.by_position)
      j["by_position"].push_back({{"from", b.from},
                                  {"to", b.to},
                                  {"tokens", b.tokens},
                                  {"perplexity", to_json(b.perplexity)},
                                  {"kl_nats", to_json(b.kl)}});
    all["rows"].push_back(j);
  }
  return all.dump(1) + "\n";
}

}  // namespace kvkeep::generate
