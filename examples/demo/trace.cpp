// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "trace.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "support/npy.hpp"

namespace kvkeep::demo {

namespace {

namespace fs = std::filesystem;

[[noreturn]] void fail(fs::path const& file, char const* field, std::string const& reason) {
  throw std::runtime_error(file.string() + ": " + field + ": " + reason);
}

std::string text(std::vector<std::int64_t> const& shape) {
  std::string s;
  for (std::int64_t const e : shape) s += (s.empty() ? "[" : ", ") + std::to_string(e);
  return s + "]";
}

/// Finite floats `[heads, tokens, dim]`; extents that are -1 are taken over, others must agree.
std::vector<float> read_rows(fs::path const& file, index_t& heads, index_t& tokens, index_t& dim) {
  tools::npy_array a = tools::read_npy(file);
  if (!a.is_float) fail(file, "descr", "expected <f4");
  index_t* const want[] = {&heads, &tokens, &dim};
  bool fits = a.shape.size() == 3;
  for (std::size_t i = 0; fits && i < 3; ++i) {
    if (*want[i] < 0) *want[i] = static_cast<index_t>(a.shape[i]);
    fits = a.shape[i] == *want[i] && a.shape[i] > 0;
  }
  if (!fits) fail(file, "shape", text(a.shape) + " does not go with the trace's other arrays");
  if (!std::all_of(a.f32.begin(), a.f32.end(), [](float x) { return std::isfinite(x); }))
    fail(file, "data", "not finite");
  return std::move(a.f32);
}

/// The query before an answer token is the one that has to find it.
std::vector<std::uint8_t> read_asks(fs::path const& file, index_t tokens) {
  tools::npy_array const a = tools::read_npy(file);
  if (a.is_float) fail(file, "descr", "expected <i4");
  if (a.shape.size() != 1 || a.shape[0] != tokens)
    fail(file, "shape",
         text(a.shape) + ", but the trace has " + std::to_string(tokens) + " tokens");
  std::vector<std::uint8_t> asks(static_cast<std::size_t>(tokens));
  for (std::size_t p = 0; p < asks.size(); ++p) {
    if (a.i32[p] != 0 && a.i32[p] != 1) fail(file, "data", "expected 0 and 1 only");
    if (p > 0) asks[p - 1] = static_cast<std::uint8_t>(a.i32[p]);
  }
  if (std::count(asks.begin() + tokens / 2, asks.end(), 1) == 0)
    fail(file, "data", "no answer in the second half");
  return asks;
}

trace load_trace(fs::path const& dir) {
  trace t;
  t.name = dir.filename().string();
  t.tokens = t.n_q_heads = t.n_kv_heads = t.dim_k = t.dim_v = -1;
  do {
    std::string const number = std::to_string(t.layers.size());
    auto const file = [&](char const* what) { return dir / (what + ("_l" + number + ".npy")); };
    layer_trace l;
    l.q = read_rows(file("q"), t.n_q_heads, t.tokens, t.dim_k);
    l.k = read_rows(file("k"), t.n_kv_heads, t.tokens, t.dim_k);
    l.v = read_rows(file("v"), t.n_kv_heads, t.tokens, t.dim_v);
    if (t.n_q_heads % t.n_kv_heads != 0)
      fail(file("q"), "shape", "query heads are no multiple of KV heads");
    if (t.tokens < 64) fail(file("q"), "shape", "fewer than 64 tokens");
    t.layers.push_back(std::move(l));
  } while (fs::exists(dir / ("q_l" + std::to_string(t.layers.size()) + ".npy")));
  t.asks = read_asks(dir / "answer_mask.npy", t.tokens);
  return t;
}

}  // namespace

std::vector<trace> load_traces(fs::path const& dir) {
  std::error_code error;
  std::vector<fs::path> folders;
  for (fs::directory_iterator at(dir, error), end; !error && at != end; at.increment(error))
    if (at->is_directory()) folders.push_back(at->path());
  if (error) fail(dir, "folder", "cannot be read (" + error.message() + ")");
  if (folders.empty()) fail(dir, "folder", "holds no trace");
  std::sort(folders.begin(), folders.end());
  std::vector<trace> traces;
  for (auto const& f : folders) {
    traces.push_back(load_trace(f));
    trace const &a = traces.front(), &b = traces.back();
    if (a.tokens != b.tokens || a.n_q_heads != b.n_q_heads || a.n_kv_heads != b.n_kv_heads ||
        a.dim_k != b.dim_k || a.dim_v != b.dim_v || a.layers.size() != b.layers.size())
      fail(f, "shape", "differs from " + a.name);
  }
  return traces;
}

full_attention::full_attention(trace const& t)
    : tokens_(t.tokens), prompt_(t.prompt()), n_q_heads_(t.n_q_heads), dim_v_(t.dim_v) {
  std::size_t const rows = at(t.n_layers(), 0, prompt_);
  probability_.resize(rows * static_cast<std::size_t>(tokens_));
  out_.resize(rows * static_cast<std::size_t>(dim_v_));
  double const scale = 1 / std::sqrt(static_cast<double>(t.dim_k));
  for (index_t l = 0; l < t.n_layers(); ++l)
    for (index_t h = 0; h < n_q_heads_; ++h)
      for (index_t p = prompt_; p < tokens_; ++p) {
        index_t const kv = h / t.group();
        double* prob = probability_.data() + at(l, h, p) * static_cast<std::size_t>(tokens_);
        double* result = out_.data() + at(l, h, p) * static_cast<std::size_t>(dim_v_);
        for (index_t j = 0; j <= p; ++j)
          for (index_t d = 0; d < t.dim_k; ++d)
            prob[j] += scale * static_cast<double>(t.q(l, h, p)[d]) *
                       static_cast<double>(t.k(l, kv, j)[d]);
        double const most = *std::max_element(prob, prob + p + 1);
        double sum = 0;
        for (index_t j = 0; j <= p; ++j) sum += prob[j] = std::exp(prob[j] - most);
        for (index_t j = 0; j <= p; ++j) {
          prob[j] /= sum;
          for (index_t d = 0; d < dim_v_; ++d)
            result[d] += prob[j] * static_cast<double>(t.v(l, kv, j)[d]);
        }
      }
}

}  // namespace kvkeep::demo
