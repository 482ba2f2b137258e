// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Small models with random weights, written in both file formats, and the folder that they lie in.
#pragma once

#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "generate/model.hpp"

namespace kvkeep::test {

namespace fs = std::filesystem;

/// A folder that is gone after the test.
struct model_folder {
  fs::path path;
  model_folder() {
    static int number = 0;
    path = fs::temp_directory_path() /
           ("kvkeep_generate_" + std::to_string(getpid()) + "_" + std::to_string(number++));
    fs::remove_all(path);
    fs::create_directories(path);
  }
  model_folder(model_folder const&) = delete;
  model_folder& operator=(model_folder const&) = delete;
  ~model_folder() {
    std::error_code ignored;
    fs::remove_all(path, ignored);
  }
  fs::path write(std::string const& name, std::string const& bytes) const {
    std::ofstream(path / name, std::ios::binary) << bytes;
    return path / name;
  }
};

/// Models that are not part of the repository; empty where they are missing.
inline fs::path shared_model(std::string const& name) {
  char const* const given = std::getenv("KVKEEP_SHARED_DIR");
  fs::path const file = fs::path(given != nullptr ? given : KVKEEP_SHARED_DIR) / "models" / name;
  return fs::exists(file) ? file : fs::path();
}

struct random_floats {
  std::uint64_t state;
  float operator()() {
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    return static_cast<float>(state >> 40) / 8388608.0F - 1.0F;
  }
  std::vector<float> list(std::size_t n, float scale, float middle = 0) {
    std::vector<float> v(n);
    for (float& x : v) x = middle + scale * (*this)();
    return v;
  }
};

inline generate::model_config tiny_config() {
  generate::model_config c;
  c.dim = 32;
  c.hidden = 44;  // not a multiple of the vectors' lanes
  c.n_layers = 3;
  c.n_q_heads = 4;
  c.n_kv_heads = 2;
  c.head_dim = 8;
  c.vocabulary = 61;
  c.context = 96;
  return c;
}

/// Random weights; large enough that greedy text does not run in a circle.
inline generate::model random_model(std::uint64_t seed,
                                    generate::model_config const& c = tiny_config(),
                                    bool tied = true) {
  random_floats r{seed};
  auto const weights = [&](index_t rows, index_t cols) {
    float const scale = 2.5F / std::sqrt(static_cast<float>(cols));
    return generate::matrix{rows, cols, r.list(product(rows, cols), scale)};
  };
  auto const norm = [&] { return r.list(product(c.dim), 0.3F, 1); };
  generate::model m;
  m.config = c;
  m.embedding = weights(c.vocabulary, c.dim);
  for (index_t i = 0; i < c.n_layers; ++i)
    m.layers.push_back({norm(), norm(), weights(c.q_width(), c.dim), weights(c.kv_width(), c.dim),
                        weights(c.kv_width(), c.dim), weights(c.dim, c.q_width()),
                        weights(c.hidden, c.dim), weights(c.hidden, c.dim),
                        weights(c.dim, c.hidden)});
  m.final_norm = norm();
  if (!tied) m.own_classifier = weights(c.vocabulary, c.dim);
  return m;
}

template <class T>
void put(std::string& to, T value) {
  to.append(reinterpret_cast<char const*>(&value), sizeof value);
}
inline void put(std::string& to, std::vector<float> const& v) {
  to.append(reinterpret_cast<char const*>(v.data()), v.size() * sizeof(float));
}

inline std::string llama2c_bytes(generate::model const& m) {
  auto const& c = m.config;
  bool const tied = m.own_classifier.empty();
  std::string s;
  for (index_t const v : {c.dim, c.hidden, c.n_layers, c.n_q_heads, c.n_kv_heads,
                          tied ? c.vocabulary : -c.vocabulary, c.context})
    put(s, v);
  auto const all = [&](auto const& member) {
    for (auto const& l : m.layers) put(s, member(l));
  };
  using layer = generate::layer_weights;
  put(s, m.embedding.row_major());
  all([](layer const& l) { return l.attention_norm; });
  for (auto member : {&layer::q, &layer::k, &layer::v, &layer::output})
    all([&](layer const& l) { return (l.*member).row_major(); });
  all([](layer const& l) { return l.ffn_norm; });
  for (auto member : {&layer::gate, &layer::down, &layer::up})
    all([&](layer const& l) { return (l.*member).row_major(); });
  put(s, m.final_norm);
  put(s, std::vector<float>(product(c.context, c.head_dim)));
  if (!tied) put(s, m.own_classifier.row_major());
  return s;
}

/// Parts of a GGUF file; tests change them before they are joined.
struct gguf_parts {
  std::uint32_t version = 3;
  std::string metadata, infos, data;
  std::uint64_t n_metadata = 0, n_tensors = 0;
  std::uint32_t type = 0;  ///< of matrices: 0 F32, 1 F16, 8 Q8_0

  static void text(std::string& to, std::string const& s) {
    put(to, std::uint64_t{s.size()});
    to += s;
  }
  void key(std::string const& name, std::uint32_t kind) {
    text(metadata, name);
    put(metadata, kind);
    ++n_metadata;
  }
  void add(std::string const& name, index_t v) {
    key(name, 4);
    put(metadata, static_cast<std::uint32_t>(v));
  }
  void add(std::string const& name, float v) {
    key(name, 6);
    put(metadata, v);
  }
  void add(std::string const& name, std::string const& v) {
    key(name, 8);
    text(metadata, v);
  }
  void add(std::string const& name, std::vector<std::string> const& list) {
    key(name, 9);
    put(metadata, std::uint32_t{8});
    put(metadata, std::uint64_t{list.size()});
    for (auto const& s : list) text(metadata, s);
  }
  void add(std::string const& name, std::vector<float> const& list) {
    key(name, 9);
    put(metadata, std::uint32_t{6});
    put(metadata, std::uint64_t{list.size()});
    put(metadata, list);
  }
  void tensor(std::string const& name, std::vector<float> const& v, index_t rows, index_t cols) {
    std::uint32_t const own = rows == 1 ? 0 : type;
    text(infos, name);
    put(infos, std::uint32_t{rows == 1 ? 1U : 2U});
    put(infos, static_cast<std::uint64_t>(cols));
    if (rows > 1) put(infos, static_cast<std::uint64_t>(rows));
    put(infos, own);
    put(infos, std::uint64_t{data.size()});
    if (own == 0) put(data, v);
    for (std::size_t i = 0; own == 1 && i < v.size(); ++i) put(data, to_fp16(v[i]).bits);
    for (std::size_t i = 0; own == 8 && i < v.size(); i += 32) quantise(v.data() + i);
    data.resize((data.size() + 31) / 32 * 32);
    ++n_tensors;
  }
  void quantise(float const* v) {
    float most = 0;
    for (int i = 0; i < 32; ++i) most = std::fmax(most, std::fabs(v[i]));
    fp16 const scale = to_fp16(most / 127);
    put(data, scale.bits);
    for (int i = 0; i < 32; ++i)
      put(data, static_cast<std::int8_t>(std::lround(v[i] / std::fmax(to_float(scale), 1e-9F))));
  }
  std::string join() const {
    std::string s = "GGUF";
    put(s, version);
    put(s, n_tensors);
    put(s, n_metadata);
    s += metadata + infos;
    s.resize((s.size() + 31) / 32 * 32);
    return s + data;
  }
};

inline gguf_parts gguf_metadata(generate::model_config const& c) {
  gguf_parts g;
  g.add("general.architecture", std::string("llama"));
  g.add("llama.context_length", c.context);
  g.add("llama.embedding_length", c.dim);
  g.add("llama.block_count", c.n_layers);
  g.add("llama.feed_forward_length", c.hidden);
  g.add("llama.attention.head_count", c.n_q_heads);
  g.add("llama.attention.head_count_kv", c.n_kv_heads);
  g.add("llama.attention.layer_norm_rms_epsilon", c.norm_epsilon);
  g.add("llama.rope.freq_base", static_cast<float>(c.rope_base));
  g.add("llama.rope.dimension_count", c.head_dim);
  g.add("llama.vocab_size", c.vocabulary);
  return g;
}

inline void add_tensors(gguf_parts& g, generate::model const& m) {
  auto const matrix = [&](std::string const& name, generate::matrix const& w) {
    g.tensor(name, w.row_major(), w.rows(), w.cols());
  };
  auto const norm = [&](std::string const& name, std::vector<float> const& w) {
    g.tensor(name, w, 1, m.config.dim);
  };
  matrix("token_embd.weight", m.embedding);
  for (std::size_t i = 0; i < m.layers.size(); ++i) {
    std::string const b = "blk." + std::to_string(i) + ".";
    auto const& l = m.layers[i];
    norm(b + "attn_norm.weight", l.attention_norm);
    matrix(b + "attn_q.weight", l.q);
    matrix(b + "attn_k.weight", l.k);
    matrix(b + "attn_v.weight", l.v);
    matrix(b + "attn_output.weight", l.output);
    norm(b + "ffn_norm.weight", l.ffn_norm);
    matrix(b + "ffn_gate.weight", l.gate);
    matrix(b + "ffn_up.weight", l.up);
    matrix(b + "ffn_down.weight", l.down);
  }
  norm("output_norm.weight", m.final_norm);
  if (!m.own_classifier.empty()) matrix("output.weight", m.own_classifier);
}

inline std::string gguf_bytes(generate::model const& m, std::uint32_t type = 0) {
  gguf_parts g = gguf_metadata(m.config);
  g.type = type;
  add_tensors(g, m);
  return g.join();
}

}  // namespace kvkeep::test
