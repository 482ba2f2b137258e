// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "generate/compare.hpp"

#include <algorithm>
#include <cmath>
#include <set>

#include "support/random_policy.hpp"

namespace kvkeep::generate {

namespace {

/// Two-sided 95% points of Student's t for 1, 2, ... degrees of freedom.
constexpr double t_points[] = {12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262};

/// Values of one column, by seed.
using column = std::map<std::int64_t, std::pair<int, int>>;  // held, of
using columns = std::map<std::string, column>;

void note(columns& c, std::string const& name, std::int64_t seed, bool held) {
  auto& [good, of] = c[name][seed];
  good += held ? 1 : 0;
  ++of;
}

bool occurs(std::vector<index_t> const& anchor, token_list const& text) {
  return std::search(text.begin(), text.end(), anchor.begin(), anchor.end()) != text.end();
}

/// What a check counts for.
void note_check(columns& c, episode const& e, episode_check const& k, bool held,
                token_list const& text) {
  if (e.task == "diary") {
    note(c, "complete", e.seed, occurs(k.anchor, text));
    note(c, k.kind, e.seed, held);
    if (k.kind != "default") note(c, "average", e.seed, held);
  } else if (k.kind == e.task) {
    note(c, k.kind, e.seed, held);
    if (e.task == "passkey" && k.depth >= 0)
      note(c, "passkey@" + std::to_string(std::min(3, static_cast<int>(k.depth * 4)) * 25), e.seed,
           held);
  }
}

/// The average of a table of LongGenBench's kind: of the means of its kinds, not of all entries.
void average_kinds(columns& c) {
  column& average = c["average"];
  average.clear();
  for (auto const& [seed, unused] : c["once"]) {
    double sum = 0;
    int kinds = 0;
    for (char const* kind : {"once", "range", "periodic"})
      if (auto const it = c[kind].find(seed); it != c[kind].end() && it->second.second > 0) {
        sum += static_cast<double>(it->second.first) / it->second.second;
        ++kinds;
      }
    constexpr int unit = 1'000'000;
    if (kinds > 0) average[seed] = {static_cast<int>(std::lround(sum / kinds * unit)), unit};
  }
}

policy_pair pair_of(std::string const& name, index_t capacity) {
  if (name == "random") {
    policy_pair p;
    p.name = name;
    p.prompt = p.decode =
        erase_policy<cpu::context>(tools::make_random(capacity, std::min(32, capacity / 4)));
    return p;
  }
  policy_request r;
  r.policy = name;
  r.capacity = capacity;
  if (name == "morphkv max") r.policy = "morphkv", r.fusion = reduction::max;
  policy_pair p = make_policies(r);
  p.name = name;
  return p;
}

/// A policy that holds `slots` slots while it decodes.
policy_pair sized_pair(std::string const& name, index_t slots) {
  policy_pair const p = pair_of(name, slots);
  return p.decode.when.room > 0 || !p.cuts_decode() ? p : pair_of(name, slots - 1);
}

std::vector<episode> chosen(episode_set const& set, std::string const& task,
                            comparison_options const& o) {
  std::map<std::int64_t, std::size_t> taken;
  std::vector<episode> list;
  for (episode const& e : set.episodes) {
    if (e.task != task || (o.seeds > 0 && e.seed > o.seeds)) continue;
    if (std::size_t& n = taken[e.seed]; o.episodes == 0 || n < o.episodes) {
      ++n;
      list.push_back(e);
    }
  }
  return list;
}

std::vector<std::string> tasks_of(episode_set const& set) {
  std::vector<std::string> tasks;
  for (episode const& e : set.episodes)
    if (std::find(tasks.begin(), tasks.end(), e.task) == tasks.end()) tasks.push_back(e.task);
  return tasks;
}

comparison_row run_one(runtime& rt, model const& m, episode_set const& set, std::string const& name,
                       index_t percent, comparison_options const& o) {
  comparison_row row;
  row.policy = name;
  row.percent = percent;
  columns all;
  double seconds = 0, tokens = 0;
  for (std::string const& task : tasks_of(set)) {
    std::vector<episode> const episodes = chosen(set, task, o);
    if (episodes.empty()) continue;
    std::size_t longest = 0;
    for (episode const& e : episodes)
      longest = std::max(longest, e.prompt.size() + e.response.size());
    auto const slots = std::max<index_t>(
        12, static_cast<index_t>(std::lround(static_cast<double>(longest) * percent / 100)));
    evaluation_options x;
    x.forced = task != "diary";
    x.end_tokens = m.end_tokens;
    x.engine.max_sequences = o.batch;
    x.engine.sample_every = 0;
    evaluation const r = evaluate(rt, m, sized_pair(name, slots), episodes, x);
    for (std::size_t i = 0; i < episodes.size(); ++i)
      for (std::size_t k = 0; k < episodes[i].checks.size(); ++k)
        note_check(all, episodes[i], episodes[i].checks[k], r.held[i][k], r.tokens[i]);
    seconds += r.usage.decode;
    tokens += static_cast<double>(r.usage.decoded_tokens);
    // Peaks are of all sequences that shared the engine.
    auto const shared = std::min<std::size_t>(static_cast<std::size_t>(o.batch), episodes.size());
    row.capacity = std::max(row.capacity, slots);
    row.kv_bytes = std::max(row.kv_bytes, r.usage.peak_bytes() / shared);
    row.state_bytes = std::max(row.state_bytes, r.usage.state_bytes / shared);
  }
  average_kinds(all);
  for (auto const& [key, values] : all) {
    std::vector<double> per_seed;
    for (auto const& [seed, v] : values)
      per_seed.push_back(static_cast<double>(v.first) / std::max(1, v.second));
    row.columns[key] = estimate_of(per_seed);
  }
  row.tokens_per_second = seconds > 0 ? tokens / seconds : 0;
  return row;
}

}  // namespace

estimate estimate_of(std::vector<double> const& per_seed) {
  estimate e;
  e.seeds = static_cast<int>(per_seed.size());
  for (double x : per_seed) e.mean += x / e.seeds;
  if (e.seeds < 2) return e;
  double sum = 0;
  for (double x : per_seed) sum += (x - e.mean) * (x - e.mean);
  std::size_t const freedom = per_seed.size() - 1;
  double const t = freedom <= std::size(t_points) ? t_points[freedom - 1] : 2.0;
  e.half = t * std::sqrt(sum / static_cast<double>(freedom) / e.seeds);
  return e;
}

std::vector<std::string> compared_policies() {
  return {"fullkv",
          "random",
          "streamingllm",
          "h2o",
          "tova",
          "knorm",
          "keydiff",
          "observed_attention",
          "morphkv",
          "morphkv max",
          "snapkv+morphkv",
          "pyramidkv+morphkv",
          "dynamickv+morphkv",
          "adakv+morphkv",
          "lagkv+morphkv"};
}

std::vector<comparison_row> compare(runtime& rt, model const& m, episode_set const& set,
                                    comparison_options const& o) {
  std::vector<std::pair<std::string, index_t>> runs;
  for (std::string const& name : o.policies.empty() ? compared_policies() : o.policies)
    for (index_t const percent : o.percents) {
      if (name == "fullkv" && percent != o.percents.back()) continue;  // it has no budget
      runs.emplace_back(name, name == "fullkv" ? 100 : percent);
    }
  std::vector<comparison_row> rows;
  for (auto const& [name, percent] : runs) {
    if (o.progress) o.progress(name, percent, rows.size(), runs.size());
    rows.push_back(run_one(rt, m, set, name, percent, o));
  }
  return rows;
}

}  // namespace kvkeep::generate
