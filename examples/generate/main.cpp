// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Generates text with a Llama-type model at a bounded cache size, and says what that costs and saves.
#include <charconv>
#include <cstdio>
#include <exception>
#include <new>
#include <stdexcept>

#include "generate/episodes.hpp"
#include "generate/file.hpp"
#include "generate/generate.hpp"
#include "generate/options.hpp"
#include "generate/report.hpp"

namespace kvkeep::generate {

namespace {

std::vector<index_t> parse_ids(std::string const& list) {
  std::vector<index_t> ids;
  for (std::size_t at = 0; at <= list.size();) {
    std::size_t const end = std::min(list.find(',', at), list.size());
    index_t id = 0;
    auto const [stop, error] = std::from_chars(list.data() + at, list.data() + end, id);
    if (error != std::errc{} || stop != list.data() + end)
      throw bad_input("--prompt-ids", list.substr(at, end - at), "expected token ids, as in 1,5,7");
    ids.push_back(id);
    at = end + 1;
  }
  return ids;
}

/// What is to be generated behind.
struct job {
  std::vector<index_t> prompt;
  episode_set set;
  episode const* task = nullptr;
};

job read_job(arguments const& a, model const& m) {
  job j;
  if (!a.task.empty()) {
    j.set = load_episodes(std::filesystem::path(a.model).parent_path() / "episodes.json",
                          m.config.vocabulary);
    j.task = &find_episode(j.set, a.task);
    j.prompt = j.task->prompt;
  } else if (!a.prompt_ids.empty()) {
    j.prompt = parse_ids(a.prompt_ids);
  } else {
    if (m.text == nullptr && !a.prompt.empty())
      throw bad_input(a.model, "tokenizer", "none: use --prompt-ids, or --tokenizer FILE");
    if (m.first_token >= 0) j.prompt.push_back(m.first_token);
    if (!a.prompt.empty()) {
      auto const ids = m.text->encode(a.prompt);
      j.prompt.insert(j.prompt.end(), ids.begin(), ids.end());
    }
  }
  if (j.prompt.empty())
    throw bad_input("--prompt", "text", "expected --prompt, --prompt-ids or --task");
  for (index_t const t : j.prompt)
    if (t < 0 || t >= m.config.vocabulary)
      throw bad_input("--prompt-ids", std::to_string(t),
                      "expected token ids 0.." + std::to_string(m.config.vocabulary - 1));
  return j;
}

/// New tokens: what was asked for, or what the reference or the context suggests.
index_t tokens_of(arguments const& a, job const& j, index_t context) {
  if (a.tokens > 0) return a.tokens;
  if (j.task != nullptr) return static_cast<index_t>(j.task->response.size());
  return std::clamp(context - static_cast<index_t>(j.prompt.size()), 1, 256);
}

/// A cache that only grows ends with the model's context; one that evicts may go on.
void check_context(policy_pair const& p, index_t prompt, index_t final_length, index_t context) {
  if (p.cuts_decode() || final_length <= context) return;
  if (prompt > context)
    throw bad_input("--prompt", std::to_string(prompt) + " tokens",
                    "the model's context has " + std::to_string(context) + ", and " + p.name +
                        " does not evict while it goes on");
  throw bad_input("--tokens", std::to_string(final_length - prompt),
                  "expected at most " + std::to_string(context - prompt) +
                      ": the model's context has " + std::to_string(context) + ", and " + p.name +
                      " does not evict while it goes on");
}

/// Writes text as it comes.
class printer {
 public:
  explicit printer(model const& m) : model_(m) {}
  void operator()(index_t token) {
    std::string part = model_.text != nullptr ? model_.text->decode(token, last_)
                                              : (last_ < 0 ? "" : ",") + std::to_string(token);
    if (text.empty()) part.erase(0, part.find_first_not_of(' '));
    last_ = token;
    text += part;
    std::fwrite(part.data(), 1, part.size(), stdout);
    std::fflush(stdout);
  }
  void end() { std::fputs("\n", stdout); }
  std::string text;

 private:
  model const& model_;
  index_t last_ = -1;
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

void print_others(model const& m, std::vector<std::vector<index_t>> const& written) {
  for (std::size_t i = 1; i < written.size(); ++i) {
    std::printf("\n[%zu]\n", i);
    printer print(m);
    for (index_t const t : written[i]) print(t);
    print.end();
  }
}

void run(arguments a) {
  if (!a.json.empty()) check_writable(a.json);
  model const m = load_model(a.model, a.tokenizer);
  job const j = read_job(a, m);
  auto const n_prompt = static_cast<index_t>(j.prompt.size());
  index_t const tokens = tokens_of(a, j, m.config.context), length = n_prompt + tokens;
  a.policy.capacity = capacity_of(a.budget, length);
  policy_pair const policies = make_policies(a.policy);
  check_context(policies, n_prompt, length, m.config.context);

  runtime rt(a.threads);
  engine e(rt, m, policies, engine_options_of(a, std::min(n_prompt, m.config.context), length));
  printer print(m);
  if (m.text != nullptr && !a.prompt.empty())
    for (index_t const t : j.prompt)
      if (t != m.first_token) print(t);
  generation_options g;
  g.tokens = tokens;
  g.sampling = a.sampling;
  if (!a.no_stop) g.end_tokens = m.end_tokens;
  g.verify_every = a.verify;
  g.on_token = [&](index_t sequence, index_t token) {
    if (sequence == 0) print(token);
  };
  std::vector<std::vector<index_t>> const prompts(static_cast<std::size_t>(a.batch), j.prompt);
  run_figures f;
  f.written = generate(e, prompts, g);
  print.end();
  print_others(m, f.written);

  f.model_file = a.model;
  f.policy = a.policy.policy;
  f.evicts = policies.cuts_prompt() || policies.cuts_decode();
  f.layout = a.layout;
  f.capacity = a.policy.capacity;
  f.slots_per_head = e.slots_per_head();
  f.threads = a.threads;
  f.prompt = j.prompt;
  f.text = m.text != nullptr ? print.text : "";
  f.usage = e.usage();
  for (auto const& w : f.written) {  // the last token was not fed
    std::size_t const fed = j.prompt.size() + std::max(w.size(), std::size_t{1}) - 1;
    f.full_bytes += product(fed, m.config.n_layers, m.config.n_kv_heads) * f.usage.slot_bytes;
  }
  if (j.task != nullptr)
    for (episode_check const& c : j.task->checks) {
      ++f.checks;
      f.checks_held += holds_freely(*j.task, c, f.written[0]) ? 1 : 0;
    }
  if (!a.quiet) print_report(f);
  if (!a.json.empty()) write_whole(a.json, to_json(f));
}

}  // namespace
}  // namespace kvkeep::generate

/// Exit code 0; 1: a call or a check of the library failed; 2: bad input.
int main(int argc, char** argv) {
  kvkeep::generate::arguments a;
  if (int const code = kvkeep::generate::parse(argc, argv, a); code >= 0) return code;
  try {
    kvkeep::generate::run(a);
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
