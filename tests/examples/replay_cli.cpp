// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The program kvkeep-replay: recorded cases in every layout, outputs, malformed input, exit codes.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <functional>
#include <sstream>

#include "../support/case.hpp"
#include "../support/catch.hpp"

#ifdef KVKEEP_REPLAY_PROGRAM

namespace {

namespace fs = std::filesystem;
using kvkeep::test::case_dirs;
using kvkeep::test::golden_case;
using kvkeep::test::load_case;
using nlohmann::json;

fs::path golden(std::string const& name) { return fs::path(KVKEEP_GOLDEN_DIR) / name; }

/// A folder that is gone after the test.
struct scratch_folder {
  fs::path path;
  scratch_folder() {
    static int number = 0;
    path = fs::temp_directory_path() /
           ("kvkeep_replay_" + std::to_string(getpid()) + "_" + std::to_string(number++));
    fs::remove_all(path);
    fs::create_directories(path);
  }
  scratch_folder(scratch_folder const&) = delete;
  scratch_folder& operator=(scratch_folder const&) = delete;
  ~scratch_folder() {
    std::error_code ignored;
    fs::remove_all(path, ignored);
  }
};

struct run_result {
  int code = -1;
  std::string text;  ///< stdout and stderr
};

run_result replay(std::vector<std::string> const& arguments) {
  std::string command = "'" KVKEEP_REPLAY_PROGRAM "'";
  for (auto const& a : arguments) command += " '" + a + "'";
  run_result r;
  std::FILE* pipe = popen((command + " 2>&1").c_str(), "r");
  REQUIRE(pipe != nullptr);
  char part[4096];
  for (std::size_t n; (n = std::fread(part, 1, sizeof part, pipe)) > 0;) r.text.append(part, n);
  int const status = pclose(pipe);
  r.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  return r;
}

bool contains(std::string const& text, std::string const& part) {
  return text.find(part) != std::string::npos;
}

/// A copy of a golden case with a changed case.json.
fs::path changed(scratch_folder const& at, std::string const& name,
                 std::function<void(json&)> const& change) {
  fs::path const dir = at.path / name;
  fs::remove_all(dir);
  fs::copy(golden(name), dir);
  json meta = json::parse(std::ifstream(dir / "case.json"));
  change(meta);
  std::ofstream(dir / "case.json") << meta.dump();
  return dir;
}
fs::path unknown_case(scratch_folder const& at) {
  return changed(at, "cake_adjust_budgets", [](json& meta) { meta["policy"] = "nobody"; });
}

void keep_bytes(fs::path const& file, std::uintmax_t n) { fs::resize_file(file, n); }

/// Array with its batch axis doubled: axis 0 of inputs, axis 1 of a trace's outputs.
void double_batch(fs::path const& dir, json& entry, std::size_t axis) {
  fs::path const file = dir / entry["file"].get<std::string>();
  auto a = kvkeep::tools::read_npy(file);
  std::size_t inner = 1;
  for (std::size_t i = axis; i < a.shape.size(); ++i) inner *= static_cast<std::size_t>(a.shape[i]);
  auto const twice = [&](auto& values) {
    std::remove_reference_t<decltype(values)> all;
    for (std::size_t at = 0; at < values.size(); at += inner)
      for (int copy = 0; copy < 2; ++copy)
        all.insert(all.end(), values.begin() + static_cast<std::ptrdiff_t>(at),
                   values.begin() + static_cast<std::ptrdiff_t>(at + inner));
    values = all;
  };
  twice(a.f32);
  twice(a.i32);
  a.shape[axis] *= 2;
  kvkeep::tools::write_npy(file, a);
  entry["shape"] = a.shape;
}

}  // namespace

TEST_CASE("every golden case passes in every layout") {
  std::vector<std::string> cases;
  for (auto const& dir : case_dirs(KVKEEP_GOLDEN_DIR)) cases.push_back(dir.string());
  REQUIRE(cases.size() >= 69);
  for (std::string const layout : {"strided", "paged", "ragged"}) {
    auto arguments = cases;
    arguments.insert(arguments.end(), {"--check", "--layout", layout});
    auto const r = replay(arguments);
    INFO(layout << "\n" << r.text);
    CHECK(r.code == 0);
    std::istringstream lines(r.text);
    std::size_t passed = 0;
    for (std::string line; std::getline(lines, line);) passed += line.rfind("PASS ", 0) == 0;
    CHECK(passed == cases.size());
  }
}

TEST_CASE("a trace of two sequences is two traces") {
  scratch_folder const tmp;
  for (char const* name : {"morph_sum_gqa_w4_c16", "spec_morph_gqa_max_cur", "tova_decode_gqa",
                           "h2o_decode_mha_short"}) {
    fs::path const dir = tmp.path / name;
    changed(tmp, name, [&](json& meta) {
      meta["shape"]["B"] = 2;
      for (auto& entry : meta["inputs"]) double_batch(dir, entry, 0);
      for (auto& [output, entry] : meta["outputs"].items())
        if (output != "lens" && output != "evicted") double_batch(dir, entry, 1);
    });
    auto const r = replay({dir.string(), "--check"});
    INFO(r.text);
    CHECK(r.code == 0);
  }
}

TEST_CASE("policies that do not exist are named") {
  scratch_folder const tmp;
  auto const r = replay({unknown_case(tmp).string(), "--check"});
  CHECK(r.code == 3);
  CHECK(r.text == "unsupported: nobody\n");
  auto const cuda = replay({golden("knorm_kvf").string(), "--backend", "cuda"});
#ifdef KVKEEP_REPLAY_CUDA
  CHECK((cuda.code == 0 || cuda.code == 77));  // 77: no device
#else
  CHECK(cuda.code == 3);
  CHECK(contains(cuda.text, "cuda"));
#endif
}

TEST_CASE("outputs are written as recorded, and nothing else") {
  scratch_folder const tmp;
  for (char const* name : {"morph_sum_gqa_w4_c16", "dynamickv_8l_dup", "pyramidkv_budgets"}) {
    fs::path const out = tmp.path / "out" / name;
    REQUIRE(replay({golden(name).string(), "--out", out.string(), "--layout", "paged"}).code == 0);
    golden_case const c = load_case(golden(name));
    std::size_t files = 0;
    for (auto const& entry : fs::directory_iterator(out)) files += entry.is_regular_file() ? 1 : 0;
    CHECK(files == c.outputs.size() + 1);
    for (auto const& [output, expected] : c.outputs) {
      auto const mine = kvkeep::tools::read_npy(out / (output + ".npy"));
      CHECK(mine.shape == expected.shape);
      CHECK(mine.i32 == expected.i32);
    }
    json const result = json::parse(std::ifstream(out / "result.json"));
    CHECK(result["name"] == name);
    CHECK(result["policy"] == c.policy());
    CHECK(result["backend"] == "cpu");
    CHECK(result["layout"] == "paged");
    CHECK(result["parameters"].is_object());
    CHECK(result["microseconds"].is_number());
  }
  fs::path const several = tmp.path / "several";
  CHECK(replay({golden("knorm_kvf").string(), golden("spec_apportion").string(), "--out",
                several.string()})
            .code == 0);
  CHECK(fs::exists(several / "knorm_kvf" / "kept.npy"));
  CHECK(fs::exists(several / "spec_apportion" / "result.json"));
}

TEST_CASE("a mismatch fails, and of several cases the gravest code is returned") {
  scratch_folder const tmp;
  fs::path const dir = changed(tmp, "knorm_kvpress", [](json&) {});
  auto kept = kvkeep::tools::read_npy(dir / "kept.npy");
  ++kept.i32.back();
  kvkeep::tools::write_npy(dir / "kept.npy", kept);
  auto const r = replay({dir.string(), "--check"});
  CHECK(r.code == 1);
  CHECK(r.text.rfind("FAIL knorm_kvpress: kept: 1 of 48", 0) == 0);
  CHECK(replay({dir.string()}).code == 0);

  // A trace whose sets are no integers cannot be followed either.
  std::string const trace = "spec_morph_gqa_sum";
  fs::path const floats =
      changed(tmp, trace, [](json& meta) { meta["outputs"]["kept"]["dtype"] = "float32"; });
  auto sets = kvkeep::tools::read_npy(floats / "kept.npy");
  sets.is_float = true;
  sets.f32.assign(sets.i32.begin(), sets.i32.end());
  kvkeep::tools::write_npy(floats / "kept.npy", sets);
  auto const no_sets = replay({floats.string(), "--check"});
  CHECK(no_sets.code == 1);
  CHECK(contains(no_sets.text, "kept: dtype differs"));

  std::string const good = golden("knorm_kvf").string();
  std::string const unknown = unknown_case(tmp).string();
  std::string const missing = (tmp.path / "missing").string();
  CHECK(replay({good, unknown, "--check"}).code == 3);
  CHECK(replay({unknown, dir.string(), good, "--check"}).code == 1);
  CHECK(replay({good, dir.string(), missing, unknown, "--check"}).code == 2);
}

TEST_CASE("bad parameters and shapes are refused by name, and nothing is written") {
  struct {
    char const* name;
    char const* group;
    char const* field;
    json value;
  } const bad[] = {
      {"snapkv_avg_w8_k5_mha", "params", "window", 24},
      {"snapkv_avg_w8_k5_mha", "params", "window", 0},
      {"snapkv_avg_w8_k5_mha", "params", "window", "8"},
      {"snapkv_avg_w8_k5_mha", "params", "kernel", 4},
      {"snapkv_avg_w8_k5_mha", "params", "capacity", nullptr},
      {"snapkv_avg_w8_k5_mha", "params", "pooling", "median"},
      {"snapkv_avg_w8_k5_gqa_mean", "params", "gqa_agg", "none"},
      {"snapkv_avg_w8_k5_mha", "shape", "T", 0},
      {"snapkv_avg_w8_k5_mha", "shape", "T", -96},
      {"snapkv_avg_w8_k5_mha", "shape", "T", 4294967296},
      {"snapkv_avg_w8_k5_gqa_mean", "shape", "Hq", 7},
      {"morph_sum_gqa_w4_c16", "params", "evict_after", 0.5},
      {"morph_sum_gqa_w4_c16", "params", "n_query_rows", 0},
      {"morph_sum_gqa_w4_c16", "params", "fusion", "sum"},
      {"morph_sum_gqa_w4_c16", "shape", "steps", 0},
      {"pyramidkv_sel_layer3", "params", "layer", 8},
      {"pyramidkv_sel_layer3", "params", "beta", 0},
      {"adakv_kvf_mha_avg", "params", "floor", 1.5},
      {"adakv_kvf_mha_avg", "params", "variant", "none"},
      {"lagkv_kvpress", "params", "lag_size", 0},
      {"expected_attention_kvpress", "params", "n_future", 0},
      {"expected_attention_kvpress", "params", "rope_layout", "whole"},
      {"cake_adjust_budgets", "params", "columns", {"num_layers", "total", "limit"}},
      {"spec_dynamickv_a", "params", "r_min", 2},
      {"dynamickv_8l", "params", "every", 0},
      {"streaming_trace", "params", "recent_size", 0},
      {"tova_decode_gqa", "params", "capacity", 0},
  };
  scratch_folder const tmp;
  fs::path const out = tmp.path / "out";
  for (auto const& b : bad) {
    auto const dir = changed(tmp, b.name, [&](json& meta) { meta[b.group][b.field] = b.value; });
    auto const r = replay({dir.string(), "--check", "--out", out.string()});
    INFO(b.name << " " << b.field << " = " << b.value.dump() << "\n" << r.text);
    CHECK(r.code == 2);
    CHECK(contains(r.text, std::string("case.json: ") + b.group + "." + b.field));
    CHECK(!fs::exists(out));
  }
}

TEST_CASE("malformed folders and files are refused by name") {
  scratch_folder const tmp;
  std::string const name = "snapkv_avg_w8_k5_mha";
  fs::path const dir = tmp.path / name, out = tmp.path / "out";
  auto const refused = [&](
                           std::string const& message, std::function<void(json&)> const& change,
                           std::function<void()> const& then = [] {}) {
    changed(tmp, name, change);
    then();
    auto const r = replay({dir.string(), "--check", "--out", out.string()});
    INFO(message << "\n" << r.text);
    CHECK(r.code == 2);
    CHECK(contains(r.text, message));
    CHECK(!fs::exists(out));
  };
  auto const same = [](json&) {};
  refused("k.npy: data: truncated", same, [&] { keep_bytes(dir / "k.npy", 500); });
  refused("k.npy: magic", same, [&] { keep_bytes(dir / "k.npy", 0); });
  refused("kept.npy: data: truncated", same, [&] { keep_bytes(dir / "kept.npy", 200); });
  refused("q_win.npy: file", same, [&] { fs::remove(dir / "q_win.npy"); });
  refused("case.json: file", same, [&] { fs::remove(dir / "case.json"); });
  refused("case.json: json", same, [&] { keep_bytes(dir / "case.json", 100); });
  refused("inputs.k.shape", [](json& m) { m["shape"]["T"] = 95; });
  refused("inputs.q_win.shape", [](json& m) { m["shape"]["B"] = 2; });
  refused("inputs.k: shape", [](json& m) { m["inputs"]["k"]["shape"] = {1, 2, 48, 32}; });
  refused("inputs.k.shape", [](json& m) { m["inputs"]["k"]["shape"][2] = -96; });
  refused("inputs.k.dtype", [](json& m) { m["inputs"]["k"]["dtype"] = "float64"; });
  refused("inputs.k.file", [](json& m) { m["inputs"]["k"]["file"] = "../k.npy"; });
  refused("inputs.k: missing", [](json& m) { m["inputs"].erase("k"); });
  refused("outputs.extra", [](json& m) { m["outputs"]["extra"] = m["outputs"]["kept"]; });
  refused("outputs", [](json& m) { m.erase("outputs"); });
  refused("schema", [](json& m) { m["schema"] = 2; });
  refused("origin", [](json& m) { m["origin"] = "nowhere"; });
  refused("name", [](json& m) { m["name"] = "../name"; });
  CHECK(replay({(tmp.path / "missing").string()}).code == 2);
  CHECK(replay({golden(name).string(), "--layout", "striped"}).code == 2);
  CHECK(replay({}).code == 2);
  CHECK(replay({"--help"}).code == 0);

  // Recorded outputs are read to be compared with, and not otherwise.
  changed(tmp, name, same);
  fs::remove(dir / "kept.npy");
  CHECK(replay({dir.string(), "--out", out.string()}).code == 0);
  CHECK(fs::exists(out / "kept.npy"));
}

#else

TEST_CASE("kvkeep-replay is not part of this build") { SUCCEED(); }

#endif
