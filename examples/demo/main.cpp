// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Replays recorded attention of a trained model under every policy, at equal bytes.
#include <algorithm>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>

#include "report.hpp"

namespace {

using namespace kvkeep;
using namespace kvkeep::demo;

struct arguments {
  std::string data = KVKEEP_DEMO_DATA;
  std::vector<index_t> budgets{24, 48, 96};
  std::string json;
};

void check_budgets(arguments& a, trace const& t) {
  std::sort(a.budgets.begin(), a.budgets.end());
  a.budgets.erase(std::unique(a.budgets.begin(), a.budgets.end()), a.budgets.end());
  for (index_t const b : a.budgets)
    if (b < 16 || b >= t.prompt())
      throw std::runtime_error("--budget: " + std::to_string(b) + ": expected 16.." +
                               std::to_string(t.prompt() - 1) + " (the prompt has " +
                               std::to_string(t.prompt()) + " tokens)");
}

/// One policy through all traces; refusals name it.
std::vector<outcome> replay_all(contestant const& c, std::vector<trace> const& traces,
                                std::vector<full_attention> const& full) try {
  std::vector<outcome> outcomes;
  for (std::size_t i = 0; i < traces.size(); ++i) outcomes.push_back(replay(c, traces[i], full[i]));
  return outcomes;
} catch (std::exception const& e) {
  throw std::runtime_error(c.name + ": " + e.what());
}

std::vector<result> compare(index_t budget, std::vector<trace> const& traces,
                            std::vector<full_attention> const& full) {
  std::fprintf(stderr, "replaying with %d tokens per KV head ", budget);
  std::vector<result> rows;
  for (contestant const& c : make_contestants(traces[0], budget)) {
    rows.push_back(summarize(c, budget, traces, replay_all(c, traces, full)));
    std::fputc('.', stderr);
  }
  std::fputc('\n', stderr);
  return rows;
}

int run(arguments a) {
  std::vector<trace> const traces = load_traces(a.data);
  trace const& first = traces.front();
  check_budgets(a, first);
  std::string names;
  for (trace const& t : traces) names += (names.empty() ? "" : ", ") + t.name;
  std::printf(
      "Recorded attention of a small trained model (%d layers, %d query heads, %d KV heads, "
      "%d features),\nreplayed under every policy at equal bytes of K and V. %zu sequences: %s.\n",
      first.n_layers(), first.n_q_heads, first.n_kv_heads, first.dim_k, traces.size(),
      names.c_str());
  std::fflush(stdout);
  std::vector<full_attention> const full(traces.begin(), traces.end());
  std::vector<result> all;
  for (index_t const budget : a.budgets) {
    std::vector<result> const rows = compare(budget, traces, full);
    print_table(rows, first);
    std::fflush(stdout);
    all.insert(all.end(), rows.begin(), rows.end());
  }
  print_legend(first);
  if (!a.json.empty()) write_json(a.json, all);
  std::vector<std::string> const wrong = violations(all, first);
  for (auto const& line : wrong) std::fprintf(stderr, "kvkeep-demo: wrong: %s\n", line.c_str());
  return wrong.empty() ? 0 : 1;
}

}  // namespace

/// Exit code 0; 1: a figure is not what it has to be; 2: bad arguments or data.
int main(int argc, char** argv) {
  arguments a;
  CLI::App app("Replays recorded attention of a trained model under every policy, at equal bytes.",
               "kvkeep-demo");
  app.add_option("--data", a.data, "folder of traces, one folder each")->capture_default_str();
  app.add_option("--budget", a.budgets, "tokens per KV head, as in 24,48,96")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--json", a.json, "file for the figures");
  try {
    app.parse(argc, argv);
  } catch (CLI::ParseError const& e) {
    if (e.get_exit_code() == 0) return app.exit(e);
    std::fprintf(stderr, "kvkeep-demo: %s\n", e.what());
    return 2;
  }
  try {
    return run(a);
  } catch (std::exception const& e) {
    std::fprintf(stderr, "kvkeep-demo: %s\n", e.what());
    return 2;
  }
}
