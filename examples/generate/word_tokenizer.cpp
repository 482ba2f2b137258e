// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <algorithm>
#include <cctype>
#include <unordered_map>

#include "generate/file.hpp"
#include "generate/tokenizer.hpp"

namespace kvkeep::generate {

namespace {

bool is_space(char c) { return std::isspace(static_cast<unsigned char>(c)) != 0; }
bool is_sign(char c) { return std::ispunct(static_cast<unsigned char>(c)) != 0; }
bool is_one_sign(std::string const& word, std::string_view signs) {
  return word.size() == 1 && signs.find(word[0]) != std::string_view::npos;
}
/// Words such as <end> steer the model and are not shown.
bool is_hidden(std::string const& word) {
  return word.size() > 2 && word.front() == '<' && word.back() == '>';
}

}  // namespace

struct word_tokenizer::index {
  std::unordered_map<std::string, index_t> id;
};

word_tokenizer::word_tokenizer(std::vector<std::string> words)
    : words_(std::move(words)), index_(std::make_unique<index>()) {
  for (std::size_t i = 0; i < words_.size(); ++i)
    index_->id.emplace(words_[i], static_cast<index_t>(i));
}

word_tokenizer::~word_tokenizer() = default;

std::vector<index_t> word_tokenizer::encode(std::string_view text) const {
  std::string lower(text);
  std::transform(lower.begin(), lower.end(), lower.begin(), [](char c) {
    return static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  });
  std::vector<index_t> ids;
  for (std::size_t i = 0; i < lower.size();) {
    std::size_t end = i;
    while (end < lower.size() && !is_space(lower[end])) ++end;
    if (end > i) append(std::string_view(lower).substr(i, end - i), ids);
    // A line break is a word where the vocabulary has it.
    auto const line =
        end < lower.size() && lower[end] == '\n' ? index_->id.find("\n") : index_->id.end();
    if (line != index_->id.end()) ids.push_back(line->second);
    i = end + 1;
  }
  return ids;
}

/// Takes a chunk whole where the vocabulary has it, and apart at its signs otherwise.
void word_tokenizer::append(std::string_view chunk, std::vector<index_t>& ids) const {
  auto const whole = index_->id.find(std::string(chunk));
  if (whole != index_->id.end()) {
    ids.push_back(whole->second);
    return;
  }
  for (std::size_t i = 0; i < chunk.size();) {
    std::size_t end = i + 1;
    while (!is_sign(chunk[i]) && end < chunk.size() && !is_sign(chunk[end])) ++end;
    std::string const word(chunk.substr(i, end - i));
    auto const it = index_->id.find(word);
    if (it == index_->id.end()) throw bad_input("the prompt", word, "not a word of the model");
    ids.push_back(it->second);
    i = end;
  }
}

std::string word_tokenizer::decode(index_t token, index_t previous) const {
  std::string const& word = words_[static_cast<std::size_t>(token)];
  if (is_hidden(word)) return {};
  if (word == "\n" || is_one_sign(word, ".,;:!?)'")) return word;
  if (previous < 0) return word;
  std::string const& before = words_[static_cast<std::size_t>(previous)];
  bool const joined = before == "\n" || is_one_sign(before, "('");
  return joined ? word : " " + word;
}

}  // namespace kvkeep::generate
