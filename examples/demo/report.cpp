// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "report.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <map>
#include <stdexcept>

#include <nlohmann/json.hpp>

namespace kvkeep::demo {

namespace {

double median(std::vector<double> v) {
  auto const mid = v.begin() + static_cast<std::ptrdiff_t>(v.size() / 2);
  std::nth_element(v.begin(), mid, v.end());
  return *mid;
}

nlohmann::json to_json(quality const& q) {
  return {{"relative_error", q.error}, {"attention_mass_kept", q.mass}};
}

result const& find(std::vector<result> const& rows, bool (*is)(result const&)) {
  return *std::find_if(rows.begin(), rows.end(), is);
}

}  // namespace

result summarize(contestant const& c, index_t budget, std::vector<trace> const& traces,
                 std::vector<outcome> outcomes) {
  result r;
  r.policy = c.name;
  r.evicts = c.evicts;
  r.random = c.random;
  r.budget = c.evicts ? budget : traces[0].tokens;
  double const share = 1.0 / static_cast<double>(traces.size());
  std::vector<double> step, plain;
  std::int64_t slots = 0;
  for (std::size_t i = 0; i < traces.size(); ++i) {
    outcome const& o = outcomes[i];
    for (auto [to, from] : {std::pair{&r.all, &o.all}, std::pair{&r.answers, &o.answers}}) {
      to->error += share * from->error;
      to->mass += share * from->mass;
    }
    slots = std::max(slots, o.peak_slots);
    r.state_bytes = std::max(r.state_bytes, o.state_bytes);
    step.insert(step.end(), o.step_us.begin(), o.step_us.end());
    plain.insert(plain.end(), o.plain_us.begin(), o.plain_us.end());
    r.traces.emplace_back(traces[i].name, std::move(outcomes[i]));
  }
  auto const row_bytes =
      static_cast<std::size_t>(traces[0].dim_k + traces[0].dim_v) * sizeof(float);
  r.kv_bytes = static_cast<std::size_t>(slots) * row_bytes;
  r.decision_us = std::max(0.0, median(std::move(step)) - median(std::move(plain)));
  return r;
}

void print_table(std::vector<result> rows, trace const& t) {
  std::stable_sort(rows.begin(), rows.end(), [](result const& a, result const& b) {
    return a.evicts != b.evicts ? !a.evicts : a.all.mass > b.all.mass;
  });
  result const& most = find(rows, [](result const& r) { return r.evicts && !r.random; });
  result const& random = find(rows, [](result const& r) { return r.random; });
  auto const sure =
      std::min_element(rows.begin(), rows.end(), [](result const& a, result const& b) {
        return a.evicts != b.evicts ? a.evicts : a.answers.error < b.answers.error;
      });
  std::printf(
      "\n%d of %d tokens per KV head: every policy holds %zu bytes of K and V, %.0f%% of all\n",
      most.budget, t.tokens, most.kv_bytes, 100.0 * most.budget / t.tokens);
  std::printf(
      "Most attention mass kept: %s, %.0f%% (random eviction: %.0f%%). Least error at answers: "
      "%s.\n\n",
      most.policy.c_str(), 100 * most.all.mass, 100 * random.all.mass, sure->policy.c_str());
  std::printf("%-32s %6s %7s %7s | %-15s | %-15s | %8s\n", "", "", "KV", "state", "  all steps",
              "  at answers", "us per");
  std::printf("%-32s %6s %7s %7s | %7s %7s | %7s %7s | %8s\n", "policy", "tokens", "bytes", "bytes",
              "mass", "error", "mass", "error", "decision");
  for (result const& r : rows)
    std::printf("%-32s %6d %7zu %7zu | %6.1f%% %7.3f | %6.1f%% %7.3f | %8.2f\n", r.policy.c_str(),
                r.budget, r.kv_bytes, r.state_bytes, 100 * r.all.mass, r.all.error,
                100 * r.answers.mass, r.answers.error, r.decision_us);
}

void print_legend(trace const& t) {
  std::printf(
      "\nPrompt: the first %d tokens. Then %d tokens are decoded one by one with the recorded "
      "queries,\n"
      "keys and values, whatever was evicted before (teacher forcing).\n"
      "  tokens    slots per KV head, the current token's included, mean over heads and layers\n"
      "  KV bytes  most slots in use while decoding, all layers and heads, times a row's bytes "
      "(fp32)\n"
      "  state     bytes that the session holds of a sequence besides K and V, positions "
      "included,\n"
      "            in a cache with room for the longest head\n"
      "  mass      share of full attention's probability on the tokens that are still there\n"
      "  error     |output - full output| / |full output| of the library's attention; both are "
      "means\n"
      "            over steps, layers, query heads and sequences; \"at answers\" counts only the "
      "steps\n"
      "            whose query has to look up an answer\n"
      "  us        append + attend + confirm minus attention alone over as many slots: medians "
      "over\n"
      "            decoded tokens, per layer; the cut of the prompt is not in it\n"
      "  X, then Y X cuts the prompt only; Y holds the size while decoding and keeps uneven "
      "budgets\n"
      "morphkv keeps the attention weights of its window per slot (state); \"recomputed\" reads K "
      "again.\n"
      "pyramidkv is flat, by its rule, where the prompt is shorter than twice (budget - window).\n"
      "Windows: a quarter of the budget (h2o: half). Sinks: 4 for streamingllm, lagkv and "
      "expected_attention, else none.\n",
      t.prompt(), t.tokens - t.prompt());
}

void write_json(std::filesystem::path const& file, std::vector<result> const& rows) {
  nlohmann::json list = nlohmann::json::array();
  for (result const& r : rows) {
    nlohmann::json j = {{"policy", r.policy},           {"budget_tokens", r.budget},
                        {"evicts", r.evicts},           {"kv_bytes", r.kv_bytes},
                        {"state_bytes", r.state_bytes}, {"decision_us", r.decision_us},
                        {"all_steps", to_json(r.all)},  {"answers", to_json(r.answers)}};
    for (auto const& [name, o] : r.traces)
      j["traces"][name] = {{"all_steps", to_json(o.all)}, {"answers", to_json(o.answers)}};
    list.push_back(std::move(j));
  }
  std::ofstream out(file);
  out << nlohmann::json{{"rows", std::move(list)}}.dump(2) << '\n';
  if (!out.flush()) throw std::runtime_error(file.string() + ": file: cannot be written");
}

std::vector<std::string> violations(std::vector<result> const& rows, trace const& t) {
  std::vector<std::string> list;
  auto const row_bytes = static_cast<std::size_t>(t.dim_k + t.dim_v) * sizeof(float);
  std::map<std::string, result const*> smaller;
  for (result const& r : rows) {
    std::string const name = r.policy + " with " + std::to_string(r.budget) + " tokens";
    auto const most = row_bytes * static_cast<std::size_t>(r.budget) *
                      static_cast<std::size_t>(t.n_layers()) *
                      static_cast<std::size_t>(t.n_kv_heads);
    if (r.kv_bytes > most)
      list.push_back(name + " holds " + std::to_string(r.kv_bytes) + " bytes, more than " +
                     std::to_string(most));
    if (!r.evicts && (r.all.error > 1e-5 || std::abs(r.all.mass - 1) > 1e-9))
      list.push_back(name + " differs from full attention");
    result const*& before = smaller[r.policy];
    if (before != nullptr && r.all.mass < before->all.mass - 1e-9)
      list.push_back(name + " keeps less mass than with " + std::to_string(before->budget));
    before = &r;
  }
  return list;
}

}  // namespace kvkeep::demo
