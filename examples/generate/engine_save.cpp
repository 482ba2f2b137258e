// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <algorithm>
#include <cstring>

#include "generate/engine_state.hpp"

namespace kvkeep::generate {

using detail::expect;

namespace {

constexpr char magic[8] = {'k', 'v', 'k', 'e', 'e', 'p', 'g', '1'};

}  // namespace

/// Layout: magic, the session's state, logits, then K and V of the slots in use.
std::vector<std::byte> engine::save(index_t id) const {
  state& s = *s_;
  s.check_alive(id);
  std::vector<std::byte> out(sizeof magic + s.kv.saved_bytes());
  std::memcpy(out.data(), magic, sizeof magic);
  expect(s.kv.save(id, std::span(out).subspan(sizeof magic)), "save");
  auto const append = [&](float const* data, index_t n) {
    auto const* const bytes = reinterpret_cast<std::byte const*>(data);
    out.insert(out.end(), bytes, bytes + product(n) * sizeof(float));
  };
  append(s.logits_of(id), s.config.vocabulary);
  for (index_t l = 0; l < s.config.n_layers; ++l)
    for (index_t h = 0; h < s.config.n_kv_heads; ++h)
      for (index_t slot = 0; slot < s.kv.lengths(l)(id, h); ++slot) {
        append(s.cache.k({l, id, h, slot}), s.config.head_dim);
        append(s.cache.v({l, id, h, slot}), s.config.head_dim);
      }
  return out;
}

index_t engine::load(std::span<std::byte const> in) {
  state& s = *s_;
  std::size_t const head = sizeof magic + s.kv.saved_bytes();
  auto const refuse_state = [](char const* what) { throw bad_input("saved state", "bytes", what); };
  if (in.size() < head || std::memcmp(in.data(), magic, sizeof magic) != 0)
    refuse_state("not a sequence of this engine");
  index_t id = -1;
  expect(s.kv.begin(id), "begin");
  if (s.kv.load(id, in.subspan(sizeof magic, head - sizeof magic)) != status::ok) {
    expect(s.kv.end(id), "end");
    refuse_state("another model, policy, size or version");
  }
  std::size_t rows = 0;
  for (index_t l = 0; l < s.config.n_layers; ++l)
    for (index_t h = 0; h < s.config.n_kv_heads; ++h)
      rows += static_cast<std::size_t>(s.kv.lengths(l)(id, h));
  std::size_t const floats = product(rows, 2, s.config.head_dim) + product(s.config.vocabulary);
  if (in.size() != head + floats * sizeof(float)) {
    expect(s.kv.end(id), "end");
    refuse_state("truncated");
  }
  std::byte const* at = in.data() + head;
  auto const read = [&](float* to, index_t n) {
    std::memcpy(to, at, product(n) * sizeof(float));
    at += product(n) * sizeof(float);
  };
  s.live[static_cast<std::size_t>(id)] = true;
  read(s.logits_of(id), s.config.vocabulary);
  for (index_t l = 0; l < s.config.n_layers; ++l) {
    s.cache.resize(l, id, s.longest(l, id));
    for (index_t h = 0; h < s.config.n_kv_heads; ++h)
      for (index_t slot = 0; slot < s.kv.lengths(l)(id, h); ++slot) {
        read(s.cache.k({l, id, h, slot}), s.config.head_dim);
        read(s.cache.v({l, id, h, slot}), s.config.head_dim);
      }
  }
  return id;
}

}  // namespace kvkeep::generate
