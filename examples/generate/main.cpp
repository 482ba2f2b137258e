// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Generates text with a Llama-type model at a bounded cache size, and says what that costs and saves.
#include <algorithm>
#include <cstdio>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>

#include "generate/demo.hpp"
#include "generate/file.hpp"
#include "generate/generate.hpp"
#include "generate/job.hpp"
#include "generate/record.hpp"
#include "generate/report.hpp"

namespace kvkeep::generate {

namespace {

/// Writes text as it comes: words where the model has them, else ids.
class printer {
 public:
  explicit printer(model const& m) : model_(m) {}
  void operator()(index_t token) {
    std::string part = model_.text != nullptr ? model_.text->decode(token, last_)
                                              : (last_ < 0 ? "" : ",") + std::to_string(token);
    if (!begun_) part.erase(0, std::min(part.find_first_not_of(' '), part.size()));
    begun_ = begun_ || !part.empty();
    last_ = token;
    std::fwrite(part.data(), 1, part.size(), stdout);
    std::fflush(stdout);
  }
  void end() { std::fputs("\n", stdout); }

 private:
  model const& model_;
  index_t last_ = -1;
  bool begun_ = false;
};

engine_options engine_options_of(arguments const& a, index_t max_prompt, index_t max_tokens) {
  engine_options o;
  o.layout = {layout_of(a.layout), a.block};
  o.chunk = a.chunk;
  o.max_sequences = a.batch;
  o.max_prompt = max_prompt;
  o.max_tokens = max_tokens;
  return o;
}

/// Generates and prints. @return new tokens per sequence
std::vector<token_list> write_text(engine& e, model const& m, job const& j, arguments const& a) {
  printer print(m);
  if (m.text != nullptr && j.task == nullptr)
    for (index_t const t : j.prompt)
      if (t != m.first_token) print(t);
  generation_options g;
  g.tokens = a.tokens;
  g.sampling = a.sampling;
  if (!a.no_stop) g.end_tokens = m.end_tokens;
  g.verify_every = a.verify;
  g.on_token = [&](index_t sequence, index_t token) {
    if (sequence == 0) print(token);
  };
  std::vector<token_list> const prompts(static_cast<std::size_t>(a.batch), j.prompt);
  auto written = generate(e, prompts, g);
  print.end();
  for (std::size_t i = 1; i < written.size(); ++i) {
    std::printf("\n[%zu]\n", i);
    printer other(m);
    for (index_t const t : written[i]) other(t);
    other.end();
  }
  return written;
}

std::string text_of(model const& m, std::vector<index_t> const& tokens) {
  std::string text;
  index_t last = -1;
  for (index_t const t : tokens) {
    if (m.text != nullptr) text += m.text->decode(t, last);
    last = t;
  }
  return text;
}

/// What the engine and the text say once all is written.
void fill(run_figures& f, model const& m, job const& j) {
  for (auto const& w : f.written) {  // the last token was not fed
    std::size_t const fed = j.prompt.size() + std::max(w.size(), std::size_t{1}) - 1;
    f.full_bytes += product(fed, m.config.n_layers, m.config.n_kv_heads) * f.usage.slot_bytes;
  }
  f.prompt = j.prompt;
  f.text = text_of(m, f.written[0]);
  if (j.task == nullptr) return;
  for (episode_check const& c : j.task->checks) {
    ++f.checks;
    f.checks_held += holds_freely(*j.task, c, f.written[0]) ? 1 : 0;
  }
}

/// A budget beyond the sequence evicts nothing; the cache need not be larger for it.
index_t most_useful(policy_request const& r, index_t length) {
  return std::max(length, r.window.value_or(0) + r.sinks.value_or(most_default_sinks) + 1);
}

void run(arguments a) {
  if (!a.json.empty()) check_writable(a.json);
  model const m = load_model(a.model, a.tokenizer);
  job const j = read_job(a, m);
  index_t const context = m.config.context;
  auto const n_prompt = static_cast<index_t>(j.prompt.size());
  a.tokens = tokens_of(a, j, context);
  index_t const length = n_prompt + a.tokens;
  a.policy.capacity = std::min(capacity_of(a.budget, length), most_useful(a.policy, length));
  if (a.budget.back() == '%')
    a.policy.budget = a.budget + " of " + std::to_string(length) + " tokens";
  a.policy.rope_base = m.config.rope_base;
  policy_pair const policies = make_policies(a.policy);
  check_context(policies, n_prompt, length, context);

  runtime rt(a.threads);
  engine_options o = engine_options_of(a, std::min(n_prompt, context), length);
  std::unique_ptr<trace_recorder> recorder;
  if (!a.record.empty()) {
    recorder = std::make_unique<trace_recorder>(a.policy, policies, m.config);
    check_record_folder(a.record);
    o.observer = recorder.get();
  }
  engine e(rt, m, recorder != nullptr ? recorder->watched(policies) : policies, o);
  if (recorder != nullptr) recorder->watch(e);

  run_figures f;
  f.model_file = a.model;
  f.policy = a.policy.policy;
  f.evicts = policies.cuts_prompt() || policies.cuts_decode();
  f.layout = a.layout;
  f.capacity = a.policy.capacity;
  f.slots_per_head = e.slots_per_head();
  f.threads = a.threads;
  f.written = write_text(e, m, j, a);
  f.usage = e.usage();
  fill(f, m, j);
  if (!a.quiet) print_report(f);
  if (!a.json.empty()) write_whole(a.json, to_json(f));
  if (recorder != nullptr) recorder->write(a.record);
}

/// Runs and prints a comparison; says on stderr what is under way.
void run_comparison(runtime& rt, model const& m, episode_set const& set, comparison_options o,
                    arguments const& a) {
  if (!a.policies.empty()) o.policies = a.policies;
  if (!a.percents.empty()) o.percents = a.percents;
  o.progress = [](std::string const& policy, index_t percent, std::size_t done, std::size_t all) {
    std::fprintf(stderr, "\r%3zu of %zu: %-20s %3d%% ", done + 1, all, policy.c_str(), percent);
  };
  auto const rows = compare(rt, m, set, o);
  std::fprintf(stderr, "\r%50s\r", "");
  std::fputs(comparison_text(rows).c_str(), stdout);
  if (!a.json.empty()) write_whole(a.json, comparison_json(rows));
  if (!a.csv.empty()) write_whole(a.csv, comparison_csv(rows));
}

/// Comparisons and the demonstration run on the episodes beside the model.
void run_episodes(arguments const& a) {
  for (std::string const& file : {a.json, a.csv})
    if (!file.empty()) check_writable(file);
  model const m = load_model(a.model, a.tokenizer);
  episode_set const set = read_episodes(a.model, m);
  runtime rt(a.threads);
  if (a.demo) {
    show_long_response(rt, m, set);
    std::printf("\nThe same on more episodes and tasks, at equal numbers of slots:\n");
  }
  run_comparison(rt, m, set, a.demo || a.quick ? quick_comparison() : comparison_options{}, a);
  if (a.demo)
    std::printf(
        "\nNext: kvkeep-generate --model %s --compare (all policies and budgets, minutes);\n"
        "      --task diary:3 --policy snapkv+morphkv --budget 20%% (one response); --help.\n",
        a.model.c_str());
}

}  // namespace
}  // namespace kvkeep::generate

/// Exit code 0; 1: a call or a check of the library failed; 2: bad input.
int main(int argc, char** argv) {
  kvkeep::generate::arguments a;
  if (int const code = kvkeep::generate::parse(argc, argv, a); code >= 0) return code;
  try {
    a.compare || a.demo ? kvkeep::generate::run_episodes(a) : kvkeep::generate::run(a);
    return 0;
  } catch (kvkeep::generate::bad_input const& e) {
    std::fprintf(stderr, "kvkeep-generate: %s\n", e.what());
  } catch (std::invalid_argument const& e) {  // what a session refuses when it is bound, too
    std::fprintf(stderr, "kvkeep-generate: %s\n", e.what());
  } catch (std::bad_alloc const&) {
    std::fprintf(stderr,
                 "kvkeep-generate: --budget, --tokens, --batch: more memory than there is\n");
  } catch (std::exception const& e) {
    std::fprintf(stderr, "kvkeep-generate: %s\n", e.what());
    return 1;
  }
  return 2;
}
