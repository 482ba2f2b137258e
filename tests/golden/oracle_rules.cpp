// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Rules of the oracle that no golden case pins, on numbers small enough to check by hand, and the
/// strictness of the .npy reader.
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>
#include <string>
#include <vector>

#include "../../examples/support/npy.hpp"
#include "../support/catch.hpp"
#include "../support/oracle.hpp"
#include "../support/oracle_budget.hpp"
#include "../support/oracle_decode.hpp"
#include "../support/oracle_morph.hpp"

namespace {

namespace oracle = kvkeep::oracle;
using kvkeep::index_t;
using oracle::array;
using oracle::kept_set;
using oracle::kept_sets;

double const nan = std::numeric_limits<double>::quiet_NaN();

TEST_CASE("selection order: -0 equals +0, NaN loses to -inf, ties go to the lower position",
          "[oracle]") {
  CHECK(oracle::top_positions({-0.0, 0.0, 0.0}, {4, 2, 7}, 2) == kept_set{2, 4});
  CHECK(oracle::ranked({nan, -oracle::infinity, 1, nan}, {0, 1, 2, 3}) == kept_set{2, 1, 0, 3});
  CHECK(oracle::top_positions({1, 2}, {0, 1}, 9) == kept_set{0, 1});
  CHECK(oracle::top_positions({1, 2}, {0, 1}, -1).empty());
}

TEST_CASE("the guard counts live positions and wins over the budget", "[oracle]") {
  std::vector<double> const s{0, 9, 1, 8, 2, 0};
  kept_set const p{3, 5, 6, 10, 11, 20};
  CHECK(oracle::select(s, p, 4, {.sinks = 1, .recent = 1}) == kept_set{3, 5, 10, 20});
  CHECK(oracle::select(s, p, 3, {.frozen = 7}) == kept_set{3, 5, 6});
  CHECK(oracle::select(s, p, 1, {.recent = 2, .frozen = 4}) == kept_set{3, 11, 20});
}

TEST_CASE("softmax: sink, sanitised logits, softcap", "[oracle]") {
  auto const with_sink = oracle::softmax({std::log(2.0), 0}, 0.0);
  CHECK(with_sink[0] == Approx(0.5));
  CHECK(with_sink[1] == Approx(0.25));
  double lse = 0;
  oracle::softmax({0, 0}, 0.0, &lse);
  CHECK(lse == Approx(std::log(3.0)));
  CHECK(oracle::sanitised(nan) == -oracle::largest);
  CHECK(oracle::sanitised(oracle::infinity) == oracle::largest);
  auto const lowest = oracle::softmax({-oracle::largest, -oracle::largest});
  CHECK(lowest[0] == 0.5);
  array const q({1, 1, 1}, 3.0), k({1, 1, 1}, 4.0);
  CHECK(oracle::logit(q, 0, 0, k, 0, 0, {.scale = 0.5, .softcap = 2, .sinks = {}}) ==
        Approx(2 * std::tanh(3.0)));
}

TEST_CASE("pooling damps the ends (avg) or ignores them (max)", "[oracle]") {
  CHECK(oracle::pool1d({3, 3, 3}, 3, oracle::pooling::avg) == std::vector<double>{2, 3, 2});
  CHECK(oracle::pool1d({-1, -5, -5}, 3, oracle::pooling::max) == std::vector<double>{-1, -1, -5});
  CHECK_THROWS_AS(oracle::pool1d({1}, 2, oracle::pooling::avg), std::invalid_argument);
}

TEST_CASE("prompts shorter than the window have no candidates", "[oracle]") {
  array const q({2, 3, 4}, 1.0), k({1, 3, 4}, 1.0);
  oracle::window_rule const w;
  array const s = oracle::window_scores(q, k, w);
  CHECK(s.shape == std::vector<index_t>{1, 0});
  CHECK(oracle::keep_with_window(s, 5, 3) == kept_sets{{0, 1, 2}});
}

TEST_CASE("LagKV: a constant reference channel counts as 0 and short prompts score 1", "[oracle]") {
  array const flat({1, 5, 2}, 1.0);
  CHECK(oracle::lagkv_scores(flat, flat, 1, 2, true).row(0) ==
        std::vector<double>{1, 0.5, 0.5, 1, 1});
  CHECK(oracle::lagkv_scores(flat, flat, 1, 2, false).row(0) ==
        std::vector<double>{1, 0, 0.5, 1, 1});
  CHECK(oracle::lagkv_scores(flat, flat, 1, 4, true).row(0) == std::vector<double>(5, 1.0));
  CHECK_FALSE(oracle::lagkv_applies(5, 1, 4));
}

TEST_CASE("whole blocks keep the open tail and protected blocks", "[oracle]") {
  std::vector<double> const s{5, 0, 3, 3, 1, 1, 0};
  kept_set const p{0, 1, 2, 3, 4, 5, 6};
  CHECK(oracle::select_blocks(s, p, 2, 3) == kept_set{2, 3, 6});
  CHECK(oracle::select_blocks(s, p, 2, 3, {}, true) == kept_set{0, 1, 6});
  CHECK(oracle::select_blocks(s, p, 2, 4, {.frozen = 1}) == kept_set{0, 1, 2, 3, 6});
}

TEST_CASE("joined scores are fp32 means over heads, then over layers", "[oracle]") {
  array const s({2, 2, 1}, std::vector<double>{1, 2, 4, 8});
  CHECK(oracle::layer_scores(s.slice(0)) == std::vector<double>{1.5});
  CHECK(oracle::sequence_scores(s) == std::vector<double>{3.75});
}

TEST_CASE("MorphKV without any query row keeps the newest old tokens", "[oracle]") {
  oracle::tokens const t{array({1, 20, 2}, 1.0), array({1, 20, 2}, 1.0), array({1, 20, 1}, 1.0)};
  oracle::decode_rule rule;
  rule.capacity = 6;
  oracle::morph_rule morph;
  morph.first_query = 12;
  oracle::morph_decode sim(t, rule, morph, oracle::full_cache(t, 12));
  auto const r = sim.step(12);
  CHECK(r.kept == kept_sets{{6, 7, 8, 9, 10, 11, 12}});
  CHECK(r.out.at(0, 0) == Approx(1.0));
}

TEST_CASE("decoding may start from any kept set", "[oracle]") {
  array keys({1, 12, 1}, 1.0);
  keys.at(0, 3, 0) = 5;
  oracle::tokens const t{array({1, 12, 1}), keys, array({1, 12, 1}, 2.0)};
  oracle::decode_rule rule;
  rule.capacity = 3;
  oracle::knorm_decode sim(t, rule, {{1, 3, 8}});
  CHECK(sim.step(10).kept == kept_sets{{1, 8, 10}});
  CHECK(sim.step(11).kept == kept_sets{{1, 8, 10}});
  oracle::streaming_decode ring(t, rule, {{1, 3, 8}}, true);
  auto const r = ring.step(10);
  CHECK(r.kept == kept_sets{{3, 8, 10}});
  CHECK(r.evicted);
}

struct scratch_file {
  std::filesystem::path path = std::filesystem::temp_directory_path() /
                               ("kvkeep_npy_" + std::to_string(::getpid()) + ".npy");
  ~scratch_file() { std::filesystem::remove(path); }
};

std::string slurp(std::filesystem::path const& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

/// Writes the bytes and returns the reader's message, without the file's name.
std::string refusal(std::filesystem::path const& path, std::string const& bytes) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
  try {
    kvkeep::tools::read_npy(path);
  } catch (std::runtime_error const& e) {
    std::string const what = e.what(), prefix = path.string() + ": ";
    REQUIRE(what.substr(0, prefix.size()) == prefix);
    return what.substr(prefix.size());
  }
  return "accepted";
}

std::string npy_bytes(std::string const& header, std::string const& data) {
  return std::string("\x93NUMPY\x01\x00", 8) + static_cast<char>(header.size()) + '\0' + header +
         data;
}

TEST_CASE("npy files round trip and match the golden files byte for byte", "[npy]") {
  scratch_file const file;
  for (char const* name : {"scores.npy", "k.npy"}) {
    auto const original = std::filesystem::path(KVKEEP_GOLDEN_DIR) / "spec_topk_ties" / name;
    kvkeep::tools::write_npy(file.path, kvkeep::tools::read_npy(original));
    CHECK(slurp(file.path) == slurp(original));
  }
  kvkeep::tools::write_npy(file.path, {0, 3}, std::vector<float>{});
  CHECK(kvkeep::tools::read_npy(file.path).shape == std::vector<std::int64_t>{0, 3});
  kvkeep::tools::write_npy(file.path, {}, std::vector<std::int32_t>{7});
  CHECK(kvkeep::tools::read_npy(file.path).i32 == std::vector<std::int32_t>{7});
  CHECK_THROWS_AS(kvkeep::tools::write_npy(file.path, {2}, std::vector<float>{1}),
                  std::runtime_error);
}

TEST_CASE("malformed npy files are refused with the field's name", "[npy]") {
  scratch_file const file;
  auto const with = [](std::string const& descr, std::string const& order,
                       std::string const& shape) {
    return "{'descr': " + descr + ", 'fortran_order': " + order + ", 'shape': " + shape + "}\n";
  };
  std::string const good = with("'<f4'", "False", "(2,)"), eight(8, '\0');
  CHECK(refusal(file.path, npy_bytes(good, eight)) == "accepted");
  CHECK(refusal(file.path, "") == "magic: not a .npy file");
  CHECK(refusal(file.path, "\x93NUMPY\x01") == "header: truncated");
  CHECK(refusal(file.path, npy_bytes(good, eight).substr(0, 30)) == "header: truncated");
  CHECK(refusal(file.path, npy_bytes(good, "1234567")) == "data: truncated");
  CHECK(refusal(file.path, npy_bytes(good, eight + "x")) == "data: bytes after the last element");
  std::string second = npy_bytes(good, eight);
  second[6] = 2;
  CHECK(refusal(file.path, second) == "version: only 1.0 is read");
  auto const field = [&](std::string const& header) {
    return refusal(file.path, npy_bytes(header, eight));
  };
  CHECK(field(with("'<f8'", "False", "(1,)")) == "descr: only <f4 and <i4 are read");
  CHECK(field(with("'>f4'", "False", "(2,)")) == "descr: only <f4 and <i4 are read");
  CHECK(field(with("'<f4'", "True", "(2,)")) == "fortran_order: only C order is read");
  CHECK(field(with("'<f4'", "0", "(2,)")) == "fortran_order: expected True or False");
  CHECK(field(with("'<f4'", "False", "(-2,)")) == "shape: expected a non-negative integer");
  CHECK(field(with("'<f4'", "False", "(2)")) == "shape: not a tuple");
  CHECK(field(with("'<f4'", "False", "(99999999999,)")) == "shape: extent too large");
  CHECK(field(with("'<f4'", "False", "(65536, 65536, 65536, 65536)")) == "data: truncated");
  CHECK(field("{'descr': '<f4', 'shape': (2,)}\n") == "fortran_order: missing");
  CHECK(field("{'descr': '<f4', 'descr': '<f4'}\n") == "descr: given twice");
  CHECK(field("{'descr': '<f4") == "header: does not end in a newline");
  CHECK(field("{'descr': '<f4\n") == "descr: unterminated string");
  CHECK(field(good + "x\n") == "header: text after the dictionary");
}

}  // namespace
