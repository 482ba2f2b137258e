// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// The bundled model and its comparison: a budget as large as the sequence changes nothing, figures are whole.
#include <cmath>
#include <stdexcept>

#include <nlohmann/json.hpp>

#include "../support/catch.hpp"
#include "generate/compare.hpp"
#include "generate/demo.hpp"
#include "generate/job.hpp"

using namespace kvkeep;
using namespace kvkeep::generate;

namespace {

struct bundle {
  model m = load_model(KVKEEP_BUNDLED_MODEL);
  episode_set set = read_episodes(KVKEEP_BUNDLED_MODEL, m);
  runtime rt{1};
};

comparison_row const& row(std::vector<comparison_row> const& rows, std::string const& policy) {
  for (comparison_row const& r : rows)
    if (r.policy == policy) return r;
  FAIL("no row of " << policy);
  throw std::logic_error("unreachable");
}

}  // namespace

TEST_CASE("every policy equals the full cache where the budget holds the whole sequence") {
  bundle b;
  comparison_options o;
  o.percents = {100};
  o.episodes = o.seeds = 1;
  auto const rows = compare(b.rt, b.m, b.set, o);
  REQUIRE(rows.size() == compared_policies().size());
  comparison_row const& full = row(rows, "fullkv");
  CHECK(full.columns.count("average") == 1);
  for (comparison_row const& r : rows) {
    INFO(r.policy);
    REQUIRE(r.columns.size() == full.columns.size());
    for (auto const& [name, e] : full.columns) {
      INFO(name);
      CHECK(r.columns.at(name).mean == e.mean);
    }
    REQUIRE(r.by_position.size() == full.by_position.size());
    for (std::size_t i = 0; i < full.by_position.size(); ++i) {
      position_bucket const& have = r.by_position[i];
      INFO("from " << have.from << " to " << have.to);
      CHECK(have.tokens == full.by_position[i].tokens);
      CHECK(have.kl.mean == 0);
      CHECK(have.perplexity.mean == full.by_position[i].perplexity.mean);
    }
  }
}

TEST_CASE("policies hold equally many slots at a budget, and the full cache more") {
  bundle b;
  comparison_options o;
  o.policies = {"fullkv", "random", "oracle", "streamingllm", "h2o", "morphkv", "snapkv+morphkv"};
  o.percents = {25};
  o.episodes = o.seeds = 1;
  std::size_t told = 0;
  o.progress = [&](std::string const&, index_t, std::size_t done, std::size_t all) {
    CHECK(done == told++);
    CHECK(all == o.policies.size());
  };
  auto const rows = compare(b.rt, b.m, b.set, o);
  CHECK(told == o.policies.size());
  std::size_t const bytes = row(rows, "streamingllm").kv_bytes;
  for (comparison_row const& r : rows) {
    INFO(r.policy);
    if (r.policy == "fullkv")
      CHECK(r.kv_bytes > 3 * bytes);
    else
      CHECK(r.kv_bytes == bytes);
    CHECK(r.state_bytes > 0);
  }
  auto const j = nlohmann::json::parse(comparison_json(rows));
  REQUIRE(j["rows"].size() == rows.size());
  CHECK(j["rows"][1]["policy"] == "random");
  CHECK(j["rows"][1]["accuracy"]["once"]["mean"].get<double>() == rows[1].columns.at("once").mean);
  std::string const csv = comparison_csv(rows);
  CHECK(csv.rfind("policy,percent,slots,column,mean,half_width_95,seeds\n", 0) == 0);
  CHECK(csv.find("\nmorphkv,25,") != std::string::npos);
  CHECK(row(rows, "oracle").columns.at("recall").mean >=
        row(rows, "random").columns.at("recall").mean);

  // By position: the full cache is its own reference, and who knows the future is nearer to it than chance.
  double const chance = row(rows, "random").by_position.back().kl.mean;
  CHECK(row(rows, "fullkv").by_position.back().kl.mean == 0);
  CHECK(row(rows, "oracle").by_position.back().kl.mean < chance / 2);
  auto const& by_position = j["rows"][2]["by_position"];
  REQUIRE(by_position.size() == rows[2].by_position.size());
  CHECK(by_position.back()["from"] == 0);
  CHECK(by_position.back()["to"] == 512);
  CHECK(by_position[0]["kl_nats"]["mean"].get<double>() == rows[2].by_position[0].kl.mean);
  CHECK(by_position[0]["perplexity"]["mean"].get<double>() ==
        rows[2].by_position[0].perplexity.mean);
  for (char const* const column :
       {"perplexity@64-127,", "kl_nats@448-511,", "kl_nats@0-511,", "passkey,"})
    CHECK(csv.find("\noracle,25," + std::to_string(rows[2].capacity) + "," + column) !=
          std::string::npos);
  std::string const text = comparison_text(rows);
  for (char const* const part :
       {"25% of the final length: accuracy", ": passkeys by depth", "75-100%",
        ": KL divergence from the full cache's prediction, nats per token, by position",
        ": perplexity by position", "448-511"})
    CHECK(text.find(part) != std::string::npos);
}

TEST_CASE("a comparison refuses a policy before it runs another one") {
  bundle b;
  comparison_options o;
  o.episodes = o.seeds = 1;
  o.percents = {12, 100};
  o.progress = [](std::string const& policy, index_t, std::size_t, std::size_t) {
    FAIL_CHECK("ran " << policy);
  };
  for (std::string const bad : {"vapt", "h2o+snapkv", "random+h2o", "snapkv+tova", ""}) {
    o.policies = {"fullkv", "h2o", bad};
    std::string message;
    try {
      compare(b.rt, b.m, b.set, o);
    } catch (std::invalid_argument const& e) {
      message = e.what();
    }
    INFO(message);
    CHECK(message.rfind("--policies: " + bad + " at 12%: ", 0) == 0);
    CHECK((message.find("expected") != std::string::npos ||
           message.find("allowed: ") != std::string::npos));
  }
}

TEST_CASE("intervals are Student's") {
  estimate const one = estimate_of({0.5});
  CHECK(one.mean == 0.5);
  CHECK(one.half == 0);
  estimate const five = estimate_of({1, 2, 3, 4, 5});
  CHECK(five.mean == Approx(3));
  CHECK(five.half == Approx(2.776 * std::sqrt(2.5 / 5)).epsilon(1e-6));
  CHECK(quick_comparison().policies.size() >= 5);
}
