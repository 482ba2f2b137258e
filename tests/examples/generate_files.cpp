// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Model files of kvkeep-generate: both formats, quantised tensors, and everything malformed.
#include <algorithm>
#include <functional>

#include "../support/catch.hpp"
#include "generate/file.hpp"
#include "generate_models.hpp"

namespace {

using namespace kvkeep;
using namespace kvkeep::test;
using generate::bad_input;
using generate::load_model;
using generate::model;

void check_same(model const& a, model const& b, float tolerance) {
  auto const close = [&](std::vector<float> const& x, std::vector<float> const& y) {
    REQUIRE(x.size() == y.size());
    float most = 0;
    for (std::size_t i = 0; i < x.size(); ++i) most = std::fmax(most, std::fabs(x[i] - y[i]));
    CHECK(most <= tolerance);
  };
  close(a.embedding.row_major(), b.embedding.row_major());
  close(a.own_classifier.row_major(), b.own_classifier.row_major());
  close(a.final_norm, b.final_norm);
  REQUIRE(a.layers.size() == b.layers.size());
  for (std::size_t i = 0; i < a.layers.size(); ++i) {
    auto const &x = a.layers[i], &y = b.layers[i];
    close(x.attention_norm, y.attention_norm);
    close(x.ffn_norm, y.ffn_norm);
    using layer = generate::layer_weights;
    for (auto m : {&layer::q, &layer::k, &layer::v, &layer::output, &layer::gate, &layer::up,
                   &layer::down}) {
      CHECK((x.*m).rows() == (y.*m).rows());
      CHECK((x.*m).cols() == (y.*m).cols());
      close((x.*m).row_major(), (y.*m).row_major());
    }
  }
}

/// The message of a refusal, which names the file.
std::string refusal(fs::path const& file, fs::path const& tokenizer = {}) {
  try {
    load_model(file, tokenizer);
  } catch (bad_input const& e) {
    std::string const what = e.what();
    CHECK(what.find('\n') == std::string::npos);
    return what;
  }
  return "not refused";
}

void check_refused(fs::path const& file, std::string const& part, fs::path const& tokenizer = {}) {
  std::string const what = refusal(file, tokenizer);
  INFO(what);
  CHECK(what.find(part) != std::string::npos);
  CHECK(what.rfind((tokenizer.empty() ? file : tokenizer).string(), 0) == 0);
}

}  // namespace

TEST_CASE("both formats hold the same model, with a tied or an own classifier") {
  model_folder const tmp;
  for (bool const tied : {true, false}) {
    model const m = random_model(3, tiny_config(), tied);
    check_same(load_model(tmp.write("m.bin", llama2c_bytes(m))), m, 0);
    check_same(load_model(tmp.write("m.gguf", gguf_bytes(m))), m, 0);
  }
  auto parts = gguf_metadata(tiny_config());
  parts.version = 2;
  add_tensors(parts, random_model(3));
  check_same(load_model(tmp.write("v2.gguf", parts.join())), random_model(3), 0);
}

TEST_CASE("F16 and Q8_0 tensors are read to within their rounding") {
  model_folder const tmp;
  auto c = tiny_config();
  c.hidden = 64;  // Q8_0 comes in blocks of 32
  model const m = random_model(5, c);
  check_same(load_model(tmp.write("f16.gguf", gguf_bytes(m, 1))), m, 1e-3F);
  check_same(load_model(tmp.write("q8.gguf", gguf_bytes(m, 8))), m, 5e-3F);
  check_refused(tmp.write("odd.gguf", gguf_bytes(random_model(5), 8)), "blk.0.ffn_down.weight");
}

TEST_CASE("a file cut anywhere is refused, and so is one that is too long") {
  model_folder const tmp;
  model const m = random_model(7);
  for (auto const& [name, whole] : {std::pair<std::string, std::string>{"m.bin", llama2c_bytes(m)},
                                    {"m.gguf", gguf_bytes(m)}}) {
    std::vector<std::size_t> ends;
    for (std::size_t n = 1; n < 600; n += 7) ends.push_back(n);
    for (std::size_t n = 600; n < whole.size(); n += 3001) ends.push_back(n);
    // The last tensor is a vector of 128 bytes without padding behind it.
    ends.push_back(whole.size() - 1);
    for (std::size_t const n : ends) {
      std::string const what = refusal(tmp.write(name, whole.substr(0, n)));
      INFO(name << " " << n << " of " << whole.size() << ": " << what);
      CHECK(what.rfind((tmp.path / name).string() + ": ", 0) == 0);
    }
  }
  check_refused(tmp.write("long.bin", llama2c_bytes(m) + "1234"), "size: ");
  check_refused(tmp.write("empty.bin", ""), "file: empty");
  check_refused(tmp.path / "missing.gguf", "file: does not exist");
  check_refused(tmp.path, "file: empty, or not a file");
}

TEST_CASE("llama2.c headers that cannot be are refused by field") {
  model_folder const tmp;
  std::string const good = llama2c_bytes(random_model(7));
  auto const with = [&](std::size_t field, std::int32_t value) {
    std::string s = good;
    std::memcpy(s.data() + 4 * field, &value, sizeof value);
    return tmp.write("m.bin", s);
  };
  check_refused(with(0, 0), "magic: ");
  check_refused(with(0, -32), "magic: ");
  check_refused(with(0, 0x616b3432), "version: ");
  check_refused(with(0, 33), "n_heads: 4");
  check_refused(with(1, 0), "feed-forward length: 0");
  check_refused(with(2, 2000), "layers: 2000");
  check_refused(with(3, 5), "n_heads: 5");
  check_refused(with(4, 3), "KV heads: 3");
  check_refused(with(4, 0), "KV heads: 0");
  check_refused(with(5, INT32_MIN), "vocabulary: ");
  check_refused(with(5, 1 << 21), "truncated: ");
  check_refused(with(6, -1), "context length: -1");
}

namespace {

/// A GGUF file whose parts were changed before and after its tensors were added.
using change = std::function<void(gguf_parts&)>;
fs::path changed_gguf(model_folder const& tmp, change const& before, change const& after = {}) {
  model const m = random_model(7);
  gguf_parts g = gguf_metadata(m.config);
  before(g);
  add_tensors(g, m);
  if (after) after(g);
  return tmp.write("m.gguf", g.join());
}

/// A GGUF file whose metadata tell of another shape than its tensors have.
fs::path other_shape(model_folder const& tmp,
                     std::function<void(generate::model_config&)> const& f) {
  return changed_gguf(tmp, [&](gguf_parts& g) {
    auto c = tiny_config();
    f(c);
    g = gguf_metadata(c);
  });
}

}  // namespace

TEST_CASE("GGUF metadata that cannot be are refused by key") {
  model_folder const tmp;
  auto const bytes = [&](change const& before) { return changed_gguf(tmp, before); };
  std::string other = gguf_bytes(random_model(7));
  other.replace(other.find("llama"), 5, "gemma");
  check_refused(tmp.write("m.gguf", other), "general.architecture: gemma");
  check_refused(bytes([](gguf_parts& g) { g.version = 4; }), "version: 4");
  check_refused(bytes([](gguf_parts& g) { g.n_metadata = 1ULL << 60; }), "metadata_kv_count: ");
  check_refused(bytes([](gguf_parts& g) { g.add("llama.context_length", 3); }),
                "llama.context_length: occurs twice");
  check_refused(bytes([](gguf_parts& g) { g.add("llama.rope.scaling.type", std::string("yarn")); }),
                "llama.rope.scaling.type: yarn");
  check_refused(bytes([](gguf_parts& g) { g.add("tokenizer.ggml.eos_token_id", 61); }),
                "tokenizer.ggml.eos_token_id: 61");
  check_refused(bytes([](gguf_parts& g) {
                  g.add("tokenizer.ggml.tokens", std::vector<std::string>{"a", "b"});
                }),
                "tokenizer.ggml.tokens: 2 tokens");
  check_refused(bytes([](gguf_parts& g) { g.add("general.alignment", 0); }),
                "general.alignment: 0");
  check_refused(bytes([](gguf_parts& g) { g.key("x", 13); }), "x: metadata type 13");
  check_refused(bytes([](gguf_parts& g) { g.add("llama.expert_count", 8); }),
                "llama.expert_count: 8");
  check_refused(bytes([](gguf_parts& g) { g = gguf_parts(); }), "general.architecture: missing");
}

TEST_CASE("GGUF tensors that cannot be are refused by name") {
  model_folder const tmp;
  auto const same = [](gguf_parts&) {};
  check_refused(changed_gguf(tmp, same, [](gguf_parts& g) { g.n_tensors = 1ULL << 60; }),
                "tensor_count: ");
  check_refused(changed_gguf(tmp, same, [](gguf_parts& g) { g.infos.clear(); }), "");
  check_refused(changed_gguf(tmp, [](gguf_parts& g) { g.type = 2; }),
                "token_embd.weight: tensor type 2");
  check_refused(other_shape(tmp, [](auto& c) { c.hidden = 48; }),
                "blk.0.ffn_gate.weight: shape [32, 44], expected [32, 48]");
  check_refused(other_shape(tmp, [](auto& c) { c.n_layers = 4; }),
                "blk.3.attn_norm.weight: missing");
  check_refused(other_shape(tmp, [](auto& c) { c.n_kv_heads = 3; }), "KV heads: 3");
  check_refused(other_shape(tmp, [](auto& c) { c.n_q_heads = 5; }),
                "llama.attention.head_count: 5");
}

TEST_CASE("a llama2.c tokenizer has one token per id") {
  model_folder const tmp;
  model const m = random_model(7);
  fs::path const file = tmp.write("m.bin", llama2c_bytes(m));
  auto const tokens = [&](index_t n, std::uint32_t length) {
    std::string s;
    put(s, std::uint32_t{4});
    for (index_t i = 0; i < n; ++i) {
      put(s, -1.0F * static_cast<float>(i));
      put(s, length);
      s += std::string(length, 'a');
    }
    return tmp.write("tok.bin", s);
  };
  CHECK(load_model(file, tokens(61, 2)).text != nullptr);
  check_refused(file, "token 60: truncated", tokens(60, 2));
  check_refused(file, "size: ", tokens(62, 2));
  check_refused(file, "token 0: 5 bytes", tokens(61, 5));
}
