// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Recorded traces of generated sequences: judged in double step by step, and replayed.
#include <cstdio>

#include "../support/catch.hpp"
#include "generate/episodes.hpp"
#include "generate/record.hpp"
#include "generate_runs.hpp"
#include "trace_judge.hpp"

namespace {

using namespace kvkeep;
using namespace kvkeep::test;

/// A policy under a name of its own, as its folder is called.
struct setting {
  std::string name;
  policy_request request;
};

std::vector<setting> settings(index_t capacity) {
  std::vector<setting> list;
  for (std::string const policy : {"h2o", "tova", "streamingllm", "morphkv", "knorm", "keydiff"})
    list.push_back({policy, with(policy, capacity)});
  list.push_back({"max", with("morphkv", capacity)});
  list.back().request.fusion = reduction::max;
  return list;
}

/// Other forms of the same policies.
std::vector<setting> variants(index_t capacity) {
  std::vector<setting> list;
  auto const vary = [&](std::string const& policy, std::string const& name) -> policy_request& {
    list.push_back({name, with(policy, capacity)});
    return list.back().request;
  };
  vary("morphkv", "cached").rows = morph_rows::cached;
  vary("morphkv", "direct").rows = morph_rows::direct;
  vary("morphkv", "burst").evict_after = 1.3;
  vary("h2o", "sums_alone").window = 0;
  vary("tova", "unprotected").window = 0;
  vary("keydiff", "plain_keydiff").window = 0;
  vary("knorm", "norm_burst").evict_after = 1.2;
  return list;
}

/// Generates and records. @return the folders of the layers
std::vector<fs::path> record(model const& m, setting const& s, ids const& prompt, index_t tokens,
                             fs::path const& dir, way const& w = {}) {
  auto const policies = generate::make_policies(s.request);
  generate::trace_recorder recorder(s.request, policies, m.config);
  auto const prompts = batch_of(prompt, w.batch);
  engine_options o = options_of(w, prompts, tokens);
  o.observer = &recorder;
  generate::runtime rt(w.threads);
  engine e(rt, m, recorder.watched(policies), o);
  recorder.watch(e);
  generate::generation_options g;
  g.tokens = tokens;
  generate::generate(e, prompts, g);
  recorder.write(dir / s.name);
  return case_dirs(dir / s.name);
}

/// What the policy decided holds in double. @return decisions
index_t check_folders(std::vector<fs::path> const& folders) {
  index_t decisions = 0;
  for (auto const& dir : folders) {
    verdict const v = judge(load_case(dir));
    INFO(dir.string() << ": " << v.near_ties << " near ties, widest " << v.widest);
    CHECK(v.wrong == "");
    decisions += v.decisions;
  }
  return decisions;
}

#ifdef KVKEEP_REPLAY_PROGRAM
/// Runs kvkeep-replay with these words. @return what it printed, and the exit code at the end
std::string replay(std::string const& words) {
  std::FILE* pipe = popen(("'" KVKEEP_REPLAY_PROGRAM "' " + words + " 2>&1").c_str(), "r");
  REQUIRE(pipe != nullptr);
  std::string text;
  char part[4096];
  for (std::size_t n; (n = std::fread(part, 1, sizeof part, pipe)) > 0;) text.append(part, n);
  return text + "exit " + std::to_string(pclose(pipe));
}

void check_replay(std::vector<fs::path> const& folders) {
  std::string words = "--check";
  for (auto const& dir : folders) words += " '" + dir.string() + "'";
  std::string const text = replay(words);
  INFO(text);
  CHECK(text.find("exit 0") != std::string::npos);
}
#else
void check_replay(std::vector<fs::path> const&) {}
#endif

generate::model_config one_head_per_group() {
  auto c = tiny_config();
  c.n_kv_heads = c.n_q_heads;
  return c;
}

}  // namespace

TEST_CASE("every decision of a generated sequence holds in double, and in kvkeep-replay") {
  way const ways[] = {{},
                      {layout_kind::paged, 1, 5},
                      {layout_kind::ragged, 2, 64, 3},
                      {layout_kind::strided, 1, 7, 1, true}};
  struct {
    std::uint64_t seed;
    generate::model_config config;
    index_t prompt;
  } const runs[] = {
      {61, tiny_config(), 9}, {62, one_head_per_group(), 31}, {63, tiny_config(), 40}};
  std::size_t turn = 0;
  for (auto const& r : runs) {
    auto const m = random_model(r.seed, r.config);
    model_folder const tmp;
    auto all = settings(20);
    for (auto& s : variants(20)) all.push_back(std::move(s));
    for (auto const& s : all) {
      INFO("seed " << r.seed << ", " << s.name);
      auto const folders =
          record(m, s, random_prompt(r.seed, r.prompt), 40, tmp.path, ways[turn++ % 4]);
      REQUIRE(folders.size() == 3);
      CHECK(check_folders(folders) > 3 * 5);
      check_replay(folders);
    }
  }
}

TEST_CASE("the bundled model's decisions hold in double, and in kvkeep-replay") {
  fs::path const file = KVKEEP_BUNDLED_MODEL;
  auto const m = generate::load_model(file);
  auto const set =
      generate::load_episodes(file.parent_path() / "episodes.json", m.config.vocabulary);
  ids const& prompt = generate::find_episode(set, "diary:1").prompt;
  model_folder const tmp;
  auto all = settings(48);  // the prompt is cut, too
  for (auto const& s : variants(48))
    if (s.name == "cached" || s.name == "burst") all.push_back(s);
  for (auto const& s : all) {
    INFO(s.name);
    // In layer 0 old columns fall 100 below the window's after a while: cached weights vanish.
    auto const folders = record(m, s, prompt, s.name == "cached" ? 100 : 60, tmp.path);
    CHECK(check_folders(folders) > 10);
    check_replay(folders);
  }
}

TEST_CASE("a wrong victim is found by both") {
  auto const m = random_model(64);
  model_folder const tmp;
  for (std::string const policy : {"h2o", "tova", "morphkv", "knorm", "keydiff"}) {
    INFO(policy);
    auto const dir = record(m, {policy, with(policy, 12)}, random_prompt(64, 30), 20, tmp.path)[0];
    auto a = tools::read_npy(dir / "kept.npy");
    // The last entry keeps the token that left, and lets its oldest one go instead.
    auto const width = a.i32.size() / static_cast<std::size_t>(a.shape[0] * a.shape[2]);
    auto const heads = static_cast<std::size_t>(a.shape[2]);
    auto* const last = a.i32.data() + a.i32.size() - heads * width;
    for (std::size_t h = 0; h < heads; ++h) {
      auto *const now = last + h * width, *const before = now - heads * width;
      std::size_t gone = 0;
      while (std::find(now, now + width, before[gone]) != now + width) ++gone;
      now[gone == 0 ? 1 : 0] = before[gone];
      std::sort(now, now + width);
    }
    tools::write_npy(dir / "kept.npy", a);
    CHECK(judge(load_case(dir)).wrong.find("above the lowest") != std::string::npos);
#ifdef KVKEEP_REPLAY_PROGRAM
    CHECK(replay("--check '" + dir.string() + "'").rfind("FAIL layer_0: kept", 0) == 0);
#endif
  }
}

#ifdef KVKEEP_REPLAY_PROGRAM
namespace {

/// Makes token `first + 1` a copy of `first`, whose own row does not see it: from then on they tie.
void make_twins(fs::path const& dir, index_t first) {
  auto q = tools::read_npy(dir / "q.npy"), k = tools::read_npy(dir / "k.npy"),
       v = tools::read_npy(dir / "v.npy");
  auto const dim = k.shape[3], group = q.shape[1] / k.shape[1];
  auto const row = [&](tools::npy_array& a, std::int64_t head) {
    return a.f32.data() + (head * a.shape[2] + first) * dim;
  };
  for (std::int64_t h = 0; h < q.shape[1]; ++h)
    for (std::int64_t d = 0; d < dim; ++d) row(q, h)[d] = -1000 * row(k, h / group)[d];
  for (auto* const a : {&k, &v})
    for (std::int64_t h = 0; h < a->shape[1]; ++h) std::copy_n(row(*a, h), dim, row(*a, h) + dim);
  tools::write_npy(dir / "q.npy", q);
  tools::write_npy(dir / "k.npy", k);
  tools::write_npy(dir / "v.npy", v);
}

/// Where one of the two has left, the other one has. @return whether either could have left first
bool swap_twins(tools::npy_array& kept, index_t first, index_t recent) {
  auto const width = static_cast<std::size_t>(kept.shape.back());
  bool free = true, apart = false;
  for (std::size_t at = 0; at < kept.i32.size(); at += width) {
    auto *const row = kept.i32.data() + at, *const end = row + width;
    auto *const one = std::find(row, end, first), *const two = std::find(row, end, first + 1);
    index_t const newest = *std::max_element(row, end);
    if (newest <= first || (one == end) == (two == end)) continue;
    apart = true;
    free = free && newest > first + recent;
    *(one == end ? two : one) = one == end ? first : first + 1;
  }
  return free && apart;
}

/// Records, makes twins in what layer 0 was given, and lets the other one of them leave first.
fs::path tied_case(model const& m, policy_request const& request, fs::path const& tmp) {
  for (index_t first = 1; first < 60; ++first) {
    auto const name = request.policy + "_" + std::to_string(first);
    auto const dir = record(m, {name, request}, random_prompt(65, 9), 80, tmp)[0];
    make_twins(dir, first);
    fs::path const own = tmp / (name + "_own");
    std::string const ran = replay("'" + dir.string() + "' --out '" + own.string() + "'");
    INFO(ran);
    REQUIRE(ran.find("exit 0") != std::string::npos);
    for (auto const& output : load_case(dir, false).output_info)
      fs::copy(own / (output.first + ".npy"), dir, fs::copy_options::overwrite_existing);
    auto kept = tools::read_npy(dir / "kept.npy");
    index_t const recent = *request.window + (request.policy == "morphkv" ? 1 : 0);
    if (!swap_twins(kept, first, recent)) continue;
    tools::write_npy(dir / "kept.npy", kept);
    return dir;
  }
  return {};
}

}  // namespace

TEST_CASE("a tie that went the other way does not set the rest of a trace apart") {
  auto const m = random_model(65);
  model_folder const tmp;
  for (std::string const policy : {"h2o", "tova", "morphkv", "knorm", "keydiff"}) {
    INFO(policy);
    auto request = with(policy, 12);
    request.window = policy == "tova" ? 1 : 3;
    auto const dir = tied_case(m, request, tmp.path);
    REQUIRE(!dir.empty());
    verdict const v = judge(load_case(dir));
    CHECK(v.wrong == "");
    std::string const text = replay("--check '" + dir.string() + "'");
    INFO(text);
    CHECK(text.rfind("PASS layer_0, ", 0) == 0);
    CHECK(text.find(" near ties") != std::string::npos);
  }
}
#endif
