// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <cmath>

#include "generate/gguf.hpp"
#include "generate/llama2c.hpp"
#include "generate/model.hpp"

namespace kvkeep::generate {

namespace detail {

void check_config(std::string const& file, model_config const& c) {
  auto const within = [&](char const* field, std::int64_t v, std::int64_t least,
                          std::int64_t most) {
    if (v < least || v > most)
      throw bad_input(
          file, field,
          std::to_string(v) + ", expected " + std::to_string(least) + ".." + std::to_string(most));
  };
  within("embedding length", c.dim, 1, 1 << 20);
  within("feed-forward length", c.hidden, 1, 1 << 22);
  within("layers", c.n_layers, 1, 1024);
  within("query heads", c.n_q_heads, 1, 4096);
  within("KV heads", c.n_kv_heads, 1, c.n_q_heads);
  within("head dimension", c.head_dim, 2, 1024);
  within("vocabulary", c.vocabulary, 1, 1 << 22);
  within("context length", c.context, 1, 1 << 24);
  if (c.n_q_heads % c.n_kv_heads != 0)
    throw bad_input(file, "KV heads",
                    std::to_string(c.n_kv_heads) + ", expected a divisor of " +
                        std::to_string(c.n_q_heads) + " query heads");
  if (c.head_dim % 2 != 0)
    throw bad_input(file, "head dimension",
                    std::to_string(c.head_dim) + ", expected an even number");
}

namespace {

/// Integers are narrowed where they fit, so that check_config sees the others as out of range.
index_t narrow(std::int64_t v) {
  return v < 0 || v > (std::int64_t{1} << 30) ? -1 : static_cast<index_t>(v);
}

/// What the engine does not compute is refused rather than left out.
void check_features(gguf_file const& f, model_config const& c) {
  std::string const scaling = f.text("llama.rope.scaling.type", "none");
  if (scaling != "none") f.fail("llama.rope.scaling.type", scaling + ", expected none");
  if (f.has_tensor("rope_freqs.weight"))
    f.fail("rope_freqs.weight", "scaled RoPE is not supported");
  if (std::int64_t const n = f.integer("llama.expert_count", 0); n != 0)
    f.fail("llama.expert_count", std::to_string(n) + ", expected 0");
  for (char const* key : {"llama.rope.dimension_count", "llama.attention.value_length"})
    if (std::int64_t const n = f.integer(key, c.head_dim); n != c.head_dim)
      f.fail(key,
             std::to_string(n) + ", expected the head dimension, " + std::to_string(c.head_dim));
  if (!(c.norm_epsilon >= 0) || !(c.rope_base > 0) || !std::isfinite(c.rope_base))
    f.fail("llama.rope.freq_base", "expected a positive number");
}

model_config read_config(gguf_file const& f) {
  std::string const architecture = f.text("general.architecture");
  if (architecture != "llama") f.fail("general.architecture", architecture + ", expected llama");
  model_config c;
  c.dim = narrow(f.integer("llama.embedding_length"));
  c.hidden = narrow(f.integer("llama.feed_forward_length"));
  c.n_layers = narrow(f.integer("llama.block_count"));
  c.n_q_heads = narrow(f.integer("llama.attention.head_count"));
  c.n_kv_heads = narrow(f.integer("llama.attention.head_count_kv", c.n_q_heads));
  c.context = narrow(f.integer("llama.context_length"));
  if (c.n_q_heads < 1) f.fail("llama.attention.head_count", "expected at least 1");
  if (c.dim % c.n_q_heads != 0 && f.integer("llama.attention.key_length", 0) == 0)
    f.fail("llama.attention.head_count",
           std::to_string(c.n_q_heads) + ", expected a divisor of " + std::to_string(c.dim));
  c.head_dim = narrow(f.integer("llama.attention.key_length", c.dim / c.n_q_heads));
  auto const* tokens = f.strings("tokenizer.ggml.tokens");
  std::int64_t const n_tokens = tokens == nullptr ? -1 : static_cast<std::int64_t>(tokens->size());
  std::int64_t const size =
      n_tokens < 0 ? f.integer("llama.vocab_size") : f.integer("llama.vocab_size", n_tokens);
  if (n_tokens >= 0 && size != n_tokens)
    f.fail("tokenizer.ggml.tokens",
           std::to_string(n_tokens) + " tokens, expected " + std::to_string(size));
  c.vocabulary = narrow(size);
  c.norm_epsilon = static_cast<float>(f.real("llama.attention.layer_norm_rms_epsilon", 1e-5));
  c.rope_base = f.real("llama.rope.freq_base", 10000.0);
  check_config(f.name(), c);
  check_features(f, c);
  return c;
}

std::string with_spaces(std::string piece) {
  std::string const mark = "\xe2\x96\x81";  // U+2581, SentencePiece's space
  for (std::size_t at; (at = piece.find(mark)) != std::string::npos;)
    piece.replace(at, mark.size(), " ");
  return piece;
}

/// Pieces where there are scores, words where there are none; byte-level BPE ("gpt2") takes ids only.
std::shared_ptr<tokenizer const> read_tokenizer(gguf_file const& f, model const& m) {
  auto const* tokens = f.strings("tokenizer.ggml.tokens");
  std::string const kind = f.text("tokenizer.ggml.model", "none");
  if (tokens == nullptr || kind == "gpt2" || kind == "bert" || kind == "t5") return nullptr;
  auto const* scores = f.numbers("tokenizer.ggml.scores");
  bool const pieces = scores != nullptr && kind == "llama";
  if (!pieces) return std::make_shared<word_tokenizer const>(*tokens);
  if (scores->size() != tokens->size())
    f.fail("tokenizer.ggml.scores", std::to_string(scores->size()) + ", expected one per token");
  piece_vocabulary v;
  for (std::string const& t : *tokens) v.pieces.push_back(with_spaces(t));
  for (double const s : *scores) v.scores.push_back(static_cast<float>(s));
  v.first_token = m.first_token;
  return std::make_shared<piece_tokenizer const>(std::move(v));
}

index_t token_id(gguf_file const& f, std::string const& key, model_config const& c) {
  std::int64_t const id = f.integer(key, -1);
  if (id < -1 || id >= c.vocabulary)
    f.fail(key, std::to_string(id) + ", expected less than " + std::to_string(c.vocabulary));
  return static_cast<index_t>(id);
}

}  // namespace

model read_gguf(file_reader& in) {
  gguf_file const f(in);
  model m;
  m.config = read_config(f);
  model_config const& c = m.config;
  auto const vector = [&](std::string const& name) {
    return f.tensor(name, {static_cast<std::uint64_t>(c.dim)});
  };
  auto const weights = [&](std::string const& name, index_t rows, index_t cols) {
    auto const extent = {static_cast<std::uint64_t>(cols), static_cast<std::uint64_t>(rows)};
    return matrix{rows, cols, f.tensor(name, extent)};
  };
  m.embedding = weights("token_embd.weight", c.vocabulary, c.dim);
  for (index_t i = 0; i < c.n_layers; ++i) {
    std::string const b = "blk." + std::to_string(i) + ".";
    layer_weights l;
    l.attention_norm = vector(b + "attn_norm.weight");
    l.q = weights(b + "attn_q.weight", c.q_width(), c.dim);
    l.k = weights(b + "attn_k.weight", c.kv_width(), c.dim);
    l.v = weights(b + "attn_v.weight", c.kv_width(), c.dim);
    l.output = weights(b + "attn_output.weight", c.dim, c.q_width());
    l.ffn_norm = vector(b + "ffn_norm.weight");
    l.gate = weights(b + "ffn_gate.weight", c.hidden, c.dim);
    l.up = weights(b + "ffn_up.weight", c.hidden, c.dim);
    l.down = weights(b + "ffn_down.weight", c.dim, c.hidden);
    m.layers.push_back(std::move(l));
  }
  m.final_norm = vector("output_norm.weight");
  if (f.has_tensor("output.weight"))
    m.own_classifier = weights("output.weight", c.vocabulary, c.dim);
  m.first_token = token_id(f, "tokenizer.ggml.bos_token_id", c);
  if (index_t const end = token_id(f, "tokenizer.ggml.eos_token_id", c); end >= 0)
    m.end_tokens.push_back(end);
  m.text = read_tokenizer(f, m);
  return m;
}

}  // namespace detail

model load_model(std::filesystem::path const& file, std::filesystem::path const& tokenizer_file) {
  detail::file_reader in(file);
  auto const magic = in.peek(0, 4, "magic");
  bool const gguf = std::memcmp(magic.data(), "GGUF", 4) == 0;
  model m = gguf ? detail::read_gguf(in) : detail::read_llama2c(in);
  if (tokenizer_file.empty()) return m;
  m.text = load_llama2c_tokenizer(tokenizer_file, m.config.vocabulary);
  m.first_token = 1;  // llama2.c's ids of begin and end
  m.end_tokens = {1, 2};
  return m;
}

}  // namespace kvkeep::generate
