// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "generate/options.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <limits>
#include <stdexcept>

#include <CLI/CLI.hpp>

namespace kvkeep::generate {

namespace {

void add_model_options(CLI::App& app, arguments& a) {
  app.add_option("--model", a.model, "GGUF file (F32, F16, Q8_0) or llama2.c checkpoint")
      ->required();
  app.add_option("--tokenizer", a.tokenizer, "llama2.c tokenizer file");
  auto* const prompt = app.add_option("--prompt", a.prompt, "text");
  auto* const ids = app.add_option("--prompt-ids", a.prompt_ids, "token ids, as in 1,5,7");
  auto* const task = app.add_option("--task", a.task,
                                    "NAME[:INDEX], an episode of episodes.json beside the model");
  prompt->excludes(ids)->excludes(task);
  ids->excludes(task);
}

void add_policy_options(CLI::App& app, arguments& a) {
  app.add_option("--policy", a.policy.policy,
                 "a policy's name, or PROMPT+DECODE as in snapkv+morphkv")
      ->capture_default_str();
  app.add_option("--budget", a.budget, "tokens kept per KV head, or N% of the final length")
      ->capture_default_str();
  app.add_option("--window", a.policy.window,
                 "recent tokens; default a quarter of the budget, at most 32");
  app.add_option("--sinks", a.policy.sinks, "first tokens that stay");
  app.add_option("--fusion", a.fusion, "MorphKV: sum or max")->check(CLI::IsMember({"sum", "max"}));
  app.add_option("--morph-rows", a.rows,
                 "MorphKV: victims from bounds, from cached rows, or from keys and queries")
      ->check(CLI::IsMember({"lazy", "cached", "direct"}));
  app.add_option("--evict-after", a.policy.evict_after,
                 "evict in bursts at this multiple of the budget");
  app.add_option("--layer-budget", a.policy.layer_budget, "how layers and heads share the budget")
      ->check(CLI::IsMember({"uniform", "pyramid", "dynamic", "ada"}));
  app.add_option("--granularity", a.granularity, "one kept set per head, layer or sequence")
      ->check(CLI::IsMember({"head", "layer", "sequence"}))
      ->capture_default_str();
}

void add_run_options(CLI::App& app, arguments& a) {
  auto const positive = CLI::Range(1, std::numeric_limits<index_t>::max() / 2);
  app.add_option("--layout", a.layout, "of the cache")
      ->check(CLI::IsMember({"contiguous", "paged", "ragged"}))
      ->capture_default_str();
  app.add_option("--block", a.block, "slots per block (paged)")
      ->check(positive)
      ->capture_default_str();
  app.add_option("--chunk", a.chunk, "prompt tokens computed at a time")
      ->check(positive)
      ->capture_default_str();
  app.add_option("--batch", a.batch, "sequences with the same prompt, seeds seed, seed + 1, ...")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  app.add_option("--tokens", a.tokens, "new tokens; default what the context leaves, at most 256")
      ->check(positive);
  app.add_option("--threads", a.threads, "threads")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  app.add_option("--temperature", a.sampling.temperature, "0: the best token")
      ->check(CLI::Range(0.0, 100.0))
      ->capture_default_str();
  app.add_option("--top-p", a.sampling.top_p, "smallest set of tokens with this probability")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  app.add_option("--seed", a.sampling.seed, "of the draws")
      ->check([](std::string const& text) {  // CLI11 would take -1 for the largest one
        return text.find('-') == text.npos ? std::string{} : text + ": expected at least 0";
      })
      ->capture_default_str();
  app.add_flag("--no-stop", a.no_stop, "go on behind the model's end token");
  app.add_flag("--quiet", a.quiet, "text only");
  app.add_option("--verify", a.verify, "check the session's state every N steps")->check(positive);
  app.add_option("--json", a.json, "file for the figures");
  app.add_option("--record", a.record,
                 "new folder: the first sequence as cases for kvkeep-replay, one per layer");
}

void add_comparison_options(CLI::App& app, arguments& a) {
  auto* const compare =
      app.add_flag("--compare", a.compare, "all policies on the episodes beside the model");
  app.add_flag("--quick", a.quick, "fewer policies, budgets and episodes, one kind of table")
      ->needs(compare);
  app.add_option("--policies", a.policies, "of the comparison, as in fullkv,random,oracle,morphkv")
      ->delimiter(',')
      ->needs(compare);
  app.add_option("--percents", a.percents, "budgets of the comparison, as in 12,25,50")
      ->delimiter(',')
      ->check(CLI::Range(1, 100))
      ->needs(compare);
  app.add_option("--csv", a.csv, "file for the comparison")->needs(compare);
  app.add_flag("--demo", a.demo, "a long response under three policies, then a quick comparison")
      ->excludes(compare);
}

/// What a comparison and the demonstration would pass over without a word. (CLI11's `excludes` says the same, but on
/// every line of the help.)
void check_mode(CLI::App const& app, arguments const& a) {
  std::vector<std::string> const read{"--model", "--tokenizer", "--threads",  "--json", "--compare",
                                      "--quick", "--policies",  "--percents", "--csv",  "--demo"};
  if (!a.compare && !a.demo) return;
  for (CLI::Option const* const o : app.get_options())
    if (o->count() > 0 && std::find(read.begin(), read.end(), o->get_name()) == read.end())
      throw CLI::ValidationError(
          o->get_name(), std::string("not an option of ") + (a.compare ? "--compare" : "--demo"));
}

/// CLI::Range lets NaN pass.
void check_sampling(sampling_options const& o) {
  if (std::isnan(o.temperature))
    throw CLI::ValidationError("--temperature", "nan: expected 0..100");
  if (std::isnan(o.top_p)) throw CLI::ValidationError("--top-p", "nan: expected 0..1");
}

}  // namespace

int parse(int argc, char** argv, arguments& a) {
  CLI::App app("Generates with a Llama-type model at a bounded cache size.", "kvkeep-generate");
  add_model_options(app, a);
  add_policy_options(app, a);
  add_run_options(app, a);
  add_comparison_options(app, a);
  std::string names;
  list_policies(
      [&](policy_info const& p) { names += std::string(names.empty() ? "" : ", ") + p.name; });
  app.footer("Policies: " + names + ".\nExit: 0 done, 1 a check failed, 2 bad input.");
  try {
    app.parse(argc, argv);
    check_mode(app, a);
    check_sampling(a.sampling);
  } catch (CLI::ParseError const& e) {
    if (e.get_exit_code() == 0) return app.exit(e);
    std::fprintf(stderr, "kvkeep-generate: %s\n", e.what());
    return 2;
  }
  if (!a.fusion.empty()) a.policy.fusion = a.fusion == "max" ? reduction::max : reduction::sum;
  if (!a.rows.empty())
    a.policy.rows = a.rows == "lazy"     ? morph_rows::lazy
                    : a.rows == "direct" ? morph_rows::direct
                                         : morph_rows::cached;
  a.policy.granularity = a.granularity == "head"    ? scope::head
                         : a.granularity == "layer" ? scope::layer
                                                    : scope::sequence;
  return -1;
}

index_t capacity_of(std::string const& budget, index_t final_length) {
  bool const share = !budget.empty() && budget.back() == '%';
  double value = 0;
  char const* const end = budget.data() + budget.size() - (share ? 1 : 0);
  auto const [stop, error] = std::from_chars(budget.data(), end, value);
  double const tokens = share ? std::round(value * final_length / 100) : value;
  if (error != std::errc{} || stop != end || !(tokens >= 1) || tokens > most_tokens ||
      tokens != std::floor(tokens))
    throw std::invalid_argument("--budget: " + budget + ": expected tokens, 1.." +
                                std::to_string(most_tokens) + ", or a share such as 25%");
  return static_cast<index_t>(tokens);
}

layout_kind layout_of(std::string const& name) {
  return name == "paged"    ? layout_kind::paged
         : name == "ragged" ? layout_kind::ragged
                            : layout_kind::strided;
}

}  // namespace kvkeep::generate
