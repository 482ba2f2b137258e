// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "generate/episodes.hpp"

#include <algorithm>
#include <charconv>
#include <fstream>

#include <nlohmann/json.hpp>

#include "generate/file.hpp"

namespace kvkeep::generate {

namespace {

using nlohmann::json;

/// Reads fields of one JSON object; every error names the file and the field.
class fields {
 public:
  fields(std::string const& file, std::string prefix, json const& object)
      : file_(file), prefix_(std::move(prefix)), object_(object) {
    if (!object.is_object()) throw bad_input(file_, prefix_, "expected an object");
  }
  [[noreturn]] void fail(std::string const& name, std::string const& what) const {
    throw bad_input(file_, prefix_.empty() ? name : prefix_ + "." + name, what);
  }
  json const& at(char const* name) const {
    auto const it = object_.find(name);
    if (it == object_.end()) fail(name, "missing");
    return *it;
  }
  std::int64_t integer(char const* name, std::int64_t least, std::int64_t most) const {
    json const& v = at(name);
    if (!v.is_number_integer()) fail(name, "expected an integer");
    auto const n = v.get<std::int64_t>();
    if (n < least || n > most)
      fail(name,
           std::to_string(n) + ", expected " + std::to_string(least) + ".." + std::to_string(most));
    return n;
  }
  std::string text(char const* name) const {
    json const& v = at(name);
    if (!v.is_string()) fail(name, "expected a string");
    return v.get<std::string>();
  }
  std::vector<index_t> tokens(char const* name, index_t vocabulary) const {
    json const& v = at(name);
    if (!v.is_array()) fail(name, "expected an array of token ids");
    std::vector<index_t> ids;
    for (json const& t : v) {
      if (!t.is_number_integer() || t.get<std::int64_t>() < 0 ||
          t.get<std::int64_t>() >= vocabulary)
        fail(name, t.dump() + ", expected token ids 0.." + std::to_string(vocabulary - 1));
      ids.push_back(t.get<index_t>());
    }
    return ids;
  }
  json const& array(char const* name) const {
    json const& v = at(name);
    if (!v.is_array()) fail(name, "expected an array");
    return v;
  }

 private:
  std::string const& file_;
  std::string prefix_;
  json const& object_;
};

episode_check read_check(fields const& f, index_t vocabulary, index_t response) {
  episode_check c;
  c.kind = f.text("kind");
  c.entry = static_cast<index_t>(f.integer("entry", -1, 1 << 30));
  if (!f.at("depth").is_number()) f.fail("depth", "expected a number");
  c.depth = f.at("depth").get<double>();
  c.at = static_cast<index_t>(f.integer("at", 0, response - 1));
  c.n = static_cast<index_t>(f.integer("n", 1, response - c.at));
  c.anchor = f.tokens("anchor", vocabulary);
  return c;
}

episode read_episode(std::string const& file, std::string const& prefix, json const& j,
                     index_t vocabulary) {
  fields const f(file, prefix, j);
  episode e;
  e.task = f.text("task");
  e.seed = f.integer("seed", std::numeric_limits<std::int64_t>::min(),
                     std::numeric_limits<std::int64_t>::max());
  e.prompt = f.tokens("prompt", vocabulary);
  e.response = f.tokens("response", vocabulary);
  if (e.prompt.empty()) f.fail("prompt", "expected at least one token");
  if (e.response.empty()) f.fail("response", "expected at least one token");
  for (json const& c : f.array("checks"))
    e.checks.push_back(
        read_check({file, prefix + ".checks[" + std::to_string(e.checks.size()) + "]", c},
                   vocabulary, static_cast<index_t>(e.response.size())));
  return e;
}

bool same(episode const& e, episode_check const& c, std::span<index_t const> tokens) {
  return static_cast<std::size_t>(c.n) <= tokens.size() &&
         std::equal(tokens.begin(), tokens.begin() + c.n, e.response.begin() + c.at);
}

}  // namespace

episode_set load_episodes(std::filesystem::path const& path, index_t vocabulary) {
  std::string const file = path.string();
  std::ifstream in(path);
  if (!in) throw bad_input(file, "file", "cannot be read");
  json const j = json::parse(in, nullptr, false);
  if (j.is_discarded()) throw bad_input(file, "json", "malformed");
  fields const f(file, "", j);
  f.integer("schema", 1, 1);
  episode_set set;
  set.vocabulary_sha256 = f.text("vocabulary_sha256");
  for (json const& e : f.array("episodes"))
    set.episodes.push_back(
        read_episode(file, "episodes[" + std::to_string(set.episodes.size()) + "]", e, vocabulary));
  return set;
}

episode const& find_episode(episode_set const& set, std::string const& name) {
  std::size_t const colon = name.find(':');
  std::string const task = name.substr(0, colon);
  std::string const number = colon == std::string::npos ? "0" : name.substr(colon + 1);
  std::vector<episode const*> list;
  std::string known;
  for (episode const& e : set.episodes) {
    if (e.task == task) list.push_back(&e);
    if ((", " + known + ",").find(", " + e.task + ",") == std::string::npos)
      known += (known.empty() ? "" : ", ") + e.task;
  }
  if (list.empty()) throw bad_input("--task", task, "expected one of " + known);
  std::size_t index = 0;
  auto const [end, error] = std::from_chars(number.data(), number.data() + number.size(), index);
  if (error != std::errc{} || end != number.data() + number.size() || index >= list.size())
    throw bad_input("--task", name, "expected " + task + ":0.." + std::to_string(list.size() - 1));
  return *list[index];
}

bool holds_freely(episode const& e, episode_check const& c, std::span<index_t const> written) {
  auto const found = std::search(written.begin(), written.end(), c.anchor.begin(), c.anchor.end());
  if (found == written.end()) return false;
  auto const behind = static_cast<std::size_t>(found - written.begin()) + c.anchor.size();
  return same(e, c, written.subspan(behind));
}

bool holds_forced(episode const& e, episode_check const& c, std::span<index_t const> choices) {
  return static_cast<std::size_t>(c.at) <= choices.size() &&
         same(e, c, choices.subspan(static_cast<std::size_t>(c.at)));
}

std::vector<bool> questions_of(episode const& e) {
  std::vector<bool> asks(e.response.size());
  if (e.task == "diary") return asks;
  for (episode_check const& c : e.checks) {
    auto const at = static_cast<std::size_t>(c.at);
    std::size_t const n = std::min(at, c.anchor.size());  // the first question may end the prompt
    for (std::size_t i = at - n; i < at; ++i) asks[i] = true;
  }
  return asks;
}

}  // namespace kvkeep::generate
