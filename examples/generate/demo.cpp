// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "generate/demo.hpp"

#include <algorithm>
#include <cstdio>
#include <stdexcept>

namespace kvkeep::generate {

namespace {

/// Writes words as they come, in lines of at most `width` columns.
class wrapped_text {
 public:
  explicit wrapped_text(tokenizer const& words) : words_(words) {}
  ~wrapped_text() { std::printf("\n"); }

  void operator()(index_t token) {
    std::string part = words_.decode(token, last_);
    last_ = token;
    if (part.empty()) return;
    if (column_ + part.size() > width && part.front() == ' ') {  // signs stay with their word
      std::printf("\n");
      column_ = 0;
    }
    if (column_ == 0) {
      part.erase(0, std::min(part.find_first_not_of(' '), part.size()));
      part = "  " + part;
    }
    column_ += part.size();
    std::fputs(part.c_str(), stdout);
    std::fflush(stdout);
  }

 private:
  static constexpr std::size_t width = 100;
  tokenizer const& words_;
  index_t last_ = -1;
  std::size_t column_ = 0;
};

/// "3, 7 to 9" of ascending numbers.
std::string ranges(std::vector<index_t> const& numbers) {
  std::string text;
  for (std::size_t i = 0; i < numbers.size();) {
    std::size_t last = i;
    while (last + 1 < numbers.size() && numbers[last + 1] == numbers[last] + 1) ++last;
    text += (text.empty() ? "" : ", ") + std::to_string(numbers[i]);
    if (last > i) text += (last > i + 1 ? " to " : ", ") + std::to_string(numbers[last]);
    i = last + 1;
  }
  return text;
}

void report(episode const& e, token_list const& written, engine_usage const& u,
            std::size_t full_bytes) {
  std::vector<index_t> wrong;
  for (episode_check const& c : e.checks)
    if (!holds_freely(e, c, written)) wrong.push_back(c.entry);
  std::sort(wrong.begin(), wrong.end());
  wrong.erase(std::unique(wrong.begin(), wrong.end()), wrong.end());
  std::printf(
      "  -> %zu of %zu entries as instructed%s%s; keys and values: %zu KB at most (%.0f%% of "
      "all)\n",
      e.checks.size() - wrong.size(), e.checks.size(),
      wrong.empty() ? "" : ", wrong or missing: day ", ranges(wrong).c_str(), u.peak_bytes() / 1024,
      100 * static_cast<double>(u.peak_bytes()) / static_cast<double>(full_bytes));
}

}  // namespace

void show_long_response(runtime& rt, model const& m, episode_set const& set) {
  auto const diary = std::find_if(set.episodes.begin(), set.episodes.end(),
                                  [](episode const& e) { return e.task == "diary"; });
  if (diary == set.episodes.end() || m.text == nullptr)
    throw std::invalid_argument("--demo: expected a model with words and a diary in episodes.json");
  std::printf("The instructions, given once:\n\n");
  {
    wrapped_text print(*m.text);
    for (index_t const t : diary->prompt)
      if (t != m.first_token) print(t);
  }
  auto const length = static_cast<index_t>(diary->prompt.size() + diary->response.size());
  for (char const* name : {"fullkv", "morphkv", "streamingllm"}) {
    bool const full = std::string_view(name) == "fullkv";
    policy_request r;
    r.policy = name;
    r.capacity = full ? length : length / 2;
    engine_options o;
    o.max_prompt = static_cast<index_t>(diary->prompt.size());
    o.max_tokens = length + 8;
    engine e(rt, m, make_policies(r), o);
    std::printf("\n%s, %s:\n\n", name,
                full ? "all tokens" : (std::to_string(r.capacity) + " tokens per KV head").c_str());
    generation_options g;
    g.tokens = static_cast<index_t>(diary->response.size()) + 8;
    g.end_tokens = m.end_tokens;
    token_list written;
    {
      wrapped_text print(*m.text);
      g.on_token = [&](index_t, index_t token) { print(token); };
      written = generate(e, std::span(&diary->prompt, 1), g)[0];
    }
    engine_usage const u = e.usage();
    report(*diary, written, u,
           static_cast<std::size_t>(length) * u.slot_bytes *
               static_cast<std::size_t>(m.config.n_layers * m.config.n_kv_heads));
  }
}

comparison_options quick_comparison() {
  comparison_options o;
  o.policies = {"fullkv", "random", "streamingllm", "h2o", "tova", "morphkv", "snapkv+morphkv"};
  o.percents = {25, 50};
  o.episodes = 1;
  o.bucket = 0;
  return o;
}

}  // namespace kvkeep::generate
