// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "generate/compare.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "generate/oracle.hpp"
#include "support/random_policy.hpp"

namespace kvkeep::generate {

namespace {

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

policy_pair pair_of(std::string const& name, index_t capacity, double rope_base) {
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
  r.rope_base = rope_base;
  if (name == "morphkv max") r.policy = "morphkv", r.fusion = reduction::max;
  policy_pair p = make_policies(r);
  p.name = name;
  return p;
}

/// A policy that holds `slots` slots while it decodes.
policy_pair sized_pair(std::string const& name, index_t slots, double rope_base) {
  policy_pair const p = pair_of(name, slots, rope_base);
  return p.decode.when.room > 0 || !p.cuts_decode() ? p : pair_of(name, slots - 1, rope_base);
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

/// One task: its episodes, and what the full cache predicts in front of their reference tokens.
struct task_run {
  std::string name;
  std::vector<episode> episodes;
  predictions full;  ///< empty without `by_position`

  index_t slots(index_t percent) const {
    std::size_t longest = 0;
    for (episode const& e : episodes)
      longest = std::max(longest, e.prompt.size() + e.response.size());
    return std::max<index_t>(
        12, static_cast<index_t>(std::lround(static_cast<double>(longest) * percent / 100)));
  }
  /// Sequences that share an engine.
  std::size_t shared(index_t batch) const {
    return std::min(static_cast<std::size_t>(batch), episodes.size());
  }
};

/// Everything that the rows of a comparison share.
class comparison {
 public:
  comparison(runtime& rt, model const& m, episode_set const& set, comparison_options const& o)
      : rt_(rt), model_(m), options_(o) {
    for (std::string const& name : tasks_of(set)) {
      task_run t{name, chosen(set, name, o), {}};
      if (!t.episodes.empty()) tasks_.push_back(std::move(t));
    }
  }

  /// Refuses a policy that cannot be had at this budget: before hours of others have run.
  void check(std::string const& policy, index_t percent) const {
    if (policy == "oracle") return;
    try {
      for (task_run const& t : tasks_)
        check_evaluation(rt_, model_, sized_pair(policy, t.slots(percent), model_.config.rope_base),
                         t.episodes, options_of(true));
    } catch (std::invalid_argument const& e) {
      throw std::invalid_argument("--policies: " + policy + " at " + std::to_string(percent) +
                                  "%: " + e.what());
    }
  }

  /// What `by_position` compares with.
  void predict_with_full_cache() {
    if (options_.bucket == 0) return;
    for (task_run& t : tasks_)
      t.full = predict(rt_, model_, pair_of("fullkv", 1, model_.config.rope_base), t.episodes,
                       options_of(true));
  }

  comparison_row row(std::string const& policy, index_t percent) {
    comparison_row r;
    r.policy = policy;
    r.percent = percent;
    columns all;
    position_tally tally(std::max(1, options_.bucket));
    engine_usage total;
    for (task_run const& t : tasks_) run(t, r, all, tally, total);
    average_kinds(all);
    for (auto const& [key, values] : all) {
      std::vector<double> per_seed;
      for (auto const& [seed, v] : values)
        per_seed.push_back(static_cast<double>(v.first) / std::max(1, v.second));
      r.columns[key] = estimate_of(per_seed);
    }
    if (options_.bucket > 0) {
      r.by_position = tally.buckets();
      r.by_position.push_back(tally.whole());
    }
    r.tokens_per_second =
        total.decode > 0 ? static_cast<double>(total.decoded_tokens) / total.decode : 0;
    return r;
  }

 private:
  evaluation_options options_of(bool forced) const {
    evaluation_options x;
    x.forced = forced;
    x.end_tokens = model_.end_tokens;
    x.engine.max_sequences = options_.batch;
    x.engine.sample_every = 0;
    return x;
  }

  /// An oracle first watches the full cache do the same.
  evaluation evaluate_policy(std::string const& policy, index_t slots, task_run const& t,
                             evaluation_options x) {
    if (policy != "oracle")
      return evaluate(rt_, model_, sized_pair(policy, slots, model_.config.rope_base), t.episodes,
                      x);
    attention_recorder recorder(model_.config);
    evaluation_options full = options_of(x.forced);
    full.engine.observer = &recorder;
    evaluate(rt_, model_, pair_of("fullkv", slots, model_.config.rope_base), t.episodes, full);
    auto const seer = std::make_shared<oracle>(recorder.take());
    x.engine.observer = seer.get();
    return evaluate(rt_, model_, make_oracle_pair(seer, slots - 1), t.episodes, x);
  }

  /// Diaries are written freely, and once more teacher-forced for what is predicted of the reference.
  void run(task_run const& t, comparison_row& r, columns& all, position_tally& tally,
           engine_usage& total) {
    index_t const slots = t.slots(r.percent);
    bool const freely = t.name == "diary";
    evaluation_options forced = options_of(true);
    if (options_.bucket > 0) forced.see = tally_against(t.full, t.episodes, tally);
    evaluation const e = evaluate_policy(r.policy, slots, t, freely ? options_of(false) : forced);
    if (freely && options_.bucket > 0) evaluate_policy(r.policy, slots, t, forced);
    for (std::size_t i = 0; i < t.episodes.size(); ++i)
      for (std::size_t k = 0; k < t.episodes[i].checks.size(); ++k)
        note_check(all, t.episodes[i], t.episodes[i].checks[k], e.held[i][k], e.tokens[i]);
    total.decode += e.usage.decode;
    total.decoded_tokens += e.usage.decoded_tokens;
    // Peaks are of all sequences that shared the engine.
    r.capacity = std::max(r.capacity, slots);
    r.kv_bytes = std::max(r.kv_bytes, e.usage.peak_bytes() / t.shared(options_.batch));
    r.state_bytes = std::max(r.state_bytes, e.usage.state_bytes / t.shared(options_.batch));
  }

  runtime& rt_;
  model const& model_;
  comparison_options const& options_;
  std::vector<task_run> tasks_;
};

}  // namespace

std::vector<std::string> compared_policies() {
  return {"fullkv",
          "random",
          "oracle",
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
          "cake+morphkv",
          "adakv+morphkv",
          "lagkv+morphkv",
          "expected_attention+morphkv"};
}

std::vector<comparison_row> compare(runtime& rt, model const& m, episode_set const& set,
                                    comparison_options const& o) {
  std::vector<std::pair<std::string, index_t>> runs;
  for (std::string const& name : o.policies.empty() ? compared_policies() : o.policies)
    for (index_t const percent : o.percents) {
      if (name == "fullkv" && percent != o.percents.back()) continue;  // it has no budget
      runs.emplace_back(name, name == "fullkv" ? 100 : percent);
    }
  comparison all(rt, m, set, o);
  for (auto const& [name, percent] : runs) all.check(name, percent);
  all.predict_with_full_cache();
  std::vector<comparison_row> rows;
  for (auto const& [name, percent] : runs) {
    if (o.progress) o.progress(name, percent, rows.size(), runs.size());
    rows.push_back(all.row(name, percent));
  }
  return rows;
}

}  // namespace kvkeep::generate
