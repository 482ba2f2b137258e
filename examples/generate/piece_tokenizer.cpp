// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <cstdio>
#include <limits>
#include <unordered_map>

#include "generate/file.hpp"
#include "generate/tokenizer.hpp"

namespace kvkeep::generate {

struct piece_tokenizer::index {
  std::unordered_map<std::string, index_t> id;
  index_t bytes[256];  ///< the pieces <0x00> .. <0xFF>, -1 where there is none
};

piece_tokenizer::piece_tokenizer(piece_vocabulary v)
    : vocabulary_(std::move(v)), index_(std::make_unique<index>()) {
  for (std::size_t i = 0; i < vocabulary_.pieces.size(); ++i)
    index_->id.emplace(vocabulary_.pieces[i], static_cast<index_t>(i));
  for (unsigned b = 0; b < 256; ++b) {
    char name[8];
    std::snprintf(name, sizeof name, "<0x%02X>", b);
    index_->bytes[b] = find(name);
  }
}

piece_tokenizer::~piece_tokenizer() = default;

index_t piece_tokenizer::find(std::string const& piece) const {
  auto const it = index_->id.find(piece);
  return it == index_->id.end() ? -1 : it->second;
}

std::vector<index_t> piece_tokenizer::encode(std::string_view text) const {
  std::vector<index_t> ids;
  if (text.empty()) return ids;
  std::string const spaced = " " + std::string(text);
  for (std::size_t i = 0; i < spaced.size();) {
    std::size_t end = i + 1;  // one character: continuation bytes are 10xxxxxx
    while (end < spaced.size() && end < i + 4 &&
           (static_cast<unsigned char>(spaced[end]) & 0xC0U) == 0x80U)
      ++end;
    index_t const id = find(spaced.substr(i, end - i));
    for (std::size_t b = i; b < end && id < 0; ++b) {
      index_t const byte = index_->bytes[static_cast<unsigned char>(spaced[b])];
      if (byte < 0)
        throw bad_input("the prompt", spaced.substr(i, end - i), "not in the vocabulary");
      ids.push_back(byte);
    }
    if (id >= 0) ids.push_back(id);
    i = end;
  }
  for (;;) {
    float best = -std::numeric_limits<float>::infinity();
    std::size_t at = ids.size();
    index_t merged = -1;
    for (std::size_t i = 0; i + 1 < ids.size(); ++i) {
      auto const& p = vocabulary_.pieces;
      index_t const id =
          find(p[static_cast<std::size_t>(ids[i])] + p[static_cast<std::size_t>(ids[i + 1])]);
      if (id < 0 || !(vocabulary_.scores[static_cast<std::size_t>(id)] > best)) continue;
      best = vocabulary_.scores[static_cast<std::size_t>(id)];
      at = i;
      merged = id;
    }
    if (merged < 0) return ids;
    ids[at] = merged;
    ids.erase(ids.begin() + static_cast<std::ptrdiff_t>(at) + 1);
  }
}

std::string piece_tokenizer::decode(index_t token, index_t previous) const {
  std::string const& piece = vocabulary_.pieces[static_cast<std::size_t>(token)];
  unsigned byte = 0;
  if (piece.size() == 6 && std::sscanf(piece.c_str(), "<0x%02X>", &byte) == 1)
    return {static_cast<char>(byte)};
  bool const first = previous < 0 || previous == vocabulary_.first_token;
  return first && piece.rfind(' ', 0) == 0 ? piece.substr(1) : piece;
}

}  // namespace kvkeep::generate
