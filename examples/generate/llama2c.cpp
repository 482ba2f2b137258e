// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// llama2.c checkpoints of version 0: seven integers, then fp32 arrays, each over all layers.
#include <cstdlib>

#include "generate/file.hpp"
#include "generate/llama2c.hpp"
#include "generate/model.hpp"

namespace kvkeep::generate {

namespace detail {

namespace {

struct header {
  model_config config;
  bool tied = true;
};

/// The format has no magic number: what cannot be a size tells that the file is another one.
header read_header(file_reader& in) {
  char const* const names[] = {"dim",        "hidden_dim", "n_layers", "n_heads",
                               "n_kv_heads", "vocab_size", "seq_len"};
  std::int32_t v[7];
  for (int i = 0; i < 7; ++i) v[i] = in.number<std::int32_t>(names[i]);
  if (v[0] == 0x616b3432)
    in.fail("version", std::to_string(v[1]) + " of llama2.c's format, expected 0");
  header h;
  h.tied = v[5] > 0;
  if (v[5] == INT32_MIN) v[5] = 0;
  model_config& c = h.config;
  c.dim = v[0];
  c.hidden = v[1];
  c.n_layers = v[2];
  c.n_q_heads = v[3];
  c.n_kv_heads = v[4];
  c.vocabulary = std::abs(v[5]);
  c.context = v[6];
  if (v[0] < 1 || v[3] < 1 || v[0] > 1 << 20 || v[3] > v[0])
    in.fail("magic", "neither a GGUF file nor a llama2.c checkpoint of version 0");
  if (v[0] % v[3] != 0)
    in.fail("n_heads",
            std::to_string(v[3]) + ", expected a divisor of dim = " + std::to_string(v[0]));
  c.head_dim = v[0] / v[3];
  check_config(in.name(), c);
  return h;
}

/// Floats of the whole file, so that a wrong length is found before anything is read.
std::uint64_t expected_floats(header const& h) {
  model_config const& c = h.config;
  auto const n = [](index_t v) { return static_cast<std::uint64_t>(v); };
  std::uint64_t const q = n(c.q_width()), kv = n(c.kv_width()), dim = n(c.dim);
  std::uint64_t const layer = 2 * dim + 2 * dim * q + 2 * dim * kv + 3 * dim * n(c.hidden);
  std::uint64_t const ends = n(c.vocabulary) * dim * (h.tied ? 1 : 2) + dim;
  return ends + n(c.n_layers) * layer + n(c.context) * n(c.head_dim);
}

matrix read_matrix(file_reader& in, index_t rows, index_t cols, char const* name) {
  return {rows, cols,
          in.floats(static_cast<std::uint64_t>(rows) * static_cast<std::uint64_t>(cols), name)};
}

}  // namespace

model read_llama2c(file_reader& in) {
  header const h = read_header(in);
  model_config const& c = h.config;
  std::uint64_t const bytes = 7 * sizeof(std::int32_t) + expected_floats(h) * sizeof(float);
  if (in.size() != bytes)
    in.fail(in.size() < bytes ? "truncated" : "size",
            std::to_string(in.size()) + " bytes, expected " + std::to_string(bytes));
  model m;
  m.config = c;
  m.layers.resize(static_cast<std::size_t>(c.n_layers));
  auto const dim = static_cast<std::uint64_t>(c.dim);
  auto const vectors = [&](auto member, char const* name) {
    for (auto& l : m.layers) l.*member = in.floats(dim, name);
  };
  auto const matrices = [&](auto member, index_t rows, index_t cols, char const* name) {
    for (auto& l : m.layers) l.*member = read_matrix(in, rows, cols, name);
  };
  m.embedding = read_matrix(in, c.vocabulary, c.dim, "token_embedding");
  vectors(&layer_weights::attention_norm, "rms_att_weight");
  matrices(&layer_weights::q, c.q_width(), c.dim, "wq");
  matrices(&layer_weights::k, c.kv_width(), c.dim, "wk");
  matrices(&layer_weights::v, c.kv_width(), c.dim, "wv");
  matrices(&layer_weights::output, c.dim, c.q_width(), "wo");
  vectors(&layer_weights::ffn_norm, "rms_ffn_weight");
  matrices(&layer_weights::gate, c.hidden, c.dim, "w1");
  matrices(&layer_weights::down, c.dim, c.hidden, "w2");
  matrices(&layer_weights::up, c.hidden, c.dim, "w3");
  m.final_norm = in.floats(dim, "rms_final_weight");
  in.take(static_cast<std::uint64_t>(c.context) * static_cast<std::uint64_t>(c.head_dim) *
              sizeof(float),
          "freq_cis");  // angles, computed here
  if (!h.tied) m.own_classifier = read_matrix(in, c.vocabulary, c.dim, "wcls");
  return m;
}

}  // namespace detail

std::shared_ptr<tokenizer const> load_llama2c_tokenizer(std::filesystem::path const& file,
                                                        index_t vocabulary) {
  detail::file_reader in(file);
  auto const longest = in.number<std::uint32_t>("max_token_length");
  piece_vocabulary v;
  for (index_t i = 0; i < vocabulary; ++i) {
    std::string const field = "token " + std::to_string(i);
    v.scores.push_back(in.number<float>(field));
    auto const length = in.number<std::uint32_t>(field);
    if (length > longest)
      in.fail(field,
              std::to_string(length) + " bytes, expected at most " + std::to_string(longest));
    v.pieces.push_back(in.text(length, field));
  }
  if (in.left() > 0) in.fail("size", "more than " + std::to_string(vocabulary) + " tokens");
  return std::make_shared<piece_tokenizer const>(std::move(v));
}

}  // namespace kvkeep::generate
