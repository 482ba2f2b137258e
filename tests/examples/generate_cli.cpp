// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The program kvkeep-generate: text, figures, bad input, exit codes.
#include <sys/wait.h>

#include <algorithm>
#include <cstdio>

#include <nlohmann/json.hpp>

#include "../support/catch.hpp"
#include "generate/sha256.hpp"
#include "generate_models.hpp"

namespace {

using namespace kvkeep::test;
using nlohmann::json;
using words = std::vector<std::string>;

struct outcome {
  int code = -1;
  std::string out, err;
};

outcome generate(words const& arguments) {
  model_folder const tmp;
  fs::path const errors = tmp.path / "stderr";
  std::string command = "'" KVKEEP_GENERATE_PROGRAM "'";
  for (auto const& a : arguments) command += " '" + a + "'";
  outcome r;
  std::FILE* pipe = popen((command + " 2>'" + errors.string() + "'").c_str(), "r");
  REQUIRE(pipe != nullptr);
  char part[4096];
  for (std::size_t n; (n = std::fread(part, 1, sizeof part, pipe)) > 0;) r.out.append(part, n);
  int const status = pclose(pipe);
  r.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  std::ifstream in(errors);
  r.err.assign(std::istreambuf_iterator<char>(in), {});
  return r;
}

words operator+(words a, words const& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

/// A model of words with episodes beside it.
struct word_model {
  model_folder folder;
  std::string file, json_file;
  word_model() {
    auto const m = random_model(41);
    gguf_parts g = gguf_metadata(m.config);
    std::vector<std::string> list{"<pad>", "<bos>", "<end>", ".", ","};
    while (list.size() < 61) list.push_back("w" + std::to_string(list.size()));
    g.add("tokenizer.ggml.model", std::string("word"));
    g.add("tokenizer.ggml.tokens", list);
    g.add("tokenizer.ggml.bos_token_id", 1);
    g.add("tokenizer.ggml.eos_token_id", 2);
    g.type = 1;
    add_tensors(g, m);
    file = folder.write("words.gguf", g.join()).string();
    std::string joined;
    for (auto const& w : list) joined += (joined.empty() ? "" : "\n") + w;
    std::string const sum = kvkeep::generate::sha256(joined);
    folder.write("episodes.json", R"({"schema":1,"vocabulary_sha256":")" + sum + R"(","episodes":[
      {"task":"diary","seed":1,"prompt":[1,7,8],"response":[9,10,11,2],
       "checks":[{"kind":"once","entry":1,"depth":-1,"at":1,"n":1,"anchor":[]}]}]})");
    json_file = (folder.path / "out.json").string();
  }
};

void check_refused(words const& arguments, std::string const& part) {
  outcome const r = generate(arguments);
  INFO(part << "\n" << r.err);
  CHECK(r.code == 2);
  CHECK(r.out.empty());
  CHECK(r.err.find(part) != std::string::npos);
  CHECK(r.err.rfind("kvkeep-generate: ", 0) == 0);
  CHECK(std::count(r.err.begin(), r.err.end(), '\n') == 1);
}

}  // namespace

namespace {

/// A llama2.c model and its tokenizer as one GGUF file, matrices in F16.
std::string as_gguf(fs::path const& model, fs::path const& tokens) {
  auto const m = kvkeep::generate::load_model(model);
  std::ifstream in(tokens, std::ios::binary);
  std::string const bytes((std::istreambuf_iterator<char>(in)), {});
  std::vector<std::string> pieces;
  std::vector<float> scores;
  for (std::size_t at = 4; at < bytes.size();) {
    float score = 0;
    std::uint32_t length = 0;
    std::memcpy(&score, bytes.data() + at, 4);
    std::memcpy(&length, bytes.data() + at + 4, 4);
    std::string piece = bytes.substr(at + 8, length);
    for (std::size_t i; (i = piece.find(' ')) != std::string::npos;)
      piece.replace(i, 1, "\xe2\x96\x81");
    pieces.push_back(piece);
    scores.push_back(score);
    at += 8 + length;
  }
  gguf_parts g = gguf_metadata(m.config);
  g.add("tokenizer.ggml.model", std::string("llama"));
  g.add("tokenizer.ggml.tokens", pieces);
  g.add("tokenizer.ggml.scores", scores);
  g.add("tokenizer.ggml.bos_token_id", 1);
  g.add("tokenizer.ggml.eos_token_id", 2);
  g.type = 1;
  add_tensors(g, m);
  return g.join();
}

}  // namespace

TEST_CASE("a real model says what it says elsewhere") {
  fs::path const model = shared_model("stories260K/stories260K.bin");
  if (model.empty()) {
    WARN("skipped: no shared models");
    return;
  }
  words const base{"--model",         model.string(),
                   "--tokenizer",     (model.parent_path() / "tok512.bin").string(),
                   "--tokens",        "200",
                   "--quiet",         "--prompt",
                   "Once upon a time"};
  std::string const want =
      "Once upon a time, there was a little girl named Lily. She loved to play outside in the "
      "park. "
      "One day, she saw a big, red ball.";
  outcome const full = generate(base + words{"--policy", "fullkv"});
  INFO(full.err);
  CHECK(full.code == 0);
  CHECK(full.out.substr(0, want.size()) == want);
  for (std::string const policy : {"morphkv", "h2o", "snapkv+morphkv"})
    CHECK(generate(base + words{"--policy", policy, "--budget", "100%", "--layout", "paged"}).out ==
          full.out);
  model_folder const tmp;
  std::string const gguf =
      tmp.write("m.gguf", as_gguf(model, model.parent_path() / "tok512.bin")).string();
  CHECK(generate({"--model", gguf, "--prompt", "Once upon a time", "--tokens", "60", "--quiet",
                  "--policy", "fullkv"})
            .out.substr(0, 80) == want.substr(0, 80));
  // Attention is local in this model: a window keeps the story's beginning.
  CHECK(generate(base + words{"--budget", "48", "--verify", "5"}).out.substr(0, 40) ==
        want.substr(0, 40));
}

TEST_CASE("the layout, threads and the batch change no word") {
  word_model const m;
  words const base{"--model", m.file,     "--prompt", "w7 w8, w9.", "--tokens",
                   "40",      "--budget", "12",       "--no-stop",  "--quiet"};
  outcome const r = generate(base);
  INFO(r.err);
  CHECK(r.code == 0);
  CHECK(r.out.rfind("w7 w8, w9.", 0) == 0);
  CHECK(generate(base + words{"--layout", "paged", "--threads", "2", "--chunk", "2"}).out == r.out);
  words const free{"--model", m.file, "--prompt", "w7", "--tokens", "40", "--no-stop", "--quiet"};
  CHECK(generate(free + words{"--budget", "99999999"}).out ==
        generate(free + words{"--policy", "fullkv"}).out);
  CHECK(generate(base + words{"--layout", "ragged", "--batch", "3"}).out.rfind(r.out, 0) == 0);
}

TEST_CASE("ids alone serve a model without words, and a policy may go beyond the context") {
  model_folder const tmp;
  std::string const file = tmp.write("m.bin", llama2c_bytes(random_model(42))).string();
  outcome const r = generate({"--model", file, "--prompt-ids", "1,5,7", "--tokens", "300",
                              "--budget", "20", "--verify", "10"});
  INFO(r.err);
  CHECK(r.code == 0);
  CHECK(std::count(r.out.begin(), r.out.begin() + static_cast<std::ptrdiff_t>(r.out.find('\n')),
                   ',') == 299);
  std::string ids = "1";
  for (int i = 0; i < 120; ++i) ids += "," + std::to_string(i % 61);
  CHECK(generate({"--model", file, "--prompt-ids", ids, "--tokens", "5", "--budget", "20"}).code ==
        0);
  check_refused({"--model", file, "--prompt-ids", ids, "--tokens", "5", "--policy", "fullkv"},
                "--prompt: 121 tokens: the model's context has 96");
  check_refused({"--model", file, "--prompt-ids", ids, "--tokens", "5", "--policy", "snapkv"},
                "snapkv does not evict");
  check_refused({"--model", file, "--prompt-ids", "1,5", "--tokens", "95", "--policy", "fullkv"},
                "--tokens: 95: expected at most 94");
}

TEST_CASE("an episode is generated and checked, and the figures are in the file") {
  word_model const m;
  outcome const r = generate({"--model", m.file, "--task", "diary:0", "--tokens", "50", "--budget",
                              "10", "--window", "3", "--no-stop", "--json", m.json_file});
  INFO(r.err);
  REQUIRE(r.code == 0);
  CHECK(r.out.find("of 1 held") != std::string::npos);
  json const j = json::parse(std::ifstream(m.json_file));
  CHECK(j["policy"] == "morphkv");
  CHECK(j["capacity"] == 10);
  CHECK(j["slots_per_head"] == 11);
  CHECK(j["prompt"] == json({1, 7, 8}));
  CHECK(j["tokens"][0].size() == 50);
  CHECK(j["decode"]["tokens"] == 49);
  CHECK(j["bytes"]["kv_peak"] == 3 * 2 * 11 * 2 * 8 * 4);
  CHECK(j["bytes"]["full"] == 3 * 2 * 52 * 2 * 8 * 4);
  CHECK(j["evictions"]["slots"] == 3 * 2 * (52 - 10));
  CHECK(j["checks"]["of"] == 1);
}

#ifdef KVKEEP_REPLAY_PROGRAM
TEST_CASE("what a policy decided is recorded, and kvkeep-replay decides the same") {
  model_folder const tmp;
  std::string const file = tmp.write("m.bin", llama2c_bytes(random_model(43))).string();
  words const base{"--model", file, "--prompt-ids", "1,5,7,9,11,3,2", "--tokens", "40", "--quiet"};
  auto const record = [&](words const& policy, std::string const& name) {
    fs::path const dir = tmp.path / name;
    outcome const r = generate(base + policy + words{"--record", dir.string()});
    INFO(r.err);
    CHECK(r.code == 0);
    std::string const replay =
        "'" KVKEEP_REPLAY_PROGRAM "' --check '" + dir.string() + "'/layer_* > /dev/null 2>&1";
    CHECK(std::system(replay.c_str()) == 0);
    CHECK(std::distance(fs::directory_iterator(dir), fs::directory_iterator()) == 3);
    check_refused(base + policy + words{"--record", dir.string()}, "expected a new or empty one");
  };
  words const budget{"--budget", "12"};
  for (std::string const policy : {"h2o", "tova", "streamingllm"})
    record(budget + words{"--policy", policy}, policy);
  record(budget, "sum");
  record(budget + words{"--fusion", "max", "--evict-after", "1.4", "--layout", "paged"}, "max");
  check_refused(base + words{"--policy", "snapkv", "--record", (tmp.path / "x").string()},
                "--record: snapkv");
  check_refused(base + words{"--record", (tmp.path / "no" / "such").string()},
                "such: folder: cannot be made");
}
#endif

TEST_CASE("a budget beyond a short sequence keeps all of it") {
  word_model const m;
  for (std::string const policy : {"streamingllm", "morphkv", "lagkv"}) {
    outcome const r = generate({"--model", m.file, "--prompt", "w7", "--tokens", "1", "--policy",
                                policy, "--budget", "99"});
    INFO(policy << " " << r.err);
    CHECK(r.code == 0);
  }
}

TEST_CASE("a comparison and the demonstration refuse the options of one response") {
  word_model const m;
  for (std::string const mode : {"--compare", "--demo"}) {
    words const base{"--model", m.file, mode};
    for (words const& option :
         {words{"--prompt", "w7"}, words{"--task", "diary"}, words{"--policy", "h2o"},
          words{"--budget", "9"}, words{"--window", "2"}, words{"--layout", "paged"},
          words{"--tokens", "3"}, words{"--batch", "2"}, words{"--seed", "2"}, words{"--quiet"},
          words{"--record", "x"}})
      check_refused(base + option, option[0] + ": not an option of " + mode);
  }
}

TEST_CASE("a comparison refuses an unknown policy before it runs another one") {
  word_model const m;
  words const base{"--model", m.file, "--compare", "--percents", "50"};
  // One line: without the progress of what ran before.
  check_refused(base + words{"--policies", "fullkv,h2o,vapt", "--json", m.json_file},
                "--policies: vapt at 50%: --policy: vapt: expected fullkv, ");
  check_refused(base + words{"--policies", "fullkv,h2o+snapkv", "--csv", m.json_file},
                "--policies: h2o+snapkv at 50%: --policy: snapkv: cuts prompts only");
  CHECK(!fs::exists(m.json_file));
}

TEST_CASE("bad input is one line, exit code 2, and nothing is written") {
  word_model const m;
  words const base{"--model", m.file, "--json", m.json_file};
  words const good = base + words{"--prompt", "w7"};
  std::string const missing = (m.folder.path / "missing.gguf").string();
  check_refused({"--model", missing, "--prompt", "w7"}, "missing.gguf: file: does not exist");
  check_refused({"--prompt", "w7"}, "--model is required");
  check_refused(
      {"--model", m.folder.write("x.bin", std::string(64, 'x')).string(), "--prompt-ids", "1"},
      "magic: neither");
  std::string cut;
  {
    std::ifstream in(m.file, std::ios::binary);
    cut.assign(std::istreambuf_iterator<char>(in), {});
  }
  cut.resize(cut.size() / 2);
  check_refused({"--model", m.folder.write("cut.gguf", cut).string(), "--prompt", "w7"},
                "truncated");
  check_refused(base + words{"--prompt", "w7 zebra"}, "zebra: not a word of the model");
  check_refused(base + words{"--prompt-ids", "1,61"}, "--prompt-ids: 61: expected token ids 0..60");
  check_refused(base + words{"--prompt-ids", "-1"}, "--prompt-ids: -1");
  check_refused(base + words{"--prompt-ids", "1,,2"}, "--prompt-ids: : expected token ids");
  check_refused(base + words{"--prompt-ids", "1", "--prompt", "w7"}, "excludes");
  check_refused(base, "--prompt: expected a text, or --prompt-ids or --task");
  check_refused(base + words{"--prompt", ""}, "--prompt: expected a text");
  check_refused(base + words{"--task", "walk"}, "--task: walk: expected one of diary");
  check_refused(good + words{"--policy", "nobody"}, "--policy: nobody: expected fullkv, ");
  check_refused(good + words{"--policy", "h2o", "--budget", "8", "--window", "8"},
                "sinks + window");
  check_refused(good + words{"--policy", "tova", "--window", "2"},
                "--window: kvkeep: tova.window = 2, allowed: 0..1");
  check_refused(good + words{"--policy", "knorm", "--sinks", "-1"},
                "--sinks: kvkeep: knorm.sinks = -1, allowed: 0..");
  check_refused(good + words{"--policy", "h2o+morphkv", "--evict-after", "0.5"},
                "--evict-after: kvkeep: morphkv.evict_after = 0.5, allowed: 1..1024");
  check_refused(good + words{"--evict-after", "nan"}, "--evict-after: kvkeep: morphkv.evict_after");
  check_refused(good + words{"--budget", "0"}, "--budget: 0: expected");
  words const few = good + words{"--tokens", "5"};
  check_refused(few, "--budget: 25% of 7 tokens = 2: expected more than sinks + window = 2");
  check_refused(few + words{"--policy", "adakv+morphkv"},
                "--budget: 25% of 7 tokens = 2: expected");
  check_refused(few + words{"--policy", "streamingllm", "--budget", "3"},
                "--budget: 3: expected more than sinks + window = 4");
  check_refused(good + words{"--budget", "x%"}, "--budget: x%: expected");
  check_refused(good + words{"--budget", "1.5"}, "--budget: 1.5: expected");
  check_refused(good + words{"--layout", "striped"}, "--layout");
  check_refused(good + words{"--tokens", "0"}, "--tokens");
  check_refused(good + words{"--temperature", "-1"}, "--temperature");
  check_refused(good + words{"--temperature", "nan"}, "--temperature: nan");
  check_refused(good + words{"--top-p", "nan"}, "--top-p: nan");
  check_refused(good + words{"--seed", "-3"}, "--seed: -3: expected at least 0");
  check_refused(good + words{"--policy", "adakv", "--granularity", "layer"}, "budget");
  check_refused(good + words{"--layer-budget", "ada", "--policy", "tova"}, "budget");
  m.folder.write("episodes.json", R"({"schema":1,"vocabulary_sha256":"x","episodes":[]})");
  check_refused(base + words{"--task", "diary"},
                "episodes.json: vocabulary_sha256: made for other");
  m.folder.write("episodes.json", "[");
  check_refused(base + words{"--task", "diary"}, "episodes.json: json: malformed");
  CHECK(!fs::exists(m.json_file));
  check_refused(
      {"--model", m.file, "--prompt", "w7", "--json", (m.folder.path / "no" / "all.json").string()},
      "all.json: file: cannot be written");
  check_refused({"--model", m.file, "--prompt", "w7", "--json", m.folder.path.string()},
                "cannot be written");
  CHECK(generate({"--help"}).code == 0);
}
