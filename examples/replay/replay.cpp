// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// kvkeep-replay: runs recorded cases through the library and compares the results with the
/// recorded ones. Exit codes: 0 pass, 1 mismatch, 2 bad input, 3 unsupported; of several cases the
/// first of 2, 1, 3, 0 that occurred; 77 where the backend's device is missing.
#include <chrono>
#include <cstdio>
#include <new>
#include <set>

#include <CLI/CLI.hpp>

#include "compare.hpp"
#include "guide.hpp"
#include "output.hpp"

namespace kvkeep::replay {
namespace {

enum exit_code : int { passed = 0, mismatch = 1, bad_input = 2, not_supported = 3, skipped = 77 };

struct settings {
  std::vector<std::string> cases;
  std::string out;
  std::string backend = "cpu";
  std::string layout = "strided";
  bool check = false;
};

layout_kind layout_of(std::string const& name) {
  return name == "paged"    ? layout_kind::paged
         : name == "ragged" ? layout_kind::ragged
                            : layout_kind::strided;
}

replayed run_case(backend& b, recorded_case const& c, layout_kind layout) {
  std::string const kind = c.kind();
  if (kind == "prefill_select" || kind == "prefill_select_ragged") return run_prefill(b, c, layout);
  if (kind == "decode_trace") return run_decode(b, c, layout);
  if (kind == "layer_budget" || kind == "layer_budget_from_scores") return run_layers(b, c, layout);
  if (kind == "budget") return run_budget(b, c);
  if (kind == "select") return run_select(b, c);
  throw unsupported(kind);
}

/// The fields that every case has; names become folders.
recorded_case load_checked(settings const& s, std::string const& dir) {
  if (!std::filesystem::is_directory(dir)) throw std::runtime_error(dir + ": folder: not found");
  recorded_case c = tools::load_case(dir, s.check);
  std::string const name = c.name(), origin = c.meta.value("origin", nlohmann::json()).dump();
  bool const plain = !name.empty() && name != "." && name != ".." &&
                     std::none_of(name.begin(), name.end(), [](char x) {
                       return x == '/' || x == '\\' || static_cast<unsigned char>(x) < ' ';
                     });
  if (!plain) c.fail("name", "allowed: a plain file name");
  if (origin != "\"official\"" && origin != "\"spec\"")
    c.fail("origin", origin + ", allowed: official or spec");
  if (c.policy().empty() || c.kind().empty()) c.fail("policy", "empty");
  if (s.check && c.outputs.empty()) c.fail("outputs", "empty: nothing to compare with");
  return c;
}

/// A folder of its own for each of several cases, even where names repeat.
std::filesystem::path folder(settings const& s, std::string const& name,
                             std::set<std::string>& taken) {
  if (s.cases.size() == 1) return s.out;
  std::string unique = name;
  for (int i = 2; !taken.insert(unique).second; ++i) unique = name + "_" + std::to_string(i);
  return std::filesystem::path(s.out) / unique;
}

std::string compare(recorded_case const& c, replayed const& r) {
  for (auto const& [name, expected] : c.outputs) {
    std::string const reason = difference(name, r.outputs.at(name), expected);
    if (!reason.empty()) return reason;
  }
  return {};
}

/// Whether the outputs differ in values alone.
bool same_form(recorded_case const& c, replayed const& r) {
  return std::all_of(c.outputs.begin(), c.outputs.end(), [&](auto const& expected) {
    npy_array const& mine = r.outputs.at(expected.first);
    return mine.shape == expected.second.shape && mine.is_float == expected.second.is_float;
  });
}

exit_code replay_case(settings const& s, backend& b, recorded_case const& c,
                      std::set<std::string>& taken) {
  using clock = std::chrono::steady_clock;
  auto const start = clock::now();
  replayed r = run_case(b, c, layout_of(s.layout));
  double const microseconds =
      std::chrono::duration<double, std::micro>(clock::now() - start).count();
  keep_named(c, r);
  if (!s.out.empty()) {
    nlohmann::ordered_json result;
    result["name"] = c.name();
    result["policy"] = c.policy();
    result["parameters"] = r.parameters;
    result["backend"] = b.name();
    result["layout"] = s.layout;
    result["microseconds"] = microseconds;
    write_results(folder(s, c.name(), taken), r, result);
  }
  if (!s.check) {
    std::printf("ran %s in %.0f us\n", c.name().c_str(), microseconds);
    return passed;
  }
  std::string reason = compare(c, r);
  if (!reason.empty() && can_guide(c) && same_form(c, r)) {
    r = run_decode(b, c, layout_of(s.layout), true);
    keep_named(c, r);
    reason = compare(c, r);
  }
  if (reason.empty()) {
    std::string const ties =
        r.near_ties == 0 ? "" : ", " + std::to_string(r.near_ties) + " near ties";
    std::printf("PASS %s%s\n", c.name().c_str(), ties.c_str());
    return passed;
  }
  std::printf("FAIL %s: %s\n", c.name().c_str(), reason.c_str());
  return mismatch;
}

exit_code replay_folder(settings const& s, backend& b, std::string const& dir,
                        std::set<std::string>& taken) {
  std::string name = dir;
  try {
    recorded_case const c = load_checked(s, dir);
    name = c.name();
    return replay_case(s, b, c, taken);
  } catch (unsupported const& e) {
    std::printf("unsupported: %s\n", e.what());
    return not_supported;
  } catch (call_failed const& e) {
    std::printf("FAIL %s: %s\n", name.c_str(), e.what());
    return mismatch;
  } catch (std::bad_alloc const&) {
    std::fprintf(stderr, "kvkeep-replay: %s/case.json: shape: more memory than there is\n",
                 dir.c_str());
  } catch (std::invalid_argument const& e) {
    // What the library refuses when a session is bound, with its own name of the field.
    std::fprintf(stderr, "kvkeep-replay: %s/case.json: params: %s\n", dir.c_str(), e.what());
  } catch (std::exception const& e) {
    std::fprintf(stderr, "kvkeep-replay: %s\n", e.what());
  }
  return bad_input;
}

exit_code replay_all(settings const& s) {
  std::unique_ptr<backend> b;
  try {
    b = s.backend == "cuda" ? make_cuda_backend() : make_cpu_backend();
  } catch (unsupported const& e) {
    std::fprintf(stderr, "unsupported: %s\n", e.what());
    return not_supported;
  } catch (no_device const& e) {
    std::fprintf(stderr, "skipped: backend %s, %s\n", s.backend.c_str(), e.what());
    return skipped;
  }
  std::set<int> codes;
  std::set<std::string> taken;
  for (std::string const& dir : s.cases) {
    codes.insert(replay_folder(s, *b, dir, taken));
    std::fflush(stdout);
  }
  for (exit_code const code : {bad_input, mismatch, not_supported})
    if (codes.count(code) > 0) return code;
  return passed;
}

}  // namespace
}  // namespace kvkeep::replay

int main(int argc, char** argv) {
  kvkeep::replay::settings s;
  CLI::App app("Runs recorded cases of KV-cache eviction through kvkeep.", "kvkeep-replay");
  app.add_option("CASE_DIR", s.cases, "folders with a case.json")->required();
  app.add_option("--out", s.out,
                 "folder for <output>.npy and result.json; one below it for each of several cases");
  app.add_flag("--check", s.check,
               "compare with the recorded outputs: PASS name[, N near ties], or FAIL name: reason");
  app.add_option("--backend", s.backend, "cpu or cuda")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
  app.add_option("--layout", s.layout, "strided, paged or ragged")
      ->check(CLI::IsMember({"strided", "paged", "ragged"}))
      ->capture_default_str();
  app.footer(
      "Exit: 0 pass, 1 mismatch, 2 bad input, 3 unsupported; of several cases the first of "
      "2, 1, 3, 0 that occurred. 77: the backend's device is missing.");
  try {
    app.parse(argc, argv);
  } catch (CLI::ParseError const& e) {
    return app.exit(e) == 0 ? 0 : 2;
  }
  return kvkeep::replay::replay_all(s);
}
