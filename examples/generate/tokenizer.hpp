// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Text to token ids and back.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include <kvkeep/core/types.hpp>

namespace kvkeep::generate {

class tokenizer {
 public:
  virtual ~tokenizer() = default;
  /// Ids of a text, without a first token. @throws bad_input for what the vocabulary does not have
  virtual std::vector<index_t> encode(std::string_view text) const = 0;
  /// Text that `token` adds behind `previous` (-1: nothing came before).
  virtual std::string decode(index_t token, index_t previous) const = 0;
};

/// A vocabulary of pieces with scores: the neighbours whose union scores best are merged until none is
/// left (as SentencePiece's BPE). Bytes that no piece covers have pieces <0xNN>.
struct piece_vocabulary {
  std::vector<std::string> pieces;  ///< a space is a space
  std::vector<float> scores;
  index_t first_token = 1;  ///< the piece behind it loses its leading space
};
class piece_tokenizer final : public tokenizer {
 public:
  explicit piece_tokenizer(piece_vocabulary v);
  ~piece_tokenizer() override;
  std::vector<index_t> encode(std::string_view text) const override;
  std::string decode(index_t token, index_t previous) const override;

 private:
  struct index;
  index_t find(std::string const& piece) const;

  piece_vocabulary vocabulary_;
  std::unique_ptr<index> index_;
};

/// A vocabulary of whole words and signs: text is made lower-case and split at spaces and punctuation.
class word_tokenizer final : public tokenizer {
 public:
  explicit word_tokenizer(std::vector<std::string> words);
  ~word_tokenizer() override;
  std::vector<index_t> encode(std::string_view text) const override;
  std::string decode(index_t token, index_t previous) const override;
  std::vector<std::string> const& words() const { return words_; }

 private:
  struct index;
  void append(std::string_view chunk, std::vector<index_t>& ids) const;

  std::vector<std::string> words_;
  std::unique_ptr<index> index_;
};

}  // namespace kvkeep::generate
