// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "generate/job.hpp"

#include <algorithm>
#include <charconv>

#include "generate/file.hpp"
#include "generate/sha256.hpp"

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

}  // namespace

namespace {

/// Ids mean something only with the words that they were made from.
void check_words(std::string const& file, episode_set const& set, model const& m) {
  auto const* const words = dynamic_cast<word_tokenizer const*>(m.text.get());
  if (words == nullptr) return;
  std::string list;
  for (std::string const& w : words->words()) list += (list.empty() ? "" : "\n") + w;
  if (sha256(list) != set.vocabulary_sha256)
    throw bad_input(file, "vocabulary_sha256", "made for other words than the model's");
}

}  // namespace

episode_set read_episodes(std::string const& model_file, model const& m) {
  auto const file = std::filesystem::path(model_file).parent_path() / "episodes.json";
  episode_set set = load_episodes(file, m.config.vocabulary);
  check_words(file.string(), set, m);
  return set;
}

job read_job(arguments const& a, model const& m) {
  job j;
  if (a.prompt.empty() && a.prompt_ids.empty() && a.task.empty())
    throw bad_input("--prompt: expected a text, or --prompt-ids or --task");
  if (!a.task.empty()) {
    j.set = read_episodes(a.model, m);
    j.task = &find_episode(j.set, a.task);
    j.prompt = j.task->prompt;
  } else if (!a.prompt_ids.empty()) {
    j.prompt = parse_ids(a.prompt_ids);
  } else {
    if (m.text == nullptr)
      throw bad_input(a.model, "tokenizer", "none: use --prompt-ids, or --tokenizer FILE");
    if (m.first_token >= 0) j.prompt.push_back(m.first_token);
    auto const ids = m.text->encode(a.prompt);
    j.prompt.insert(j.prompt.end(), ids.begin(), ids.end());
  }
  if (j.prompt.empty()) throw bad_input("--prompt", a.prompt, "no token of the model in it");
  for (index_t const t : j.prompt)
    if (t < 0 || t >= m.config.vocabulary)
      throw bad_input("--prompt-ids", std::to_string(t),
                      "expected token ids 0.." + std::to_string(m.config.vocabulary - 1));
  return j;
}

index_t tokens_of(arguments const& a, job const& j, index_t context) {
  if (a.tokens > 0) return a.tokens;
  if (j.task != nullptr) return static_cast<index_t>(j.task->response.size());
  return std::clamp(context - static_cast<index_t>(j.prompt.size()), 1, 256);
}

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

}  // namespace kvkeep::generate
